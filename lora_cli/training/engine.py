"""How the parts of an optimizer step are computed: gradients, their sum, clipping, the update.

`train_step` puts the parts together. This engine computes them by plain autograd; `graph_engine.py`
computes the same faster on a GPU, and is tested against this one.
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
        task: Computes the losses.
        optimizer: The optimizer as Accelerate prepared it, which scales the loss in fp16.
        accelerator: The precision and the processes.
        max_grad_norm: The norm to which longer gradients are scaled down; None leaves them.
        parameters: The trained parameters by name. They are looked up once, because a search
            through a large model takes as long as a small step.
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
            weights: The weight of one item in each term of the step's loss.

        Returns:
            What the micro-batch adds to each term of the step's loss (terms,), on the device.

        Raises:
            LoraError: If the loss depends on nothing that is trained.
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
        """Give each process the sum of all processes' gradients, and return the sum of shares."""
        if self.accelerator.num_processes == 1:
            return shares
        total: Tensor = self.accelerator.reduce(shares, "sum")
        sum_gradients(list(self.parameters.values()), self.accelerator)
        return total

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to `max_grad_norm`, and return their norm before that."""
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        parameters = list(self.parameters.values())
        return torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, limit))

    def update_weights(self, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Let the optimizer update the weights, unless the step is bad.

        A bad step changes neither the weights nor the optimizer's running means. (With gradients of
        zero it would: momentum and weight decay change the weights too.)

        Args:
            loss: The loss of the step.
            grad_norm: The norm of its gradient.

        Returns:
            Whether the step is bad, and whether the weights were left as they were; both on the
            device, because reading them would wait for the step.
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
    """Return the error of a model whose forward pass uses nothing of what is trained."""
    first, *others = engine.parameters
    more = f" and {len(others)} more" if others else ""
    what = f"what is trained, `{first}`{more}, takes no part in the model's forward pass"
    hint = "the model reads the base's weights there, as Mamba's kernels do: adapt other modules"
    return LoraError(what, engine.task.recipe.at("adapter.target_modules"), hint)


def _step_unless(bad: Tensor, optimizer: Any) -> None:
    """Update the weights if the step is not bad; a fused optimizer decides that on the device."""
    inner = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's wrapper
    if inner.defaults.get("fused"):
        inner.found_inf = bad.float()  # the attribute that torch's gradient scaler sets too
        optimizer.step()
    elif not bad:
        optimizer.step()


def sum_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace the gradients by their sums over the processes, in one message.

    The gradients of an adapter are small, so one message costs less than the hooks and buckets of
    DDP; and a process may have any number of micro-batches, or none. A parameter without a gradient
    in every process keeps none, so that the optimizer does not change it.
    """
    present = torch.tensor([float(p.grad is not None) for p in parameters])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([present.to(accelerator.device), *(g.flatten() for g in gradients)])
    flat = accelerator.reduce(flat, "sum")
    found, *parts = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, count, part in zip(parameters, found.tolist(), parts, strict=True):
        parameter.grad = part.view_as(parameter) if count else None
