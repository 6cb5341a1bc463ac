"""Log training: collect the results of each step, and write a line every few steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lora_cli.errors import counted
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded
from lora_cli.training.bad_numbers import BadStep, reject_bad_scale, reject_bad_steps
from lora_cli.training.batches import Batches, PlannedStep
from lora_cli.training.gpu_monitor import GpuMonitor
from lora_cli.training.run_log import RunLog, clock, peak_memory_bytes, rate_key
from lora_cli.training.step import StepResult
from lora_cli.training.train_state import TrainState


class UnloggedSteps:
    """The steps since the last line of the log: their losses, and which of them were bad.

    Losses and flags stay on the device until `read`, because reading one waits for its step.

    Args:
        state: The state of the run, with the losses that were not logged before it was resumed.
        device: The device of the losses.
        bad_streak: The consecutive bad steps up to now.
    """

    def __init__(
        self, state: TrainState, device: torch.device, bad_streak: Sequence[BadStep] = ()
    ) -> None:
        self.state, self.at_last_line = state, replace(state)
        self.good_steps = state.unlogged_steps
        self.loss_sum = torch.tensor(state.unlogged_loss, device=device)
        self.term_sums = {
            term: torch.tensor(total, device=device) for term, total in state.unlogged_terms.items()
        }
        self.grad_norm = torch.zeros(())
        self.bad_streak = list(bad_streak)
        self.bad_steps: list[BadStep] = []
        self._unread: list[tuple[BadStep, Tensor]] = []

    def add(self, planned: PlannedStep, result: StepResult) -> None:
        """Add a step. On a CPU its flags are read immediately, on a GPU by `read`."""
        self.loss_sum = self.loss_sum + torch.where(result.bad, 0.0, result.loss)
        for term, mean in result.terms.items():
            good_mean = torch.where(result.bad, 0.0, mean)
            self.term_sums[term] = self.term_sums.get(term, 0.0) + good_mean
        self.grad_norm = result.grad_norm
        flags = torch.stack([result.bad, result.skipped])
        self._unread.append((BadStep(planned.number, planned.places), flags))
        if flags.device.type == "cpu":
            self.read()

    def read(self) -> None:
        """Wait for the device, and find out which steps were bad or skipped."""
        if not self._unread:
            return
        flags = torch.stack([flags for _, flags in self._unread]).tolist()
        for (step, _), (is_bad, is_skipped) in zip(self._unread, flags, strict=True):
            self.state.skipped_steps += int(is_skipped)
            if is_bad:
                self.bad_streak = [*self.bad_streak, step]
                self.bad_steps.append(step)
            else:
                self.bad_streak = []
                self.good_steps += 1
        self._unread = []

    def measurements(self, task: Task) -> dict[str, float]:
        """Return the mean loss, the last gradient norm, and the speed since the last line.

        Args:
            task: The task, which names the unit of the speed, and the terms of the loss.
        """
        self.read()
        now, last = self.state, self.at_last_line
        seconds = max(now.seconds - last.seconds, 1e-9)
        return {
            "loss": float(self.loss_sum) / self.good_steps if self.good_steps else float("nan"),
            **{
                task.result_of_term(term): float(total) / max(self.good_steps, 1)
                for term, total in self.term_sums.items()
            },
            "grad_norm": float(self.grad_norm),
            "examples_per_s": round((now.examples - last.examples) / seconds, 2),
            rate_key(task.unit): round((now.tokens - last.tokens) / seconds, 1),
            "seconds_per_step": round(seconds / max(now.step - last.step, 1), 4),
        }

    def save_to_state(self) -> None:
        """Store the sums in the state, so that a resumed run logs the same line."""
        self.read()
        self.state.unlogged_steps, self.state.unlogged_loss = self.good_steps, float(self.loss_sum)
        self.state.unlogged_terms = {term: float(total) for term, total in self.term_sums.items()}

    def clear_state(self) -> None:
        """Remove the sums from the state, once they are logged."""
        self.state.unlogged_steps, self.state.unlogged_loss = 0, 0.0
        self.state.unlogged_terms = {}


class StepLog:
    """Counts steps and seconds, logs them, and ends a run with too many bad steps.

    Args:
        run_log: Prints the lines and writes `metrics.jsonl`.
        state: The state of the run, in which steps are counted.
        task: The task; its recipe defines how often a line is written.
        batches: The plan of the run: its steps and epochs.
        accelerator: The device, and fp16's loss scale.
        gpu: The GPU statistics since the last line.
    """

    def __init__(
        self,
        run_log: RunLog,
        state: TrainState,
        task: Task,
        batches: Batches,
        accelerator: Accelerator,
        gpu: GpuMonitor,
    ) -> None:
        self.run_log, self.state, self.task, self.recipe = run_log, state, task, task.recipe
        self.batches, self.accelerator, self.gpu = batches, accelerator, gpu
        self.unlogged = UnloggedSteps(state, accelerator.device)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restart the clock, so that evaluations and checkpoints before are not counted."""
        self._counted_until = time.perf_counter()

    def count_seconds(self) -> None:
        """Count the time in steps until now, once the device has finished them."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        counted_until, self._counted_until = self._counted_until, time.perf_counter()
        self.state.seconds += self._counted_until - counted_until

    def check_numbers(self) -> None:
        """Wait for the device, and end the run if too many steps were bad.

        Raises:
            NumericsError: If too many steps in a row were bad, or fp16's loss scale is too small.
        """
        self.unlogged.read()
        reject_bad_steps(self.unlogged.bad_streak, self.recipe)
        if self.accelerator.scaler is not None:
            scale = self.accelerator.scaler.get_scale()
            reject_bad_scale(scale, self.state.step, self.recipe)

    def add(self, planned: PlannedStep, result: StepResult, learning_rate: float) -> None:
        """Count a step, and write a line if one is due.

        Raises:
            NumericsError: If too many steps in a row were bad.
        """
        state = self.state
        self.unlogged.add(planned, result)
        state.step = planned.number
        state.examples += len(planned.examples)
        state.tokens += planned.cost
        self.run_log.sample(state.step, planned.examples)
        self.run_log.advance(state.step)
        reject_bad_steps(self.unlogged.bad_streak, self.recipe)
        if state.step == 1:
            self.run_log.warn_of_idle(result.idle)
        is_due = state.step % self.recipe.train.log_every_steps == 0
        if is_due or state.step in (1, self.batches.total_steps):
            self._write_line(learning_rate)

    def _write_line(self, learning_rate: float) -> None:
        self.count_seconds()
        self.check_numbers()
        state, measured = self.state, self.unlogged.measurements(self.task)
        record: dict[str, Any] = {
            "step": state.step,
            "epoch": self.batches.epoch_of(state.step),
            **measured,
            "learning_rate": learning_rate,
            "memory_bytes": peak_memory_bytes(self.accelerator.device),
            **self.gpu.record(),
        }
        steps_left = self.batches.total_steps - state.step
        self.run_log.trained(record, steps_left * measured["seconds_per_step"])
        for text in (*(bad.warning() for bad in self.unlogged.bad_steps), *self.gpu.new_notes()):
            self.run_log.say(text)
        self.unlogged.clear_state()
        self.unlogged = UnloggedSteps(state, self.accelerator.device, self.unlogged.bad_streak)


def trained_line(state: TrainState, split: Encoded | None) -> str:
    """Return a line on the steps and the duration of a run, and the rows if some had no example.

    Args:
        state: The state of the run at its end.
        split: The train rows; None if they are streamed.
    """
    rows = ""
    if split is not None and split.rows_without_example:
        n_rows = len(split.rows)
        rows = f" on {n_rows - split.rows_without_example:,} of {counted(n_rows, 'row')}"
    return f"trained {counted(state.step, 'step')}{rows} in {clock(state.seconds)}"
