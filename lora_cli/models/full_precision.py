"""Run a model that is stored in 16 bits as if it were stored in float32, to compare outputs.

Whether padding changes a model's outputs depends on its architecture, but in bfloat16 rounding
hides it: in a deep model, rounding alone changes small outputs by several per cent. Memory may not
suffice for a float32 copy of the whole model, so each operation gets float32 copies of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

HALF_DTYPES = (torch.bfloat16, torch.float16)
NOT_TENSORS = {type(None), bool, int, float, str, torch.device}


@contextmanager
def full_precision(model: nn.Module) -> Iterator[torch.dtype]:
    """Compute in float32 within the context, without autocast, whatever the storage dtype is.

    Flash attention only supports 16 bits: models with it compute as usual, unless this context is
    inside `torch_attention`.

    Yields:
        The dtype that the model computes in.
    """
    halves = {p.dtype for p in model.parameters() if p.dtype in HALF_DTYPES}
    if halves and has_flash_attention(model):
        yield halves.pop()
        return
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False), _Float32() if halves else nullcontext():
        yield torch.float32


def has_flash_attention(model: nn.Module) -> bool:
    """Return whether a model or a part of it uses flash attention, which only supports 16 bits."""
    return bool(_flash_configs(model))


@contextmanager
def torch_attention(model: nn.Module) -> Iterator[None]:
    """Replace flash attention by torch's SDPA within the context."""
    configs = _flash_configs(model)
    for config, _ in configs:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for config, name in configs:
            config._attn_implementation = name


def _flash_configs(model: nn.Module) -> list[tuple[Any, str]]:
    """Return the configurations in a model that select flash attention, with its name."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None))}
    named = [(c, str(getattr(c, "_attn_implementation", ""))) for c in configs.values()]
    return [(config, name) for config, name in named if "flash" in name]


class _Float32(TorchFunctionMode):
    """Passes float32 copies of 16-bit tensors to every function of torch."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.dtype.__get__:  # type: ignore[attr-defined]  # `x.to(weight.dtype)`
            return _wide_dtype(func(*args))
        if func is torch.nn.functional.embedding or func is torch.embedding:
            return _widened(func(*args, **kwargs or {}))  # a few rows, not the whole table
        if _reads_values(func):
            args = _all_widened(args)
        return func(*args, **_all_widened(kwargs or {}))


def _reads_values(func: Callable[..., Any]) -> bool:
    """Return whether a function reads values: it is no attribute access and writes to no tensor."""
    name = getattr(func, "__name__", "")
    is_getter = name in ("__get__", "__set__", "__delete__")
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return not (is_getter or writes)


def _all_widened(value: Any) -> Any:
    """Apply `_widened` to every value in an argument, which may be a nested container.

    `tree_map` does the same, but takes several times as long as a small operation, so it is only
    used for other types of containers.
    """
    kind = type(value)
    if kind is tuple:
        return tuple([_all_widened(item) for item in value])
    if kind is list:
        return [_all_widened(item) for item in value]
    if kind is dict:
        return {key: _all_widened(item) for key, item in value.items()}
    if kind in NOT_TENSORS:
        return value
    if isinstance(value, Tensor | torch.dtype):
        return _widened(value)
    return tree_map(_widened, value)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _wide_dtype(value)
    if isinstance(value, Tensor) and value.dtype in HALF_DTYPES:
        return value.float()
    return value


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF_DTYPES else dtype
