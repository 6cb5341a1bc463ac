"""The device, the precision and the processes of a command."""

from __future__ import annotations

import os
import socket
import time
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
from lora_cli.models.base_model import mixed_precision
from lora_cli.recipe import Recipe

NOTICE_S = 2.0  # after so long a process says that it waits; starting Python took several more
APPEAR_S = 1800.0  # and after so long it gives up: queues start nodes minutes apart
# once they have met, the others wait while the main process reads and encodes the data
PATIENCE = timedelta(hours=6)
# torch retries for so long where nobody answers at the address, which may be another machine's
CONNECT = timedelta(seconds=30)
POLL_S = 0.05
APPEARED = "lora/appeared"  # counts the processes
LOCAL_SIZE = "LOCAL_WORLD_SIZE"
GPUS = Path("/proc/driver/nvidia/gpus")  # of this machine, whether they may be used or not


def start_accelerator(recipe: Recipe, cpu: bool = False) -> Accelerator:
    """Return Accelerate's view of the device and of the processes.

    Args:
        recipe: Its precision is that of the computation.
        cpu: Whether to compute on the CPU though there is a GPU.

    Raises:
        LoraError: If the precision needs a GPU, a variable that places the processes is wrong, or
            the model would be divided among them.
        ResourceError: If the other processes do not appear.
    """
    clean_environment()
    processes = read_processes()
    _use_float32()
    _reject_missing_gpus(processes)
    on_cpu = cpu or processes.use_cpu or not torch.cuda.is_available()
    if recipe.train.precision == "fp16" and on_cpu:
        raise LoraError(
            "fp16 needs a GPU",
            recipe.at("train.precision"),
            "use `--set train.precision=fp32`, or bf16",
        )
    if processes.size > 1 and not distributed.is_initialized():
        _meet(processes, on_cpu)
    cpu = cpu or (on_cpu and (processes.use_cpu or processes.size > 1))
    given = os.environ.get(LOCAL_SIZE)
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision(recipe))
    if given is None:  # on a CPU Accelerate sets it to 1, which would be read the next time
        os.environ.pop(LOCAL_SIZE, None)
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


def _reject_missing_gpus(processes: Processes) -> None:
    """Reject GPUs that are asked for and cannot be used: a CPU would silently take their place."""
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

    Torch's own waiting hears no signal, and says nothing; so it is begun when all are there.

    Raises:
        ResourceError: If they do not appear in time.
    """
    began, noticed = time.monotonic(), False
    me = f"process {processes.rank} of {processes.size}"
    place = f"{processes.address} (`MASTER_ADDR`, `MASTER_PORT`)"
    whom = f"at {place} for the others" if processes.rank == 0 else f"for process 0 at {place}"
    store: Any = None
    while True:
        try:
            store = store or _store(processes)
            if store is not None and store.add(APPEARED, 0) >= processes.size:
                break
        except (RuntimeError, OSError) as error:  # torch's own are of the first kind
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise _alone(processes, f"{me} cannot meet the others at {place}: {reason}") from error
        waited = time.monotonic() - began
        if waited > APPEAR_S:
            unknown = _unknown_address(processes)
            what = f"{me} waited in vain {whom}" + (f": {unknown}" if unknown else "")
            raise _alone(processes, what)
        if waited > NOTICE_S and not noticed:
            unknown = _unknown_address(processes)
            why = f": {unknown}" if unknown else ""
            warn(f"{me} waits {whom} (`WORLD_SIZE` is {processes.size}){why}")
            noticed = True
        time.sleep(POLL_S)
    if not on_cpu:
        torch.cuda.set_device(processes.local_rank)
    store.set_timeout(PATIENCE)
    distributed.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=store,
        rank=processes.rank,
        world_size=processes.size,
        timeout=PATIENCE,
    )


def _store(processes: Processes) -> Any:
    """Return the store through which the processes meet, None if nobody offers it yet."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the launcher offers it
        store: Any = next(rendezvous("env://"))[0]
    else:
        host, _, port = processes.address.rpartition(":")
        if _unknown_address(processes):  # a cluster's names may take a while to be known
            return None
        if processes.rank > 0:
            try:
                socket.create_connection((host, int(port)), timeout=1.0).close()
            except OSError:
                return None
        tcp_store: Any = vars(distributed)["TCPStore"]  # public, but not to type checkers
        store = tcp_store(
            host,
            int(port),
            processes.size,
            processes.rank == 0,
            timeout=CONNECT,
            wait_for_workers=False,
        )
    store.add(APPEARED, 1)
    return store


def _unknown_address(processes: Processes) -> str:
    """Return why the name of process 0's machine leads to no address; nothing if it does."""
    host, _, port = processes.address.rpartition(":")
    try:
        socket.getaddrinfo(host, int(port))
    except (OSError, UnicodeError) as error:  # the second where the name is too long for one
        reason = getattr(error, "strerror", None) or str(error)
        return f"no machine is known as `{host}` ({reason})"
    return ""


def _alone(processes: Processes, what: str) -> ResourceError:
    hint = f"start all {processes.size} processes, with the same address and a port that is free"
    return ResourceError(what, "the environment variables", hint)
