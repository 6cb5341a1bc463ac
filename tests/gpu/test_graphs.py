"""Tests that steps recorded as CUDA graphs equal plain steps, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from gpu import test_precision as runs

from lora_cli.recipe import load_recipe
from lora_cli.tasks.sequence_classification import SequenceClassification
from lora_cli.training import graph_engine

pytestmark = runs.pytestmark
SETTINGS = ("train.max_steps=40", "adapter.dropout=0.1", "train.optimizer.learning_rate=1e-3")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    real = graph_engine.GraphEngine.__post_init__

    def remember(self: Any) -> None:
        real(self)
        made.append(self)

    monkeypatch.setattr(graph_engine.GraphEngine, "__post_init__", remember)
    return made


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_recorded_steps_equal_plain_steps_bit_for_bit(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch, engines: list[Any]
) -> None:
    settings = (*SETTINGS, f"train.precision={precision}")
    runs.train(runs.recipe(tmp_path, *settings, output="recorded"))
    assert not engines[0].why_not
    assert engines[0].graphs, "no shape recurred"
    assert engines[0].update is not None, "the update is not recorded"
    monkeypatch.setattr(graph_engine, "MAX_GRAPHS", 0)
    runs.train(runs.recipe(tmp_path, *settings, output="plain"))
    assert not engines[1].graphs
    assert runs.losses(tmp_path / "recorded") == runs.losses(tmp_path / "plain")
    recorded, plain = adapter(tmp_path / "recorded"), adapter(tmp_path / "plain")
    for name, tensor in plain.items():
        assert torch.equal(recorded[name], tensor), name


def test_a_run_continues_with_plain_steps_if_recording_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: list[Any]
) -> None:
    real, seen = SequenceClassification.losses, []

    def waiting(self: Any, model: Any, output: torch.Tensor, batch: Any) -> Any:
        seen.append(output.sum().item())  # this cannot be captured in a graph
        return real(self, model, output, batch)

    monkeypatch.setattr(SequenceClassification, "losses", waiting)
    runs.train(runs.recipe(tmp_path, *SETTINGS, output="broken"))
    assert "synchronizing" in engines[0].why_not
    assert not engines[0].graphs
    monkeypatch.setattr(SequenceClassification, "losses", real)
    monkeypatch.setattr(graph_engine, "MAX_GRAPHS", 0)
    runs.train(runs.recipe(tmp_path, *SETTINGS, output="plain"))
    assert runs.losses(tmp_path / "broken") == runs.losses(tmp_path / "plain")


def test_compiled_layers_train_like_the_model_s_own(tmp_path: Path, engines: list[Any]) -> None:
    settings = ("train.max_steps=40", "train.optimizer.learning_rate=1e-3")
    runs.train(runs.recipe(tmp_path, *settings, "train.kernels=fused", output="fused"))
    assert engines[0].graphs
    assert engines[0].layers
    runs.train(runs.recipe(tmp_path, *settings, "train.kernels=reference", output="reference"))
    pairs = zip(runs.losses(tmp_path / "fused"), runs.losses(tmp_path / "reference"), strict=True)
    for fused, reference in pairs:
        assert abs(fused - reference) < 1e-4 * abs(reference)


def test_compiled_and_recorded_steps_resume_bit_for_bit(tmp_path: Path) -> None:
    settings = (*SETTINGS, "train.precision=bf16", "train.kernels=fused")
    settings += ("checkpoint.every_steps=10", "checkpoint.keep=10")
    runs.train(runs.recipe(tmp_path, *settings, output="whole"))
    whole = adapter(tmp_path / "whole")
    curve = runs.losses(tmp_path / "whole")
    cut = tmp_path / "whole"
    for name in ("step-000030", "step-000040"):
        for file in (cut / "checkpoints" / name).iterdir():
            file.unlink()
        (cut / "checkpoints" / name).rmdir()
    (cut / "report.json").unlink()
    runs.train(runs.recipe(tmp_path, *settings, output="whole"), resume=True)
    for name, tensor in adapter(cut).items():
        assert torch.equal(whole[name], tensor), name
    lines = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == curve


def language_model(tmp_path: Path, *settings: str, output: str) -> Any:
    """Return a recipe whose texts have many lengths; half of each text is a prompt."""
    base = tmp_path / "decoder"
    if not base.exists():
        tiny.save_llama(base)
        runs.rows(tmp_path / "train.jsonl")
    file = tmp_path / "decoder.yaml"
    file.write_text(json.dumps({
        "model": {"name": str(base)},
        "task": {"type": "causal_lm", "prompt_column": "text", "completion_column": "label",
                 "max_length": 32},
        "data": {"train": "train.jsonl", "validation": {"fraction": 0.25, "disjoint": None},
                 "check": {"max_overlap": 1.0}},
        "adapter": {"rank": 4, "target_modules": "all-linear", "dropout": 0.1},
        "train": {"max_steps": 40, "micro_batch_size": 8, "log_every_steps": 1,
                  "optimizer": {"learning_rate": 1e-3}},
    }))  # fmt: skip
    return load_recipe(file, [*settings, f"output_dir={tmp_path / output}"])


@pytest.mark.parametrize("again", ["true", "false"])
def test_compiled_layers_of_a_language_model_train_like_its_own(
    tmp_path: Path, again: str, engines: list[Any]
) -> None:
    settings = ("adapter.dropout=0", f"train.gradient_checkpointing={again}")
    fused, reference = (
        language_model(tmp_path, *settings, f"train.kernels={kernels}", output=kernels)
        for kernels in ("fused", "reference")
    )
    report = runs.train(fused)
    assert engines[0].layers
    assert report["kernels"]["batches"] == "filled on the right without a mask"
    runs.train(reference)
    pairs = zip(runs.losses(tmp_path / "fused"), runs.losses(tmp_path / "reference"), strict=True)
    for one, other in pairs:
        assert abs(one - other) < 1e-4 * abs(other)
