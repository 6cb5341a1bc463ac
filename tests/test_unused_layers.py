"""A checkpoint with more layers than config.json says: what is left out is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_cli.models.base_model import load_config, load_pretrained
from lora_cli.recipe import Recipe


@pytest.mark.parametrize("kind", ["llama", "encoder"])
@pytest.mark.parametrize("fewer", [True, False])
def test_layers_that_are_left_out_are_named(
    kind: str, fewer: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tiny.save_llama if kind == "llama" else tiny.save_encoder
    base = save(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    if fewer:
        config["num_hidden_layers"] -= 1
        (base / "config.json").write_text(json.dumps(config))
    task = {"type": "causal_lm" if kind == "llama" else "sequence_classification"}
    recipe = Recipe.model_validate(
        {"model": {"name": str(base)}, "task": task, "data": {"path": "rows.csv"}}
    )
    auto = AutoModelForCausalLM if kind == "llama" else AutoModelForSequenceClassification
    capsys.readouterr()
    cpu, has_head = torch.device("cpu"), kind == "encoder"
    load_pretrained(auto, recipe, load_config(recipe), cpu, torch.float32, has_head)
    said = capsys.readouterr().err
    _, info = auto.from_pretrained(base, output_loading_info=True)
    layers = [name for name in info["unexpected_keys"] if ".1." in name]
    assert bool(layers) == fewer
    assert ("has more layers than config.json says" in said) == fewer
    if fewer:
        assert f"{len(layers)} tensors" in said
