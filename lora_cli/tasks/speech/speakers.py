"""Who speaks: a vector for each row, or one for all, as SpeechT5 reads it (an x-vector)."""

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
    """A value that describes no speaker; the text says why."""


def vector_of(value: Any, size: int | None) -> Vector:
    """Return the vector that a cell holds (D,).

    Args:
        value: A list of numbers, or such a list as text (JSON).
        size: How many numbers the model reads; None where that is not known.

    Raises:
        SpeakerError: If it is none, or says nothing.
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
        isinstance(one, int | float) and not isinstance(one, bool) for one in numbers
    ):
        raise SpeakerError("does not hold a list of numbers")
    return _checked(np.array(numbers, dtype=np.float64), size)


def read_vector(recipe: Recipe, file: str, copy: Path | None, size: int) -> Vector:
    """Return the vector of `task.speaker_embedding` (D,).

    Args:
        recipe: Names the file.
        file: The file, of `numpy.save`.
        copy: Is read instead where that is not there any more; None: there is none.
        size: How many numbers the model reads.

    Raises:
        LoraError: If it cannot be read, or is no such vector.
    """
    at, path = recipe.at("task.speaker_embedding"), Path(file)
    if not path.is_file() and copy is not None and copy.is_file():
        path = copy
    if not path.is_file():
        raise LoraError(f"there is no file {path}", at, name_neighbours(path))
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
            raise SpeakerError("does not hold an array of numbers")
        if found.ndim > 1 and found.size != max(found.shape):
            shape = " x ".join(map(str, found.shape))
            raise SpeakerError(f"holds {shape} numbers, and not one vector")
        return _checked(found.astype(np.float64).reshape(-1), size)
    except SpeakerError as error:
        hint = "write it with `numpy.save(FILE, vector)`, one vector of the speaker"
        raise LoraError(f"{path} {error}", at, hint) from error
    except (OSError, ValueError, EOFError) as error:
        what = f"{path} is no array that `numpy.save` wrote"
        raise LoraError(what, at, "write it with `numpy.save(FILE, vector)`") from error


def _checked(vector: NDArray[np.float64], size: int | None) -> Vector:
    if size is not None and len(vector) != size:
        raise SpeakerError(f"holds {counted(len(vector), 'number')}, and the model reads {size}")
    if not np.isfinite(vector).all():
        raise SpeakerError("holds numbers that are NaN or infinity")
    if not math.sqrt(float((vector**2).sum())) > 0.0:
        raise SpeakerError("holds zeros alone, which describe no speaker")
    return vector.astype(np.float32)
