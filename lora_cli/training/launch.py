"""How a run starts and ends: who goes first, what errors mean, and the seeds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from lora_cli.errors import InterruptedRun, LoraError, NumericsError
from lora_cli.recipe import Learned, Recipe
from lora_cli.training.memory_and_disk import resource_error
from lora_cli.training.stop_request import StopRequest
from lora_cli.unexpected_errors import note_phase


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


@contextmanager
def explaining(
    recipe: Recipe, learned: Learned, accelerator: Accelerator, stop: StopRequest
) -> Iterator[None]:
    """Say what an error of training means; what every process raises is left to the main process.

    Args:
        recipe: Says how large the batches are, and where the result goes.
        learned: How large they are, where the recipe leaves that open.
        accelerator: Which process this is.
        stop: Knows what the run is doing.
    """
    try:
        yield
    except (InterruptedRun, NumericsError) as error:
        if accelerator.is_main_process:
            raise
        raise SystemExit(error.exit_code) from None
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        if (full := resource_error(error, recipe, learned, stop.activity)) is not None:
            raise full from error
        note_phase(error, stop.activity)
        raise
    except Exception as error:
        note_phase(error, stop.activity)
        raise


def seed_everything(*seed: int) -> None:
    """Seed the generators of torch, numpy and Python with a mix of the numbers."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    if torch.accelerator.is_available():
        torch.manual_seed(mixed)
    else:  # that would prepare, for a millisecond, to seed devices that there are not
        torch.default_generator.manual_seed(mixed)
    np.random.seed(mixed % 2**32)  # some models draw their masks from it
    random.seed(mixed)
