"""Errors that tell the user what is wrong, where, and how to fix it.

Every error that a user can cause is a `LoraError`. It carries one or more problems, each of which
says *what* is wrong, *where* (a recipe key, a file and line, a file and row), and *how* to fix it.
The class decides the exit code of the command:

| code | class              | meaning                                          |
|------|--------------------|--------------------------------------------------|
| 2    | `LoraError`        | the recipe, the arguments or the data are wrong  |
| 3    | `NumericsError`    | the numbers went bad (NaN or infinity)           |
| 4    | `IntegrityError`   | a file is not what it claims to be               |
| 5    | `ResourceError`    | a resource ran out (memory, disk, hours)         |
| 6    | `RegressionError`  | a new adapter is worse than the old one          |
| 130+ | `InterruptedRun`   | stopped by a signal, after saving                |
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.redaction import redacted

BACKUP = "restore it from a backup or train again"  # of files that were damaged
MOST_COMPARED = 1000  # names, of which the nearest is looked for
WIDTH = 1000  # characters of a line; data may hold 50 MB in one


@dataclass(frozen=True)
class Problem:
    """A single problem.

    Args:
        what: The error, in one line. Names the value that is wrong in backticks.
        at: Its location: `adapter.rank (recipe.yaml:14)` or `train.csv:17`.
        hint: What to do about it; a command or a value that works when typed in.
    """

    what: str
    at: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        lines = [f"error: {printable(self.what)}"]
        if self.at:
            lines.append(f"  at {printable(self.at)}")
        if self.hint:
            lines.append(f"hint: {printable(self.hint)}")
        return "\n".join(lines)


class LoraError(Exception):
    """Something that the user can fix: the recipe, the arguments or the data."""

    exit_code = 2

    def __init__(
        self, what: str | Sequence[Problem], at: str | None = None, hint: str | None = None
    ) -> None:
        self.problems = [Problem(what, at, hint)] if isinstance(what, str) else list(what)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class NumericsError(LoraError):
    """A value is not finite, such as a loss or a gradient."""

    exit_code = 3


class IntegrityError(LoraError):
    """A file is not what it claims to be: wrong hash, wrong base, missing tensors."""

    exit_code = 4


class ResourceError(LoraError):
    """A resource ran out: memory or disk."""

    exit_code = 5


class RegressionError(LoraError):
    """A new adapter is worse than the old one by more than the tolerance."""

    exit_code = 6


class InterruptedRun(LoraError):  # noqa: N818 - not an error: the run was asked to stop, and saved
    """A signal or a time limit stopped the run, after its state was saved."""

    def __init__(self, what: str, exit_code: int, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.exit_code = exit_code


def warn(what: str) -> None:
    """Print a warning on stderr: something to know that need not be fixed."""
    print(redacted(f"warning: {what}"), file=sys.stderr)  # noqa: T201 - stdout is for data


def printable(text: str, width: int = WIDTH) -> str:
    """Return a text as one line without terminal control sequences.

    What cannot be seen is written as its code: a line end, an escape, half of a character, a space
    of no width that makes two labels look the same.
    """
    if len(text) > width:
        from lora_cli.characters import first_characters  # which takes a while to import

        text = first_characters(text, width - 1) + "…"
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: `1 row`, `2 rows`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the candidate most similar to `name`, or None if none is close."""
    if len(name) > WIDTH:  # comparing takes longer than the text is worth
        return None
    near = list(candidates)
    if len(near) > MOST_COMPARED:
        near = [other for other in near if other[:1] == name[:1]][:MOST_COMPARED]
    close = difflib.get_close_matches(name, near, n=1, cutoff=cutoff)
    return close[0] if close else None


def system_error(error: BaseException) -> int | None:
    """Return the `errno` of a system error, whichever library raised it."""
    if isinstance(error, OSError):
        return error.errno
    # libraries written in Rust, as safetensors, have errors of their own, with the number in them
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def name_neighbours(path: Path) -> str:
    """Return a hint for a missing path: the nearest name beside it, or where the path starts.

    Args:
        path: As the user wrote it.
    """
    if path.is_file():
        return f"{path} is a file"
    if path.exists() and not path.is_dir():
        return f"{path} is a pipe or a device"
    try:
        names = sorted(other.name for other in path.absolute().parent.iterdir())
    except OSError:
        return f"there is no folder {path.parent} either; it starts from {Path.cwd()}"
    if close := nearest(path.name, names):
        return f"did you mean `{path.with_name(close)}`?"
    return "is the path right?" if path.is_absolute() else f"the path starts from {Path.cwd()}"


def require_file(path: Path, at: str) -> None:
    """Require that a path is an ordinary file.

    Args:
        path: As the user wrote it.
        at: The option or the key that names it.

    Raises:
        LoraError: If it is not there, or is a folder, a pipe or a device.
    """
    if path.is_file():
        return
    if path.is_dir():
        raise LoraError(f"{path} is a folder, and not a file", at, "name one file in it")
    if path.exists():
        hint = "write its content into a file, and name that"
        raise LoraError(f"{path} is a pipe or a device, and not a file", at, hint)
    raise LoraError(f"there is no file {path}", at, name_neighbours(path))


def did_you_mean(name: str, candidates: Iterable[str], noun: str = "one of") -> str:
    """Return a hint that names the nearest candidate, and all of them if they are few.

    Args:
        name: What was written.
        candidates: What could have been meant.
        noun: The words before the list of candidates: `its columns are`.
    """
    names = [str(candidate) or "(no name)" for candidate in candidates]
    if not names:
        return f"{noun} none"
    close = nearest(name, names)
    shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
    return f"did you mean `{close}`? ({noun} {shown})" if close else f"{noun} {shown}"
