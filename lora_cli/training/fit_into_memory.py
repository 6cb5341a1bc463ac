"""Choose settings that fit into GPU memory: `micro_batch_size` and `gradient_checkpointing: auto`.

Both settings affect the memory of a step, not its result, so they may depend on the machine. The
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

HEADROOM = 0.05  # share of the GPU's free memory that is reserved for libraries and fragmentation
LARGE_HEADROOM = 0.7  # the share if the user did not ask for the largest micro-batch


def fit_into_memory(
    model: nn.Module,
    task: Task,
    batches: Batches,
    accelerator: Accelerator,
    optimizer_bytes: int,
    begins: bool,
) -> list[str]:
    """Choose gradient checkpointing and the micro-batch size, if the recipe does not set them.

    The choices are stored in `task.learned`.

    Args:
        model: The model, as it will be trained.
        task: The task, which builds batches and computes the loss.
        batches: The examples of the train split, and their lengths.
        accelerator: The precision and the processes; all processes choose the same.
        optimizer_bytes: The size of the optimizer's state.
        begins: Whether the run is at its first step; a resumed run keeps its choices.

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
    """Return the size of the largest micro-batch of the longest examples that fits.

    It is found by forward and backward passes with growing numbers of examples; the model is not
    changed. Without a GPU nothing is tried: the size is 8, or the whole step if that is smaller.

    Args:
        model: The model, as it will be trained.
        task: The task, which builds batches and computes the loss.
        batches: The examples of the train split, and their lengths.
        accelerator: The precision and the processes; all processes get the same size.
        optimizer_bytes: The size of the optimizer's state.

    Raises:
        ResourceError: If not even one example fits.
    """
    if accelerator.device.type != "cuda":
        return min(8, task.recipe.train.step_size)
    share = _share(task, batches, accelerator)
    with _untouched(model), _headroom(accelerator.device, HEADROOM):
        trial = _Trial(model, task, batches, accelerator, optimizer_bytes)
        n_fitting = largest(trial.fits, share)
    smallest: int = min(gather_object([n_fitting]))
    if not smallest:
        raise out_of_memory(task.recipe, 1, TRAINING)
    return smallest


def choose_checkpointing(
    model: nn.Module,
    task: Task,
    batches: Batches,
    accelerator: Accelerator,
    optimizer_bytes: int,
) -> Checkpointing:
    """Return the least gradient checkpointing for which a micro-batch of long examples fits.

    With `micro_batch_size: auto`, a single example has to fit. Nothing is tried without a GPU, or
    if the architecture does not support gradient checkpointing. Arguments are those of
    `find_micro_batch`.
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
    """Return the number of examples in a step if they easily fit into one micro-batch, or None.

    The result of a step does not depend on how it is split, and a GPU takes little longer for
    twice as many short texts. With None, the micro-batch size of the recipe is used. Arguments are
    those of `find_micro_batch`.
    """
    train = task.recipe.train
    checkpoints = task.learned.checkpointing_of(train)
    is_useful = train.kernels != "reference" and not checkpoints
    is_split = train.micro_batch_size != "auto" and train.step_size > train.micro_batch_size
    if not (
        is_useful and is_split and task.same_in_any_batch and accelerator.device.type == "cuda"
    ):
        return None
    share = _share(task, batches, accelerator)
    with _untouched(model), _headroom(accelerator.device, LARGE_HEADROOM):
        fits = _Trial(model, task, batches, accelerator, optimizer_bytes).fits(share)
    return share if all(gather_object([fits])) else None


def _share(task: Task, batches: Batches, accelerator: Accelerator) -> int:
    """Return the largest number of examples in a step that one process computes."""
    size = min(task.recipe.train.step_size, len(batches.lengths))
    return math.ceil(int(size) / int(accelerator.num_processes))


@dataclass
class _Trial:
    """Tests whether a number of the longest examples fits into memory."""

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
        kernels = may_use_kernels(task, self.accelerator)  # compiled layers need no more memory
        with fused_modules(self.model, self.accelerator).in_use() if kernels else nullcontext():
            return _fits(self.model, task, batch.to(device), self.accelerator, self.optimizer_bytes)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to `limit` that fits, or 0, by doubling and then bisection.

    Args:
        fits: Returns whether a number fits. It must be monotonic.
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
    """Return whether a micro-batch fits, in addition to gradients and the optimizer's state."""
    try:
        reserved = torch.empty(optimizer_bytes, dtype=torch.uint8, device=accelerator.device)
        for _ in range(2):  # in the second pass, gradients take memory too
            with accelerator.autocast():
                loss = task.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own has no types
        torch.cuda.synchronize(accelerator.device)
        del reserved, loss
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
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    training_mode(model)
    try:
        yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@contextmanager
def _headroom(device: torch.device, share: float) -> Iterator[None]:
    """Limit torch to the memory that is free now, except for a share of it."""
    torch.cuda.empty_cache()
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    own = torch.cuda.memory_reserved(index)
    torch.cuda.set_per_process_memory_fraction((own + free * (1 - share)) / total, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
        torch.cuda.reset_peak_memory_stats(index)
