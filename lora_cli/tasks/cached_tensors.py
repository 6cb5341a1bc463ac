"""Tensors of an example as its cache keeps them: bytes, a shape and a dtype, without loss."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor, nn

KEYS = {"data", "shape", "dtype"}
FEATURE = {"data": "large_binary", "shape": ["int32"], "dtype": "string"}
"""The types of the three, as `datasets` names them; of a list, that of its items."""


def kept(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor as it is kept."""
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"data": data, "shape": list(tensor.shape), "dtype": dtype}


def restored(example: dict[str, Any]) -> dict[str, Any]:
    """Return an example with its kept values as tensors again."""
    return {name: _tensor(value) if _is_kept(value) else value for name, value in example.items()}


def _is_kept(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == KEYS


def _tensor(value: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, value["dtype"])
    if not value["data"]:
        return torch.zeros(value["shape"], dtype=dtype)
    flat = torch.frombuffer(bytearray(value["data"]), dtype=dtype)
    return flat.view(value["shape"])


def hash_of(part: nn.Module) -> str:
    """Return a hash (xxh3, 128 bits) of all tensors of a frozen model.

    They are read as they are in memory: a model that was loaded in another dtype answers otherwise.
    """
    state = xxhash.xxh3_128()
    for name, tensor in part.state_dict().items():
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(kept(tensor)["data"])
    return state.hexdigest()
