"""Handle standard streams that are closed, or that cannot be written to."""

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

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF)


def prepare_streams() -> None:
    """Replace closed streams by `/dev/null`, and let a run continue if its log cannot be written.

    Otherwise the next file that is opened would get the number of a closed stream, and what a
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
    for stream in (sys.stdout, sys.stderr):
        # its encoding may lack characters of the data
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
    """A stream whose disk may be full.

    Args:
        stream: The stream to write to.
        is_log: Whether to drop text that cannot be written. For the output of a command, which is
            no log, this is an error.
    """

    def __init__(self, stream: io.TextIOWrapper, is_log: bool) -> None:
        self._stream, self._is_log = stream, is_log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        with self._handled_errors():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts, one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._handled_errors():
            self._stream.flush()

    @contextmanager
    def _handled_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in WRITE_ERRORS:  # such as a pipe whose reader has closed it
                raise
            if self._is_log:
                return
            what = f"the output cannot be printed: {(error.strerror or str(error)).lower()}"
            hint = "redirect stdout elsewhere; files that were already written are complete"
            raise ResourceError(what, "stdout", hint) from None
