"""Tensors of an example in its cache: bytes, a shape and a dtype, without any loss."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor, nn

KEYS = {"data", "shape", "dtype"}
FEATURE = {"data": "large_binary", "shape": ["int32"], "dtype": "string"}
"""The types of these keys, as `datasets` names them; a list stands for a list of its item."""


def to_cached(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor in the form in which it is cached."""
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"data": data, "shape": list(tensor.shape), "dtype": dtype}


def restored(example: dict[str, Any]) -> dict[str, Any]:
    """Return an example with its cached values converted back to tensors."""
    return {name: _tensor(value) if _is_cached(value) else value for name, value in example.items()}


def _is_cached(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == KEYS


def _tensor(value: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, value["dtype"])
    if not value["data"]:
        return torch.zeros(value["shape"], dtype=dtype)
    flat = torch.frombuffer(bytearray(value["data"]), dtype=dtype)
    return flat.view(value["shape"])


def hash_of(part: nn.Module) -> str:
    """Return a hash (xxh3, 128 bits) of all tensors of a frozen model.

    It depends on their values in memory, so a model that is loaded in another dtype has another.
    """
    state = xxhash.xxh3_128()
    for name, tensor in part.state_dict().items():
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(to_cached(tensor)["data"])
    return state.hexdigest()
