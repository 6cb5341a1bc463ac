"""Folders with the layout of a Hub data set get their own rows, whatever is cached."""

from __future__ import annotations

import csv
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_cli.data.load_rows import load_rows
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe, load_recipe

Json = dict[str, Any]
README = """---
configs:
- config_name: default
  data_files: [{{split: train, path: data/train*}}, {{split: test, path: data/test*}}]
- config_name: second
  data_files: [{{split: train, path: second/*.{kind}}}]
---
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(file: Path, rows: list[Json]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("rows.jsonl", "\n".join(map(json.dumps, rows)))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))


def read(file: Path) -> list[Json]:
    """Return the rows of a file, read without `datasets`."""
    if file.suffix == ".parquet":
        return list(pq.read_table(file).to_pylist())
    if file.suffix == ".csv":
        rows = csv.DictReader(file.read_text().splitlines())
        return [{**row, "label": int(row["label"])} for row in rows]
    if file.suffix == ".zip":
        lines = zipfile.ZipFile(file).read("rows.jsonl").decode().splitlines()
        return [json.loads(line) for line in lines]
    return [json.loads(line) for line in file.read_text().splitlines()]


def make(folder: Path, kind: str, tag: str, readme: bool = True) -> None:
    for place in ("data/train", "data/test", "second/a"):
        rows = [{"text": f"{tag} {place} {i}", "label": i % 2} for i in range(3)]
        write(folder / f"{place}.{kind}", rows)
    if readme:
        (folder / "README.md").write_text(README.format(kind=kind))


def recipe_of(name: str, **data: Any) -> Recipe:
    values = {"model": {"name": "m"}, "task": {"type": "causal_lm"}, "output_dir": "o"}
    return Recipe.model_validate({**values, "data": {"name": name, **data}})


def rows_of(folder: Path, **data: Any) -> tuple[list[Json], str]:
    rows = load_rows(recipe_of(str(folder), **data))["train"]
    return list(rows), rows.sha256


def same_times(folder: Path, change: Callable[[], None]) -> None:
    """Change files but not their modification times, as `rsync` and archives may."""
    times = {file: file.stat() for file in folder.rglob("*") if file.is_file()}
    change()
    for file, status in times.items():
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "zip"])
@pytest.mark.parametrize("config", [None, "second"])
@pytest.mark.slow_after(2)
def test_a_folder_has_its_own_rows(kind: str, config: str | None, tmp_path: Path) -> None:
    options = {"config": config} if config else {}
    place = "second/a" if config else "data/train"
    result = []
    for side in ("one", "two"):  # two folders of the same name and layout
        folder = tmp_path / side / "set"
        make(folder, kind, side)
        result.append(rows_of(folder, **options))
        assert result[-1][0] == read(folder / f"{place}.{kind}")
    for way in (lambda change: change(), lambda change: same_times(folder, change)):
        way(lambda: make(folder, kind, f"new{len(result)}"))  # other files in the same folder
        result.append(rows_of(folder, **options))
        assert result[-1][0] == read(folder / f"{place}.{kind}")
    assert len({sha256 for _, sha256 in result}) == 4  # the cache key of encoded rows
    make(folder, kind, "two")
    assert rows_of(folder, **options)[0] == result[1][0]


def test_a_folder_without_a_readme_has_its_own_rows(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    make(folder, "parquet", "one", readme=False)
    first = rows_of(folder)
    same_times(folder, lambda: make(folder, "parquet", "two", readme=False))
    second = rows_of(folder)
    assert second[0] == read(folder / "data/train.parquet") != first[0]
    assert second[1] != first[1]


def test_unchanged_files_are_prepared_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "set", "parquet", "one")
    first = rows_of(tmp_path / "set", test="test")
    with monkeypatch.context() as patch:
        patch.setattr(datasets.DatasetBuilder, "_download_and_prepare", lambda *_, **__: 1 / 0)
        assert rows_of(tmp_path / "set", test="test") == first
    assert len(list((cache / "lora").glob("folder-*"))) == 1


def test_the_path_of_a_folder_is_relative_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "own" / "set", "parquet", "own")
    make(tmp_path / "elsewhere" / "set", "parquet", "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = tmp_path / "own" / "recipe.yaml"
    for name in ("set", "./set", "../own/set"):
        values = {"model": {"name": "m"}, "task": {"type": "causal_lm"}, "data": {"name": name}}
        file.write_text(json.dumps(values))
        recipe = load_recipe(file)
        assert Path(str(recipe.data.name)).resolve() == tmp_path / "own" / "set"
        assert load_rows(recipe)["train"][0]["text"].startswith("own")
    overridden = load_recipe(file, ["data.name=set"])
    assert load_rows(overridden)["train"][0]["text"].startswith("elsewhere")
    (tmp_path / "other").mkdir()
    moved = file.rename(tmp_path / "other" / "recipe.yaml")
    moved.write_text(json.dumps({**values, "data": {"name": "set"}}))
    with pytest.raises(LoraError, match=r"`set` is also a folder in the working directory"):
        load_rows(load_recipe(moved))


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    make(tmp_path / "set", "parquet", "one")
    with pytest.raises(LoraError, match=r"folder, which has no revision `v2`[\s\S]*leave it out"):
        rows_of(tmp_path / "set", revision="v2")


def test_cached_rows_are_not_used_for_another_data_set(tmp_path: Path, cache: Path) -> None:
    """Without a connection, `datasets` loads whatever it last prepared under a name."""
    make(tmp_path / "films", "parquet", "one")
    datasets.load_dataset(str(tmp_path / "films"), split="train")  # like other tools
    with pytest.raises(LoraError, match=r"cache has a folder of this name only[\s\S]*connect once"):
        load_rows(recipe_of("films"))
    (prepared,) = (cache / "films" / "default" / "0.0.0").glob("????????????????")
    commits = "a" * 40, "b" * 40
    (cache / "org___films" / "default" / "0.0.0").mkdir(parents=True)
    prepared.rename(cache / "org___films" / "default" / "0.0.0" / commits[0])
    rows = load_rows(recipe_of("org/films", revision=commits[0]))["train"]
    assert list(rows) == read(tmp_path / "films" / "data" / "train.parquet")
    with pytest.raises(LoraError, match=rf"the cache has revision {commits[0]} only"):
        load_rows(recipe_of("org/films", revision=commits[1]))
