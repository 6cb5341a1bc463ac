"""One optimizer step.

A step adds the gradients of loss *sums* over its micro-batches and processes, each divided by the
number of items of the whole step (rows, or trained tokens). However a step is cut, its gradient is
the same. (The mean of micro-batch means, which many loops take, weighs a token in a short batch
more than one in a long batch.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_cli.adapters.attach import trainable_parameters
from lora_cli.tasks import Batch, Task


@dataclass
class StepResult:
    """What a step reports."""

    loss: Tensor
    """Mean over the step's items."""
    grad_norm: Tensor
    """Length of the gradient before it was shortened."""
    idle: list[str]
    """Trained parameters that got no gradient: the forward pass does not use them."""
    skipped: bool
    """Whether a gradient overflowed in fp16, so that nothing was updated."""


def train_step(
    model: nn.Module,
    task: Task,
    optimizer: Any,
    batches: list[Batch],
    accelerator: Accelerator,
    max_grad_norm: float | None = None,
) -> StepResult:
    """Make one optimizer step from this process's micro-batches.

    Args:
        model: The model, in training mode.
        task: It computes the loss.
        optimizer: Prepared by Accelerate, which scales fp16's loss.
        batches: This process's share of the step; may be empty.
        accelerator: Precision and processes.
        max_grad_norm: Longer gradients are shortened to this; None leaves them.
    """
    parameters = trainable_parameters(model)
    # a float also where there are no batches: the processes must agree on the type
    n_items = torch.tensor(float(sum(b.n_items for b in batches)), device=accelerator.device)
    if accelerator.num_processes > 1:
        n_items = accelerator.reduce(n_items, "sum")
    # Divided before the backward pass, and not after, so that fp16's gradients stay in range.
    per_item = 1.0 / n_items.clamp(min=1e-12)
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.autocast():
            loss = task.loss(model, batch) * per_item
        accelerator.backward(loss)
        total += loss.detach()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
        sum_gradients(list(parameters.values()), accelerator)
    if accelerator.scaler is not None and not batches:
        accelerator.scaler.scale(total)  # one that has scaled nothing refuses to step
    idle = [name for name, parameter in parameters.items() if parameter.grad is None]
    limit = math.inf if max_grad_norm is None else max_grad_norm
    norm = accelerator.clip_grad_norm_(list(parameters.values()), limit)
    skipped = _step(optimizer, accelerator)
    optimizer.zero_grad()
    return StepResult(total, torch.as_tensor(norm), idle, skipped)


def _step(optimizer: Any, accelerator: Accelerator) -> bool:
    """Update the weights; return whether fp16's loss scale gave the step up instead."""
    scaler = accelerator.scaler
    before = scaler.get_scale() if scaler is not None else 0.0
    optimizer.step()
    # fused optimizers skip a step themselves, on the GPU, so only the lowered scale tells
    return scaler is not None and scaler.get_scale() < before


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
