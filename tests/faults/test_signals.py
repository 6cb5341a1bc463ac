"""Tests that a run saves and ends on a signal, and ends immediately on a second one."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import STEPS, Kill, Nursery, Whole
from runs import assert_same_run

from lora_cli.training.checkpoints import checkpoints

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize(
    ("at", "times", "number"),
    [
        ("step", 4, signal.SIGTERM),
        ("step", 7, signal.SIGINT),
        ("evaluate", 4, signal.SIGTERM),  # the first and second are of step 0
        ("evaluate", 3, signal.SIGHUP),
        ("save", 2, signal.SIGTERM),
        ("publish", 1, signal.SIGINT),
    ],
)
@pytest.mark.slow_after(1)
def test_a_signal_loses_nothing(
    nest: Nursery, whole: Whole, tmp_path: Path, at: str, times: int, number: signal.Signals
) -> None:
    out = tmp_path / "cut"
    assert nest.run(whole.recipe, out, kill=Kill(0.0, at, times, number)) == [CODES[number]]
    said = (tmp_path / "cut.0.log").read_text()
    assert "everything is saved" in said
    assert "`--resume`" in said
    assert "Traceback" not in said
    step, folder = checkpoints(out)[-1]
    made = len((out / "samples.jsonl").read_text().splitlines())
    assert made == step  # the step that was being made is the last, and it is saved
    due = json.loads((folder / "trainer.json").read_text())["evaluation_due"]
    assert due == (at == "evaluate")
    assert nest.run(whole.recipe, out) == [0]
    assert_same_run(whole.out, out)


@pytest.mark.parametrize(
    ("at", "times", "code"),
    [("load", 1, -signal.SIGTERM), ("evaluate", 1, 143), ("evaluate", 2, 143)],
)
@pytest.mark.slow
def test_before_the_first_step_there_is_nothing_to_save(
    nest: Nursery, whole: Whole, tmp_path: Path, at: str, times: int, code: int
) -> None:
    out = tmp_path / "cut"
    kill = Kill(0.0, at, times, signal.SIGTERM)
    assert nest.run(whole.recipe, out, kill=kill) == [code]
    assert checkpoints(out) == []
    if code > 0:
        assert "nothing new to save" in (tmp_path / "cut.0.log").read_text()
    assert nest.run(whole.recipe, out) == [0]
    assert_same_run(whole.out, out)


def test_the_command_saves_on_a_signal(nest: Nursery, whole: Whole, tmp_path: Path) -> None:
    """The exit code of the command, and its output on both streams."""
    out = tmp_path / "cut"
    flags = ["-o", str(out), "--set", "train.log_every_steps=1"]
    kill = Kill(0.0, "step", 5, signal.SIGTERM)
    assert nest.command(["train", str(whole.recipe), *flags], out, kill) == 143
    said = (tmp_path / "cut.0.log").read_text()
    assert (tmp_path / "cut.0.out").read_text() == ""
    assert "everything is saved" in said
    assert "Traceback" not in said
    assert re.search(rf"^step +1/{STEPS}  loss", said, re.MULTILINE)
    assert not re.search(r"[^\n\x20-\uffff]", said)  # a file is no terminal
    assert checkpoints(out)[-1][0] == 5


@pytest.mark.slow
def test_after_the_last_step_everything_is_saved(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    evaluations = 2 + STEPS // 5  # before, every five steps and after the last; then the best
    kill = Kill(0.0, "evaluate", evaluations + 1, signal.SIGTERM)
    assert nest.run(whole.recipe, out, kill=kill) == [143]
    assert not (out / "report.json").exists()
    assert nest.run(whole.recipe, out) == [0]
    assert_same_run(whole.out, out)


@pytest.mark.slow
def test_the_second_interruption_ends_immediately(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    """While it evaluates: the first would have it saved, and the second leaves it as it is."""
    out = tmp_path / "cut"
    slow = ["evaluate.micro_batch_size=1", "train.max_steps=2000", "checkpoint.every_steps=500"]
    began = time.monotonic()
    kill = Kill(0.0, "step", 100, signal.SIGINT, again=1.2)
    ends = nest.run(whole.recipe, out, kill=kill, sets=slow)
    assert ends == [130]
    assert time.monotonic() - began < 60
    for _, folder in checkpoints(out):
        assert (folder / "manifest.json").exists()


@pytest.mark.slow
def test_a_signal_to_the_whole_group_spares_the_workers(
    nest: Nursery, wholes: Callable[[str], Whole], tmp_path: Path
) -> None:
    """Schedulers and terminals signal all processes, including data loader workers."""
    whole = wholes("workers, length grouping")
    recipe = whole.recipe
    out = tmp_path / "cut"
    kill = Kill(0.0, "step", 5, signal.SIGTERM, group=True)
    assert nest.run(recipe, out, kill=kill) == [143]
    assert "everything is saved" in (tmp_path / "cut.0.log").read_text()
    assert nest.run(recipe, out) == [0]
    assert_same_run(whole.out, out)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(
    nest: Nursery, wholes: Callable[[str], Whole], tmp_path: Path
) -> None:
    whole = wholes("two processes")
    recipe = whole.recipe
    for at, times in (("step", 6), ("evaluate", 3)):
        out = tmp_path / at
        assert nest.run(recipe, out, 2, Kill(0.0, at, times, signal.SIGTERM)) == [143, 143]
        said = "".join(Path(f"{out}.{rank}.log").read_text() for rank in (0, 1))
        assert said.count("everything is saved") == 1
        assert nest.run(recipe, out, 2) == [0, 0]
        assert_same_run(whole.out, out)


@pytest.mark.slow
def test_ten_seconds_are_enough(nest: Nursery, whole: Whole, tmp_path: Path) -> None:
    """From the signal to the end of the process, in the middle of a long evaluation."""
    rows = (whole.recipe.parent / "validation.jsonl").read_text() * 400
    (tmp_path / "long.jsonl").write_text(rows)
    sets = [f"data.validation={tmp_path / 'long.jsonl'}", "evaluate.baseline=false",
            "evaluate.micro_batch_size=1", "data.check.max_overlap=1.0"]  # fmt: skip
    told = tmp_path / "told"
    kill = Kill(0.5, "evaluate", 1, signal.SIGTERM, note=str(told))
    assert nest.run(whole.recipe, tmp_path / "cut", kill=kill, sets=sets) == [143]
    assert time.time() - told.stat().st_mtime < 10
    _, folder = checkpoints(tmp_path / "cut")[-1]
    assert json.loads((folder / "trainer.json").read_text())["evaluation_due"]


@pytest.mark.slow
def test_a_run_ends_before_its_time_limit(nest: Nursery, whole: Whole, tmp_path: Path) -> None:
    out, seconds = tmp_path / "cut", 3
    sets = ["train.max_steps=100000", f"train.max_hours={seconds / 3600}",
            "evaluate.every_steps=1000"]  # fmt: skip
    began = time.monotonic()
    ends = nest.run(whole.recipe, out, sets=sets)
    assert time.monotonic() - began < seconds + 60  # all steps would take an hour
    assert ends == [5]
    said = (tmp_path / "cut.0.log").read_text()
    assert "hours of `train.max_hours` are over: stopped at step" in said
    step, _ = checkpoints(out)[-1]
    assert step == len((out / "samples.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_checkpoints_are_written_every_few_minutes(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / "often"
    sets = ["checkpoint.every_minutes=1e-6", "checkpoint.every_steps=1000", "checkpoint.keep=100"]
    assert nest.run(whole.recipe, out, sets=sets) == [0]
    assert [step for step, _ in checkpoints(out)] == list(range(1, STEPS + 1))
    assert_same_run(whole.out, out)


@pytest.mark.slow
def test_a_terminal_that_is_gone_is_no_reason_under_nohup(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    out, kill = tmp_path / "out", Kill(0.0, "step", 3, signal.SIGHUP)
    assert nest.run(whole.recipe, out, kill=kill, ignored=[signal.SIGHUP]) == [0]
    assert (out / "report.json").exists()
