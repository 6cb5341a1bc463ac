"""What every optimizer step works with, found once before the first, and how gradients arise.

`train_step` says what a step is; an engine, how its parts are computed. This one computes them by
plain autograd. Whatever computes the same faster (compiled layers, a captured graph, a base that is
sharded over several GPUs) is another engine with the same three methods, tested against this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_cli.adapters.attach import trainable_parameters
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Batch


@dataclass
class Engine:
    """Computes gradients and updates by plain autograd.

    Args:
        model: The model, in training mode.
        task: It computes the losses.
        optimizer: Prepared by Accelerate, which scales fp16's loss.
        accelerator: Precision and processes.
        max_grad_norm: Longer gradients are shortened to this; None leaves them.
        parameters: The trained parameters by name. To search a large model for them takes as long
            as a small step, so they are found once.
    """

    model: nn.Module
    task: Task
    optimizer: Any
    accelerator: Accelerator
    max_grad_norm: float | None = None
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = self.parameters or trainable_parameters(self.model)

    @property
    def kind(self) -> str:
        """How the steps are computed, for the report."""
        return "plain autograd"

    @property
    def facts(self) -> dict[str, str]:
        """How batches and steps are computed, for the report."""
        waits = ", waiting once a micro-batch for what the host decides"
        steps = self.kind + waits * self.task.waits_for_device
        batches = {"batches": self.task.layout, "steps": steps}
        return batches | self.task.frozen_facts

    def add_gradients(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """Add the gradients of a micro-batch to those of the step so far.

        Args:
            batch: The micro-batch, on the device.
            weights: What one item of each term of the loss weighs in the step.

        Returns:
            The micro-batch's share of each term of the step's loss (terms,), on the device.
        """
        with self.accelerator.autocast():
            sums = self.task.losses(self.model, self.task.output(self.model, batch), batch)
            shares = torch.stack([sums[term].sum() * weight for term, weight in weights.items()])
            loss = shares.sum()
        self.accelerator.backward(loss)
        return shares.detach()

    def sum_over_processes(self, shares: Tensor) -> Tensor:
        """Add up the gradients of all processes in each of them; return their summed shares."""
        if self.accelerator.num_processes == 1:
            return shares
        total: Tensor = self.accelerator.reduce(shares, "sum")
        sum_gradients(list(self.parameters.values()), self.accelerator)
        return total

    def update(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shorten the gradients, update the weights unless the step is bad, and clear them.

        A bad step leaves the weights and the optimizer's running means as they are. (A gradient of
        zeros would not: momentum and decay move the weights too.)

        Args:
            loss: The step's loss.

        Returns:
            The length of the gradient before it was shortened; whether the step is bad; whether
            nothing was updated. All are on the device, as reading them would wait for the step.
        """
        scaler, optimizer = self.accelerator.scaler, self.optimizer
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        parameters = list(self.parameters.values())
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, limit))
        bad, overflow = ~loss.isfinite(), ~norm.isfinite()
        if scaler is None:
            bad |= overflow
            _step_unless(bad, optimizer)
        else:
            optimizer.step()  # the scaler leaves out what overflows, and lowers its scale
        self.clear_gradients()
        return norm, bad, bad | overflow

    def clear_gradients(self) -> None:
        """Leave the parameters without gradients, as before the step."""
        self.optimizer.zero_grad()


def _step_unless(bad: Tensor, optimizer: Any) -> None:
    """Update the weights if the step is not bad; fused optimizers find out on the device."""
    inner = getattr(optimizer, "optimizer", optimizer)  # as Accelerate has it
    if inner.defaults.get("fused"):
        inner.found_inf = bad.float()  # what torch's scaler tells them by
        optimizer.step()
    elif not bad:
        optimizer.step()


def sum_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace the gradients by their sums over the processes, in one message.

    Adapters are small: one message of all gradients costs less than DDP's hooks and buckets, and a
    process may have any number of micro-batches, or none. A parameter that has no gradient in any
    process is left without, as in one process, so that an optimizer does not move it.
    """
    present = torch.tensor([float(p.grad is not None) for p in parameters])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([present.to(accelerator.device), *(g.flatten() for g in gradients)])
    flat = accelerator.reduce(flat, "sum")
    found, *parts = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, count, part in zip(parameters, found.tolist(), parts, strict=True):
        parameter.grad = part.view_as(parameter) if count else None
