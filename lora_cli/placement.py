"""Where a command computes: the device, the precision, and the processes that share the work."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from lora_cli.environment import Processes, clean_environment, read_processes
from lora_cli.errors import LoraError, ResourceError, counted, warn
from lora_cli.models import mixed_precision
from lora_cli.recipe import Recipe

NOTICE_S = 10.0  # after so long a process says that it waits for the others to appear
APPEAR_S = 1800.0  # and after so long it gives up: queues start nodes minutes apart
# once they have met, the others wait while the main process reads and encodes the data
PATIENCE = timedelta(hours=6)
GPUS = Path("/proc/driver/nvidia/gpus")  # of this machine, whether they may be used or not


def start_accelerator(recipe: Recipe) -> Accelerator:
    """Return Accelerate's view of the device and of the processes.

    Raises:
        LoraError: If the precision needs a GPU, a variable that places the processes is wrong, or
            the model would be divided among them.
        ResourceError: If the other processes do not appear.
    """
    clean_environment()
    processes = read_processes()
    _use_float32()
    _refuse_missing_gpus(processes)
    on_cpu = processes.use_cpu or not torch.cuda.is_available()
    if recipe.train.precision == "fp16" and on_cpu:
        raise LoraError(
            "fp16 needs a GPU",
            recipe.at("train.precision"),
            "use `--set train.precision=fp32`, or bf16",
        )
    if processes.size > 1 and not distributed.is_initialized():
        _meet(processes, on_cpu)
    cpu = on_cpu and (processes.use_cpu or processes.size > 1)
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision(recipe))
    whole = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in whole:
        raise LoraError(
            f"{accelerator.distributed_type.value} is not supported: each process holds the model",
            hint="start with `accelerate launch --multi_gpu`",
        )
    return accelerator


def end_processes() -> None:
    """Leave the group of processes, if there is one; NCCL warns of those that just end."""
    PartialState().destroy_process_group()


def _use_float32() -> None:
    """Undo what a notebook may have set for all of torch, and the recipe decides."""
    if torch.get_default_dtype() != torch.float32:
        warn(f"torch's default dtype was {torch.get_default_dtype()}; it is torch.float32 now")
        torch.set_default_dtype(torch.float32)
    if torch.get_default_device().type != "cpu":
        warn(f"torch's default device was {torch.get_default_device()}; it is the CPU now")
        torch.set_default_device(None)
    if torch.get_float32_matmul_precision() != "highest":
        precision = torch.get_float32_matmul_precision()
        warn(f"torch's precision of matrix products was `{precision}`; it is `highest` now")
        torch.set_float32_matmul_precision("highest")


def _refuse_missing_gpus(processes: Processes) -> None:
    """Refuse GPUs that are asked for and cannot be used: a CPU would silently take their place."""
    if processes.use_cpu:
        return
    count = torch.cuda.device_count()
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    names = [] if asked in ("", "-1") else [name for name in asked.split(",") if name.strip()]
    there = count > 0 or (GPUS.is_dir() and any(GPUS.iterdir()))
    if there and count < len(names):
        raise LoraError(
            f"`CUDA_VISIBLE_DEVICES={asked}` names {counted(len(names), 'GPU')}, and {count} of "
            "them can be used",
            "the environment variable `CUDA_VISIBLE_DEVICES`",
            "`nvidia-smi -L` lists those that there are; an empty value computes on the CPU",
        )
    if count and processes.local_rank >= count:
        raise LoraError(
            f"`LOCAL_RANK` is {processes.local_rank}, but there is no such GPU: "
            f"{counted(count, 'GPU')} can be used",
            "the environment variable `LOCAL_RANK`",
            f"start {counted(count, 'process')[:-1] + 'es' if count > 1 else 'one process'} on "
            "this machine, or show it more GPUs with `CUDA_VISIBLE_DEVICES`",
        )


def _meet(processes: Processes, on_cpu: bool) -> None:
    """Wait until all processes have appeared, and form their group.

    The waiting is done in a thread, since torch's own hears no signal meanwhile.

    Raises:
        ResourceError: If they do not appear in time.
    """
    found: list[Any] = []  # the store through which they find each other
    errors: list[Exception] = []

    def wait() -> None:
        try:
            timeout = timedelta(seconds=APPEAR_S)
            store, _, _ = next(rendezvous("env://", timeout=timeout))
            store.set_timeout(PATIENCE)
            found.append(store)
        except Exception as error:  # torch raises several kinds
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(NOTICE_S)
    me = f"process {processes.rank} of {processes.size}"
    place = f"{processes.address} (`MASTER_ADDR`, `MASTER_PORT`)"
    whom = f"at {place} for the others" if processes.rank == 0 else f"for process 0 at {place}"
    if thread.is_alive():
        warn(f"{me} waits {whom} (`WORLD_SIZE` is {processes.size})")
    while thread.is_alive():
        thread.join(1.0)
    if errors:
        reason = str(errors[0]).splitlines()[0] if str(errors[0]) else type(errors[0]).__name__
        raise ResourceError(
            f"{me} has waited in vain {whom}: {reason}",
            "the environment variables",
            f"start all {processes.size} processes, with the same address",
        ) from errors[0]
    backend = "gloo" if on_cpu else "nccl"
    if not on_cpu:
        torch.cuda.set_device(processes.local_rank)
    distributed.init_process_group(
        backend,
        store=found[0],
        rank=processes.rank,
        world_size=processes.size,
        timeout=PATIENCE,
    )
