"""Unexpected errors: three lines on the screen, and the traceback in a file."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.redaction import redacted

PHASE = "phase: "  # the beginning of the note that says what was being done


class UnexpectedError(LoraError):
    """An error that is a bug, of this tool or of a library, and no mistake of the user's."""

    exit_code = 1


@contextlib.contextmanager
def phase(what: str) -> Iterator[None]:
    """Remember what was being done, in case an unexpected error is raised within the context.

    Args:
        what: As it stands behind `while`: `reading the tokenizer`. The innermost one is shown.
    """
    try:
        yield
    except Exception as error:
        note_phase(error, what)
        raise


def note_phase(error: BaseException, what: str) -> None:
    """Note on an error what was being done, unless a more precise note is there already."""
    if _phase_of(error) is None:
        error.add_note(PHASE + what)


def _phase_of(error: BaseException) -> str | None:
    notes = getattr(error, "__notes__", [])
    return next((str(n).removeprefix(PHASE) for n in notes if str(n).startswith(PHASE)), None)


def unexpected_error(error: BaseException, arguments: Sequence[str]) -> UnexpectedError:
    """Return what to say of an unexpected error, and write its traceback into a file.

    Args:
        error: What was raised.
        arguments: Of the command, as they were typed.
    """
    command = shlex.join(["lora", *arguments])
    activity = _phase_of(error) or f"running `{shlex.join(['lora', *arguments[:1]])}`"
    file = _write(error, command)
    hint = "run it again with `--debug` to see the traceback, which no file could hold"
    if file is not None:
        hint = f"the traceback is in {file}; please report it together with the recipe"
    what = f"unexpected error while {activity}: {own_words(error)}"
    return UnexpectedError(what, _place(error), hint)


def own_words(error: BaseException) -> str:
    """Return the kind of an error and what it says, in one line.

    An error of a data loader's process says its whole traceback, whose last line is the error.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith(("Traceback (", "Original Traceback (")) for line in lines):
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """Return the last line of this tool's own code that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parent) + os.sep
    own = [frame for frame in frames if frame.filename.startswith(package)] or list(frames)
    if not own:
        return "lora"
    return f"lora_cli/{own[-1].filename.removeprefix(package)}:{own[-1].lineno}"


def _write(error: BaseException, command: str) -> Path | None:
    """Write a traceback, with secrets masked, into a file that only its owner can read."""
    text = f"$ {command}\n" + "".join(traceback.format_exception(error))
    try:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        handle, name = tempfile.mkstemp(f"-{stamp}.txt", "lora-error-", text=True)
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(redacted(text))
    except OSError:
        return None
    return Path(name)
