"""Tests of NaN and infinity: bad steps are skipped, and a run of bad steps ends without saving."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lora_cli.adapters.attach import trainable_parameters
from lora_cli.errors import NumericsError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.recipe import load_recipe
from lora_cli.tasks.texts import padding_check
from lora_cli.training import load_trainable_model, train
from lora_cli.training import run as training_run
from lora_cli.training.bad_numbers import MAX_BAD_STEPS, BadStep, reject_bad_scale, reject_bad_steps
from lora_cli.training.checkpoints import checkpoints
from lora_cli.training.engine import Engine

Json = dict[str, Any]
Run = Callable[..., Json]
BAD = "Q"  # the base yields NaN for this character


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that yields NaN for every text with a certain character."""
    folder = tiny.save_llama(tmp_path_factory.mktemp("bases") / "llama", tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (token,) = tiny.tokenizer("llama")(BAD, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that trains on texts for one epoch, two texts per step."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # simulates rows that overflow; normally a base with NaN is rejected before training
    monkeypatch.setattr(padding_check, "require_finite_weights", lambda *_: None)

    def start(texts: list[str], name: str = "out", resume: bool = False, **sections: Any) -> Json:
        for split, rows in {"train": texts, "validation": ["a fine film"]}.items():
            text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
            (tmp_path / f"{split}.jsonl").write_text(text)
        data = {"train": "train.jsonl", "check": {"max_overlap": 1.0}, **sections.pop("data", {})}
        train_section = {
            "max_steps": None, "epochs": 1, "micro_batch_size": 2, "log_every_steps": 4,
            "optimizer": {"type": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
            **sections.pop("train", {}),
        }  # fmt: skip
        path = tiny.recipe(base, tmp_path, data=data, train=train_section, **sections)
        return train(load_recipe(path, [f"output_dir={tmp_path / name}"]), resume)

    return start


def texts(count: int, *bad: int) -> list[str]:
    """Return texts; those with the given indices yield NaN."""
    return [f"{tiny.CORPUS[i % 8]} {BAD if i in bad else ''}{i}" for i in range(count)]


def lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def step_of(out: Path, row: int) -> int:
    return next(s["step"] for s in lines(out / "samples.jsonl") if row in s["examples"])


def steps_saved(out: Path) -> list[int]:
    return [step for step, _ in checkpoints(out)]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_step_of_a_bad_row_is_skipped_and_the_row_is_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], streaming: bool
) -> None:
    sections: Json = {"data": {"streaming": True}, "train": {"epochs": None, "max_steps": 6}}
    report = run(texts(12, 7), **sections if streaming else {})
    out = tmp_path / "out"
    step = step_of(out, 7)
    assert report["training"]["skipped_steps"] == 1
    said = capsys.readouterr().err
    assert said.count("is left out") == 1
    assert f"warning: step {step} is left out: the loss or the gradient is NaN or infinity" in said
    assert "train.jsonl:8" in said.split("is left out")[1].splitlines()[0]
    logged = [r["loss"] for r in lines(out / "metrics.jsonl") if "loss" in r]
    assert all(loss is not None for loss in logged[1:])
    assert all(t.isfinite().all() for t in load_file(out / "adapter_model.safetensors").values())


def test_a_packed_row_is_named_too(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vouching: Json = {"data": {"validation": "validation.jsonl"}}  # may be in the last step
    packing = {"packing": True, "micro_batch_size": 1}
    run(texts(12, 7), train=packing, task={"max_length": 24}, **vouching)
    assert "train.jsonl:8" in capsys.readouterr().err


def test_a_skipped_step_has_no_effect(run: Run, tmp_path: Path) -> None:
    constant = {"type": "constant"}
    run(texts(12, 7), "a", train={"scheduler": constant, "log_every_steps": 1})
    step = step_of(tmp_path / "a", 7)
    # as if the step had a learning rate of zero, and did not enter AdamW's means
    weights: list[dict[str, torch.Tensor]] = []
    real = training_run.train_step

    def watched(engine: Engine, batches: Any) -> Any:
        result = real(engine, batches)
        weights.append({n: p.detach().clone() for n, p in engine.parameters.items()})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "train_step", watched)
        run(texts(12, 7), "b", train={"scheduler": constant, "log_every_steps": 1})
    assert all(torch.equal(weights[step - 1][n], weights[step - 2][n]) for n in weights[0])
    assert not all(torch.equal(weights[-1][n], weights[-2][n]) for n in weights[0])


def test_consecutive_bad_steps_stop_the_run(run: Run, tmp_path: Path) -> None:
    sections: Json = {"train": {"log_every_steps": 100}, "checkpoint": {"every_steps": 1}}
    with pytest.raises(NumericsError) as caught:
        run(texts(20, *range(20)), **sections)
    assert caught.value.exit_code == 3
    (problem,) = caught.value.problems
    assert problem.what == "the loss or the gradient is NaN or infinity in steps 1 to 5"
    first = lines(tmp_path / "out/samples.jsonl")[0]["examples"]
    assert all(f"train.jsonl:{i + 1}" in str(problem.hint) for i in first)
    assert "checkpoint" not in str(problem.hint)
    assert len(lines(tmp_path / "out/samples.jsonl")) == MAX_BAD_STEPS
    assert steps_saved(tmp_path / "out") == []
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_bad_weights_stop_the_run_and_are_not_called_good(run: Run, tmp_path: Path) -> None:
    wild = {"optimizer": {"type": "sgd", "learning_rate": 1e30}, "max_grad_norm": None}
    warmup = {"type": "constant", "warmup_steps": 2}  # the learning rate of the first step is zero
    with pytest.raises(NumericsError, match="lower the learning rate") as caught:
        run(
            texts(20), train={**wild, "scheduler": warmup},
            checkpoint={"every_steps": 1, "keep": 9},
        )  # fmt: skip
    assert "the checkpoint of step 1 is good; delete those after it" in str(caught.value)
    assert steps_saved(tmp_path / "out") == [1, 2]  # step 2 had a finite loss, so it was saved
    for _, folder in checkpoints(tmp_path / "out"):
        tensors = load_file(folder / "adapter_model.safetensors").values()
        assert all(tensor.isfinite().all() for tensor in tensors)


def test_a_checkpoint_waits_for_a_good_step(run: Run, tmp_path: Path) -> None:
    run(texts(12), "order")
    sample = {s["step"]: s["examples"] for s in lines(tmp_path / "order/samples.jsonl")}
    bad = [sample[2][0], sample[3][0]]
    run(texts(12, *bad), checkpoint={"every_steps": 2, "keep": 9})
    assert steps_saved(tmp_path / "out") == [4, 6]
    run(texts(12, sample[2][0]), "other", checkpoint={"every_steps": 2, "keep": 9})
    assert steps_saved(tmp_path / "other") == [3, 4, 6]


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.slow
def test_after_a_bad_last_step_validation_must_have_a_finite_loss(
    run: Run, tmp_path: Path, validated: bool
) -> None:
    run(texts(12), "order")
    bad = lines(tmp_path / "order/samples.jsonl")[-1]["examples"][0]
    if validated:
        report = run(texts(12, bad), data={"validation": "validation.jsonl"})
        assert report["training"]["skipped_steps"] == 1
        assert steps_saved(tmp_path / "out") == [6]
        return
    with pytest.raises(NumericsError, match="at step 6"):
        run(texts(12, bad))
    assert steps_saved(tmp_path / "out") == []
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.slow
def test_a_run_with_a_bad_step_resumes_exactly(run: Run, tmp_path: Path, stop: int) -> None:
    sections: Json = {"checkpoint": {"every_steps": 1}, "train": {"log_every_steps": 3}}
    run(texts(12, 7), "whole", **sections)
    real, calls = training_run.train_step, iter(range(1, 100))

    def step(*arguments: Any) -> Any:
        if next(calls) > stop:
            raise KeyError("pulled the plug")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "train_step", step)
        with pytest.raises(KeyError):
            run(texts(12, 7), "cut", **sections)
    report = run(texts(12, 7), "cut", resume=True, **sections)
    assert report["training"]["skipped_steps"] == 1
    for name in ("adapter_model.safetensors", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    logged = [
        [r["loss"] for r in lines(tmp_path / name / "metrics.jsonl") if "loss" in r]
        for name in ("cut", "whole")
    ]
    assert logged[0] == logged[1]


def test_a_step_with_a_nan_gradient_is_skipped_even_if_the_loss_is_finite(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = load_trainable_model.make_trainable, iter(range(100))

    def attach(model: nn.Module, *rest: Any) -> None:
        real(model, *rest)
        first = next(iter(trainable_parameters(model).values()))
        first.register_hook(lambda grad: grad * torch.nan if next(calls) == 2 else grad)

    monkeypatch.setattr(load_trainable_model, "make_trainable", attach)
    assert run(texts(12))["training"]["skipped_steps"] == 1


def test_parameters_with_nan_are_neither_saved_nor_published(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training_run.train_step

    def spoil(engine: Engine, batches: Any) -> Any:
        result = real(engine, batches)  # the loss of the parameters before the step
        with torch.no_grad():
            next(iter(engine.parameters.values())).fill_(torch.nan)
        return result

    monkeypatch.setattr(training_run, "train_step", spoil)
    often = {"evaluate": {"every_steps": 1}, "checkpoint": {"every_steps": 1}}
    with pytest.raises(NumericsError, match="contains NaN or infinity at step 1"):
        run(texts(12), data={"validation": "validation.jsonl"}, **often)
    assert steps_saved(tmp_path / "out") == []
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize("baseline", [True, False])
def test_a_nan_loss_on_validation_stops_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: bool
) -> None:
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": f"a {BAD}"}) + "\n")
    calls: list[int] = []
    real = training_run.train_step

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(training_run, "train_step", counted)
    with pytest.raises(NumericsError, match="the model's loss on this row is nan") as caught:
        run(texts(12), data={"validation": "held.jsonl"}, evaluate={"baseline": baseline})
    assert caught.value.problems[0].at == "held.jsonl:1"
    assert len(calls) == (
        0 if baseline else 6
    )  # with a baseline, it is detected before the first step
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_evaluating_an_adapter_with_nan_is_an_error(run: Run, tmp_path: Path) -> None:
    run(texts(12))
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": f"a {BAD}"}) + "\n")
    recipe = recipe.with_values({"data.test": str(tmp_path / "held.jsonl")})
    with pytest.raises(NumericsError, match="is nan") as caught:
        evaluate_adapter(tmp_path / "out", recipe)
    assert caught.value.exit_code == 3


def test_predictions_are_strict_json_even_with_nan_losses(run: Run, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": f"a {BAD}"}) + "\n")
    report = run(texts(12), data={"test": "held.jsonl"}, evaluate={"baseline": False})
    assert math.isnan(report["metrics"]["after"]["test"]["loss"])
    text = (tmp_path / "out/predictions/test.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_limits() -> None:
    recipe = tiny.recipe_of()
    bad = [BadStep(i, lambda: [f"x:{j}" for j in range(20)]) for i in range(1, 6)]
    reject_bad_steps(bad[:4], recipe)
    reject_bad_steps([], recipe, limit=1)
    with pytest.raises(NumericsError, match="and 12 more"):
        reject_bad_steps(bad, recipe)
    reject_bad_scale(1.0, 9, recipe)
    with pytest.raises(NumericsError, match="overflow in fp16 at step 9"):
        reject_bad_scale(0.5, 9, recipe)
