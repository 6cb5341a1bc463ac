"""What a newer version wrote is rejected by name; what an older one wrote still reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from lora_cli.adapters.peft_format.adapter_folder import read_adapter
from lora_cli.cli.app import app
from lora_cli.data.dataset_cache import cached_dataset
from lora_cli.errors import LoraError
from lora_cli.files import sha256_of
from lora_cli.format_version import require_format
from lora_cli.recipe import load_recipe, read_computation
from lora_cli.training import train
from lora_cli.training.checkpoints import load_checkpoint
from tests import tiny

UNKNOWN = [2, 0, -1, 10**15, "x", "1", 1.0, 1.5, True, None, [1], {"a": 1}]
Json = dict[str, Any]


def edit(file: Path, change: Callable[[Json], object]) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    path = tiny.recipe(tiny.save_encoder(folder / "base"), folder, train={"max_steps": 1})
    train(load_recipe(path))
    return folder / "out"


@pytest.mark.parametrize("value", UNKNOWN, ids=repr)
def test_an_unknown_format_is_rejected(value: Any) -> None:
    with pytest.raises(LoraError, match=r"`format` is .+, and this lora reads 1") as caught:
        require_format({"format": value}, "a file")
    assert json.dumps(value)[:20] in str(caught.value)
    assert "written by a newer lora: upgrade" in str(caught.value)


@pytest.mark.parametrize("values", [{"format": 1}, {}, {"form": 2}])
def test_format_1_and_none_are_read(values: Json) -> None:
    require_format(values, "a file")


# ------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize("value", UNKNOWN, ids=repr)
def test_a_recipe_of_another_format_is_rejected_for_that_alone(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"modell: a\nformat: {json.dumps(value)}\nfuture: 3\n", encoding="utf-8")
    with pytest.raises(LoraError, match="`format` is") as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    assert problem.at == f"format ({path}:2)"
    assert "`task.format`" in str(problem.hint)
    assert "upgrade" in str(problem.hint)


@pytest.mark.parametrize("line", ["", "format: 1\n"])
def test_a_recipe_may_name_its_format(line: str, tmp_path: Path) -> None:
    path = tiny.recipe(tmp_path / "base", tmp_path)
    path.write_text(line + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert load_recipe(path).format == 1


def test_a_flag_can_name_it_too(tmp_path: Path) -> None:
    path = tiny.recipe(tmp_path / "base", tmp_path)
    with pytest.raises(LoraError, match="`format` is 2") as caught:
        load_recipe(path, ["format=2"])
    assert caught.value.problems[0].at == "format (--set format=2)"


def test_a_mistake_in_the_format_itself_is_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("format: 1\nformat: 2\n", encoding="utf-8")
    with pytest.raises(LoraError, match="`format` appears twice"):
        load_recipe(path)


# --------------------------------------------------------------------------- files that lora wrote


def test_what_is_written_names_its_format(trained: Path) -> None:
    (step,) = (trained / "checkpoints").iterdir()
    files = [trained / "manifest.json", trained / "computation.json", step / "manifest.json"]
    assert [json.loads(file.read_text())["format"] for file in files] == [1, 1, 1]
    assert (trained / "recipe.yaml").read_text().startswith("format: 1\n")


@pytest.mark.parametrize("value", [2, "x", True, None], ids=repr)
def test_an_adapter_of_another_format_is_rejected(value: Any, trained: Path) -> None:
    file = trained / "manifest.json"
    before = file.read_bytes()
    try:
        edit(file, lambda values: values.update(format=value, files={"of": "another kind"}))
        with pytest.raises(LoraError, match="`format` is") as caught:
            read_adapter(trained)
        assert caught.value.problems[0].at == str(file)
        edit(file, lambda values: values.update(files=json.loads(before)["files"]))
        edit(file, lambda values: values.pop("format"))
        assert read_adapter(trained).verified  # an older version wrote none
    finally:
        file.write_bytes(before)


def test_a_command_says_so(trained: Path) -> None:
    file = trained / "manifest.json"
    before = file.read_bytes()
    try:
        edit(file, lambda values: values.update(format=2))
        found = CliRunner().invoke(app, ["predict", "--adapter", str(trained), "a text"])
    finally:
        file.write_bytes(before)
    assert "`format` is 2, and this lora reads 1" in str(found.exception)
    assert "upgrade" in str(found.exception)


@pytest.mark.parametrize("value", [2, "x", True, None], ids=repr)
def test_a_checkpoint_of_another_format_is_rejected_and_not_skipped(
    value: Any, trained: Path
) -> None:
    (step,) = (trained / "checkpoints").iterdir()
    file = step / "manifest.json"
    before = file.read_bytes()
    try:
        edit(file, lambda values: values.update(format=value))
        with pytest.raises(LoraError, match="`format` is") as caught:
            load_checkpoint(trained)
        assert caught.value.problems[0].at == str(file)
        edit(file, lambda values: values.pop("format"))
        assert load_checkpoint(trained) is not None
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("value", [2, "x", True, None], ids=repr)
def test_what_an_adapter_was_trained_with_is_rejected_likewise(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "computation.json"
    file.write_text(json.dumps({"format": value, "of": "another kind"}), encoding="utf-8")
    with pytest.raises(LoraError, match="`format` is"):
        read_computation(tmp_path)
    file.write_text(json.dumps({"recipe": {}, "base": {"config": {}}}), encoding="utf-8")
    assert read_computation(tmp_path) is not None


@pytest.mark.parametrize("name", ["key.json", "manifest.json"])
def test_cached_rows_of_another_format_are_made_anew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows, features = [{"a": 1}], datasets.Features({"a": datasets.Value("int64")})

    def made(rows: list[Json]) -> Any:
        return list(cached_dataset(lambda: rows, ["key"], features))

    assert made(rows) == rows
    (folder,) = (tmp_path / "lora").iterdir()
    files = {other: folder / other for other in ("key.json", "manifest.json")}

    def change(how: Callable[[Json], object]) -> None:
        edit(files[name], how)
        if name == "key.json":  # which the manifest vouches for
            key = {"bytes": files[name].stat().st_size, "sha256": sha256_of(files[name])}
            edit(files["manifest.json"], lambda values: values["files"].update({name: key}))

    change(lambda values: values.pop("format"))
    assert made([]) == rows  # an older version wrote none
    assert capsys.readouterr().err == ""
    change(lambda values: values.update(format=2))
    assert made(rows) == rows
    said = capsys.readouterr().err
    assert "were rebuilt: `format` is 2, and this lora reads 1" in said
    assert json.loads(files[name].read_text())["format"] == 1
