"""A run that is killed with SIGKILL, whenever, and resumed is as if it had never been killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import RUNS, STEPS, Kill, Nursery, Whole, torment, write_recipe
from runs import assert_same_run

from lora_cli.training.checkpoints import checkpoints


@pytest.mark.parametrize("name", RUNS)
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


def test_resuming_what_never_began_begins(nest: Nursery, whole: Whole, tmp_path: Path) -> None:
    """In a shell loop the first call has nothing to resume, and the last finds all done."""
    recipe = whole.recipe
    out = tmp_path / "cut"
    assert nest.run(recipe, out, kill=Kill(0.0)) == [-signal.SIGKILL]
    assert nest.run(recipe, out, kill=Kill(0.0, "save")) == [-signal.SIGKILL]
    assert nest.run(recipe, out) == [0]
    assert_same_run(whole.out, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert nest.run(recipe, out) == [0]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.slow
def test_a_killed_launch_is_resumed_by_the_launcher(
    nest: Nursery, wholes: Callable[[str], Whole], tmp_path: Path
) -> None:
    """Two processes under `accelerate launch`, killed with their launcher."""
    whole = wholes("two processes")
    assert whole.processes == 2
    recipe = whole.recipe
    out = tmp_path / "cut"
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu",
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "lora_cli", "train", str(recipe), "-o", str(out), "--resume",
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        command, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not checkpoints(out):
        assert launcher.poll() is None
        time.sleep(0.01)
    for process in (*descendants(launcher.pid), launcher.pid):  # workers outlive their launcher
        os.kill(process, signal.SIGKILL)
    launcher.wait()
    assert not (out / "report.json").exists()
    assert nest.run(recipe, out, 2) == [0, 0]
    assert_same_run(whole.out, out)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def test_the_recipes_are_of_every_kind(tmp_path: Path) -> None:
    text = "".join(write_recipe(tmp_path, name)[0].read_text() for name in RUNS)
    for key in ("dropout: 0.", "gradient_accumulation_steps: 2", "packing: true", "workers: 2",
                "group_by_length: true", "streaming: true", "type: full"):  # fmt: skip
        assert key in text
