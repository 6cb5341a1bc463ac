"""Tests that a saved config.json has the older names of rotary embedding settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import LlamaForSequenceClassification
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.models.older_config_names import add_older_names
from lora_cli.recipe import load_recipe
from lora_cli.training import train

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}


def write_config(folder: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    file = folder / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if k not in without}))


def with_names(folder: Path, saved: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that are added to a config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(saved))
    add_older_names(folder, base)
    values = json.loads(file.read_text())
    assert {name: values[name] for name in saved} == saved
    return {name: value for name, value in values.items() if name not in saved}


def test_names_of_the_base_are_kept(tmp_path: Path) -> None:
    saved = {
        "dtype": "float32",
        "rope_parameters": {"full_attention": {"rope_theta": 1e6}},
        "vocab_size": 99,
    }
    base = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000,
        "rotary_pct": 0.5,
        "vocab_size": 98,
        "torch_dtype": "bfloat16",
        "unused": 1,
    }
    assert with_names(tmp_path, saved, base) == {
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000,
        "rotary_pct": 0.5,
        "torch_dtype": "float32",  # the dtype of the saved weights
    }


def test_names_in_nested_configurations_are_kept(tmp_path: Path) -> None:
    saved = {"text_config": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    add_older_names(tmp_path, {"text_config": {"rope_theta": 5e5}})
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, **SCALING}, {"rope_theta": 5e5, "rope_scaling": SCALING}),
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, {}),
        (None, {}),
    ],
)
def test_older_names_are_added_for_a_base_saved_by_transformers_5(
    rope: Any, wanted: dict[str, Any], tmp_path: Path
) -> None:
    assert with_names(tmp_path, {"rope_parameters": rope}, {}) == wanted


@pytest.mark.parametrize("adapter", [{"rank": 2, "target_modules": ["q_proj"]}, {"type": "full"}])
def test_merged_and_fully_trained_models_have_older_names(
    adapter: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny.save_llama(tmp_path / "base")
    write_config(
        base,
        {"rope_theta": 5e5, "rope_scaling": SCALING, "torch_dtype": "float32"},
        ("rope_parameters", "dtype"),
    )
    recipe = tiny.recipe(base, tmp_path, adapter=adapter)
    train(load_recipe(recipe))
    merged = tmp_path / "out"
    if adapter.get("type") != "full":
        merged = tmp_path / "merged"
        command = ["merge", "--base", str(base), "--adapter", str(tmp_path / "out")]
        result = CliRunner().invoke(app, [*command, "--to", str(merged)])
        assert result.exit_code == 0, result.output
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"].items() >= SCALING.items()
    assert config["dtype"] == "float32"
    a, b = (tiny_model(folder) for folder in (base, merged))
    assert a.config.rope_parameters == b.config.rope_parameters
    torch.testing.assert_close(a.model.rotary_emb.inv_freq, b.model.rotary_emb.inv_freq)


def tiny_model(folder: Path) -> Any:
    return LlamaForSequenceClassification.from_pretrained(folder)
