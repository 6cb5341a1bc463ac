"""The header of a safetensors file, checked before anything reads a tensor.

A file is eight bytes that say how long the header is, the header (JSON: the dtype, the shape and
the place of each tensor), and the tensors' bytes without a gap. Whoever made a file may lie in all
of it, so nothing here trusts a number before it is compared with the size of the file.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.errors import IntegrityError
from lora_cli.git_lfs import FETCH, POINTS, is_pointer

MAX_HEADER_BYTES = 16 * 2**20  # of a hundred thousand tensors, which take about a second
MAX_DIMENSIONS = 64  # torch has no more
KEYS = {"dtype", "shape", "data_offsets"}
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


class TensorEntry(NamedTuple):
    """What the header says of a tensor; `start` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the entries of a safetensors file by name, in the order of their bytes.

    Raises:
        IntegrityError: If the file is not whole, or not a safetensors file.
        PermissionError: If it may not be read.
    """
    try:
        return _entries(file)
    except PermissionError:
        raise  # the file may be whole
    except (OSError, ValueError, RecursionError) as error:
        hint = "it was damaged, or another tool wrote it wrongly; get it again from its source"
        reason = "the header is too deep" if isinstance(error, RecursionError) else str(error)
        if _looks_pickled(file):
            reason = "it is a pickle, which can run code when it is read"
            hint = "convert it where you trust it; this tool reads safetensors only"
        if is_pointer(file):
            reason, hint = f"it is {POINTS}", FETCH
        raise IntegrityError(f"not a whole safetensors file: {reason}", str(file), hint) from error


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, such as `format`.

    Raises:
        IntegrityError: As `read_header`.
    """
    read_header(file)  # which checks that the metadata are texts
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        metadata: dict[str, str] = json.loads(handle.read(length)).get("__metadata__", {})
    return metadata


def header_bytes(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Any) -> bytes:
    """Return the beginning of a safetensors file, after which the tensors' bytes follow in order.

    Args:
        tensors: The dtype (by its name in such files) and the shape of each, by name.
        metadata: What the file says of itself.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of their sizes
    return len(text).to_bytes(8, "little") + text


def _entries(file: Path) -> dict[str, TensorEntry]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"it has {size:,} bytes, and its header would have {length:,}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
        text = handle.read(length)
    header = json.loads(text, object_pairs_hook=_Objects().checked, parse_constant=_reject)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not texts")
    first = 8 + length
    entries = {name: _entry(name, value, first) for name, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))  # by start and end
    ends = [entry.end for entry in entries.values()]
    for (name, entry), end in zip(entries.items(), itertools.chain([first], ends), strict=False):
        if entry.start != end:
            error = "overlaps the one before" if entry.start < end else "begins after a gap"
            raise ValueError(f"`{name}` {error}")
    if (last := ends[-1] if ends else first) != size:
        raise ValueError(f"it has {size:,} bytes, and its tensors end at {last:,}")
    return entries


def _entry(name: str, value: Any, first: int) -> TensorEntry:
    """Return the entry of a tensor, if its dtype, shape and place agree."""
    if not isinstance(value, dict) or value.keys() != KEYS:
        raise ValueError(f"`{name}` has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"`{name}` is of a dtype that is not known")
    if not _are_counts(shape, MAX_DIMENSIONS):
        raise ValueError(f"the shape of `{name}` is not valid")
    if not _are_counts(offsets, 2) or len(offsets) != 2:
        raise ValueError(f"the place of `{name}` is not valid")
    start, end = offsets
    if math.prod(shape) * BITS[dtype] != (end - start) * 8:
        raise ValueError(
            f"`{name}` does not have the number of bytes that its shape {tuple(shape)} needs"
        )
    return TensorEntry(dtype, tuple(shape), first + start, first + end)


def _are_counts(value: Any, most: int) -> bool:
    if not isinstance(value, list) or len(value) > most:
        return False
    for number in value:  # noqa: SIM110 - faster, and there may be a hundred thousand of these
        if type(number) is not int or not 0 <= number < 2**63:
            return False
    return True


class _Objects:
    """Checks each object of the header as it is read, so that a wrong one ends the reading."""

    def __init__(self) -> None:
        self.others = 0

    def checked(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return an object: of a tensor, or one of two others, the metadata and the whole."""
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name appears twice in its header")
        if len(found) != len(KEYS) or "dtype" not in found:
            self.others += 1
            if self.others > 2:
                raise ValueError("its header contains something that is not a tensor")
        return found


def _reject(constant: str) -> None:
    raise ValueError(f"its header holds {constant}")


def _looks_pickled(file: Path) -> bool:
    """Return whether a file begins as `pickle.dump` or `torch.save` would begin it."""
    try:
        with file.open("rb") as handle:
            beginning = handle.read(4)
    except OSError:
        return False
    return beginning.startswith((b"PK\x03\x04", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"))
