"""Tests that a run that is killed at any time and resumed equals an uninterrupted one."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import RUNS, STEPS, Kill, Nursery, Whole, torment, write_recipe
from runs import assert_same_run

from lora_cli.training.checkpoints import checkpoints


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_random_kills_change_nothing(
    nest: Nursery, wholes: Callable[[str], Whole], tmp_path: Path, name: str
) -> None:
    """One here; `scripts/chaos` kills hundreds."""
    outcome = torment(nest, tmp_path, wholes(name), 1, random.Random(name))
    assert outcome.differences == []
    assert outcome.kills == 1


def test_every_step_can_be_the_last(nest: Nursery, whole: Whole, tmp_path: Path) -> None:
    """Row 2: each step in turn, across accumulation, the edge of an epoch and its short batch."""
    recipe, sets = whole.recipe, ["checkpoint.every_steps=1"]
    out = tmp_path / "cut"
    seen = []
    for _ in range(5):  # the second save of each process: two steps on
        kill = Kill(0.0, "save", 2)
        assert nest.run(recipe, out, kill=kill, sets=sets) == [-signal.SIGKILL]
        seen.append(checkpoints(out)[-1][0])
    assert seen == sorted(seen)
    assert nest.run(recipe, out, sets=sets) == [0]
    steps = [json.loads(line)["step"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))  # none twice, none lost


@pytest.mark.slow
def test_resuming_without_a_run_starts_one(nest: Nursery, whole: Whole, tmp_path: Path) -> None:
    """In a shell loop, the first call has nothing to resume, and the last finds a complete run."""
    recipe = whole.recipe
    out = tmp_path / "cut"
    assert nest.run(recipe, out, kill=Kill(0.0)) == [-signal.SIGKILL]
    assert nest.run(recipe, out, kill=Kill(0.0, "save")) == [-signal.SIGKILL]
    assert nest.run(recipe, out) == [0]
    assert_same_run(whole.out, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert nest.run(recipe, out) == [0]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_the_recipes_are_of_every_kind(tmp_path: Path) -> None:
    text = "".join(write_recipe(tmp_path, name)[0].read_text() for name in RUNS)
    for key in ("dropout: 0.", "gradient_accumulation_steps: 2", "packing: true", "workers: 2",
                "group_by_length: true", "streaming: true", "type: full"):  # fmt: skip
        assert key in text
