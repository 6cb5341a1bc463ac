"""One optimizer step.

A step adds the gradients of loss *sums* over its micro-batches and processes, each term of the loss
divided by its number of items in the whole step (rows, or trained tokens). However a step is cut,
its gradient is the same. (The mean of micro-batch means, which many loops take, weighs a token in a
short batch more than one in a long batch.) Where a loss compares the examples of a step with each
other, it is computed of all of them at once (`coupled_step.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.tasks.examples import Batch
from lora_cli.training.coupled_step import add_coupled_gradients
from lora_cli.training.engine import Engine


@dataclass
class StepResult:
    """What a step reports."""

    loss: Tensor
    """Mean over the step's items; of several terms, the weighted sum of their means."""
    terms: dict[str, Tensor]
    """The mean of each term, where a teacher adds one."""
    grad_norm: Tensor
    """Length of the gradient before it was shortened."""
    idle: list[str]
    """Trained parameters that got no gradient: the forward pass does not use them."""
    bad: Tensor
    """Whether the loss or the gradient is NaN or infinity; of fp16, the loss. True or false, on
    the device, as reading it would wait for the step."""
    skipped: Tensor
    """Whether nothing was updated: a bad step, or one whose gradient overflowed in fp16."""


def train_step(engine: Engine, batches: list[Batch]) -> StepResult:
    """Make one optimizer step.

    Args:
        engine: The model, its trained parameters and the optimizer.
        batches: This process's micro-batches of the step; may be none.
    """
    accelerator = engine.accelerator
    # Divided before the backward pass, and not after, so that fp16's gradients stay in range.
    weights = _weights_per_item(engine, batches)
    shares = torch.zeros(len(weights), device=accelerator.device)
    if engine.task.couples_examples:
        shares += add_coupled_gradients(engine, batches, weights)
    else:
        for batch in batches:
            shares += engine.add_gradients(batch, weights)
    if accelerator.scaler is not None and not batches:
        accelerator.scaler.scale(shares)  # one that has scaled nothing raises on a step
    shares = engine.sum_over_processes(shares)
    loss = shares.sum()
    idle = [name for name, parameter in engine.parameters.items() if parameter.grad is None]
    norm, bad, skipped = engine.update(loss)
    return StepResult(loss, _means(engine, shares), norm, idle, bad, skipped)


def _weights_per_item(engine: Engine, batches: list[Batch]) -> dict[str, Tensor]:
    """Return what one item of each term of the loss weighs: the term's weight by its items."""
    accelerator, weights = engine.accelerator, {}
    for term, weight in engine.task.train_loss_weights.items():
        # filled on the device, as a copy would wait for it; a float also where there are no
        # batches, since the processes must agree on the type
        count = float(sum(float(batch.items[term].sum()) for batch in batches))
        n_items = torch.full((), count, device=accelerator.device)
        if accelerator.num_processes > 1:
            n_items = accelerator.reduce(n_items, "sum")
        weights[term] = weight / n_items.clamp(min=1e-12)
    return weights


def _means(engine: Engine, shares: Tensor) -> dict[str, Tensor]:
    """Return the mean of each term, from its share of the loss, if there are several terms."""
    weights = engine.task.train_loss_weights
    if len(weights) == 1:
        return {}
    terms = zip(weights.items(), shares, strict=True)
    return {term: share / weight for (term, weight), share in terms if weight}
