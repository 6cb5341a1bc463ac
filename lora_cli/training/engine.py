"""Compute the parts of an optimizer step: gradients, their sum, clipping, and the update.

`train_step` combines the parts. This engine uses plain autograd. `graph_engine.py` computes the
same faster on a GPU, and is tested against this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_cli.adapters.attach import trainable_parameters
from lora_cli.errors import LoraError
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Batch


@dataclass
class Engine:
    """Computes gradients and updates by plain autograd.

    Args:
        model: The model, in training mode.
        task: The task, which computes the losses.
        optimizer: The optimizer, prepared by Accelerate, which scales the loss in fp16.
        accelerator: The precision and the processes.
        max_grad_norm: The maximum norm of the gradient; None for no clipping.
        parameters: The trained parameters by name. They are collected once, because searching a
            large model takes as long as a small step.
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
        note = ", waiting once a micro-batch for what the host decides"
        steps = self.kind + note * self.task.waits_for_device
        batches = {"batches": self.task.layout, "steps": steps}
        return batches | self.task.frozen_facts

    def add_gradients(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """Add the gradients of a micro-batch to those of the step so far.

        Args:
            batch: The micro-batch, on the device.
            weights: The weight of one item in each term of the step's loss.

        Returns:
            The micro-batch's contribution to each term of the step's loss, shape (terms,), on the
            device.

        Raises:
            LoraError: If the loss does not depend on any trained parameter.
        """
        with self.accelerator.autocast():
            sums = self.task.losses(self.model, self.task.output(self.model, batch), batch)
            shares = torch.stack([sums[term].sum() * weight for term, weight in weights.items()])
            loss = shares.sum()
        if not loss.requires_grad:
            raise _without_gradient(self)
        self.accelerator.backward(loss)
        return shares.detach()

    def sum_over_processes(self, shares: Tensor) -> Tensor:
        """Sum the gradients over all processes, and return the sum of the shares of the loss."""
        if self.accelerator.num_processes == 1:
            return shares
        total: Tensor = self.accelerator.reduce(shares, "sum")
        sum_gradients(list(self.parameters.values()), self.accelerator)
        return total

    def clip_gradients(self) -> Tensor:
        """Clip the gradients to `max_grad_norm`, and return their norm before clipping."""
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        parameters = list(self.parameters.values())
        return torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, limit))

    def update_weights(self, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights, unless the step is bad.

        A bad step changes neither the weights nor the optimizer's running means. (Setting the
        gradients to zero would not do: momentum and weight decay change the weights too.)

        Args:
            loss: The loss of the step.
            grad_norm: The norm of its gradient.

        Returns:
            Whether the step is bad, and whether the update was skipped; both on the device, because
            reading them would wait for the step.
        """
        bad, overflow = ~loss.isfinite(), ~grad_norm.isfinite()
        if self.accelerator.scaler is None:
            bad |= overflow
            _step_unless(bad, self.optimizer)
        else:  # the scaler skips a step whose gradients overflow, and lowers its scale
            self.optimizer.step()
        return bad, bad | overflow

    def clear_gradients(self) -> None:
        """Remove the gradients of the parameters."""
        self.optimizer.zero_grad()

    def finish_step(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clip the gradients, update the weights, and clear the gradients.

        Returns:
            The norm of the gradient before clipping, and what `update_weights` returns.
        """
        grad_norm = self.clip_gradients()
        bad, skipped = self.update_weights(loss, grad_norm)
        self.clear_gradients()
        return grad_norm, bad, skipped


def _without_gradient(engine: Engine) -> LoraError:
    """Return the error for a model whose forward pass uses no trained parameter."""
    first, *others = engine.parameters
    more = f" and {len(others)} more" if others else ""
    what = f"what is trained, `{first}`{more}, takes no part in the model's forward pass"
    hint = "the model reads the base's weights there, as Mamba's kernels do: adapt other modules"
    return LoraError(what, engine.task.recipe.at("adapter.target_modules"), hint)


def _step_unless(bad: Tensor, optimizer: Any) -> None:
    """Update the weights unless the step is bad; fused optimizers check this on the device."""
    inner = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's wrapper
    if inner.defaults.get("fused"):
        inner.found_inf = bad.float()  # the attribute that torch's gradient scaler sets too
        optimizer.step()
    elif not bad:
        optimizer.step()


def sum_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace the gradients by their sums over the processes, in one all-reduce.

    The gradients of an adapter are small, so one all-reduce costs less than the hooks and buckets
    of DDP. A process may also have any number of micro-batches, even none. A parameter that has no
    gradient in any process still has none, so that the optimizer does not change it.
    """
    present = torch.tensor([float(p.grad is not None) for p in parameters])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([present.to(accelerator.device), *(g.flatten() for g in gradients)])
    flat = accelerator.reduce(flat, "sum")
    present_counts, *parts = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, count, part in zip(parameters, present_counts.tolist(), parts, strict=True):
        parameter.grad = part.view_as(parameter) if count else None
