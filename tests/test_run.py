"""A run: resumed it is as if it had never stopped, and what it leaves is what it measured."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from runs import assert_same_run, lines
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from lora_cli.accelerator import start_accelerator
from lora_cli.adapters.attach import (
    attach,
    disabled,
    lora_layers,
    trainable_parameters,
    training_mode,
)
from lora_cli.cli.app import app
from lora_cli.errors import IntegrityError, InterruptedRun, LoraError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.recipe import load_recipe
from lora_cli.training import (
    early_stopping,
    fit_into_memory,
    load_trainable_model,
    run_evaluations,
    train,
)
from lora_cli.training import run as training_run
from lora_cli.training.checkpoints import checkpoints, load_checkpoint
from lora_cli.training.optimizers import build_optimizer
from lora_cli.training.stop_request import StopRequest
from lora_cli.training.train_state import TrainState

ROOT = Path(__file__).parent.parent
PAIRS = {"text_column": None, "prompt_column": "text", "completion_column": "more"}
Json = dict[str, Any]
# where nothing matters but how it trains: an epoch and a half, and no evaluation
TRAINING: Json = {
    "data": {"train": "train.jsonl"}, "train": {"max_steps": 5, "log_every_steps": 1},
}  # fmt: skip


class PulledPlug(Exception):
    """Kills a run."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {}
    save = {
        "encoder": tiny.save_encoder,
        "labelled": lambda path: tiny.save_encoder(path, ["bad", "good"]),
        "gpt2": tiny.save_gpt2,
        "llama": tiny.save_llama,
    }

    def base(kind: str) -> Path:
        if kind not in made:
            made[kind] = save[kind](folder / kind)
        return made[kind]

    return base


class Bench:
    """Runs recipes on eleven train, five validation and four test rows."""

    def __init__(self, folder: Path, base: Callable[[str], Path]) -> None:
        self.folder, self.base = folder, base
        texts = [
            f"{a} {b}{' and so on' * (i % 4)}"
            for i, (a, b) in enumerate(itertools.product(tiny.CORPUS, ("then", "but", "now")))
        ]
        rows = [{"text": t, "label": i % 2, "more": t[: 3 + i]} for i, t in enumerate(texts)]
        for name, part in {
            "train": rows[:11],
            "validation": rows[11:16],
            "test": rows[16:20],
        }.items():
            write_lines(folder / f"{name}.jsonl", part)
        self.data = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}

    def recipe(self, kind: str = "encoder", **sections: Any) -> Path:
        """Write a recipe with four examples per step, so three steps per epoch."""
        train = {"max_steps": 10, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
        sections = {"data": self.data, **sections}
        sections["train"] = {**train, **sections.get("train", {})}
        if "epochs" in sections["train"]:
            sections["train"]["max_steps"] = None
        sections["train"].setdefault("optimizer", {"type": "adamw", "learning_rate": 0.01})
        return tiny.recipe(self.base(kind), self.folder, **sections)

    def run(self, path: Path, name: str = "out", *sets: str, resume: bool = False) -> Json:
        return train(load_recipe(path, [f"output_dir={self.folder / name}", *sets]), resume)

    def cut(self, path: Path, name: str, steps: int, *sets: str) -> None:
        """Start a run, and kill it after some steps."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_run, "train_step", only(steps))
            with pytest.raises(PulledPlug):
                self.run(path, name, *sets)


@pytest.fixture
def bench(tmp_path: Path, bases: Callable[[str], Path]) -> Bench:
    return Bench(tmp_path, bases)


def only(steps: int, then: Callable[[], None] | None = None) -> Callable[..., Any]:
    """Return a `train_step` that raises, or calls `then` once, after some steps."""
    real, calls = training_run.train_step, itertools.count(1)

    def step(*arguments: Any) -> Any:
        number = next(calls)
        if number > steps and then is None:
            raise PulledPlug
        if number == steps and then is not None:
            then()
        return real(*arguments)

    return step


def write_lines(path: Path, rows: list[Json]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluations(out: Path) -> dict[int, Json]:
    return {r["step"]: r["validation"] for r in lines(out / "metrics.jsonl") if "validation" in r}


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in lines(out / "metrics.jsonl") if "loss" in r]


def steps_of(out: Path) -> list[int]:
    return [step for step, _ in checkpoints(out)]


# -------------------------------------------------------------------------------------- resuming

ADAMW = {"type": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
# fmt: off
RUNS: dict[str, tuple[str, Json]] = {
    "accumulation and a short last step": ("encoder", {}),
    "dropout, workers, cosine": ("encoder", {
        "adapter": {"dropout": 0.3},
        "train": {"workers": 2, "optimizer": ADAMW,
                  "scheduler": {"type": "cosine", "warmup_steps": 3}}}),
    "sgd by length": ("encoder", {
        "train": {"group_by_length": True, "optimizer": {"type": "sgd", "learning_rate": 0.1}}}),
    "momentum": ("encoder", {
        "train": {"optimizer": {"type": "sgd", "learning_rate": 0.1, "momentum": 0.9}}}),
    "adafactor": ("encoder", {
        "train": {"optimizer": {"type": "adafactor", "learning_rate": 0.01}}}),
    "packing and workers": ("llama", {
        "task": {"max_length": 64}, "adapter": {"dropout": 0.2, "target_modules": "all-linear"},
        "train": {"packing": True, "workers": 2, "micro_batch_size": 1}}),
    "gpt2 with checkpointing": ("gpt2", {
        "adapter": {"dropout": 0.2}, "train": {"gradient_checkpointing": True}}),
    "early stopping": ("encoder", {
        "train": {"optimizer": {"type": "adamw", "learning_rate": 0.1}},
        "evaluate": {"every_steps": 1, "best": {"metric": "loss"},
                     "early_stopping": {"patience": 4}}}),
    "streaming": ("encoder", {"data": {"train": "train.jsonl", "validation": "validation.jsonl",
                                       "streaming": True}}),
}
# fmt: on


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow_after(1)
def test_a_run_resumed_after_four_steps_equals_one_of_ten(bench: Bench, name: str) -> None:
    kind, sections = RUNS[name]
    often = {"evaluate": {"every_steps": 3}, "checkpoint": {"every_steps": 4}}
    path = bench.recipe(kind, **(often | sections))
    path.write_text(path.read_text().replace("train:\n", "train:\n  log_every_steps: 3\n", 1))
    bench.run(path, "whole")
    bench.cut(path, "cut", 5)  # the checkpoint is of step 4, and the logs continue to step 5
    assert steps_of(bench.folder / "cut") == [4]
    bench.run(path, "cut", resume=True)
    assert_same_run(bench.folder / "whole", bench.folder / "cut")
    if name == "early stopping":
        assert 4 < steps_of(bench.folder / "cut")[-1] < 10


@pytest.mark.slow
def test_resuming_in_another_epoch_and_twice(bench: Bench) -> None:
    path = bench.recipe(adapter={"dropout": 0.3}, checkpoint={"every_steps": 1, "keep": 3})
    bench.run(path, "whole")
    bench.cut(path, "cut", 3)  # the end of an epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "train_step", only(4))
        with pytest.raises(PulledPlug):
            bench.run(path, "cut", resume=True)
    assert steps_of(bench.folder / "cut") == [5, 6, 7]
    bench.run(path, "cut", "train.workers=2", resume=True)  # workers may change
    assert_same_run(bench.folder / "whole", bench.folder / "cut")


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_report_is_finished(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.recipe(train={"max_steps": 4})
    bench.run(path, "whole")

    def pull(*_: Any) -> None:
        raise PulledPlug

    for place in ("_measure_best", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(training_run if place == "finish" else training_run.Run, place, pull)
            with pytest.raises(PulledPlug):
                bench.run(path, place)
        assert not (bench.folder / place / "report.json").exists()
        report = bench.run(path, place, resume=True)
        assert_same_run(bench.folder / "whole", bench.folder / place)
        assert report["training"]["steps"] == 4


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench.recipe(checkpoint={"every_steps": 2, "keep": 1}, train={"max_steps": 8})
    bench.run(path, "whole")
    bench.cut(path, "cut", 7, "checkpoint.keep=2")
    bad = checkpoints(bench.folder / "cut")[-1][1]
    (bad / "optimizer.safetensors").write_bytes(b"")
    capsys.readouterr()
    shutil.copytree(bench.folder / "cut", bench.folder / "spoilt")
    bench.run(path, "cut", resume=True)
    said = capsys.readouterr().err
    assert "warning: damaged checkpoint: `optimizer.safetensors` is not the file" in said
    assert "continuing from the one before, step-000004" in said
    assert_same_run(bench.folder / "whole", bench.folder / "cut")

    for folder in checkpoints(bench.folder / "spoilt"):
        (folder[1] / "trainer.json").unlink()
    with pytest.raises(IntegrityError) as caught:
        bench.run(path, "spoilt", resume=True)
    for name in ("step-000004", "step-000006", "start again"):
        assert name in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_checkpoint_is_not_deleted_for_a_damaged_newer_one(bench: Bench) -> None:
    path = bench.recipe(checkpoint={"every_steps": 2, "keep": 2})
    bench.cut(path, "cut", 9)
    newest = checkpoints(bench.folder / "cut")[-1][1]
    (newest / "manifest.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        # the second run dies in step 7, before it saved anything
        patch.setattr(training_run, "train_step", only(1))
        with pytest.raises(PulledPlug):
            bench.run(path, "cut", "checkpoint.every_steps=1", "checkpoint.keep=1", resume=True)
    found = load_checkpoint(bench.folder / "cut")
    assert found is not None
    assert found[1].step == 7


@pytest.mark.slow
def test_resuming_nothing_starts_at_the_beginning(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench.recipe(checkpoint={"every_steps": 2}, train={"max_steps": 4})
    bench.run(path, "whole")
    bench.run(path, "new", resume=True)
    assert "starting at the beginning" in capsys.readouterr().err
    assert_same_run(bench.folder / "whole", bench.folder / "new")
    bench.cut(path, "cut", 3)
    shutil.rmtree(bench.folder / "cut/checkpoints")
    bench.run(path, "cut", resume=True)
    assert_same_run(bench.folder / "whole", bench.folder / "cut")


def test_resuming_a_complete_run_changes_nothing(bench: Bench) -> None:
    path = bench.recipe(train={"max_steps": 2})
    report = bench.run(path)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in bench.folder.rglob("*")}
    again = bench.run(path, resume=True)
    assert again == json.loads(json.dumps(report))
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in bench.folder.rglob("*")} == before
    with pytest.raises(LoraError, match=r"max_steps: 2.*now says `20`"):
        bench.run(path, "out", "train.max_steps=20", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["balanced", {"0": 2.0}])
def test_resuming_a_complete_run_with_labels_and_weights_from_the_data(
    bench: Bench, weights: Any
) -> None:
    task = {"type": "sequence_classification", "labels": None, "class_weights": weights}
    path = bench.recipe(task=task, train={"max_steps": 1})
    report = bench.run(path)
    assert bench.run(path, resume=True) == json.loads(json.dumps(report))
    for change in ("task.labels=[good, bad]", "task.class_weights={'0': 3.0}"):
        with pytest.raises(LoraError, match="was started with"):
            bench.run(path, "out", change, resume=True)
    bench.run(
        bench.folder / "out" / "recipe.yaml", resume=True
    )  # this recipe names the learned values


def test_adding_class_weights_is_a_change_of_a_complete_run(bench: Bench) -> None:
    path = bench.recipe(train={"max_steps": 1})
    bench.run(path)
    with pytest.raises(LoraError, match=r"class_weights: None.*now says `balanced`"):
        bench.run(path, "out", "task.class_weights=balanced", resume=True)


def test_folders_that_are_not_empty_are_rejected(bench: Bench) -> None:
    path = bench.recipe()
    other = bench.folder / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(LoraError, match="is not empty"):
        bench.run(path, "other")
    with pytest.raises(LoraError, match="no run"):
        bench.run(path, "other", resume=True)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    with pytest.raises(LoraError, match="is a file"):
        bench.run(path, "other/thesis.tex")


def test_the_folder_can_be_used_again_after_a_data_error(bench: Bench) -> None:
    with pytest.raises(LoraError, match="no column"):
        bench.run(bench.recipe(task={"text_column": "review"}))
    bench.run(bench.recipe(train={"max_steps": 1}))


@pytest.mark.slow
def test_changes_are_rejected_on_resuming_and_each_is_listed(bench: Bench) -> None:
    path = bench.recipe(checkpoint={"every_steps": 2}, train={"max_steps": 4})
    bench.cut(path, "cut", 3)
    resolved = (bench.folder / "cut/recipe.yaml").read_bytes()
    with pytest.raises(LoraError) as caught:
        bench.run(path, "cut", "adapter.rank=2", "train.seed=1", resume=True)
    assert [problem.what for problem in caught.value.problems] == [
        "the run was started with `adapter.rank: 4`, the recipe now says `2`",
        "the run was started with `train.seed: 0`, the recipe now says `1`",
    ] or "rank" in str(caught.value)
    rows = lines(bench.folder / "validation.jsonl")
    write_lines(bench.folder / "validation.jsonl", rows[::-1])
    with pytest.raises(LoraError) as caught:
        bench.run(path, "cut", resume=True)
    assert len(caught.value.problems) == 1
    assert "rows of validation" in str(caught.value)
    assert "`-o DIR`" in str(caught.value)
    assert (bench.folder / "cut/recipe.yaml").read_bytes() == resolved
    write_lines(bench.folder / "validation.jsonl", rows)
    bench.run(path, "cut", "checkpoint.keep=5", "train.trackers=[tensorboard]", resume=True)


def test_leftovers_of_a_killed_save_are_cleared(bench: Bench) -> None:
    path = bench.recipe(checkpoint={"every_steps": 2}, train={"max_steps": 4})
    bench.cut(path, "cut", 3)
    leftover = bench.folder / "cut/checkpoints/.step-000004.123.tmp"
    leftover.mkdir()
    (leftover / "adapter_model.safetensors").touch()
    bench.run(path, "cut", resume=True)
    assert [p.name for p in (bench.folder / "cut/checkpoints").iterdir() if p.name[0] == "."] == []


# --------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_saves_a_checkpoint_and_ends_the_run(bench: Bench, number: int) -> None:
    path, before = bench.recipe(train={"max_steps": 6}), signal.getsignal(number)
    bench.run(path, "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "train_step", only(4, lambda: os.kill(os.getpid(), number)))
        with pytest.raises(InterruptedRun, match="--resume") as caught:
            bench.run(path, "cut")
    assert caught.value.exit_code == 128 + number
    assert steps_of(bench.folder / "cut")[-1] == 4
    assert signal.getsignal(number) == before
    bench.run(path, "cut", resume=True)
    assert_same_run(bench.folder / "whole", bench.folder / "cut")


def test_a_second_interruption_ends_immediately(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = start_accelerator(load_recipe(bench.recipe()))
    with StopRequest(load_recipe(bench.recipe()), accelerator, 0.0) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher that forwards Ctrl-C
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(StopRequest, "MOMENT_S", 0.0)
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGINT)
    assert caught.value.code == 130


def test_the_command_returns_immediately_from_a_complete_run(bench: Bench) -> None:
    path = bench.recipe(train={"max_steps": 1})
    bench.run(path)
    done = CliRunner().invoke(app, ["train", str(path), "--resume"])
    assert done.exit_code == 0
    assert "accuracy" in done.stdout
    assert "trained" not in done.stderr


# ---------------------------------------------------------------------------------- what is saved


@pytest.mark.slow
def test_rotation_keeps_the_newest_and_the_best(bench: Bench) -> None:
    no_validation = {"train": "train.jsonl"}
    sections = {"checkpoint": {"every_steps": 1, "keep": 3}}
    bench.run(bench.recipe(data=no_validation, **sections), "a")
    assert steps_of(bench.folder / "a") == [8, 9, 10]
    report = bench.run(
        bench.recipe(
            train={"optimizer": {"type": "adamw", "learning_rate": 0.1}},
            evaluate={"every_steps": 1, "best": {"metric": "loss"}}, **sections,
        ),
        "b",
    )  # fmt: skip
    assert report["best"]["step"] < 8
    assert steps_of(bench.folder / "b") == [report["best"]["step"], 8, 9, 10]


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for name in ("step-999999", "step-1000000", "step-000005", "step-7.bak", ".step-8"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert steps_of(tmp_path) == [5, 999999, 1000000]


def test_the_best_adapter_is_published_and_reported(bench: Bench) -> None:
    path = bench.recipe(
        train={"optimizer": {"type": "sgd", "learning_rate": 20.0}},
        evaluate={"every_steps": 1, "best": {"metric": "loss"}},
    )
    report = bench.run(path)
    measured = evaluations(bench.folder / "out")
    best = min((m["loss"], step) for step, m in measured.items() if step)
    assert best == (report["best"]["value"], report["best"]["step"])
    assert best[1] < 10
    assert report["metrics"]["after"]["validation"] == measured[best[1]]
    assert report["metrics"]["before"]["validation"] == measured[0]
    loaded = evaluate_adapter(bench.folder / "out", load_recipe(bench.folder / "out/recipe.yaml"))
    assert loaded == report["metrics"]["after"]


def test_validation_is_not_measured_again_if_the_last_adapter_is_the_best(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, measured = run_evaluations.evaluate, []

    def counting(model: nn.Module, task: Any, split: Any, *rest: Any, **options: Any) -> Any:
        measured.append(len(split.rows))
        return real(model, task, split, *rest, **options)

    monkeypatch.setattr(run_evaluations, "evaluate", counting)
    path = bench.recipe(
        train={"max_steps": 2}, evaluate={"baseline": False, "best": {"metric": "loss"}}
    )
    report = bench.run(path)
    assert report["best"]["step"] == 2
    assert measured == [5, 4]  # five rows of validation, four of test
    out = bench.folder / "out"
    said = lines(out / "predictions/validation.jsonl")
    assert [line["row"] for line in said] == list(range(5))
    mean = sum(line["loss"] for line in said) / 5
    assert mean == pytest.approx(report["metrics"]["after"]["validation"]["loss"], rel=1e-6)
    loaded = evaluate_adapter(out, load_recipe(out / "recipe.yaml"))
    assert loaded == report["metrics"]["after"]


def test_a_gain_below_min_delta_is_published_but_does_not_delay_stopping(bench: Bench) -> None:
    path = bench.recipe(
        train={"optimizer": {"type": "sgd", "learning_rate": 1e-3}},
        evaluate={
            "every_steps": 1, "best": {"metric": "loss"},
            "early_stopping": {"patience": 4, "min_delta": 0.5},
        },
    )  # fmt: skip
    report = bench.run(path)
    measured = {step: m["loss"] for step, m in evaluations(bench.folder / "out").items() if step}
    assert report["training"]["stopped_early"]
    assert list(measured) == [1, 2, 3, 4, 5]
    assert report["best"]["value"] == min(measured.values())
    assert report["best"]["step"] > 1


def test_an_unknown_best_metric_is_an_error_before_training(bench: Bench) -> None:
    path = bench.recipe(evaluate={"best": {"metric": "acuracy", "mode": "max"}})
    with pytest.raises(LoraError, match=r"`acuracy`(?s:.*)accuracy"):
        bench.run(path)
    assert list((bench.folder / "out").iterdir()) == []


def test_a_best_metric_that_is_not_measured_is_an_error_at_step_0(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early_stopping, "best_by", lambda *_: ("unheard", "max"))
    with pytest.raises(LoraError, match="no metric `unheard`"):
        bench.run(bench.recipe())
    assert (bench.folder / "out/samples.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "data", [{"train": "train.jsonl"}, {"train": "train.jsonl", "test": "test.jsonl"}]
)
def test_without_validation_the_last_adapter_is_published(bench: Bench, data: Json) -> None:
    report = bench.run(bench.recipe(data=data, train={"max_steps": 2}))
    out = bench.folder / "out"
    assert "best" not in report
    assert list(report["metrics"]["after"]) == list(data)[1:]
    last = checkpoints(out)[-1][1] / "adapter_model.safetensors"
    assert (out / "adapter_model.safetensors").read_bytes() == last.read_bytes()
    assert sorted(p.stem for p in out.glob("predictions/*")) == list(data)[1:]


def test_fractional_epochs(bench: Bench) -> None:
    report = bench.run(bench.recipe(train={"epochs": 0.5}))
    assert report["training"]["steps"] == 2  # of three
    assert report["training"]["epochs"] == pytest.approx(2 / 3, abs=1e-4)
    samples = [i for r in lines(bench.folder / "out/samples.jsonl") for i in r["examples"]]
    assert len(samples) == len(set(samples)) == 8


def test_an_epoch_sees_every_example_once(bench: Bench) -> None:
    report = bench.run(bench.recipe(train={"epochs": 2}))
    samples = [r["examples"] for r in lines(bench.folder / "out/samples.jsonl")]
    assert [len(examples) for examples in samples] == [4, 4, 3, 4, 4, 3]
    for epoch in (samples[:3], samples[3:]):
        assert sorted(itertools.chain(*epoch)) == list(range(11))
    assert samples[:3] != samples[3:]
    assert report["training"]["epochs"] == 2.0


def test_streaming_reads_the_rows_in_order(bench: Bench) -> None:
    data = {"train": "train.jsonl", "streaming": True}
    bench.run(bench.recipe(data=data, train={"max_steps": 4}))
    samples = [i for r in lines(bench.folder / "out/samples.jsonl") for i in r["examples"]]
    assert samples == list(range(16))


# ------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("kind", ["labelled", "llama"])
def test_metrics_of_step_0_are_those_of_the_base(bench: Bench, kind: str) -> None:
    task = {"max_length": 128} if kind == "llama" else {}  # no text is split
    report = bench.run(bench.recipe(kind, task=task, train={"max_steps": 1}))
    tokenizer = AutoTokenizer.from_pretrained(bench.base(kind))
    auto = AutoModelForCausalLM if kind == "llama" else AutoModelForSequenceClassification
    model = auto.from_pretrained(bench.base(kind)).eval()
    total = count = 0.0
    for row in lines(bench.folder / "validation.jsonl"):
        if kind == "labelled":
            ids, labels, items = (
                torch.tensor([tokenizer(row["text"])["input_ids"]]),
                row["label"],
                1,
            )
        else:
            ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
            labels, items = ids, ids.shape[1] - 1  # the first token is not predicted
        with torch.no_grad():
            loss = model(input_ids=ids, labels=torch.as_tensor(labels)).loss
        total, count = total + float(loss) * items, count + items
    measured = report["metrics"]["before"]["validation"]["loss"]
    assert measured == pytest.approx(total / count, rel=1e-5)


class Spy:
    """Records the model of a run, and its weights before and after the adapter was attached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = load_trainable_model.make_trainable

        def attach(model: nn.Module, *rest: Any) -> None:
            self.base = {name: t.detach().clone() for name, t in model.state_dict().items()}
            real(model, *rest)
            self.model = model
            self.start = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}

        monkeypatch.setattr(load_trainable_model, "make_trainable", attach)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["encoder", "gpt2", "llama"])
def test_the_frozen_base_is_not_changed(
    bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    adapter = {"dropout": 0.1, "target_modules": "all-linear"}
    bench.run(bench.recipe(kind, adapter=adapter, **TRAINING))
    trained = set(trainable_parameters(spy.model))
    frozen = {
        name.replace(".base.", "."): tensor
        for name, tensor in spy.model.state_dict().items()
        if name not in trained
    }
    assert len(frozen) > 20
    assert all(torch.equal(spy.base[name], tensor) for name, tensor in frozen.items())
    assert all(not torch.equal(spy.start[n], p) for n, p in trainable_parameters(spy.model).items())
    if kind != "encoder":  # its head is trained in full
        base = AutoModelForCausalLM.from_pretrained(bench.base(kind)).eval()
        ids = torch.arange(4, 24).reshape(2, 10)
        with torch.no_grad(), disabled(spy.model.eval()):
            assert torch.equal(spy.model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("kind", ["full", "none", "bitfit", "lora"])
@pytest.mark.slow_after(1)
def test_every_adapter_type_is_trained_saved_and_loaded(bench: Bench, kind: str) -> None:
    every_row = {"max_steps": 10, "micro_batch_size": 11, "gradient_accumulation_steps": 1}
    rate = {"optimizer": {"type": "adamw", "learning_rate": 1e-3}}
    report = bench.run(bench.recipe("encoder", adapter={"type": kind}, train=every_row | rate))
    out = bench.folder / "out"
    assert losses(out)[-1] < losses(out)[0]
    loaded = evaluate_adapter(out, load_recipe(out / "recipe.yaml"))
    # a head alone is measured on cached states of the layers below, with other rounding
    rounding = 1e-6 if kind == "none" else 0.0
    for split, metrics in report["metrics"]["after"].items():
        assert loaded[split] == pytest.approx(metrics, rel=rounding, abs=0.0)


def test_a_fully_trained_model_is_a_plain_folder(bench: Bench) -> None:
    bench.run(bench.recipe("encoder", adapter={"type": "full"}, train={"max_steps": 3}))
    out = bench.folder / "out"
    assert not (out / "adapter_config.json").exists()
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.id2label == {0: "bad", 1: "good"}
    for row, said in zip(
        lines(bench.folder / "test.jsonl"), lines(out / "predictions/test.jsonl"), strict=True
    ):
        with torch.no_grad():
            scores = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        assert scores.tolist() == pytest.approx(
            [said["scores"]["bad"], said["scores"]["good"]], abs=1e-5
        )


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["encoder", "llama"])
def test_gradient_checkpointing_gives_the_same_losses(bench: Bench, kind: str) -> None:
    path = bench.recipe(kind, adapter={"dropout": 0.2}, **TRAINING)
    bench.run(path, "plain")
    bench.run(path, "saving", "train.gradient_checkpointing=true")
    assert losses(bench.folder / "saving") == pytest.approx(
        losses(bench.folder / "plain"), rel=1e-6
    )


@pytest.mark.parametrize("how", [False, True, "offload"])
def test_automatic_gradient_checkpointing_is_chosen_once(
    how: bool | str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.recipe("llama", adapter={"dropout": 0.2}, **TRAINING)
    bench.run(path, "plain")
    enabled = []
    enable = fit_into_memory.enable_gradient_checkpointing
    monkeypatch.setattr(
        fit_into_memory,
        "enable_gradient_checkpointing",
        lambda model, recipe, how: (enable(model, recipe, how), enabled.append(model)),
    )
    monkeypatch.setattr(fit_into_memory, "choose_checkpointing", lambda *_: how)
    sets = ("train.gradient_checkpointing=auto", "checkpoint.every_steps=1")
    bench.run(path, "chosen", *sets)
    assert losses(bench.folder / "chosen") == pytest.approx(
        losses(bench.folder / "plain"), rel=1e-6
    )
    found = load_checkpoint(bench.folder / "chosen")
    assert found is not None
    assert found[1].memory["gradient_checkpointing"] == how
    assert len(enabled) == (1 if how else 0)
    # a resumed run keeps its choice, even if more memory is available now
    monkeypatch.setattr(fit_into_memory, "choose_checkpointing", lambda *_: not how)
    shutil.rmtree(found[0])
    (bench.folder / "chosen/report.json").unlink()
    bench.run(path, "chosen", *sets, resume=True)
    assert len(enabled) == (2 if how else 0)
    assert all(model.is_gradient_checkpointing for model in enabled)


@pytest.mark.slow
def test_workers_do_not_change_the_run(bench: Bench) -> None:
    path = bench.recipe(adapter={"dropout": 0.2}, **TRAINING)
    bench.run(path, "none")
    bench.run(path, "two", "train.workers=2")
    assert (bench.folder / "two/samples.jsonl").read_bytes() == (
        bench.folder / "none/samples.jsonl"
    ).read_bytes()
    name = "adapter_model.safetensors"
    assert (bench.folder / "two" / name).read_bytes() == (bench.folder / "none" / name).read_bytes()


@pytest.mark.parametrize("kind", ["encoder", "llama"])
def test_the_split_into_micro_batches_does_not_change_the_run(bench: Bench, kind: str) -> None:
    path = bench.recipe(kind, **TRAINING)
    bench.run(path, "cut")
    bench.run(path, "whole", "train.micro_batch_size=4", "train.gradient_accumulation_steps=1")
    assert losses(bench.folder / "cut") == pytest.approx(losses(bench.folder / "whole"), rel=1e-4)


def test_tokens_and_examples_are_counted(bench: Bench) -> None:
    path = bench.recipe(
        "gpt2", train={"epochs": 2}, data={"train": "train.jsonl"}, task={"max_length": 128}
    )
    bench.run(path)
    tokenizer = AutoTokenizer.from_pretrained(bench.base("gpt2"))
    texts = [row["text"] for row in lines(bench.folder / "train.jsonl")]
    wanted = 2 * sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    found = load_checkpoint(bench.folder / "out")
    assert found is not None
    assert found[1].tokens == wanted


def test_parameters_that_the_forward_pass_does_not_use_are_named(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = load_trainable_model.make_trainable

    def attach(model: nn.Module, *rest: Any) -> None:
        real(model, *rest)
        model.extra = nn.Linear(2, 2)

    monkeypatch.setattr(load_trainable_model, "make_trainable", attach)
    bench.run(bench.recipe(**TRAINING))
    assert "warning: 2 trained parameters take no part" in capsys.readouterr().err


def test_frozen_batch_normalisation_is_not_updated() -> None:
    model = tiny.ConvNet()
    recipe = tiny.recipe_of(rank=2, target_modules=["point", "line"])
    attach(model, recipe, ["classifier"])
    state = {name: tensor.clone() for name, tensor in model.norm.state_dict().items()}
    optimizer = build_optimizer(model, recipe, ["classifier"])
    for _ in range(3):
        training_mode(model)
        assert model.stem.training
        assert not model.norm.training
        F.cross_entropy(model(torch.randn(4, 3, 12, 12)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(state[name], t) for name, t in model.norm.state_dict().items())


# ------------------------------------------------------------------------------------------- PEFT


def test_losses_equal_those_of_peft_in_a_plain_loop(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import get_scheduler

    spy = Spy(monkeypatch)
    targets = ["q_proj", "v_proj", "down_proj"]
    path = bench.recipe(
        "llama", data={"train": "train.jsonl"}, task={"max_length": 128},
        adapter={"rank": 4, "alpha": 8, "target_modules": targets},
        train={"max_steps": 20, "log_every_steps": 1, "optimizer": ADAMW, "max_grad_norm": 0.5,
               "scheduler": {"type": "cosine", "warmup_steps": 4}},
    )  # fmt: skip
    bench.run(path)

    base = AutoModelForCausalLM.from_pretrained(bench.base("llama"))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    with torch.no_grad():
        for name, matrix in spy.start.items():
            model.get_parameter(f"base_model.model.{name}.default.weight").copy_(matrix)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == len(spy.start)
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    scheduler = get_scheduler("cosine", optimizer, 4, 20)
    tokenizer = AutoTokenizer.from_pretrained(bench.base("llama"))
    texts = [row["text"] for row in lines(bench.folder / "train.jsonl")]
    pieces = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    wanted = []
    for sample in lines(bench.folder / "out/samples.jsonl"):
        chosen = [pieces[i] for i in sample["examples"]]
        width = max(map(len, chosen))
        ids = torch.tensor([c + [tiny.PAD] * (width - len(c)) for c in chosen])
        mask = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in chosen])
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        wanted.append(float(loss.detach()))
    assert len(wanted) == 20
    assert wanted[-1] < wanted[0]
    assert losses(bench.folder / "out") == pytest.approx(wanted, rel=1e-5)
    for name, layer in lora_layers(spy.model).items():
        theirs = model.get_parameter(f"base_model.model.{name}.lora_B.default.weight")
        torch.testing.assert_close(layer.lora_B, theirs, rtol=0.0, atol=1e-4)


# -------------------------------------------------------------------------------------- the display


@pytest.mark.slow
def test_tensorboard_gets_the_records_of_the_log(bench: Bench) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sections = {"train": {"trackers": ["tensorboard"], "log_every_steps": 5}}
    path = bench.recipe(**sections, checkpoint={"every_steps": 4})
    bench.cut(path, "out", 6)
    bench.run(path, resume=True)
    events = EventAccumulator(str(bench.folder / "out/tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    logged = {
        r["step"]: r["loss"] for r in lines(bench.folder / "out/metrics.jsonl") if "loss" in r
    }
    assert shown == pytest.approx(logged, rel=1e-6)
    assert len(events.Scalars("train/loss")) == 3  # step 5 of the killed run is not there twice
    assert "validation/accuracy" in events.Tags()["scalars"]


def test_lines_are_plain_without_a_terminal(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run(bench.recipe())
    captured = capsys.readouterr()
    assert captured.out == ""
    said = [line for line in captured.err.splitlines() if line.startswith("step ")]
    pattern = r"step +\d+/10  loss \d\.\d{4}  lr \S+  \S+ ex/s  \S+ tok/s  \S+ GiB  \d+:\d\d left"
    assert sum(bool(re.fullmatch(pattern, line)) for line in said) == 2
    assert sum("validation: loss" in line for line in said) == 5
    assert not any(re.search(r"[\x00-\x1f\x7f]", line) for line in said)


def test_the_log_is_strict_json(tmp_path: Path) -> None:
    from lora_cli.training.run_log import RunLog

    with RunLog(tmp_path, 2, 0, {}, [], "run") as log:
        log._write({"step": 1, "grad_norm": float("inf")})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "grad_norm": None}]


def test_a_state_is_read_back_as_written(tmp_path: Path) -> None:
    state = TrainState(step=3, unlogged_steps=2, unlogged_loss=float(torch.tensor(1.1) + 0.3))
    assert TrainState(**json.loads(json.dumps(vars(state)))) == state
