"""The command itself, started as a shell starts it: exit codes, pipes, full disks, odd names.

A start that needs torch takes seconds, so there are few: tests/golden/messages.md has all messages
with their exit codes, and test_signals.py stops runs.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save_file
from world import TABLE, World

from lora_cli.cli.app import main

ROOT = Path(__file__).parents[2]
Done = subprocess.CompletedProcess[bytes]


def start(*arguments: str | bytes, cwd: Path, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lora_cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment, **{**pipes, **options})


def lora(*arguments: str | bytes, cwd: Path, **options: Any) -> Done:
    with start(*arguments, cwd=cwd, **options) as process:
        out, err = process.communicate(timeout=120)
    assert b"Traceback" not in (err or b"")
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return a folder with rows and a recipe."""
    top = tmp_path_factory.mktemp("commands")
    tiny.save_encoder(top / "bases" / "encoder")
    world = World(top / "work", top / "bases")
    world.write("rows.csv", TABLE)
    world.recipe(task={"labels": ["bad", "good"]})
    return world


# ------------------------------------------------------------------------------------ exit codes


def worse(world: World) -> list[str]:
    assert world.lora("train", "recipe.yaml", "-o", "../bases/trained").code == 0
    world.trained("old")
    folder = world.folder / world.trained("new")
    (folder / "manifest.json").unlink()
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(
        {name: tensor * (-50 if "classifier" in name else 1) for name, tensor in tensors.items()},
        weights,
        {"format": "pt"},
    )
    return ["eval", "--adapter", "new", "--against", "old", "--input", "rows.csv",
            "--metric", "loss"]  # fmt: skip


CODES: dict[int, Callable[[World], list[str]]] = {
    0: lambda world: ["schema"],
    2: lambda world: ["validate", "recipe.yaml", "--set", "train.sed=1"],
}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.slow_after(1)
def test_the_exit_code_says_what_kind_of_fault_it_was(code: int, world: World) -> None:
    result = lora(*CODES[code](world), cwd=world.folder)
    assert result.returncode == code, result.stderr
    assert (b"error: " in result.stderr) == (code != 0)


def test_an_adapter_that_is_worse_has_a_code_of_its_own(world: World) -> None:
    printed = world.lora(*worse(world))  # in this process: the next would import torch again
    assert printed.code == 6, printed.err
    assert "error: " in printed.err


# ----------------------------------------------------------------------------------- the streams


@pytest.mark.slow
def test_whoever_reads_may_have_enough(world: World) -> None:
    with start("schema", cwd=world.folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_behind_stdout_is_said_so(world: World) -> None:
    with Path("/dev/full").open("wb") as full:
        result = lora("schema", cwd=world.folder, stdout=full)
    assert result.returncode == 5
    assert result.stderr.startswith(b"error: the output cannot be printed: no space left")


def test_a_terminal_without_the_letters_of_a_name_gets_their_codes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    name = "\u65e5.yaml"
    with world.inside():
        monkeypatch.setattr(sys, "argv", ["lora", "init", "rows.csv", "--model", str(
            world.bases / "encoder"), "-o", name])  # fmt: skip
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as exited:
            main()
    sys.stdout.flush()
    assert exited.value.code == 0
    assert b"\\u65e5.yaml" in raw.getvalue()


# ------------------------------------------------------------------------------------- odd names


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"\xff.yaml", b"\\udcff.yaml"), (b"a\nb %s {x}.yaml", b"a\\nb %s {x}.yaml")],
)
@pytest.mark.slow
def test_a_recipe_of_an_odd_name_is_named_in_one_line(
    name: bytes, shown: bytes, world: World
) -> None:
    (Path(os.fsdecode(os.path.join(os.fsencode(world.folder), name)))).write_text("model: {}\n")
    result = lora("train", name, cwd=world.folder)
    assert result.returncode == 2
    assert b"(" + shown + b":1)" in result.stderr
    assert all(line.startswith((b"error: ", b"  at ", b"hint: ")) for line in
               result.stderr.splitlines())  # fmt: skip


def test_rows_in_a_folder_of_an_odd_name_are_read(world: World) -> None:
    name = "a\nb %s {x} [1]/rows \u65e5.csv"
    world.write(name, TABLE)
    printed = world.lora("validate", "recipe.yaml", "--set", f"data.path={json.dumps(name)}")
    assert printed.code == 0, printed.err


def test_nothing_can_be_written_where_the_system_says_so(world: World) -> None:
    printed = world.lora(
        "init", "rows.csv", "--model", "../bases/encoder", "-o", "/proc/recipe.yaml"
    )
    assert printed.code == 5
    assert "error: the path cannot be used: no such file or directory" in printed.err
