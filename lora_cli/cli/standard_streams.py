"""Standard input, output and error that are closed, or cannot be written to."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_cli.broken_pipe import guard_output
from lora_cli.errors import ResourceError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF)


def prepare_streams() -> None:
    """Replace closed streams by `/dev/null`, and let a run go on if its log cannot be written.

    The number of a closed stream would be given to the next file that is opened, and whatever a
    library prints would be written into that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number and not _is_open(number):
            os.dup2(opened, number)
            os.close(opened)
            opened = number
        stream = open(opened, mode, encoding="utf-8")  # noqa: SIM115 - for the whole run
        setattr(sys, name, stream)
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # whose encoding may not have every character of the data
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    guard_output()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Stream(sys.stdout, is_log=False)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Stream(sys.stderr, is_log=True)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


class _Stream:
    """A stream whose disk or pipe may be full.

    Args:
        stream: The stream to write to.
        is_log: Whether text that cannot be written is dropped. The output of a command is not
            dropped; that it cannot be written is an error.
    """

    def __init__(self, stream: io.TextIOWrapper, is_log: bool) -> None:
        self._stream, self._is_log = stream, is_log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        with self._warned():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts, one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._warned():
            self._stream.flush()

    @contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:  # such as a pipe that nobody reads any more
                raise
            if self._is_log:
                return
            what = f"the output cannot be printed: {(error.strerror or str(error)).lower()}"
            hint = "let stdout be a file or a pipe that takes it; files that were written are whole"
            raise ResourceError(what, "stdout", hint) from None
