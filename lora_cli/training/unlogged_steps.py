"""The steps since the last line of the log."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_cli.errors import counted
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded
from lora_cli.training.bad_numbers import BadStep
from lora_cli.training.batches import PlannedStep
from lora_cli.training.progress import clock, rate_key
from lora_cli.training.step import StepResult
from lora_cli.training.train_state import TrainState


class Window:
    """Adds up losses, and notes bad steps, on their device, until they are read.

    Args:
        state: Where the run stands; of a resumed run, it holds the losses not logged yet.
        device: Where the losses are.
        streak: The bad steps, in a row, that came last.
    """

    def __init__(
        self, state: TrainState, device: torch.device, streak: list[BadStep] | None = None
    ) -> None:
        self.state, self.start = state, replace(state)
        self.steps = state.unlogged_steps
        self.total = torch.tensor(state.unlogged_loss, device=device)
        self.terms = {k: torch.tensor(v, device=device) for k, v in state.unlogged_terms.items()}
        self.norm = torch.zeros(())
        self.streak = streak or []
        self.bad: list[BadStep] = []
        self._unread: list[tuple[BadStep, Tensor]] = []

    def add(self, planned: PlannedStep, result: StepResult) -> None:
        """Take in a step. On a CPU it is known at once whether it is bad, else after `look`."""
        self.total = self.total + torch.where(result.bad, 0.0, result.loss)
        for term, mean in result.terms.items():
            self.terms[term] = self.terms.get(term, 0.0) + torch.where(result.bad, 0.0, mean)
        self.norm = result.grad_norm
        flags = torch.stack([result.bad, result.skipped])
        self._unread.append((BadStep(planned.number, planned.places), flags))
        if flags.device.type == "cpu":
            self.read()

    def read(self) -> None:
        """Wait for the device, and learn which steps were bad or skipped."""
        if not self._unread:
            return
        flags = torch.stack([flags for _, flags in self._unread]).tolist()
        for (step, _), (bad, skipped) in zip(self._unread, flags, strict=True):
            self.state.skipped_steps += int(skipped)
            self.steps += int(not bad)
            self.streak = [*self.streak, step] if bad else []
            self.bad += [step] if bad else []
        self._unread = []

    @property
    def loss(self) -> float:
        """Mean loss of the steps that are not bad; waits for the device."""
        self.read()
        return float(self.total) / self.steps if self.steps else float("nan")

    def note(self, state: TrainState) -> None:
        """Put into the state what the next line of the log will need."""
        self.read()
        state.unlogged_steps, state.unlogged_loss = self.steps, float(self.total)
        state.unlogged_terms = {term: float(total) for term, total in self.terms.items()}

    def clear(self, state: TrainState) -> None:
        """Take out of the state what a line of the log has said."""
        state.unlogged_steps, state.unlogged_loss, state.unlogged_terms = 0, 0.0, {}

    def record(self, state: TrainState, task: Task) -> dict[str, float]:
        """Return loss, gradient norm and speed.

        Args:
            state: Where the run stands now.
            task: Names what the costs of batches are counted in, and the terms of the loss.
        """
        start, steps = self.start, max(self.steps, 1)
        seconds = max(state.seconds - start.seconds, 1e-9)
        return {
            "loss": self.loss,
            **{
                task.result_of_term(term): float(total) / steps
                for term, total in self.terms.items()
            },
            "grad_norm": float(self.norm),
            "examples_per_s": round((state.examples - start.examples) / seconds, 2),
            rate_key(task.unit): round((state.tokens - start.tokens) / seconds, 1),
            "seconds_per_step": round(seconds / max(state.step - start.step, 1), 4),
        }


def trained_line(state: TrainState, split: Encoded | None) -> str:
    """Return how long a run trained, and on how many rows if some gave no example.

    Args:
        state: Where it stands at its end.
        split: The train rows; None if they are streamed.
    """
    on = ""
    if split is not None and split.rows_without_example:
        n_rows = len(split.rows)
        on = f" on {n_rows - split.rows_without_example:,} of {counted(n_rows, 'row')}"
    return f"trained {counted(state.step, 'step')}{on} in {clock(state.seconds)}"
