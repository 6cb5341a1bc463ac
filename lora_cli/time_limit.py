"""A limit on the computing time of programs that come with models and data."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import ITIMER_VIRTUAL, SIGVTALRM, setitimer, signal
from types import FrameType


class TooLongError(Exception):
    """Code of a model or a data set has used up its time."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let a block of Python compute for so long at most.

    What is counted is this process's own computing, not the time that passes: a machine that is
    busy with other things changes nothing. Outside the main thread there is no limit.

    Args:
        seconds: Of computing.

    Raises:
        TooLongError: From within the block, when they are over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise TooLongError(f"it computed for more than {seconds:g} seconds")

    before = signal(SIGVTALRM, stop)
    setitimer(ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        setitimer(ITIMER_VIRTUAL, 0)
        signal(SIGVTALRM, before)
