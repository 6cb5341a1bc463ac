"""A folder that is no adapter is called by what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.errors import LoraError
from lora_cli.not_an_adapter import require_adapter


@pytest.mark.parametrize(
    ("files", "what", "hint"),
    [
        (["config.json", "model.safetensors"], "is a model, not an adapter", "lora init DATA"),
        (["model_index.json"], "is a model, not an adapter", "lora init DATA"),
        (["config.json", "merge.json"], "an adapter was merged into", "name the folder of"),
        (["config.json", "recipe.yaml"], "was trained in full", "`lora predict`"),
        (["recipe.yaml", "checkpoints/step-000002/x"], "and no adapter yet", "--resume"),
        (["notes.txt"], "it has no adapter_model.safetensors", "the output folder of"),
        ([], "it has no adapter_model.safetensors", "the output folder of"),
    ],
)
def test_what_a_folder_is_instead(files: list[str], what: str, hint: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(LoraError) as caught:
        require_adapter(tmp_path)
    (problem,) = caught.value.problems
    assert what in problem.what
    assert problem.at == str(tmp_path)
    assert hint in (problem.hint or "")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_files_of_an_adapter_are_left_to_its_reader(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    (tmp_path / "config.json").touch()
    require_adapter(tmp_path)
