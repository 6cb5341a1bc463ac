"""What asks a run to stop before its end: a signal, or the hours that the recipe gives it."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from lora_cli.broken_pipe import listening
from lora_cli.errors import InterruptedRun, ResourceError
from lora_cli.recipe import Recipe

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOADING, TRAINING = "loading the model", "training"  # two of the things that a run does
HOURS_ARE_OVER = -1  # stands where the number of a signal would


class Stopping(Exception):  # noqa: N818 - not an error: whoever catches it saves, and leaves
    """An evaluation was broken off because the run was asked to stop.

    Args:
        by: A signal's number, or `HOURS_ARE_OVER`.
    """

    def __init__(self, by: int) -> None:
        super().__init__(by)
        self.by = by


@dataclass
class Asked:
    """What is asked of a run between two steps; the same for all of its processes."""

    stop: int
    """A signal's number, `HOURS_ARE_OVER`, or 0."""
    checkpoint: bool
    """Whether the minutes between two checkpoints are over."""


class StopRequest:
    """Within the context, a signal that would end the process is noted instead.

    A broken pipe counts as one: nobody reads any more what the run says.

    While `at_once` is set there is nothing to save, and a signal ends the process after all. A
    second SIGINT always does, if it comes after a moment: a launcher passes Ctrl-C on to processes
    that got it from the terminal already.

    Args:
        recipe: Says how long the run may take, and how often it is saved.
        accelerator: The processes, which have to stop together.
        started: When the command started, as `time.monotonic` counts.
    """

    MOMENT_S = 1.0

    def __init__(self, recipe: Recipe, accelerator: Accelerator, started: float) -> None:
        self.accelerator = accelerator
        self.max_hours = max_hours = recipe.train.max_hours
        self.every_minutes = recipe.checkpoint.every_minutes
        self.received = 0
        self.at_once = False
        self.activity = LOADING
        self._until = started + max_hours * 3600 if max_hours else None
        self._saved = time.monotonic()
        self._longest_step_s = self._longest_save_s = 0.0
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._pipes = ExitStack()

    def __enter__(self) -> StopRequest:
        self._pipes.enter_context(listening(lambda: self._note(signal.SIGPIPE, None)))
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as with nohup
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._pipes.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
            if self.at_once:
                what = f"stopped while {self.activity}; there was nothing new to save"
                raise self.error(what, number)
        elif number == signal.SIGINT and now - self._since > self.MOMENT_S:
            raise SystemExit(128 + number)

    def stepped(self, seconds: float) -> None:
        """Learn how long a step takes, so that the run ends before the hours are over."""
        self._longest_step_s = max(self._longest_step_s, seconds)

    def saved(self, seconds: float) -> None:
        """Learn how long a checkpoint takes, and that there is one."""
        self._longest_save_s = max(self._longest_save_s, seconds)
        self._saved = time.monotonic()

    def poll(self) -> Asked:
        """Return what is asked of the run; every process has to call it at the same place."""
        now = time.monotonic()
        # twice what was seen so far, for a disk or a GPU that is busy
        ahead = 2 * (self._longest_step_s + self._longest_save_s)
        over = self._until is not None and now + ahead >= self._until
        stop = self.received or (HOURS_ARE_OVER if over else 0)
        minutes = (now - self._saved) / 60
        due = self.every_minutes is not None and minutes >= self.every_minutes
        if self.accelerator.num_processes > 1:
            found = gather_object([(stop, due)])
            signals = [stop for stop, _ in found]
            stop = max(signals) or min(signals)
            due = any(due for _, due in found)
        return Asked(stop, due)

    def is_noted(self) -> bool:
        """Return whether this process was sent a signal; costs nothing."""
        return bool(self.received)

    def check(self) -> None:
        """Raise `Stopping` if the run is asked to stop; every process has to call it."""
        if by := self.poll().stop:
            raise Stopping(by)

    def error(self, what: str, stop: int) -> InterruptedRun:
        """Return what ends the run, after it has saved: its message and its exit code."""
        code = 128 + stop
        if stop == HOURS_ARE_OVER:
            what = f"the {self.max_hours:g} hours of `train.max_hours` are over: {what}"
            code = ResourceError.exit_code
        return InterruptedRun(what, code, "continue with `--resume`")
