"""Coordinate the processes of a run when it starts, and explain the errors that end it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from lora_cli.errors import InterruptedRun, LoraError, NumericsError
from lora_cli.recipe import Learned, Recipe
from lora_cli.training.resource_errors import resource_error
from lora_cli.training.stop_request import StopRequest
from lora_cli.unexpected_errors import note_phase


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Let the main process execute the block before the others.

    If it fails, the others end with its exit code and no message. (They would wait forever in
    Accelerate's context of this name.)
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
def explain_errors(
    recipe: Recipe, learned: Learned, accelerator: Accelerator, stop: StopRequest
) -> Iterator[None]:
    """Convert errors such as a lack of memory to errors with a hint.

    If all processes raise the same error, only the main process reports it.

    Args:
        recipe: The batch sizes, and the output folder.
        learned: The micro-batch size, if the recipe does not set it.
        accelerator: The rank of this process.
        stop: Its `activity` is what the run is doing.
    """
    try:
        yield
    except (InterruptedRun, NumericsError) as error:
        if accelerator.is_main_process:
            raise
        raise SystemExit(error.exit_code) from None
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        if (explained := resource_error(error, recipe, learned, stop.activity)) is not None:
            raise explained from error
        note_phase(error, stop.activity)
        raise
    except Exception as error:
        note_phase(error, stop.activity)
        raise
