"""When memory or disk ends: what to say, and the largest micro-batch that fits.

Micro-batches decide what a step needs, not what it computes, so memory may choose their size. The
examples of a step stay those that the recipe asks for.
"""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from lora_cli.adapters.attach import training_mode
from lora_cli.errors import ResourceError, system_error
from lora_cli.recipe import Learned, Recipe
from lora_cli.tasks.contract import Task
from lora_cli.training.batches import Batches, prepared_for
from lora_cli.training.checkpoints import peek_state
from lora_cli.training.stop_request import LOADING, TRAINING

HEADROOM = 0.05  # of the GPU's free memory is left: it gets fragmented, and libraries want some
AMPLE = 0.7  # so much is left where it is not the user who wants the memory used
MEMORY_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk's quota is used up",
    errno.EFBIG: "a file has grown larger than the system allows",
    errno.EROFS: "the disk can only be read",
    errno.EACCES: "permission was denied",
    errno.EPERM: "permission was denied",
}
WORKER = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal: (\w+))")
SHARED = re.compile(r"shared memory|</torch_\w+>|shm_open|/dev/shm")


def resource_error(
    error: BaseException, recipe: Recipe, learned: Learned, activity: str
) -> ResourceError | None:
    """Return what to say of an error that means that memory or disk ran out, else None.

    Args:
        error: What was raised, by whichever library.
        recipe: Says how large the batches are, and where the result goes.
        learned: How large they are, where the recipe leaves that open.
        activity: What the run was doing.
    """
    if is_out_of_memory(error):
        return out_of_memory(recipe, learned.micro_batch_of(recipe.train), activity)
    saved = peek_state(recipe.output_path)
    kept = f"the checkpoint of step {saved.step} is whole; " if saved else ""
    if (worker := _worker_error(error, activity, kept)) is not None:
        return worker
    number = system_error(error)
    if number == errno.ENOENT:
        return _removed(error, recipe, activity)
    if number not in DISK_ERRORS:
        return None
    name = getattr(error, "filename", None) or recipe.output_path
    hint = f"{kept}free some space, then continue with `--resume`"
    return ResourceError(f"{DISK_ERRORS[number]} while {activity}", str(name), hint)


def _worker_error(error: BaseException, activity: str, kept: str) -> ResourceError | None:
    """Return what to say if a process that prepares batches died, or could not hand them over."""
    text = str(error)
    found = WORKER.search(text)
    if SHARED.search(text) or (found and found[2] == "Bus"):
        what = (
            f"the shared memory, through which workers hand over batches, is full while {activity}"
        )
        hint = f"{kept}go on with `--resume --set train.workers=0`, which needs none"
        return ResourceError(what, "/dev/shm", hint)
    if found is None:
        return None
    what = f"a worker that prepares batches was killed while {activity}"
    hint = (
        f"{kept}continue with `--resume`; if the machine's memory was full (`dmesg` says so), with "
        "`--set train.workers=0`"
    )
    return ResourceError(what, "train.workers", hint)


def _removed(error: BaseException, recipe: Recipe, activity: str) -> ResourceError | None:
    """Return what to say of an output that was removed while the run wrote into it."""
    folder = recipe.output_path
    name = str(getattr(error, "filename", None) or folder)
    if folder.is_dir() and not Path(name).absolute().is_relative_to(folder.absolute()):
        return None
    lost = str(folder) if not folder.is_dir() else name
    what = f"`{lost}` was removed while {activity}, by another program or by hand"
    hint = "what was saved in it is gone: start again, with `-o DIR` in another folder"
    if folder.is_dir() and peek_state(folder) is not None:
        hint = "go on from the checkpoints that are left with `--resume`"
    return ResourceError(what, recipe.at("output_dir"), hint)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory, of the GPU or the machine, is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in MEMORY_WORDS)


def out_of_memory(recipe: Recipe, micro_batch: int, activity: str) -> ResourceError:
    """Return the error that says what to change when memory ends."""
    where = "the GPU's memory" if torch.cuda.is_available() else "the memory"
    train, evaluation = recipe.train, recipe.evaluate
    ways = []
    if activity == TRAINING:
        if micro_batch > 1:
            ways.append(f"`{_cut(train.step_size, micro_batch // 2)}` (the same steps)")
        if not train.gradient_checkpointing:
            ways.append("`--set train.gradient_checkpointing=true` (slower)")
    elif activity == LOADING:
        ways += ["`--set train.precision=bf16` (half the weights' size)"]
    else:
        size = evaluation.micro_batch_size or 2 * micro_batch
        if size > 1:
            ways.append(f"`--set evaluate.micro_batch_size={size // 2}` (the same numbers)")
    lengths = {key: getattr(recipe.task, key, None) for key in recipe.task.length_keys}
    if activity != LOADING and (known := {key: n for key, n in lengths.items() if n}):
        flags = " ".join(f"--set task.{key}={max(n // 2, 1)}" for key, n in known.items())
        ways.append(f"`{flags}` (cuts more texts)")
    hint = f"add {', or '.join(ways)}"
    if activity != LOADING and (saved := peek_state(recipe.output_path)) is not None:
        hint += f"; with `--resume` all but the last continue from step {saved.step}"
    return ResourceError(f"{where} is full while {activity}", hint=hint)


def _cut(step_size: int, micro_batch: int) -> str:
    """Return the flags that cut a step of so many examples into smaller micro-batches."""
    flags: dict[str, Any] = {"micro_batch_size": micro_batch, "gradient_accumulation_steps": 1}
    if step_size % micro_batch == 0:
        flags["gradient_accumulation_steps"] = step_size // micro_batch
        flags |= {"examples_per_step": "null"}
    else:
        flags |= {"examples_per_step": step_size}
    return " ".join(f"--set train.{key}={value}" for key, value in flags.items())


# -------------------------------------------------------------------------------- the largest fit


def find_micro_batch(
    model: nn.Module,
    task: Task,
    batches: Batches,
    accelerator: Accelerator,
    optimizer_bytes: int,
) -> int:
    """Return the largest micro-batch that fits, tried on the longest examples.

    Forward and backward passes are made with growing numbers of them; nothing of the model changes.
    Without a GPU there is nothing to try, and it is 8, or the whole step if that is less.

    Args:
        model: The model, as it will be trained.
        task: It collates, and computes the loss.
        batches: They know the examples of the train split, and their lengths.
        accelerator: Precision and processes; all of them get the same number.
        optimizer_bytes: What the optimizer will keep besides.

    Raises:
        ResourceError: If not even one example fits.
    """
    if accelerator.device.type != "cuda":
        return min(8, task.recipe.train.step_size)
    share = _share(task, batches, accelerator)
    with _untouched(model), _headroom(accelerator.device, HEADROOM):
        trial = _Trial(model, task, batches, accelerator, optimizer_bytes)
        found = largest(trial.fits, share)
    found = min(gather_object([found])) if accelerator.num_processes > 1 else found
    if not found:
        raise out_of_memory(task.recipe, 1, TRAINING)
    return found


def join_micro_batches(
    model: nn.Module,
    task: Task,
    batches: Batches,
    accelerator: Accelerator,
    optimizer_bytes: int,
) -> int | None:
    """Return how many examples are a whole step, where it fits easily, to compute it in one pass.

    The sums of a step are the same however it is cut, and a GPU takes little longer for twice as
    many short texts. None leaves the micro-batches as the recipe says.

    Args: As of `find_micro_batch`.
    """
    train = task.recipe.train
    wanted = train.kernels != "reference" and not train.gradient_checkpointing
    cut = train.micro_batch_size != "auto" and train.step_size > train.micro_batch_size
    if not (wanted and cut and task.same_in_any_batch and accelerator.device.type == "cuda"):
        return None
    share = _share(task, batches, accelerator)
    with _untouched(model), _headroom(accelerator.device, AMPLE):
        fits = _Trial(model, task, batches, accelerator, optimizer_bytes).fits(share)
    if accelerator.num_processes > 1:
        fits = all(gather_object([fits]))
    return share if fits else None


def _share(task: Task, batches: Batches, accelerator: Accelerator) -> int:
    """Return the examples of a step that a process has at most."""
    size = min(task.recipe.train.step_size, len(batches.lengths))
    return math.ceil(int(size) / int(accelerator.num_processes))


@dataclass
class _Trial:
    """Tries whether the longest examples can be computed together."""

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
        return _fits(self.model, task, batch.to(device), self.accelerator, self.optimizer_bytes)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to `limit` that fits, or 0: doubled until one does not.

    Args:
        fits: Whether a number fits. If it does, every smaller one does.
        limit: The largest number that is wanted.
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
    """Return whether a micro-batch can be trained, beside gradients and the optimizer's state."""
    try:
        kept = torch.empty(optimizer_bytes, dtype=torch.uint8, device=accelerator.device)
        for _ in range(2):  # the second backward pass has the gradients of the first beside it
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
    """Put the model into training mode, and its running statistics back afterwards."""
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
    """Let torch take no more than what is free now, less a share of it."""
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
