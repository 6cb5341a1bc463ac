"""What fits into the memory of the GPU: `micro_batch_size: auto`, `gradient_checkpointing: auto`.

Both decide how much memory a step needs, not its result, so they may depend on the memory. The
examples of a step are always those of the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from lora_cli.adapters.attach import training_mode
from lora_cli.models.gradient_checkpointing import enable_gradient_checkpointing
from lora_cli.recipe.learned import Checkpointing
from lora_cli.tasks.contract import Task
from lora_cli.training.batches import Batches, prepared_for
from lora_cli.training.choose_engine import fused_modules, may_use_kernels
from lora_cli.training.resource_errors import is_out_of_memory, out_of_memory
from lora_cli.training.stop_request import TRAINING

HEADROOM = 0.05  # share of the GPU's free memory that is left for libraries and fragmentation
AMPLE = 0.7  # the same, if the user has not asked for the largest micro-batch


def fit_into_memory(
    model: nn.Module,
    task: Task,
    batches: Batches,
    accelerator: Accelerator,
    optimizer_bytes: int,
    begins: bool,
) -> list[str]:
    """Choose gradient checkpointing and micro-batches, if the recipe leaves them open.

    What is chosen stands in `task.learned` afterwards.

    Args:
        model: The model, as it will be trained.
        task: Makes batches, and computes the loss.
        batches: Has the examples of the train split, and their lengths.
        accelerator: The precision and the processes; all processes choose the same.
        optimizer_bytes: The size of the optimizer's state.
        begins: Whether the run is at its first step; one that is resumed keeps what was chosen.

    Returns:
        Lines for the log.
    """
    parts = (model, task, batches, accelerator, optimizer_bytes)
    train, learned, notes = task.recipe.train, task.learned, []
    if train.gradient_checkpointing == "auto":
        if begins:
            learned.checkpointing = choose_checkpointing(*parts)
        if learned.checkpointing:
            enable_gradient_checkpointing(model, task.recipe, learned.checkpointing)
            offload = ", with the layers' inputs in the host's memory"
            offload = offload if learned.checkpointing == "offload" else ""
            notes.append(f"gradient checkpointing{offload}, since memory is short without")
    if begins and train.micro_batch_size == "auto":
        learned.micro_batch = find_micro_batch(*parts)
        notes.append(f"micro-batches of {learned.micro_batch}, the largest that fit")
    elif begins and not task.recipe.data.streaming:
        learned.micro_batch = join_micro_batches(*parts)
    return notes


def find_micro_batch(
    model: nn.Module,
    task: Task,
    batches: Batches,
    accelerator: Accelerator,
    optimizer_bytes: int,
) -> int:
    """Return the largest micro-batch that fits, tried on the longest examples.

    Forward and backward passes are made with growing numbers of examples; the model is not changed.
    Without a GPU nothing is tried: it is 8, or the whole step if that is smaller.

    Args:
        model: The model, as it will be trained.
        task: Makes batches, and computes the loss.
        batches: Has the examples of the train split, and their lengths.
        accelerator: The precision and the processes; all processes get the same number.
        optimizer_bytes: The size of the optimizer's state.

    Raises:
        ResourceError: If not even one example fits.
    """
    if accelerator.device.type != "cuda":
        return min(8, task.recipe.train.step_size)
    share = _share(task, batches, accelerator)
    with _untouched(model), _headroom(accelerator.device, HEADROOM):
        trial = _Trial(model, task, batches, accelerator, optimizer_bytes)
        own = largest(trial.fits, share)
    found: int = min(gather_object([own]))
    if not found:
        raise out_of_memory(task.recipe, 1, TRAINING)
    return found


def choose_checkpointing(
    model: nn.Module,
    task: Task,
    batches: Batches,
    accelerator: Accelerator,
    optimizer_bytes: int,
) -> Checkpointing:
    """Return as much gradient checkpointing as a micro-batch of the longest examples needs to fit.

    With `micro_batch_size: auto` it is a single example. Nothing is tried without a GPU, or where
    the architecture has no gradient checkpointing.

    Args: As of `find_micro_batch`.
    """
    possible = getattr(model, "supports_gradient_checkpointing", False)
    if accelerator.device.type != "cuda" or not possible:
        return False
    train = task.recipe.train
    size = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    size = min(size, _share(task, batches, accelerator))
    with _untouched(model), _headroom(accelerator.device, HEADROOM):
        trial = _Trial(model, task, batches, accelerator, optimizer_bytes)
        if all(gather_object([trial.fits(size)])):
            return False
        enable_gradient_checkpointing(model, task.recipe, True)
        return True if all(gather_object([trial.fits(size)])) else "offload"


def join_micro_batches(
    model: nn.Module,
    task: Task,
    batches: Batches,
    accelerator: Accelerator,
    optimizer_bytes: int,
) -> int | None:
    """Return the examples of a whole step if they easily fit into one micro-batch, else None.

    The result of a step does not depend on how it is divided, and a GPU takes little longer for
    twice as many short texts. With None, micro-batches have the size that the recipe says.

    Args: As of `find_micro_batch`.
    """
    train = task.recipe.train
    checkpoints = task.learned.checkpointing_of(train)
    wanted = train.kernels != "reference" and not checkpoints
    cut = train.micro_batch_size != "auto" and train.step_size > train.micro_batch_size
    if not (wanted and cut and task.same_in_any_batch and accelerator.device.type == "cuda"):
        return None
    share = _share(task, batches, accelerator)
    with _untouched(model), _headroom(accelerator.device, AMPLE):
        fits = _Trial(model, task, batches, accelerator, optimizer_bytes).fits(share)
    return share if all(gather_object([fits])) else None


def _share(task: Task, batches: Batches, accelerator: Accelerator) -> int:
    """Return the largest number of a step's examples that one process computes."""
    size = min(task.recipe.train.step_size, len(batches.lengths))
    return math.ceil(int(size) / int(accelerator.num_processes))


@dataclass
class _Trial:
    """Tries whether a number of the longest examples fits into memory."""

    model: nn.Module
    task: Task
    batches: Batches
    accelerator: Accelerator
    optimizer_bytes: int

    def fits(self, count: int) -> bool:
        task, device = self.task, self.accelerator.device
        longest = np.argsort(-self.batches.lengths, kind="stable")[:count]
        examples = (self.batches.examples[int(i)] for i in longest)
        seed = task.recipe.train.seed
        batch = task.batch([prepared_for(task, example, seed, 0) for example in examples])
        kernels = may_use_kernels(task, self.accelerator)  # compiled layers need no more than those
        with fused_modules(self.model, self.accelerator).in_use() if kernels else nullcontext():
            return _fits(self.model, task, batch.to(device), self.accelerator, self.optimizer_bytes)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to `limit` that fits, or 0, by doubling and then bisecting.

    Args:
        fits: Returns whether a number fits. If it does, so do all smaller ones.
        limit: The largest number to try.
    """
    good, bad = 0, limit + 1
    while bad - good > 1:
        trial = min(max(2 * good, 1), limit) if bad > limit else (good + bad) // 2
        if fits(trial):
            good = trial
        else:
            bad = trial
    return good


def _fits(
    model: nn.Module, task: Task, batch: Any, accelerator: Accelerator, optimizer_bytes: int
) -> bool:
    """Return whether a micro-batch fits, together with gradients and the optimizer's state."""
    try:
        kept = torch.empty(optimizer_bytes, dtype=torch.uint8, device=accelerator.device)
        for _ in range(2):  # in the second pass, the gradients of the first take memory too
            with accelerator.autocast():
                loss = task.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own has no types
        torch.cuda.synchronize(accelerator.device)
        del kept, loss
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put the model into training mode, and restore its mode and its buffers afterwards."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    training_mode(model)
    try:
        yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])


@contextmanager
def _headroom(device: torch.device, share: float) -> Iterator[None]:
    """Let torch use the memory that is free now, except for a share of it."""
    torch.cuda.empty_cache()
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    ours = torch.cuda.memory_reserved(index)
    torch.cuda.set_per_process_memory_fraction((ours + free * (1 - share)) / total, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
        torch.cuda.reset_peak_memory_stats(index)
