"""Tests of the log of training, against sums by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_cli.errors import NumericsError
from lora_cli.training.batches import PlannedStep
from lora_cli.training.step import StepResult
from lora_cli.training.step_log import StepLog, UnloggedSteps, trained_line
from lora_cli.training.train_state import TrainState

CPU = torch.device("cpu")
TASK: Any = SimpleNamespace(unit="token", result_of_term=lambda term: f"loss_{term}")


def planned(number: int, examples: int = 2, cost: int = 30) -> PlannedStep:
    return PlannedStep(number, list(range(examples)), cost, [], lambda: [f"row {number}"])


def result(loss: float, bad: bool = False, skipped: bool = False, **terms: float) -> StepResult:
    means = {term: torch.tensor(value) for term, value in terms.items()}
    return StepResult(
        torch.tensor(loss), means, torch.tensor(loss * 10), ["unused"],
        torch.tensor(bad), torch.tensor(bad or skipped),
    )  # fmt: skip


def test_a_line_has_means_of_good_steps_and_speeds_since_the_last_line() -> None:
    state = TrainState(step=6, seconds=4.0, examples=10, tokens=100)
    unlogged = UnloggedSteps(state, CPU)
    unlogged.add(planned(7), result(2.0, a=5.0, b=1.0))
    unlogged.add(planned(8), result(math.nan, bad=True, a=math.nan, b=math.nan))
    assert [bad.number for bad in unlogged.bad_steps] == [8]  # on a CPU it is known immediately
    unlogged.add(planned(9), result(3.0, skipped=True, a=6.0, b=4.0))
    state.step, state.seconds, state.examples, state.tokens = 9, 6.9, 17, 140
    assert unlogged.measurements(TASK) == {
        "loss": 2.5, "loss_a": 5.5, "loss_b": 2.5, "grad_norm": 30.0,
        "examples_per_s": 2.41, "tokens_per_s": 13.8, "seconds_per_step": 0.9667,
    }  # fmt: skip
    assert state.skipped_steps == 2
    assert [bad.number for bad in unlogged.bad_steps] == [8]
    assert unlogged.bad_streak == []  # a good step came after it


def test_a_line_of_one_step_has_the_seconds_of_that_step() -> None:
    state = TrainState()
    unlogged = UnloggedSteps(state, CPU)
    unlogged.add(planned(1), result(2.0))
    state.step, state.seconds = 1, 0.5
    assert unlogged.measurements(TASK)["seconds_per_step"] == 0.5


def test_the_loss_of_only_bad_steps_is_nan() -> None:
    state = TrainState()
    unlogged = UnloggedSteps(state, CPU)
    for number in (1, 2):
        unlogged.add(planned(number), result(math.inf, bad=True, a=math.inf))
    found = unlogged.measurements(TASK)
    assert math.isnan(found["loss"])
    assert found["loss_a"] == 0.0
    assert [step.number for step in unlogged.bad_streak] == [1, 2]
    # no step and no time since the last line
    assert (found["seconds_per_step"], found["examples_per_s"]) == (0.0, 0.0)


def test_a_resumed_run_logs_the_same_line() -> None:
    whole, before = (UnloggedSteps(TrainState(), CPU) for _ in range(2))
    for unlogged in (whole, before):
        unlogged.add(planned(1), result(2.0, a=5.0))
        unlogged.add(planned(2), result(9.0, bad=True, a=9.0))
    before.save_to_state()
    state = before.state
    assert (state.unlogged_steps, state.unlogged_loss, state.unlogged_terms) == (1, 2.0, {"a": 5.0})
    after = UnloggedSteps(state, CPU, before.bad_streak)
    assert [step.number for step in after.bad_streak] == [2]
    for unlogged in (whole, after):
        unlogged.add(planned(3), result(4.0, a=6.0))
        unlogged.state.step, unlogged.state.seconds = 3, 3.0
    keys = ("loss", "loss_a", "grad_norm")
    lines = [unlogged.measurements(TASK) for unlogged in (whole, after)]
    assert [lines[0][key] for key in keys] == [lines[1][key] for key in keys] == [3.0, 5.5, 40.0]
    after.clear_state()
    assert (state.unlogged_steps, state.unlogged_loss, state.unlogged_terms) == (0, 0.0, {})


class Log:
    """Records calls of a log."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.left: list[float] = []
        self.said: list[str] = []
        self.sampled: list[tuple[int, list[int]]] = []
        self.shown: list[int] = []
        self.idle: list[list[str]] = []

    def trained(self, record: dict[str, Any], seconds_left: float) -> None:
        self.records.append(record)
        self.left.append(seconds_left)

    def sample(self, step: int, examples: list[int]) -> None:
        self.sampled.append((step, examples))

    def advance(self, step: int) -> None:
        self.shown.append(step)

    def warn_of_idle(self, idle: list[str]) -> None:
        self.idle.append(idle)

    def say(self, text: str) -> None:
        self.said.append(text)


def step_log(
    monkeypatch: pytest.MonkeyPatch, total: int, every: int, scaler: Any = None
) -> tuple[StepLog, Log]:
    """Return a log whose steps take 2 s each."""
    times = iter(range(0, 1000, 1))
    monkeypatch.setattr("time.perf_counter", lambda: 2.0 * next(times))
    recipe = SimpleNamespace(
        train=SimpleNamespace(log_every_steps=every), at=lambda key: key, output_path=Path("none")
    )
    task: Any = SimpleNamespace(**vars(TASK), recipe=recipe)
    batches: Any = SimpleNamespace(total_steps=total, epoch_of=lambda step: step / 4)
    accelerator: Any = SimpleNamespace(device=CPU, scaler=scaler)
    gpu: Any = SimpleNamespace(record=lambda: {"gpu": 1}, new_notes=lambda: ["news"])
    log: Any = Log()
    return StepLog(log, TrainState(), task, batches, accelerator, gpu), log


def test_lines_are_written_for_the_first_the_last_and_every_nth_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, log = step_log(monkeypatch, total=7, every=3)
    for number in range(1, 8):
        steps.add(planned(number), result(float(number), bad=number == 4), 0.1 * number)
    assert [record["step"] for record in log.records] == [1, 3, 6, 7]
    assert [record["loss"] for record in log.records] == [1.0, 2.5, 5.5, 7.0]
    assert [record["epoch"] for record in log.records] == [0.25, 0.75, 1.5, 1.75]
    rates = [record["learning_rate"] for record in log.records]
    assert rates == pytest.approx([0.1, 0.3, 0.6, 0.7])
    # 2 s from line to line: 1, 2, 3 and 1 steps
    rates = [record["seconds_per_step"] for record in log.records]
    assert rates == [2.0, 1.0, 0.6667, 2.0]
    assert log.left == [6 * 2.0, 4 * 1.0, 1 * 0.6667, 0.0]
    assert [record["examples_per_s"] for record in log.records] == [1.0, 2.0, 3.0, 1.0]
    assert all(record["gpu"] == 1 for record in log.records)
    state = steps.state
    assert (state.step, state.examples, state.tokens, state.seconds) == (7, 14, 210, 8.0)
    assert log.shown == [1, 2, 3, 4, 5, 6, 7]
    assert log.sampled[1] == (2, [0, 1])
    assert log.idle == [["unused"]]
    assert len(log.said) == 5  # the bad step, once, and the notes on the GPU
    assert "step 4" in " ".join(log.said)


def test_a_vanished_loss_scale_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = SimpleNamespace(get_scale=lambda: 0.0)
    steps, _ = step_log(monkeypatch, total=3, every=1, scaler=scaler)
    with pytest.raises(NumericsError, match="gradients overflow in fp16 at step 1"):
        steps.add(planned(1), result(1.0), 0.1)


@pytest.mark.parametrize(
    ("rows", "without", "wanted"),
    [(8, 0, "trained 3 steps in 1:05"), (8, 5, "trained 3 steps on 3 of 8 rows in 1:05"),
     (None, 0, "trained 3 steps in 1:05")],
)  # fmt: skip
def test_the_final_line_has_the_duration_and_the_rows(
    rows: int | None, without: int, wanted: str
) -> None:
    split: Any = rows and SimpleNamespace(rows=[0] * rows, rows_without_example=without)
    assert trained_line(TrainState(step=3, seconds=65.0), split) == wanted
