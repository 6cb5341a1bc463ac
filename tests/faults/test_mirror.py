"""Tests that a run continues from its mirror on another machine, as if uninterrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from killing import STEPS, Kill, Nursery, Whole
from runs import assert_same_run

from lora_cli.files import verify_manifest
from lora_cli.training.checkpoints import checkpoints


def said(out: Path) -> str:
    text = Path(f"{out}.0.log").read_text()
    assert "Traceback" not in text
    return text


def whole_ones(mirror: Path) -> list[str]:
    """Return the folders of a mirror that have a matching manifest."""
    return sorted(
        folder.name
        for folder in mirror.iterdir()
        if (folder / "manifest.json").exists() and verify_manifest(folder)
    )


@pytest.mark.parametrize("form", ["{}", "file://{}", "local://{}"])
@pytest.mark.slow
def test_a_new_machine_continues_the_run(
    nest: Nursery, whole: Whole, tmp_path: Path, form: str
) -> None:
    sets = [f"checkpoint.mirror={form.format(tmp_path / 'mirror')}"]
    out = tmp_path / "out"
    kill = Kill(0.0, "save", 5)
    assert nest.run(whole.recipe, out, kill=kill, sets=sets) == [-signal.SIGKILL]
    assert whole_ones(tmp_path / "mirror") == ["step-000009", "step-000012"]
    shutil.rmtree(out)
    assert nest.run(whole.recipe, out, sets=sets) == [0]
    assert "restored step-000012 from" in said(out)
    assert_same_run(whole.out, out)
    assert "final" in whole_ones(tmp_path / "mirror")


@pytest.mark.slow
def test_a_complete_run_is_restored_as_complete(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    sets = [f"checkpoint.mirror={tmp_path / 'mirror'}"]
    out = tmp_path / "out"
    assert nest.run(whole.recipe, out, sets=sets) == [0]
    files = {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "mirror").rglob("*")}
    shutil.rmtree(out)
    Path(f"{out}.0.log").unlink()
    assert nest.run(whole.recipe, out, sets=sets) == [0]
    assert "restored final" in said(out)
    assert "trained" not in said(out)
    kept = {f for f in files if f.parts[0] != "checkpoints"}
    assert {p.relative_to(out) for p in out.rglob("*") if p.is_file()} == kept
    assert verify_manifest(out)
    assert (out / "report.json").read_bytes()
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "mirror").rglob("*")}
    assert before == after  # and nothing is copied again


@pytest.fixture(scope="module")
def per_checkpoint(nest: Nursery, whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Return how many files are copied with a checkpoint: the next begins after so many."""
    top = tmp_path_factory.mktemp("counted")
    sets = [f"checkpoint.mirror={top / 'mirror'}"]
    nest.run(whole.recipe, top / "out", kill=Kill(0.0, "save", 2), sets=sets)
    files = [p for p in (top / "mirror" / "step-000003").rglob("*") if p.is_file()]
    return len(files) - 1  # the manifest comes by another call


@pytest.mark.parametrize("number", [1, 2, 6, 11])
@pytest.mark.slow
def test_a_machine_that_dies_in_the_middle_of_copying(
    nest: Nursery, whole: Whole, per_checkpoint: int, tmp_path: Path, number: int
) -> None:
    """Before the n-th file of the second checkpoint: the first is whole, and is gone on from."""
    sets = [f"checkpoint.mirror={tmp_path / 'mirror'}"]
    out = tmp_path / "out"
    kill = Kill(0.0, "upload", per_checkpoint + number)
    assert nest.run(whole.recipe, out, kill=kill, sets=sets) == [-signal.SIGKILL]
    assert whole_ones(tmp_path / "mirror") == ["step-000003"]
    part = tmp_path / "mirror" / "step-000006"
    assert sum(path.is_file() for path in part.rglob("*")) == number - 1
    shutil.rmtree(out)
    assert nest.run(whole.recipe, out, sets=sets) == [0]
    assert "step-000006" in said(out).split("restored")[0]  # what is passed over is named
    assert "restored step-000003" in said(out)
    assert_same_run(whole.out, out)


@pytest.mark.slow
def test_a_damaged_copy_is_skipped_and_named(nest: Nursery, whole: Whole, tmp_path: Path) -> None:
    mirror, out = tmp_path / "mirror", tmp_path / "out"
    sets = [f"checkpoint.mirror={mirror}"]
    kill = Kill(0.0, "save", 5)
    assert nest.run(whole.recipe, out, kill=kill, sets=sets) == [-signal.SIGKILL]
    shutil.rmtree(out)
    weights = mirror / "step-000012" / "checkpoint" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert nest.run(whole.recipe, out, sets=sets) == [0]
    assert "step-000012" in said(out)
    assert "is skipped" in said(out)
    assert "restored step-000009" in said(out)
    assert_same_run(whole.out, out)


@pytest.mark.slow
def test_a_machine_that_dies_while_restoring_restores_again(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    mirror, out = tmp_path / "mirror", tmp_path / "out"
    sets = [f"checkpoint.mirror={mirror}"]
    kill = Kill(0.0, "save", 5)
    assert nest.run(whole.recipe, out, kill=kill, sets=sets) == [-signal.SIGKILL]
    shutil.rmtree(out)
    for times in (1, 2, 4):
        kill = Kill(0.0, "restore", times)
        assert nest.run(whole.recipe, out, kill=kill, sets=sets) == [-signal.SIGKILL]
        assert checkpoints(out) == []
    assert nest.run(whole.recipe, out, sets=sets) == [0]
    assert "restored step-000012" in said(out)
    assert_same_run(whole.out, out)


def test_a_mirror_that_cannot_be_written_is_an_error_before_training(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / "out"
    sets = [f"checkpoint.mirror={tmp_path / 'file' / 'inside'}"]
    assert nest.run(whole.recipe, out, sets=sets) == [5]
    assert "cannot write to" in said(out)
    assert "checkpoint.mirror" in said(out)
    assert nest.run(whole.recipe, tmp_path / "a", sets=["checkpoint.mirror=nonesuch://b"]) == [2]
    assert "nonesuch" in said(tmp_path / "a")


@pytest.mark.slow
def test_a_mirror_that_fails_temporarily_does_not_stop_the_run(
    nest: Nursery, whole: Whole, tmp_path: Path
) -> None:
    """A warning is printed, training continues, and the next checkpoint is copied."""
    mirror, out = tmp_path / "mirror", tmp_path / "out"
    gone = ["checkpoint.every_steps=6", f"checkpoint.mirror={mirror}"]
    mirror.mkdir()
    (mirror / "step-000006").write_text("in the way")
    os.chmod(mirror / "step-000006", 0o400)
    assert nest.run(whole.recipe, out, sets=gone) == [0]
    assert {"step-000012", f"step-0000{STEPS}", "final"} <= set(whole_ones(mirror))
    assert_same_run(whole.out, out)
    report = json.loads((out / "report.json").read_text())
    assert report["training"]["steps"] == STEPS


def test_an_invalid_mirror_address_is_an_error(nest: Nursery, whole: Whole, tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"no archive")
    sets = [f"checkpoint.mirror=zip://inside::{tmp_path / 'broken.zip'}"]
    assert nest.run(whole.recipe, tmp_path / "a", sets=sets) == [2]
    assert "cannot be used as a mirror: File is not a zip file" in said(tmp_path / "a")
    # a port of this machine at which nobody listens, as of a store that is down
    sets = ["checkpoint.mirror=http://127.0.0.1:9/runs"]
    assert nest.run(whole.recipe, tmp_path / "b", sets=sets) == [5]
    assert "http://127.0.0.1:9/runs" in said(tmp_path / "b").split("error:")[1]
