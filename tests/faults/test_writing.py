"""Folders whose writer is killed after each call that touches the disk: the old or the new, whole.

The writer is a forked process that ends itself with SIGKILL: nothing in it is told, no `finally`
runs. Its calls are counted by Python's profiler, which sees each call of a function written in C.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny
import torch

from lora_cli import files
from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.adapters.peft_format.adapter_folder import read_adapter, read_tensors
from lora_cli.errors import LoraError
from lora_cli.files import (
    MANIFEST,
    READY,
    finish_publishing,
    new_folder,
    publish,
    recover,
    verify_manifest,
    write_atomically,
)
from lora_cli.folder_lock import LOCK, FolderLock
from lora_cli.models.fingerprint import Fingerprint
from lora_cli.training.checkpoints import (
    checkpoints,
    clear_leftovers,
    load_checkpoint,
    save_checkpoint,
)
from lora_cli.training.optimizers import build_optimizer
from lora_cli.training.published_adapter import publish_adapter
from lora_cli.training.train_state import TrainState

# the child starts no thread, and takes no lock that a thread of the parent may hold
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("real_fsync"),
]

# what changes the disk; a file that was opened, and no more, is one that was not written yet
TOUCHING = {"write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink"}


def killed_after(count: int, write: Callable[[], object]) -> bool:
    """Run a function in a process that is killed after so many calls; return whether it was."""
    child = os.fork()
    if child == 0:
        left = [count]

        def watch(_frame: FrameType, event: str, called: Any) -> None:
            if event == "c_return" and called.__name__ in TOUCHING:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.setprofile(watch)
            write()
            sys.setprofile(None)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def each_death(
    tmp_path: Path,
    prepare: Callable[[Path], object],
    write: Callable[[Path], object],
    later: int = 1,
) -> Iterator[Path]:
    """Yield a folder, prepared anew, after each death of the process that wrote into it.

    The first one dies after its first call, each of the others a call later (or so many); and the
    last lives.
    """
    for count in itertools.count(1, later):
        folder = tmp_path / f"dies-after-{count}"
        folder.mkdir(parents=True)
        prepare(folder)
        died = killed_after(count, functools.partial(write, folder))
        yield folder
        if not died:
            break
    assert count > 3


def fill(folder: Path, text: str) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json"):
        (folder / name).write_text(f"{text} of {name}")


def content(folder: Path) -> str:
    """Return which version a folder holds; it has to be whole."""
    assert verify_manifest(folder, "adapter_config.json", "base.json")
    found = {p.read_text().partition(" of ")[0] for p in folder.iterdir() if p.name != MANIFEST}
    assert len(found) == 1, found
    return found.pop()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def new(target: Path, text: str) -> None:
    with new_folder(target) as folder:
        fill(folder, text)


def published(target: Path, text: str) -> None:
    staging = target / files.STAGING
    staging.mkdir()
    fill(staging, text)
    publish(staging, target)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.slow
def test_a_checkpoint_is_the_old_or_the_new_whenever_its_writer_dies(
    exists: bool, tmp_path: Path
) -> None:
    seen = []
    for parent in each_death(
        tmp_path,
        lambda parent: new(parent / "step-000010", "old") if exists else None,
        lambda parent: new(parent / "step-000010", "new"),
    ):
        target = parent / "step-000010"
        recover(parent)
        seen.append(content(target) if target.exists() else "nothing")
        assert names(parent) in (["step-000010"], [])
    before = "old" if exists else "nothing"
    assert seen == sorted(seen, key=[before, "new"].index)
    assert set(seen) == {before, "new"}


def test_what_dies_before_it_is_whole_is_deleted_by_the_next_that_writes(tmp_path: Path) -> None:
    """Also where nobody may recover: another process may be writing another folder beside it."""
    (tmp_path / f".other.{os.getppid()}.tmp").mkdir()
    (tmp_path / f".merged.{os.getppid()}.tmp").mkdir()  # of a process that lives
    there = names(tmp_path)
    assert killed_after(12, lambda: new(tmp_path / "merged", "first"))
    assert len(names(tmp_path)) == 3
    new(tmp_path / "merged", "second")
    assert names(tmp_path) == sorted([*there, "merged"])
    assert content(tmp_path / "merged") == "second"


def test_what_is_published_is_the_old_or_the_new_whenever_its_writer_dies(tmp_path: Path) -> None:
    def prepare(target: Path) -> None:
        (target / "recipe.yaml").write_text("of the run")
        published(target, "old")

    seen = []
    for target in each_death(tmp_path, prepare, lambda target: published(target, "new")):
        (target / "recipe.yaml").unlink()
        ready = (target / READY).exists()
        finish_publishing(target)  # as every reader does
        leftovers = [n for n in names(target) if n.startswith(".")]
        assert leftovers in ([], [files.STAGING])
        recover(target)  # as the run does when it goes on
        seen.append((content(target), ready))
        published(target, "newer")
        assert content(target) == "newer"
        assert names(target) == sorted(
            ["adapter_config.json", "adapter_model.safetensors", "base.json", MANIFEST]
        )
    # there is a moment in which files are moved, and a reader finishes it
    assert {("old", False), ("new", True), ("new", False)} == set(seen)


def test_the_one_who_finishes_may_die_too(tmp_path: Path) -> None:
    def prepare(target: Path) -> None:
        published(target, "old")
        staging = target / files.STAGING
        staging.mkdir()
        fill(staging, "new")
        files.write_manifest(staging)
        staging.rename(target / READY)
        (target / READY / "adapter_config.json").replace(target / "adapter_config.json")

    for target in each_death(tmp_path, prepare, finish_publishing):
        finish_publishing(target)
        (target / LOCK).unlink(missing_ok=True)
        assert content(target) == "new"


def test_a_file_is_the_old_or_the_new_whenever_its_writer_dies(tmp_path: Path) -> None:
    seen = []
    for folder in each_death(
        tmp_path,
        lambda folder: (folder / "report.json").write_text("old"),
        lambda folder: write_atomically(folder / "report.json", "new"),
    ):
        recover(folder)
        assert names(folder) == ["report.json"]
        seen.append((folder / "report.json").read_text())
    assert set(seen) == {"old", "new"}


class Work:
    """A small adapter with its optimizer, saved as a run saves it."""

    def __init__(self) -> None:
        self.model = tiny.encoder()
        self.recipe = tiny.recipe_of(rank=2, target_modules=["query"])
        self.recipe = self.recipe.with_values({"checkpoint.keep": 1})
        attach(self.model, self.recipe, ["classifier"])
        self.optimizer = build_optimizer(self.model, self.recipe, ["classifier"])
        self.base = Fingerprint("base", "main", {"a": "00"})

    def step(self, number: int) -> None:
        for parameter in trainable_parameters(self.model).values():
            parameter.grad = torch.full_like(parameter, float(number))
        self.optimizer.step()

    def save(self, output: Path, number: int) -> None:
        trained = (self.model, self.recipe, ["classifier"], self.base)
        save_checkpoint(output, TrainState(step=number), self.optimizer, *trained)
        publish_adapter(output, *trained, None)


@pytest.mark.slow
def test_a_run_has_a_whole_checkpoint_and_a_whole_adapter_whenever_it_dies(tmp_path: Path) -> None:
    """With the tensors, the optimizer and the rotation of a real run."""
    work = Work()
    work.step(1)
    work.save(tmp_path / "first", 1)
    first = read_tensors(tmp_path / "first")
    work.step(2)
    seen = []
    for output in each_death(
        tmp_path / "deaths",
        lambda output: shutil.copytree(tmp_path / "first", output, dirs_exist_ok=True),
        lambda output: work.save(output, 2),
        later=3,
    ):
        held = read_adapter(output)  # before anybody clears up
        clear_leftovers(output)
        found = load_checkpoint(output)
        assert found is not None
        assert not list(output.rglob(".*"))
        same = torch.equal(next(iter(held.tensors.values())), next(iter(first.values())))
        seen.append((found[1].step, "old" if same else "new"))
        work.save(output, 2)
        assert [step for step, _ in checkpoints(output)] == [2]
    assert set(seen) == {(1, "old"), (2, "old"), (2, "new")}
    assert seen == sorted(seen, key=[(1, "old"), (2, "old"), (2, "new")].index)


WRITER = """
import sys, time
from pathlib import Path
from lora_cli import files
from lora_cli.folder_lock import FolderLock

target = Path(sys.argv[1])
lock = FolderLock(target)
print("locked", flush=True)
sys.stdin.readline()
files._move_ready(target)
lock.release()
"""


def test_a_reader_waits_for_a_writer_that_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / READY).mkdir()
    fill(tmp_path / READY, "new")
    files.write_manifest(tmp_path / READY)
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "locked\n"
        monkeypatch.setattr(files, "PATIENCE_S", 0.1)
        with pytest.raises(LoraError, match="is writing to"):
            finish_publishing(tmp_path)
        monkeypatch.setattr(files, "PATIENCE_S", 30.0)
        threading.Timer(0.3, lambda: print(file=writer.stdin, flush=True)).start()
        finish_publishing(tmp_path)
    assert content(tmp_path) == "new"  # the writer has ended, and taken its lock with it
    FolderLock(tmp_path).release()


PUBLISHER = """
import sys
from pathlib import Path
from lora_cli import files
from lora_cli.folder_lock import FolderLock

target = Path(sys.argv[1])
lock = FolderLock(target)
print("locked", flush=True)
for number in range(60):
    staging = target / files.STAGING
    staging.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json"):
        (staging / name).write_text(f"{number} of {name}")
    files.publish(staging, target)
lock.release()
"""


def test_a_reader_never_sees_the_half_of_what_a_run_publishes(tmp_path: Path) -> None:
    published(tmp_path, "first")
    command = [sys.executable, "-c", PUBLISHER, str(tmp_path)]
    reads = 0
    with subprocess.Popen(command, stdout=-1, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "locked\n"
        while writer.poll() is None:
            assert verify_manifest(tmp_path, "adapter_config.json", "base.json")
            reads += 1
    assert writer.returncode == 0
    assert reads > 10
    assert content(tmp_path) == "59"


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    """A tokenizer with several chat templates has a folder of them."""
    for text in ("old", "new"):
        (tmp_path / files.STAGING / "templates").mkdir(parents=True)
        (tmp_path / files.STAGING / "templates" / f"{text}.jinja").write_text(text)
        publish(tmp_path / files.STAGING, tmp_path)
        assert names(tmp_path / "templates") == [f"{text}.jinja"]
        assert verify_manifest(tmp_path, f"templates/{text}.jinja")
