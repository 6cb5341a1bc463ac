"""The memory that this process may still use, and the memory that it has used.

What the machine has free is not all that counts: a container or a batch job may be allowed less
(control groups), and a shell too (`ulimit -v`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

GIB = 2**30
PROC = Path("/proc")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60  # what is larger is how the kernel writes "no limit"


def available_bytes() -> int:
    """Return how much more memory this process can use: the least that any limit leaves."""
    return max(min([_of_machine(), *_of_control_groups(), *_of_process()]), 0)


def peak_bytes() -> int:
    """Return the most memory that this process has had in use at once (resident set size)."""
    if most := _keyed(PROC / "self/status").get("VmHWM", 0):
        return most
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB


def resident_bytes() -> int:
    """Return the memory that this process has in use now."""
    return _keyed(PROC / "self/status").get("VmRSS", 0) or peak_bytes()


def in_gib(count: float) -> str:
    """Return a number of bytes as text, in GiB."""
    return f"{count / GIB:.2f} GiB"


def _of_machine() -> int:
    """Return what is free, or can be freed at once; all that there is where nobody says more."""
    found = _keyed(PROC / "meminfo").get("MemAvailable")
    return found or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_control_groups() -> list[int]:
    """Return what each control group of this process leaves, those around it included."""
    left = []
    for line in _text(PROC / "self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top = CONTROL_GROUPS if number == "0" else CONTROL_GROUPS / "memory"
        files = ("memory.max", "memory.current", "inactive_file")
        if number != "0":  # the first version has other names
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        folder = top / path.lstrip("/")
        # in a container the path may be that outside of it
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            most, used = _number(group / files[0]), _number(group / files[1])
            if most is not None and used is not None and most < NO_LIMIT:
                # pages of files count as used, and are given back when they are needed
                left.append(most - used + _spaced(group / "memory.stat").get(files[2], 0))
    return left


def _of_process() -> list[int]:
    """Return what the limits of the process leave (`ulimit -v`, `ulimit -d`)."""
    try:
        import resource
    except ImportError:  # not on Windows
        return []
    used, left = _keyed(PROC / "self/status"), []
    for kind, key in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(kind)[0]
        if most != resource.RLIM_INFINITY:
            left.append(most - used.get(key, 0))
    return left


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None  # `max` is no limit


def _keyed(file: Path) -> dict[str, int]:
    """Return the sizes of a file of lines such as `VmRSS:  1234 kB`, in bytes."""
    words = [line.replace(":", " ").split() for line in _text(file).splitlines()]
    return {w[0]: int(w[1]) * 1024 for w in words if len(w) == 3 and w[2] == "kB"}


def _spaced(file: Path) -> dict[str, int]:
    """Return the numbers of a file of lines such as `inactive_file 1234`."""
    words = [line.split() for line in _text(file).splitlines()]
    return {w[0]: int(w[1]) for w in words if len(w) == 2 and w[1].isdecimal()}
