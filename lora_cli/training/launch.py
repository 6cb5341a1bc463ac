"""How a run starts: who goes first, and the seeds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lora_cli.errors import LoraError


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


def seed_everything(*seed: int) -> None:
    """Seed the generators of torch, numpy and Python with a mix of the numbers."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(mixed)
    np.random.seed(mixed % 2**32)  # some models draw their masks from it
    random.seed(mixed)
