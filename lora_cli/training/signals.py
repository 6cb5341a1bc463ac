"""Signals that ask a run to stop: it saves first."""

from __future__ import annotations

import signal
from typing import Any


class StopSignals:
    """Within the context, SIGINT and SIGTERM are noted in `received` instead of ending the process.

    A second SIGINT ends it at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise SystemExit(128 + number)
        self.received = number
