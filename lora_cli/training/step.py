"""One optimizer step.

A step adds the gradients of loss *sums* over its micro-batches and processes, each term of the loss
divided by its number of items in the whole step (rows, or trained tokens). However a step is cut,
its gradient is the same. (The mean of micro-batch means, which many loops take, weighs a token in a
short batch more than one in a long batch.)
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
    bad: Tensor
    """Whether the loss or the gradient is NaN or infinity; of fp16, the loss. True or false, on
    the device, as reading it would wait for the step."""
    skipped: Tensor
    """Whether nothing was updated: a bad step, or one whose gradient overflowed in fp16."""


def train_step(
    model: nn.Module,
    task: Task,
    optimizer: Any,
    batches: list[Batch],
    accelerator: Accelerator,
    max_grad_norm: float | None = None,
    parameters: dict[str, nn.Parameter] | None = None,
) -> StepResult:
    """Make one optimizer step from this process's micro-batches.

    A step whose loss or gradient is NaN or infinity leaves the weights and the optimizer's running
    means as they are. (A gradient of zeros would not: momentum and decay move the weights too.)

    Args:
        model: The model, in training mode.
        task: It computes the loss.
        optimizer: Prepared by Accelerate, which scales fp16's loss.
        batches: This process's share of the step; may be empty.
        accelerator: Precision and processes.
        max_grad_norm: Longer gradients are shortened to this; None leaves them.
        parameters: The model's trained parameters; None searches the model for them, which takes as
            long as a small step.
    """
    if parameters is None:
        parameters = trainable_parameters(model)
    # Divided before the backward pass, and not after, so that fp16's gradients stay in range.
    per_item = _weights_per_item(task, batches, accelerator)
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.autocast():
            sums = task.losses(model, task.forward(model, batch), batch)
            loss = torch.stack([sums[term].sum() * weight for term, weight in per_item]).sum()
        accelerator.backward(loss)
        total += loss.detach()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
        sum_gradients(list(parameters.values()), accelerator)
    if accelerator.scaler is not None and not batches:
        accelerator.scaler.scale(total)  # one that has scaled nothing raises on a step
    idle = [name for name, parameter in parameters.items() if parameter.grad is None]
    limit = math.inf if max_grad_norm is None else max_grad_norm
    norm = torch.as_tensor(accelerator.clip_grad_norm_(list(parameters.values()), limit))
    bad, overflow = ~total.isfinite(), ~norm.isfinite()
    if accelerator.scaler is None:
        bad |= overflow
        _step_unless(bad, optimizer)
    else:
        optimizer.step()  # the scaler leaves out what overflows, and lowers its scale
    optimizer.zero_grad()
    return StepResult(total, norm, idle, bad, bad | overflow)


def _weights_per_item(
    task: Task, batches: list[Batch], accelerator: Accelerator
) -> list[tuple[str, Tensor]]:
    """Return the terms of the loss, with the weight of each divided by its items in the step."""
    weights = []
    for term, weight in task.loss_weights.items():
        # filled on the device, as a copy would wait for it; a float also where there are no
        # batches, since the processes must agree on the type
        count = float(sum(float(batch.items[term].sum()) for batch in batches))
        n_items = torch.full((), count, device=accelerator.device)
        if accelerator.num_processes > 1:
            n_items = accelerator.reduce(n_items, "sum")
        weights.append((term, weight / n_items.clamp(min=1e-12)))
    return weights


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
