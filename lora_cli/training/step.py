"""One optimizer step: its gradients are summed, clipped and applied.

Gradients of loss *sums* are accumulated over the micro-batches and processes of a step. Each term
of the loss is divided once, by its number of items (rows, or trained tokens) in the whole step, so
the result does not depend on how the step is split. (The mean of micro-batch means, which many
training loops use, gives a token of a short batch more weight than one of a long batch.)
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
    """The results of a step. Tensors stay on the device, because reading one waits for the step."""

    loss: Tensor
    """The mean over the items of the step; with several terms, the weighted sum of their means."""
    terms: dict[str, Tensor]
    """The mean of each term, if the loss has several, as with a teacher."""
    grad_norm: Tensor
    """The norm of the gradient before clipping."""
    idle: list[str]
    """Trained parameters without a gradient, because the forward pass does not use them."""
    bad: Tensor
    """Whether the loss or the gradient is NaN or infinite (in fp16: the loss)."""
    skipped: Tensor
    """Whether the weights were not updated: in a bad step, or if gradients overflowed in fp16."""


def train_step(engine: Engine, batches: list[Batch]) -> StepResult:
    """Make one optimizer step.

    Args:
        engine: The model, its trained parameters and the optimizer.
        batches: The micro-batches of the step that this process computes; may be empty.
    """
    accelerator = engine.accelerator
    # the loss is divided before the backward pass, so that gradients in fp16 stay in range
    weights = _weights_per_item(engine, batches)
    shares = torch.zeros(len(weights), device=accelerator.device)  # of each term of the step's loss
    if engine.task.couples_examples:  # the loss compares all examples of the step with each other
        shares += add_coupled_gradients(engine, batches, weights)
    else:
        for batch in batches:
            shares += engine.add_gradients(batch, weights)
    if accelerator.scaler is not None and not batches:
        accelerator.scaler.scale(shares)  # a scaler that has scaled nothing would raise an error
    shares = engine.sum_over_processes(shares)
    loss = shares.sum()
    idle = [name for name, parameter in engine.parameters.items() if parameter.grad is None]
    grad_norm, bad, skipped = engine.finish_step(loss)
    return StepResult(loss, _means(engine, shares), grad_norm, idle, bad, skipped)


def _weights_per_item(engine: Engine, batches: list[Batch]) -> dict[str, Tensor]:
    """Return the weight of one item in each term of the loss: term weight / items in the step."""
    accelerator, weights = engine.accelerator, {}
    for term, term_weight in engine.task.train_loss_weights.items():
        # a float even without batches, because the processes have to agree on the type
        count = float(sum(float(batch.items[term].sum()) for batch in batches))
        # created on the device, because a copy to it would wait for the device
        n_items = torch.full((), count, device=accelerator.device)
        if accelerator.num_processes > 1:
            n_items = accelerator.reduce(n_items, "sum")
        weights[term] = term_weight / n_items.clamp(min=1e-12)
    return weights


def _means(engine: Engine, shares: Tensor) -> dict[str, Tensor]:
    """Return the mean of each term, given its share of the loss; empty for a single term."""
    weights = engine.task.train_loss_weights
    if len(weights) == 1:
        return {}
    terms = zip(weights.items(), shares, strict=True)
    return {term: share / weight for (term, weight), share in terms if weight}
