"""Read the tensors of a checkpoint's safetensors files one at a time.

They are not memory-mapped: mapped pages count as used memory until the file is closed, so a large
file would take as much memory as its size.

Files of a mixture of experts contain a tensor for each layer of each expert. transformers joins
them while loading: `mlp.experts.gate_up_proj` (experts, 2 x n, in) contains `gate_proj` and
`up_proj` (n, in) of all experts.
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

CHUNK = 2**24  # bytes in memory at a time when a tensor is only copied or compared
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
# layers of an expert in files, with the joined parameter in the model and the position in it
FUSED = {
    "w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0),
}  # fmt: skip
EXPERT_LAYER = re.compile(
    r"(?P<block>.+)\.(?:block_sparse_moe|mlp)\.experts\.(?P<number>\d+)\.(?P<layer>\w+)\.weight"
)


class Stored(NamedTuple):
    """The location of a tensor: its file, its name there, and its entry in the header."""

    file: Path
    name: str
    entry: TensorEntry

    def read(self) -> Tensor:
        """Read the tensor into new memory.

        Raises:
            IntegrityError: If its dtype is not known, or the file became shorter.
        """
        if self.entry.dtype not in DTYPES:
            what = f"`{self.name}` is stored as {self.entry.dtype}, which cannot be read"
            raise IntegrityError(what, str(self.file), "store it in another dtype")
        data = torch.empty(self.entry.end - self.entry.start, dtype=torch.uint8)
        remaining = memoryview(data.numpy().data)
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.entry.start)
            while len(remaining):
                count = handle.readinto(remaining)
                if not count:
                    raise self._shorter()
                remaining = remaining[count:]
        return data.view(DTYPES[self.entry.dtype]).reshape(self.entry.shape)

    def chunks(self) -> Iterator[bytes]:
        """Yield the tensor's bytes in chunks.

        Raises:
            IntegrityError: If the file became shorter.
        """
        remaining = self.entry.end - self.entry.start
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.entry.start)
            while remaining:
                chunk = handle.read(min(CHUNK, remaining))
                if not chunk:
                    raise self._shorter()
                remaining -= len(chunk)
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
        prefix: The prefix of the pretrained model in a model with a head, with its dot: `bert.`.
    """

    def __init__(self, files: Iterable[Path], prefix: str) -> None:
        self.places: dict[str, Stored] = {}
        for file in files:
            for name, entry in read_header(file).items():
                self.places[inner_name(name, prefix)] = Stored(file, name, entry)

    def read(self, name: str) -> Tensor:
        """Read a tensor into new memory."""
        return self.places[name].read()


class ExpertPart(NamedTuple):
    """The part of a joined parameter of all experts that is a separate tensor in the file.

    Args:
        parameter: The name of the parameter (experts, rows, in).
        expert: The index of the expert.
        rows: The rows of the expert.
        n_layers: The number of such tensors per expert.
        n_in: The length of a row.
    """

    parameter: str
    expert: int
    rows: slice
    n_layers: int
    n_in: int

    def of(self, parameter: Tensor) -> Tensor:
        """Return this part of the joined parameter."""
        return parameter[self.expert, self.rows]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a parameter of this shape has such a part."""
        n_rows = self.rows.stop - self.rows.start
        return (
            len(shape) == 3
            and self.expert < shape[0]
            and shape[1:] == (n_rows * self.n_layers, self.n_in)
        )


def expert_part(name: str, shape: tuple[int, ...]) -> ExpertPart | None:
    """Return the part of a joined parameter that a stored tensor is, or None.

    Args:
        name: The name of a layer of one expert: `…mlp.experts.3.up_proj.weight`.
        shape: The shape of the tensor.
    """
    match = EXPERT_LAYER.fullmatch(name)
    if not match or match["layer"] not in FUSED or len(shape) != 2:
        return None
    fused, index = FUSED[match["layer"]]
    rows = slice(index * shape[0], (index + 1) * shape[0])
    parameter = f"{match['block']}.mlp.experts.{fused}"
    n_layers = 2 if fused == "gate_up_proj" else 1
    return ExpertPart(parameter, int(match["number"]), rows, n_layers, shape[1])
