"""The steps since the last line of the log."""

from __future__ import annotations

from dataclasses import replace

import torch

from lora_cli.training.state import TrainState
from lora_cli.training.step import StepResult


class Window:
    """Adds up losses, on their device, until they are read.

    Args:
        state: Where the run stands; of a resumed run, it holds the losses not logged yet.
        device: Where the losses are.
    """

    def __init__(self, state: TrainState, device: torch.device) -> None:
        self.start = replace(state)
        self.steps = state.unlogged_steps
        self.total = torch.tensor(state.unlogged_loss, device=device)
        self.norm = torch.zeros(())

    def add(self, result: StepResult) -> None:
        """Take in a step."""
        self.steps += 1
        self.total = self.total + result.loss
        self.norm = result.grad_norm

    @property
    def loss(self) -> float:
        """Mean loss of the steps; waits for the device."""
        return float(self.total) / max(self.steps, 1)

    def note(self, state: TrainState) -> None:
        """Put into the state what the next line of the log will need."""
        state.unlogged_steps, state.unlogged_loss = self.steps, float(self.total)

    def record(self, state: TrainState) -> dict[str, float]:
        """Return loss, gradient norm and speed."""
        start = self.start
        seconds = max(state.seconds - start.seconds, 1e-9)
        return {
            "loss": self.loss,
            "grad_norm": float(self.norm),
            "examples_per_s": round((state.examples - start.examples) / seconds, 2),
            "tokens_per_s": round((state.tokens - start.tokens) / seconds, 1),
            "seconds_per_step": round(seconds / max(state.step - start.step, 1), 4),
        }
