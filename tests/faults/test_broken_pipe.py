"""`lora … | head`: a run saves before it ends, and what only prints ends quietly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
from killing import Nursery

from lora_cli.training.checkpoints import checkpoints

QUIET = 141


def piped(command: str, folder: Path, read: str) -> tuple[int, str, str]:
    """Run `lora COMMAND | READ` and return its exit code, what was read, and what it complained."""
    shell = f"set -o pipefail; {sys.executable} -m lora_cli {command} | {read}"
    done = subprocess.run(["bash", "-c", shell], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_run_whose_output_nobody_reads_saves_and_ends(nest: Nursery, tmp_path: Path) -> None:
    """As `lora train recipe.yaml 2>&1 | grep -m1 'step      5/5000'`."""
    train = {"max_steps": 5000, "log_every_steps": 1}
    path = tiny.recipe(tiny.save_encoder(tmp_path / "base"), tmp_path, train=train)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def read_until_the_fifth_step() -> None:
        with pipe.open() as lines:
            next(line for line in lines if "step      5/5000" in line)

    reader = threading.Thread(target=read_until_the_fifth_step)
    reader.start()
    assert nest.command(["train", str(path)], tmp_path / "out", pipe=pipe) == QUIET
    reader.join()
    step, folder = checkpoints(tmp_path / "out")[-1]
    assert 5 <= step < 5000
    assert json.loads((folder / "trainer.json").read_text())["step"] == step
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == step
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("flags", ["", " 2>&1"])
@pytest.mark.slow
def test_what_only_prints_ends_quietly(tmp_path: Path, flags: str) -> None:
    code, said, complained = piped(f"schema{flags}", tmp_path, "head -c 1")
    assert (said, complained) == ("{", "")
    assert code in (0, QUIET)  # 0 if the pipe took all of it before the end


@pytest.mark.slow
def test_a_pipe_without_a_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lora_cli", "schema"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (QUIET, "")


def test_a_pipe_that_is_read_gets_all(tmp_path: Path) -> None:
    code, said, complained = piped("schema", tmp_path, "cat")
    assert (code, complained) == (0, "")
    assert json.loads(said)["type"] == "object"
