"""Stop a run before its end: by a signal, or after `train.max_hours`."""

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
LOADING, TRAINING = "loading the model", "training"  # two of the run's activities
HOURS_ARE_OVER = -1  # used instead of the number of a signal


class Stopping(Exception):  # noqa: N818 - not an error: whoever catches it saves, and leaves
    """An evaluation was interrupted because the run has to stop.

    Args:
        by: A signal's number, or `HOURS_ARE_OVER`.
    """

    def __init__(self, by: int) -> None:
        super().__init__(by)
        self.by = by


@dataclass
class Requests:
    """What is requested of a run between two steps; the same in all processes."""

    stop: int
    """A signal's number, `HOURS_ARE_OVER`, or 0."""
    checkpoint: bool
    """Whether it is time for a checkpoint, by `checkpoint.every_minutes`."""


class StopRequest:
    """Within the context, records signals that would end the process, so that the run stops later.

    A broken pipe counts as a signal: nobody reads the output any more.

    While `at_once` is set there is nothing to save, and a signal ends the process immediately. So
    does a second SIGINT, unless it follows within `MOMENT_S`: a launcher forwards Ctrl-C to
    processes that have already received it from the terminal.

    Args:
        recipe: Defines how long the run may take, and how often it is saved.
        accelerator: The processes, which have to stop together.
        started: When the command started, by `time.monotonic`.
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
        self._received_at = 0.0
        self._old_handlers: dict[int, Any] = {}
        self._pipes = ExitStack()

    def __enter__(self) -> StopRequest:
        self._pipes.enter_context(listening(lambda: self._note(signal.SIGPIPE, None)))
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as with nohup
                self._old_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._pipes.close()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
            if self.at_once:
                what = f"stopped while {self.activity}; there was nothing new to save"
                raise self.error(what, number)
        elif number == signal.SIGINT and now - self._received_at > self.MOMENT_S:
            raise SystemExit(128 + number)

    def stepped(self, seconds: float) -> None:
        """Record the duration of a step, so that the run can end before its time is up."""
        self._longest_step_s = max(self._longest_step_s, seconds)

    def saved(self, seconds: float) -> None:
        """Record the duration of a checkpoint, and that it was written now."""
        self._longest_save_s = max(self._longest_save_s, seconds)
        self._saved = time.monotonic()

    def poll(self) -> Requests:
        """Return what is requested of the run; all processes have to call this together."""
        now = time.monotonic()
        # twice the longest times so far, in case the disk or the GPU is busy
        margin_s = 2 * (self._longest_step_s + self._longest_save_s)
        is_out_of_time = self._until is not None and now + margin_s >= self._until
        stop = self.received or (HOURS_ARE_OVER if is_out_of_time else 0)
        minutes = (now - self._saved) / 60
        due = self.every_minutes is not None and minutes >= self.every_minutes
        if self.accelerator.num_processes > 1:
            by_process = gather_object([(stop, due)])
            signals = [stop for stop, _ in by_process]
            stop = max(signals) or min(signals)
            due = any(due for _, due in by_process)
        return Requests(stop, due)

    def is_noted(self) -> bool:
        """Return whether this process has received a signal, without communication."""
        return bool(self.received)

    def check(self) -> None:
        """Raise `Stopping` if the run has to stop; all processes have to call this together."""
        if by := self.poll().stop:
            raise Stopping(by)

    def error(self, what: str, stop: int) -> InterruptedRun:
        """Return the error that ends the run after it was saved, with its exit code."""
        code = 128 + stop
        if stop == HOURS_ARE_OVER:
            what = f"the {self.max_hours:g} hours of `train.max_hours` are over: {what}"
            code = ResourceError.exit_code
        return InterruptedRun(what, code, "continue with `--resume`")
