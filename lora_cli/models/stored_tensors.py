"""The tensors of a checkpoint's safetensors files, read one at a time.

They are read and not mapped into memory: what is mapped counts as used memory until the whole file
is closed, so that a large file would take as much as it is long.

Files of a mixture of experts have a tensor for each layer of each expert, which transformers joins
while it loads them: `mlp.experts.gate_up_proj` (experts, 2 x n, in) holds `gate_proj` and `up_proj`
(n, in) of all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_cli.errors import IntegrityError
from lora_cli.models.fingerprint import inner_name
from lora_cli.tensorfile import TensorEntry, read_header

CHUNK = 2**24  # bytes of a tensor that are in memory at once where it is only copied or compared
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
# the layers that an expert had, and the parameter which holds them now, one after the other
FUSED = {
    "w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0),
}  # fmt: skip
OF_EXPERT = re.compile(
    r"(?P<block>.+)\.(?:block_sparse_moe|mlp)\.experts\.(?P<number>\d+)\.(?P<layer>\w+)\.weight"
)


class Stored(NamedTuple):
    """Where a tensor is: its file, its name there, and what the file's header says of it."""

    file: Path
    name: str
    entry: TensorEntry

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own.

        Raises:
            IntegrityError: If its dtype is not known, or the file became shorter.
        """
        if self.entry.dtype not in DTYPES:
            what = f"`{self.name}` is stored as {self.entry.dtype}, which cannot be read"
            raise IntegrityError(what, str(self.file), "store it in another dtype")
        data = torch.empty(self.entry.end - self.entry.start, dtype=torch.uint8)
        left = memoryview(data.numpy().data)
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.entry.start)
            while len(left):
                count = handle.readinto(left)
                if not count:
                    raise self._shorter()
                left = left[count:]
        return data.view(DTYPES[self.entry.dtype]).reshape(self.entry.shape)

    def chunks(self) -> Iterator[bytes]:
        """Yield the tensor's bytes, some at a time.

        Raises:
            IntegrityError: If the file became shorter.
        """
        left = self.entry.end - self.entry.start
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.entry.start)
            while left:
                chunk = handle.read(min(CHUNK, left))
                if not chunk:
                    raise self._shorter()
                left -= len(chunk)
                yield chunk

    def _shorter(self) -> IntegrityError:
        what, hint = "the file became shorter while it was read", "download it again"
        return IntegrityError(what, str(self.file), hint)

    def same_bytes(self, other: Stored) -> bool:
        """Return whether another tensor has the same dtype, shape and bytes."""
        if self.entry[:2] != other.entry[:2]:
            return False
        return all(a == b for a, b in zip(self.chunks(), other.chunks(), strict=True))


class StoredTensors:
    """The tensors of safetensors files, by their names inside the pretrained model.

    Args:
        files: The files.
        start: The prefix of the pretrained model in a model with a head, with its dot: `bert.`.
    """

    def __init__(self, files: Iterable[Path], start: str) -> None:
        self.places: dict[str, Stored] = {}
        for file in files:
            for name, entry in read_header(file).items():
                self.places[inner_name(name, start)] = Stored(file, name, entry)

    def read(self, name: str) -> Tensor:
        """Return a tensor, in memory of its own."""
        return self.places[name].read()


class ExpertPart(NamedTuple):
    """The part of a parameter of all experts that the file has as a tensor of its own.

    Args:
        parameter: Name of the parameter (experts, rows, in).
        expert: Which of the experts.
        rows: Which of its rows.
        n_layers: How many such tensors make up an expert.
        n_in: Length of a row.
    """

    parameter: str
    expert: int
    rows: slice
    n_layers: int
    n_in: int

    def of(self, parameter: Tensor) -> Tensor:
        """Return this part of the parameter of all experts."""
        return parameter[self.expert, self.rows]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a parameter of a shape has such a part."""
        n_rows = self.rows.stop - self.rows.start
        return (
            len(shape) == 3
            and self.expert < shape[0]
            and shape[1:] == (n_rows * self.n_layers, self.n_in)
        )


def expert_part(name: str, shape: tuple[int, ...]) -> ExpertPart | None:
    """Return which part of a parameter a tensor is by its name, or None if it is none.

    Args:
        name: As the model would call a layer of one expert: `…mlp.experts.3.up_proj.weight`.
        shape: Of the tensor.
    """
    found = OF_EXPERT.fullmatch(name)
    if not found or found["layer"] not in FUSED or len(shape) != 2:
        return None
    fused, place = FUSED[found["layer"]]
    rows = slice(place * shape[0], (place + 1) * shape[0])
    parameter = f"{found['block']}.mlp.experts.{fused}"
    n_layers = 2 if fused == "gate_up_proj" else 1
    return ExpertPart(parameter, int(found["number"]), rows, n_layers, shape[1])
