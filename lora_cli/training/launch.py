"""How a run starts: its processes, who goes first, and the seeds."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list

from lora_cli.errors import LoraError
from lora_cli.models import mixed_precision
from lora_cli.recipe import Recipe

# the others wait while the main process reads and encodes the data
PATIENCE = timedelta(hours=6)


def start_accelerator(recipe: Recipe) -> Accelerator:
    """Return Accelerate's view of the devices and processes.

    Raises:
        LoraError: If the precision needs a GPU, processes were started that do not see each other,
            or the model would be divided among them.
    """
    if recipe.train.precision == "fp16" and not torch.cuda.is_available():
        raise LoraError(
            "fp16 needs a GPU",
            recipe.at("train.precision"),
            "use `--set train.precision=fp32`, or bf16",
        )
    accelerator = Accelerator(
        mixed_precision=mixed_precision(recipe),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise LoraError(
            f"WORLD_SIZE is {launched}, but {accelerator.num_processes} process is seen",
            hint="on a CPU start with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
            "-m lora_cli train RECIPE`",
        )
    whole = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in whole:
        raise LoraError(
            f"{accelerator.distributed_type.value} is not supported: each process holds the model",
            hint="start with `accelerate launch --multi_gpu`",
        )
    return accelerator


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Let the main process go through the block before the others.

    Where it fails the others end with its exit code, and leave the message to it. (Accelerate's own
    context of this name would leave them waiting.)
    """
    if accelerator.num_processes == 1:
        yield
        return
    if not accelerator.is_main_process:
        code = broadcast_object_list([None])[0]
        if code:
            raise SystemExit(code)
        yield
        return
    code = 1
    try:
        yield
        code = 0
    except LoraError as error:
        code = error.exit_code
        raise
    finally:
        broadcast_object_list([code])


def end_processes() -> None:
    """Take leave of the other processes, if there are any; NCCL warns of those that just end."""
    PartialState().destroy_process_group()


def seed_everything(*seed: int) -> None:
    """Seed the generators of torch, numpy and Python with a mix of the numbers."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(mixed)
    np.random.seed(mixed % 2**32)  # some models draw their masks from it
    random.seed(mixed)
