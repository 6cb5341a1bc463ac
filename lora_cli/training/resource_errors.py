"""Explain errors of a run whose memory or disk is full: what happened, and what to change."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import torch

from lora_cli.errors import ResourceError, system_error
from lora_cli.recipe import Learned, Recipe
from lora_cli.training.checkpoints import peek_state
from lora_cli.training.stop_request import LOADING, TRAINING

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
    """Return the error to report if an exception means that memory or disk is full, or None.

    Args:
        error: The exception, of any library.
        recipe: The batch sizes, and the output folder.
        learned: The micro-batch size, if the recipe does not set it.
        activity: What the run was doing.
    """
    if is_out_of_memory(error):
        return out_of_memory(recipe, learned.micro_batch_of(recipe.train), activity)
    saved = peek_state(recipe.output_path)
    saved_note = f"the checkpoint of step {saved.step} is whole; " if saved else ""
    if (worker := _worker_error(error, activity, saved_note)) is not None:
        return worker
    error_number = system_error(error)
    if error_number == errno.ENOENT:
        return _removed(error, recipe, activity)
    if error_number not in DISK_ERRORS:
        return None
    name = getattr(error, "filename", None) or recipe.output_path
    hint = f"{saved_note}free some space, then continue with `--resume`"
    return ResourceError(f"{DISK_ERRORS[error_number]} while {activity}", str(name), hint)


def _worker_error(error: BaseException, activity: str, saved_note: str) -> ResourceError | None:
    """Return the error to report if a data loader's worker died or ran out of memory, or None."""
    text = str(error)
    match = WORKER.search(text)
    if SHARED.search(text) or (match and match[2] == "Bus"):
        what = (
            f"the shared memory, through which workers hand over batches, is full while {activity}"
        )
        hint = f"{saved_note}go on with `--resume --set train.workers=0`, which needs none"
        return ResourceError(what, "/dev/shm", hint)
    if match is None:
        return None
    what = f"a worker that prepares batches was killed while {activity}"
    hint = (
        f"{saved_note}continue with `--resume`; if the machine's memory was full (`dmesg` says "
        "so), with `--set train.workers=0`"
    )
    return ResourceError(what, "train.workers", hint)


def _removed(error: BaseException, recipe: Recipe, activity: str) -> ResourceError | None:
    """Return the error to report if the output was removed during the run, or None."""
    folder = recipe.output_path
    name = str(getattr(error, "filename", None) or folder)
    if folder.is_dir() and not Path(name).absolute().is_relative_to(folder.absolute()):
        return None
    removed_path = str(folder) if not folder.is_dir() else name
    what = f"`{removed_path}` was removed while {activity}, by another program or by hand"
    hint = "what was saved in it is gone: start again, with `-o DIR` in another folder"
    if folder.is_dir() and peek_state(folder) is not None:
        hint = "go on from the checkpoints that are left with `--resume`"
    return ResourceError(what, recipe.at("output_dir"), hint)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the GPU or the machine is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in MEMORY_WORDS)


def out_of_memory(recipe: Recipe, micro_batch: int, activity: str) -> ResourceError:
    """Return the error for full memory, with a hint on what to change."""
    memory = "the GPU's memory" if torch.cuda.is_available() else "the memory"
    train, evaluation = recipe.train, recipe.evaluate
    ways = []
    if activity == TRAINING:
        if micro_batch > 1:
            ways.append(f"`{_split_flags(train.step_size, micro_batch // 2)}` (the same steps)")
        if not train.gradient_checkpointing:
            ways.append("`--set train.gradient_checkpointing=true` (slower)")
        elif train.gradient_checkpointing is True and torch.cuda.is_available():
            ways.append("`--set train.gradient_checkpointing=offload` (needs the host's memory)")
    elif activity == LOADING:
        ways += ["`--set train.precision=bf16` (half the weights' size)"]
    else:
        size = evaluation.micro_batch_size or 2 * micro_batch
        if size > 1:
            ways.append(f"`--set evaluate.micro_batch_size={size // 2}` (the same numbers)")
    lengths = {key: getattr(recipe.task, key, None) for key in recipe.task.length_keys}
    if activity != LOADING and (set_lengths := {key: n for key, n in lengths.items() if n}):
        flags = " ".join(f"--set task.{key}={max(n // 2, 1)}" for key, n in set_lengths.items())
        ways.append(f"`{flags}` (cuts more texts)")
    hint = f"add {', or '.join(ways)}"
    if activity != LOADING and (saved := peek_state(recipe.output_path)) is not None:
        hint += f"; with `--resume` all but the last continue from step {saved.step}"
    return ResourceError(f"{memory} is full while {activity}", hint=hint)


def _split_flags(step_size: int, micro_batch: int) -> str:
    """Return the flags that split a step into smaller micro-batches."""
    flags: dict[str, Any] = {"micro_batch_size": micro_batch, "gradient_accumulation_steps": 1}
    if step_size % micro_batch == 0:
        flags["gradient_accumulation_steps"] = step_size // micro_batch
        flags |= {"examples_per_step": "null"}
    else:
        flags |= {"examples_per_step": step_size}
    return " ".join(f"--set train.{key}={value}" for key, value in flags.items())
