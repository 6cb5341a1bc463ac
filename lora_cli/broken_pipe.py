"""Output into a closed pipe, as in `lora train … 2>&1 | head`.

The system tells of it with the next write, which fails. A command that only prints ends there,
quietly; a run of training is asked to stop, as by a signal, and saves first.
"""

from __future__ import annotations

import io
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CODE = 128 + signal.SIGPIPE  # what a shell shows of a command that the signal ended


def _end() -> None:
    raise SystemExit(CODE)


_listeners: list[Callable[[], None]] = [_end]


class _Pipe(io.FileIO):
    """Standard output or error; once it is broken, what is written to it goes nowhere."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            _listeners[-1]()
            return memoryview(data).nbytes


def guard_output() -> None:
    """Notice when nobody reads standard output or error any more; files and terminals stay."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or isinstance(stream.buffer, io.BytesIO):
            continue
        mode = os.fstat(stream.fileno()).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            stream.flush()
            guarded = io.TextIOWrapper(
                io.BufferedWriter(_Pipe(stream.fileno(), "wb", closefd=False)),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, guarded)


@contextmanager
def listening(then: Callable[[], None]) -> Iterator[None]:
    """Within the context, let a broken pipe call this, and not end the command."""
    _listeners.append(then)
    try:
        yield
    finally:
        _listeners.remove(then)
