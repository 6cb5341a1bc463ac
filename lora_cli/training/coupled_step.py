"""Compute the gradients of a step whose loss compares its examples with each other.

The loss of in-batch negatives needs the outputs (embeddings) of the whole step at once, but memory
only has room for the activations of one micro-batch. So the chain rule is applied at the outputs
("gradient caching", Gao et al., 2021). First, the outputs are computed without gradients, and
gathered from all micro-batches and processes. Then the loss and its gradient with respect to the
outputs are computed. Finally, each micro-batch is computed again, and its part of that gradient is
backpropagated to the parameters. The result is the same as for one large batch, at the cost of an
additional forward pass.
"""

from __future__ import annotations

import torch
from accelerate.utils import gather_object
from torch import Tensor

from lora_cli.tasks.examples import Batch
from lora_cli.training.engine import Engine


def add_coupled_gradients(
    engine: Engine, batches: list[Batch], weights: dict[str, Tensor]
) -> Tensor:
    """Add the gradients of a whole step.

    Args:
        engine: The model, and a task that couples the examples of a step.
        batches: This process's micro-batches, on the device; may be empty.
        weights: The weight of one item in each term of the step's loss.

    Returns:
        This process's share of the step's loss; a scalar on the device.
    """
    accelerator = engine.accelerator
    if accelerator.num_processes == 1 and len(batches) == 1:
        return engine.add_gradients(batches[0], weights)  # the batch is the step
    states, outputs = [], []
    for batch in batches:
        states.append(_random_state(accelerator.device))
        with torch.no_grad(), accelerator.autocast():
            outputs.append(engine.task.output(engine.model, batch).float())
    final_state = _random_state(accelerator.device)
    loss, gradient = _loss_and_gradient(engine, batches, outputs, weights)
    parts = torch.split(gradient, [len(output) for output in outputs])
    for batch, part, state in zip(batches, parts, states, strict=True):
        _set_random_state(accelerator.device, state)  # the same dropout as before
        with accelerator.autocast():
            output = engine.task.output(engine.model, batch)
            product = (output.float() * part).sum()
        accelerator.backward(product)
    _set_random_state(accelerator.device, final_state)
    share: Tensor = loss / accelerator.num_processes
    return share


def _loss_and_gradient(
    engine: Engine, batches: list[Batch], outputs: list[Tensor], weights: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the loss of the whole step, and its gradient with respect to this process's outputs.

    Every process computes the same loss from all outputs, and takes its own part of the gradient,
    so that gradients need not be sent.
    """
    accelerator = engine.accelerator
    pairs = [(output, batch.targets) for output, batch in zip(outputs, batches, strict=True)]
    first, count = 0, sum(map(len, outputs))
    if accelerator.num_processes > 1:
        on_host = [(output.cpu(), {k: v.cpu() for k, v in t.items()}) for output, t in pairs]
        by_process: list[list[tuple[Tensor, dict[str, Tensor]]]] = gather_object([on_host])
        earlier = by_process[: accelerator.process_index]
        first = sum(len(output) for parts in earlier for output, _ in parts)
        pairs = [part for parts in by_process for part in parts]
    device = accelerator.device
    joined = torch.cat([output for output, _ in pairs]).to(device).requires_grad_()
    names = dict.fromkeys(name for _, of_batch in pairs for name in of_batch)
    targets = {
        name: torch.cat([of_batch[name] for _, of_batch in pairs]).to(device) for name in names
    }
    sums = engine.task.losses(engine.model, joined, Batch({}, targets, {}, 0, []))
    loss = torch.stack([sums[term].sum() * weight for term, weight in weights.items()]).sum()
    (gradient,) = torch.autograd.grad(loss, joined)
    return loss.detach(), gradient[first : first + count]


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the states of torch's random generators, on the CPU and on the device."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _set_random_state(device: torch.device, state: list[Tensor]) -> None:
    """Restore the states of torch's random generators."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
