"""Speaker embeddings (x-vectors, as SpeechT5 reads them): one for each row, or one for all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.errors import LoraError, counted, name_neighbours
from lora_cli.recipe import Recipe

Vector = NDArray[np.float32]


class SpeakerError(ValueError):
    """A value that is not a speaker embedding; the message says why."""


def parse_vector(value: Any, size: int | None) -> Vector:
    """Parse the vector in a cell (D,).

    Args:
        value: A list of numbers, or such a list as JSON text.
        size: The length that the model expects; None if it is not known.

    Raises:
        SpeakerError: If the value is not such a vector, or is all zeros.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise SpeakerError("is blank")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise SpeakerError("holds text, not a list of numbers in brackets") from None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    numbers = list(value) if isinstance(value, list | tuple) else None
    if numbers is None or not all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in numbers
    ):
        raise SpeakerError("does not hold a list of numbers")
    return _check_vector(np.array(numbers, dtype=np.float64), size)


def load_vector(recipe: Recipe, path: str, backup: Path | None, size: int) -> Vector:
    """Load the vector of `task.speaker_embedding` (D,).

    Args:
        recipe: The recipe, for the location of the key in messages.
        path: The file, written by `numpy.save`.
        backup: A copy to read if the file no longer exists; None if there is no copy.
        size: The length that the model expects.

    Raises:
        LoraError: If the file cannot be read, or is not such a vector.
    """
    at, source = recipe.at("task.speaker_embedding"), Path(path)
    if not source.is_file() and backup is not None and backup.is_file():
        source = backup
    if not source.is_file():
        raise LoraError(f"there is no file {source}", at, name_neighbours(source))
    try:
        array = np.load(source, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise SpeakerError("does not hold an array of numbers")
        if array.ndim > 1 and array.size != max(array.shape):
            shape = " x ".join(map(str, array.shape))
            raise SpeakerError(f"holds {shape} numbers, and not one vector")
        return _check_vector(array.astype(np.float64).reshape(-1), size)
    except SpeakerError as error:
        hint = "write it with `numpy.save(FILE, vector)`, one vector of the speaker"
        raise LoraError(f"{source} {error}", at, hint) from error
    except (OSError, ValueError, EOFError) as error:
        what = f"{source} is no array that `numpy.save` wrote"
        raise LoraError(what, at, "write it with `numpy.save(FILE, vector)`") from error


def _check_vector(vector: NDArray[np.float64], size: int | None) -> Vector:
    if size is not None and len(vector) != size:
        raise SpeakerError(f"holds {counted(len(vector), 'number')}, and the model reads {size}")
    if not np.isfinite(vector).all():
        raise SpeakerError("holds numbers that are NaN or infinity")
    if not math.sqrt(float((vector**2).sum())) > 0.0:
        raise SpeakerError("holds zeros alone, which describe no speaker")
    return vector.astype(np.float32)
