"""Signals that ask a run to stop: it saves first."""

from __future__ import annotations

import signal
import time
from typing import Any


class StopSignals:
    """Within the context, SIGINT and SIGTERM are noted in `received` instead of ending the process.

    A second SIGINT ends it at once, if it comes after a moment: a launcher passes Ctrl-C on to
    processes that got it from the terminal already.
    """

    MOMENT_S = 1.0

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
        elif number == signal.SIGINT and now - self._since > self.MOMENT_S:
            raise SystemExit(128 + number)
