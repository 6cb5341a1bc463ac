"""What memory a process may still use, by each of the limits that it may have."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from lora_cli import machine_memory
from lora_cli.machine_memory import GIB, in_gib, peak_bytes, resident_bytes

AVAILABLE = machine_memory.available_bytes.__wrapped__  # type: ignore[attr-defined]  # conftest.py


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in the place of /proc, of a machine on which 8 GiB are available."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemFree: 5 kB\nMemAvailable: {8 * 2**20} kB\n")
    (folder / "self/status").write_text(f"Name:\tx\nVmSize:\t{2 * 2**20} kB\nVmRSS:\t1024 kB\n")
    (folder / "self/cgroup").write_text("0::/\n")
    monkeypatch.setattr(machine_memory, "PROC", folder)
    monkeypatch.setattr(machine_memory, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    return folder


def group(folder: Path, most: str, used: int, cached: int, old: bool = False) -> None:
    """Write what the kernel says of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    names = names if old else ("memory.max", "memory.current", "inactive_file")
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def test_without_limits_it_is_what_the_machine_has(proc: Path) -> None:
    assert AVAILABLE() == 8 * GIB


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("limited", ["", "batch", "batch/job"])
def test_control_groups(proc: Path, tmp_path: Path, old: bool, limited: str) -> None:
    """A group has the limits of those around it too; pages of files can be taken back."""
    top = tmp_path / "groups" / ("memory" if old else "")
    line = "4:cpu,memory:/batch/job\n" if old else "0::/batch/job\n"
    (proc / "self/cgroup").write_text(f"1:cpuset:/elsewhere\n{line}")
    no_limit = str(2**63 - 4096) if old else "max"
    for path in ("", "batch", "batch/job"):
        most = str(4 * GIB) if path == limited else no_limit
        group(top / path, most, used=3 * GIB, cached=GIB, old=old)
    assert AVAILABLE() == 2 * GIB


def test_the_path_of_a_container_may_not_be_there(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/docker/of/the/host\n")
    group(tmp_path / "groups", str(2 * GIB), used=GIB, cached=0)
    assert AVAILABLE() == GIB


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_limits_of_the_process(proc: Path, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {kind: 3 * GIB}
    monkeypatch.setattr(resource, "getrlimit", lambda k: (limits.get(k, -1), -1))
    used = 2 * GIB if kind == resource.RLIMIT_AS else 0
    assert AVAILABLE() == 3 * GIB - used


def test_more_than_is_allowed_is_in_use(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda k: (GIB, GIB))
    assert AVAILABLE() == 0


def test_of_this_process() -> None:
    before = resident_bytes()
    block = bytearray(b"x") * 2**26
    assert resident_bytes() - before > 2**25
    assert peak_bytes() >= resident_bytes() - 2**22
    del block
    assert peak_bytes() - before > 2**25
    assert in_gib(3 * GIB / 2) == "1.50 GiB"
