"""fp16 and bf16 on a real GPU: they train, agree with fp32, and resume exactly."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from lora_cli.errors import NumericsError
from lora_cli.recipe import load_recipe
from lora_cli.tasks.examples import Batch
from lora_cli.training import run as training_run
from lora_cli.training.checkpoints import load_checkpoint
from lora_cli.training.engine import Engine
from lora_cli.training.step import train_step

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # libraries of the GPU's machine are not those that the project is tested with
    pytest.mark.filterwarnings("default"),
]

REFERENCE = "train.kernels=reference"  # where a task is spoiled: recorded steps do not call it


def scaled(losses: dict[str, Any], factor: float) -> dict[str, Any]:
    return {term: sums * factor for term, sums in losses.items()}


class Scaled:
    """A task whose losses are multiplied by a factor."""

    def __init__(self, task: Any, factor: float) -> None:
        self.task, self.factor = task, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def losses(self, *given: Any) -> dict[str, Any]:
        return scaled(self.task.losses(*given), self.factor)


def train(recipe: Any, resume: bool = False) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers one precision a process
    return training_run.train(recipe, resume)


def rows(path: Path, count: int = 256) -> Path:
    words = {"good": ["fine", "great", "lovely"], "bad": ["poor", "awful", "sad"]}
    lines = []
    for i in range(count):
        label = ("good", "bad")[i % 2]
        text = " ".join(words[label][(i // 2 + j) % 3] for j in range(1 + i % 7))
        lines.append(json.dumps({"text": text, "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(tmp_path: Path, *overrides: str, output: str = "out") -> Any:
    base = tmp_path / "model"
    if not base.exists():
        tiny.save_encoder(base)
        rows(tmp_path / "train.jsonl")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({
        "model": {"name": str(base)},
        "task": {"type": "sequence_classification"},
        "data": {"train": "train.jsonl", "validation": {"fraction": 0.25, "disjoint": None},
                 "check": {"max_overlap": 1.0}},
        "adapter": {"rank": 4, "target_modules": "all-linear"},
        "train": {"max_steps": 60, "micro_batch_size": 16, "gradient_accumulation_steps": 2,
                  "optimizer": {"learning_rate": 1e-2}, "log_every_steps": 5},
        "evaluate": {"every_steps": 20},
        "checkpoint": {"every_steps": 20},
    }))  # fmt: skip
    return load_recipe(file, [*overrides, f"output_dir={tmp_path / output}"])


def decoder(tmp_path: Path, *settings: str, output: str, **sizes: int) -> Any:
    """Return a recipe of a decoder in bf16, whose activations are most of its memory."""
    sizes = sizes or {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    base = tmp_path / "decoder"
    if not base.exists():
        tiny.save_llama(base)
        config = AutoConfig.from_pretrained(base)
        config.update(sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        rows(tmp_path / "train.jsonl")
    file = tmp_path / "decoder.yaml"
    file.write_text(json.dumps({
        "model": {"name": str(base)},
        "task": {"type": "causal_lm", "prompt_column": "text", "completion_column": "label",
                 "max_length": 32},
        "data": {"train": "train.jsonl", "validation": None, "check": {"max_overlap": 1.0}},
        "adapter": {"rank": 4, "target_modules": "all-linear"},
        "train": {"max_steps": 20, "micro_batch_size": 256, "log_every_steps": 1,
                  "precision": "bf16", "optimizer": {"learning_rate": 1e-3}},
    }))  # fmt: skip
    return load_recipe(file, [*settings, f"output_dir={tmp_path / output}"])


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_training_learns_without_overflow_trouble(tmp_path: Path, precision: str) -> None:
    report = train(recipe(tmp_path, f"train.precision={precision}"))
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.5 * curve[0]
    assert report["metrics"]["after"]["validation"]["accuracy"] > 0.9
    assert report["training"]["skipped_steps"] <= 3  # the first loss scale may be too large


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_follows_fp32(tmp_path: Path, precision: str) -> None:
    settings = ("train.max_steps=20", "train.optimizer.learning_rate=1e-3")
    train(recipe(tmp_path, *settings, output="a"))
    train(recipe(tmp_path, *settings, f"train.precision={precision}", output="b"))
    for a, b in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert abs(a - b) < 0.05  # fp16's first step may be given up


def test_fp16_resumes_with_its_loss_scale_after_an_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training_run.train_step

    def overflow_at(step: int, stop: int | None) -> Any:
        calls = iter(range(1, 1000))

        def step_once(engine: Any, batches: Any) -> Any:
            number = next(calls)
            if stop is not None and number > stop:
                raise RuntimeError("pulled the plug")
            if number == step:
                for batch in batches:
                    batch.targets["labels"] = batch.targets["labels"].clone()
                return real(replace(engine, task=Scaled(engine.task, 1e30)), batches)
            return real(engine, batches)

        return step_once

    settings = ("train.precision=fp16", "checkpoint.every_steps=10", REFERENCE)
    monkeypatch.setattr(training_run, "train_step", overflow_at(5, None))
    train(recipe(tmp_path, *settings, output="whole"))
    monkeypatch.setattr(training_run, "train_step", overflow_at(5, 14))
    with pytest.raises(RuntimeError, match="plug"):
        train(recipe(tmp_path, *settings, output="cut"))
    found = load_checkpoint(tmp_path / "cut")
    assert found is not None
    assert found[1].skipped_steps >= 1
    monkeypatch.setattr(training_run, "train_step", real)
    train(recipe(tmp_path, *settings, output="cut"), resume=True)
    for name in ("adapter_model.safetensors", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    a, b = (load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert a is not None
    assert b is not None
    assert a[1].scaler == b[1].scaler
    assert a[1].skipped_steps == b[1].skipped_steps


def test_fused_optimizer_on_the_gpu_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = ("train.precision=bf16", "adapter.dropout=0.1", "checkpoint.every_steps=20")
    train(recipe(tmp_path, *settings, output="whole"))
    first = recipe(tmp_path, *settings, output="cut")
    calls = iter(range(1, 1000))
    real = training_run.train_step

    def cut(*arguments: Any) -> Any:
        if next(calls) > 33:
            raise RuntimeError("pulled the plug")
        return real(*arguments)

    training_run.train_step = cut  # type: ignore[assignment]  # put back below
    try:
        with pytest.raises(RuntimeError, match="plug"):
            train(first)
    finally:
        training_run.train_step = real
    train(recipe(tmp_path, *settings, output="cut"), resume=True)
    whole, again = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert whole == again


def test_endless_overflow_in_fp16_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training_run.train_step

    def overflow(engine: Any, batches: Any) -> Any:
        return real(replace(engine, task=Scaled(engine.task, 1e30)), batches)

    monkeypatch.setattr(training_run, "train_step", overflow)
    # the first loss scale, 65536, is halved 17 times before it is below 1; step 20 is logged
    with pytest.raises(NumericsError, match="overflow in fp16 at step 20"):
        train(recipe(tmp_path, "train.precision=fp16", "checkpoint.every_steps=100", REFERENCE))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_bad_step_changes_nothing_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, optimizer: str
) -> None:
    real, steps, weights = training_run.train_step, iter(range(1, 100)), []

    def spoil(engine: Any, batches: Any) -> Any:
        factor = float("nan") if next(steps) == 7 else 1.0
        result = real(replace(engine, task=Scaled(engine.task, factor)), batches)
        weights.append([p.detach().clone() for p in engine.parameters.values()])
        return result

    monkeypatch.setattr(training_run, "train_step", spoil)
    settings = (f"train.precision={precision}", f"train.optimizer.type={optimizer}")
    report = train(
        recipe(tmp_path, *settings, "train.max_steps=12", "train.log_every_steps=12", REFERENCE)
    )
    assert report["training"]["skipped_steps"] >= 1
    assert all(torch.equal(a, b) for a, b in zip(weights[5], weights[6], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[6], weights[7], strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bad_steps_in_a_row_stop_a_run_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    real = training_run.train_step

    def spoil(engine: Any, batches: Any) -> Any:
        return real(replace(engine, task=Scaled(engine.task, float("inf"))), batches)

    monkeypatch.setattr(training_run, "train_step", spoil)
    with pytest.raises(NumericsError, match="in steps 1 to 5"):  # step 5 is logged: it is read then
        train(recipe(tmp_path, f"train.precision={precision}", REFERENCE))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_step_on_a_gpu_does_not_wait_for_it(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator()
    layer = torch.nn.Linear(8, 8).cuda()
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    prepared = accelerator.prepare_optimizer(optimizer)

    class Task:
        loss_weights = train_loss_weights = {"loss": 1.0}
        couples_examples = False

        def forward(self, model: Any, batch: Any) -> Any:
            return model(batch.inputs["x"])

        output = forward  # nothing is frozen

        def losses(self, model: Any, output: Any, batch: Any) -> Any:
            return {"loss": output.sum(-1)}

    inputs = {"x": torch.ones(2, 8, device="cuda")}
    batch = Batch(
        inputs, {"labels": torch.zeros(2, device="cuda")}, {"loss": torch.ones(2)}, 2, [0, 1]
    )

    engine = Engine(layer, Task(), prepared, accelerator, 1.0)

    def step() -> Any:
        return train_step(engine, [batch])

    step()  # the first makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not result.bad
