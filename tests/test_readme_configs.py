"""Configurations in a README: `lora init` reads a folder like `datasets`, or raises an error."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import yaml
from drafting import Init, labelled, table

from lora_cli.data.load_rows import load_rows
from lora_cli.errors import LoraError

ROWS = labelled(60, ["good", "bad"])
FILES = {"a.csv": ROWS[:40], "b.csv": ROWS[40:50], "train.csv": ROWS[:40], "test.csv": ROWS[40:50],
         "data/train-00000-of-00002.csv": ROWS[:20], "data/train-00001-of-00002.csv": ROWS[20:40],
         "data/test-00000-of-00001.csv": ROWS[40:50], "de/train.csv": ROWS[50:]}  # fmt: skip


def folder_of(folder: Path, names: list[str], configs: object) -> Path:
    for name in names:
        path = folder / "films" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table(["text", "label"], FILES[name]))
    readme = f"---\nlicense: mit\n{yaml.safe_dump({'configs': configs})}---\n# Films\n"
    (folder / "films" / "README.md").write_text(readme)
    return folder / "films"


def config(**files: object) -> dict[str, object]:
    named = [{"split": split, "path": path} for split, path in files.items()]
    return {"config_name": "default", "data_files": named}


@pytest.mark.parametrize(
    ("names", "configs"),
    [
        (["train.csv", "test.csv"], [config(train="train.csv", test="test.csv")]),
        (["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv",
          "data/test-00000-of-00001.csv"],
         [config(train="data/train-*", test="data/test-*")]),
    ],
)  # fmt: skip
def test_file_names_that_agree_with_the_readme(
    names: list[str], configs: object, init: Init, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, names, configs)
    rows = load_rows(init("", folder))
    reference = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    result = {"train": [*rows["train"], *rows["validation"]], "test": [*rows["test"]]}
    for split, read in result.items():
        expected = sorted((row["text"], row["label"]) for row in reference[split])
        assert sorted((row["text"], row["label"]) for row in read) == expected


@pytest.mark.parametrize(
    ("names", "configs", "what"),
    [
        (["a.csv", "b.csv"], [config(train="a.csv", test="b.csv")], "train rows are in a.csv"),
        (["a.csv", "b.csv"], [{"data_files": {"train": ["a.csv"], "test": "b.csv"}}], "in a.csv"),
        (["train.csv", "test.csv"], [config(train="train.csv", validation="test.csv")],
         "the validation rows are in test.csv"),
        (["train.csv", "de/train.csv"],
         [{"config_name": "en", "data_files": "train.csv"},
          {"config_name": "de", "data_dir": "de", "data_files": "train.csv"}],
         "holds 2 data sets: `en`, `de`"),
    ],
)  # fmt: skip
def test_a_readme_that_disagrees_with_file_names(
    names: list[str], configs: object, what: str, init: Init, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, names, configs)
    with pytest.raises(LoraError, match=what) as caught:
        init("", folder)
    assert f"`lora init {folder / names[0]}`" in (caught.value.problems[0].hint or "")


@pytest.mark.parametrize(
    "config",
    [
        {"data_files": "**.csv"}, {"data_files": "[train.csv"}, {"data_files": ""},
        {"data_files": "https://example.org/train.csv"}, {"data_files": "../*/train.csv"},
        {"data_files": "/etc/host*"}, {"data_dir": "/etc", "data_files": "host*"},
        {"data_files": {"train": None}}, {"data_files": {"train": [3]}},
    ],
    ids=str,
)  # fmt: skip
def test_patterns_outside_the_folder_match_nothing(
    config: dict[str, object], init: Init, tmp_path: Path
) -> None:
    assert init("", folder_of(tmp_path, ["train.csv"], [config])).data.path is not None


def test_dashes_inside_a_value_do_not_end_the_metadata(init: Init, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["a.csv", "b.csv"], [])
    configs = yaml.safe_dump({"configs": [config(train="a.csv", test="b.csv")]})
    (folder / "README.md").write_text(f"---\npretty_name: Films --- and more\n{configs}---\n")
    with pytest.raises(LoraError, match=r"train rows are in a\.csv"):
        init("", folder)


@pytest.mark.parametrize("text", ["---\nconfigs: 3\n---\n", "---\n: [\n---", "# no head", "---"])
def test_a_readme_without_files(text: str, init: Init, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["train.csv"], [])
    (folder / "README.md").write_text(text)
    assert init("", folder).data.path is not None


def test_one_of_several_parts_is_reported_as_such(init: Init, tmp_path: Path) -> None:
    name = "data/train-00000-of-00002.csv"
    init("", folder_of(tmp_path, [name], []) / name)
    assert (
        "one of 2 parts, of which only this one is read" in (tmp_path / "recipe.yaml").read_text()
    )
