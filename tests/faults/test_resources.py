"""Disk and memory run out, folders are taken or foreign, and machines change: nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from killing import STEPS, Kill, Nursery, Whole
from runs import assert_same_run
from tiny import recipe_of

from lora_cli.files import verify_manifest
from lora_cli.folder_lock import FolderLock
from lora_cli.training.checkpoints import checkpoints
from lora_cli.training.resource_errors import out_of_memory
from lora_cli.training.stop_request import TRAINING

Copy = Callable[[Path], Path]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@contextlib.contextmanager
def small_disk(place: Path, kib: int) -> Iterator[Path]:
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def said(out: Path) -> str:
    text = Path(f"{out}.0.log").read_text()
    assert "Traceback" not in text
    return text


# ------------------------------------------------------------------------------------------ disk


@root_only
def test_a_disk_without_room_is_refused_before_training(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 300) as disk:
        out = disk / "out"
        assert nest.run(whole.recipe, out) == [5]
        text = Path(f"{out}.0.log").read_text()
        assert "MiB free, and the run needs" in text
        assert "checkpoint.keep=1" in text
        assert "step" not in text.split("error:")[1]
        assert checkpoints(out) == []


@root_only
@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    """Something else takes the room while it trains; when there is room again, it goes on."""
    with small_disk(tmp_path / "disk", 16_000) as disk:
        out = disk / "out"
        assert nest.run(whole.recipe, out, kill=Kill(0.0, "save", 3)) == [-signal.SIGKILL]
        before = checkpoints(out)[-1]
        filler = disk / "filler"
        fill(filler, leave=disk_needs(out))
        ends = nest.run(whole.recipe, out, sets=["checkpoint.keep=1"])
        assert ends == [5]
        text = Path(f"{out}.0.log").read_text()
        assert "Traceback" not in text
        assert "disk" in text
        step, folder = checkpoints(out)[-1]
        assert step >= before[0]
        assert verify_manifest(folder)
        filler.unlink()
        assert nest.run(whole.recipe, out) == [0]
        assert_same_run(whole.out, out)


def fill(file: Path, leave: int) -> None:
    """Write a file that leaves so many bytes of the disk free."""
    free = shutil.disk_usage(file.parent).free
    file.write_bytes(b"\0" * max(free - leave, 0))


def disk_needs(out: Path) -> int:
    """Return room that is enough for the check before training, and too little for a save."""
    newest = checkpoints(out)[-1][1]
    return sum(f.stat().st_size for f in newest.iterdir()) // 2


@pytest.mark.slow
def test_a_limit_of_file_sizes_is_said_as_such(nest: Nursery, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ends = nest.run(whole.recipe, out, limits=[(resource.RLIMIT_FSIZE, 12_000)])
    assert ends == [5]
    text = said(out)
    assert "a file has grown larger than the system allows" in text
    for _, folder in checkpoints(out):
        assert verify_manifest(folder)
    assert nest.run(whole.recipe, out) == [0]
    assert_same_run(whole.out, out)


@root_only
def test_a_disk_that_can_only_be_read_is_refused_before_training(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 20_000) as disk:
        out = tmp_path / "link"
        out.symlink_to(disk / "out")
        (disk / "out").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert nest.run(whole.recipe, out) == [5]
        assert "cannot write to" in said(out)
        assert "Read-only file system" in said(out)


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("at", ["step", "evaluate"])
@pytest.mark.slow
def test_memory_that_is_full_is_said_with_what_would_help(
    nest: Nursery, whole: Whole, tmp_path: Path, at: str
) -> None:
    """One micro-batch needs more than the process may have; what is advised then works."""
    rows = [{"text": "a great story and so on " * 8, "label": i % 2} for i in range(1024)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ["data.check.near_duplicates=false", "evaluate.baseline=false", "train.max_steps=2",
            "evaluate.every_steps=1", "checkpoint.every_steps=1"]  # fmt: skip
    if at == "step":
        sets += [f"data.train={file}", "train.micro_batch_size=1024"]
    else:
        sets += [f"data.validation={file}", "evaluate.micro_batch_size=1024"]
    out = tmp_path / "out"
    assert nest.run(whole.recipe, out, sets=sets, squeeze=(at, 8 * 2**20)) == [5]
    text = said(out)
    assert "the memory is full while" in text
    hint = text[text.index("hint:") :]
    flags = hint[hint.index("`") + 1 : hint.index("` (the same")].split("--set ")[1:]
    assert nest.run(whole.recipe, out, sets=[*sets, *(flag.strip() for flag in flags)]) == [0]
    assert json.loads((out / "report.json").read_text())["training"]["steps"] == 2


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    ("now", "advised"), [(False, "true"), (True, "offload"), ("offload", None), ("auto", None)]
)
def test_as_much_checkpointing_is_advised_as_there_is_left(
    now: bool | str, advised: str | None, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    recipe = recipe_of()
    recipe = recipe.with_values({"train.gradient_checkpointing": now})
    hint = str(out_of_memory(recipe, 8, TRAINING))
    if advised is None or (advised == "offload" and not on_gpu):  # inputs are on the host already
        assert "gradient_checkpointing" not in hint
    else:
        assert f"`--set train.gradient_checkpointing={advised}`" in hint


# ------------------------------------------------------------------------------- locks and folders


def test_two_runs_do_not_share_a_folder(nest: Nursery, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    holder = os.fork()
    if holder == 0:
        lock = FolderLock(out)
        (tmp_path / "held").touch()
        time.sleep(60)
        os._exit(bool(lock))
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        assert nest.run(whole.recipe, out) == [2]
        assert f"process {holder} on" in said(out)
        assert nest.run(whole.recipe, out, resume=False) == [2]
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert (out / ".lock").exists()  # a dead process holds nothing, whatever it has left
    assert nest.run(whole.recipe, out, resume=False) == [0]
    assert not (out / ".lock").exists()
    assert_same_run(whole.out, out)


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        lock.release()
        other = os.fork()
        if other == 0:
            FolderLock(tmp_path)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 7
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_is_in_the_folder_is_never_overwritten(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for resume in (False, True):
        assert nest.run(whole.recipe, out, resume=resume) == [2]
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert nest.run(whole.recipe, whole.out, resume=False) == [2]


# ------------------------------------------------------------------------------ what has changed


CHANGES = {
    "learning rate": (["train.optimizer.learning_rate=0.5"], "`train.optimizer.learning_rate"),
    "batch": (["train.gradient_accumulation_steps=1"], "`train.examples_per_step: 4`"),
    "data": (["data.train=validation.jsonl", "data.check.max_overlap=1.0"], "`data.train:"),
    "length": (["train.max_steps=30"], f"`train.max_steps: {STEPS}`, the recipe now says `30`"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.slow
def test_a_changed_recipe_is_shown_and_refused_unless_allowed(
    nest: Nursery, whole: Whole, killed: Copy, tmp_path: Path, name: str
) -> None:
    out = killed(tmp_path / "out")
    sets, message = CHANGES[name]
    sets = [s.replace("=validation", f"={whole.recipe.parent}/validation") for s in sets]
    assert nest.run(whole.recipe, out, sets=sets) == [2]
    assert message in said(out)
    assert "--set checkpoint.allow_changes=true" in said(out)
    sets = [*sets, "checkpoint.allow_changes=true"]
    assert nest.run(whole.recipe, out, sets=sets) == [0]
    report = json.loads((out / "report.json").read_text())
    assert any(message in change for change in report["training"]["changes"])
    assert all(change.startswith("after step 9: ") for change in report["training"]["changes"])


@pytest.mark.slow
def test_another_machine_is_shown_and_refused_unless_allowed(
    nest: Nursery, whole: Whole, killed: Copy, tmp_path: Path
) -> None:
    out = killed(tmp_path / "out")
    assert 2 in nest.run(whole.recipe, out, 2)
    assert "`processes: 1`, and now it is `2`" in said(out)
    assert nest.run(whole.recipe, out, threads=2) == [2]
    assert "`threads: 1`, and now it is `2`" in said(out)
    assert "OMP_NUM_THREADS" in said(out)
    assert nest.run(whole.recipe, out) == [0]
    assert_same_run(whole.out, out)


def test_another_model_cannot_be_allowed(
    nest: Nursery, whole: Whole, killed: Copy, tmp_path: Path
) -> None:
    out = killed(tmp_path / "out")
    sets = ["adapter.rank=2", "checkpoint.allow_changes=true"]
    assert nest.run(whole.recipe, out, sets=sets) == [2]
    assert "allow_changes" not in said(out)


@pytest.mark.slow
def test_smaller_micro_batches_are_the_same_steps(
    nest: Nursery, whole: Whole, killed: Copy, tmp_path: Path
) -> None:
    """What the message of a full memory advises, typed in."""
    out = killed(tmp_path / "out")
    sets = ["train.micro_batch_size=1", "train.gradient_accumulation_steps=4"]
    assert nest.run(whole.recipe, out, sets=sets) == [0]
    assert "`micro_batch_size: 2`, and now it is `1`" in said(out)
    assert (out / "samples.jsonl").read_bytes() == (whole.out / "samples.jsonl").read_bytes()
