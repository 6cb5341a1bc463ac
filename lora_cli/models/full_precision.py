"""Run a model that is stored in 16 bits as if it were stored in float32, to compare outputs.

Whether a model answers a padded text as it answers the text alone is a matter of its architecture,
but in bfloat16 rounding hides it: of a deep model, rounding alone moves small outputs by several
per cent. A float32 copy of the whole model would not fit beside it, so each operation gets a
float32 copy of the tensors that it reads, one operation at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

HALVES = (torch.bfloat16, torch.float16)
NO_TENSORS = {type(None), bool, int, float, str, torch.device}


@contextmanager
def full_precision(model: nn.Module) -> Iterator[torch.dtype]:
    """Compute in float32 inside the `with`, whatever the model is stored in; without autocast.

    Flash attention computes 16-bit numbers only: such a model computes as it always does, unless
    `other_attention` is around this.

    Yields:
        The dtype that the model computes in.
    """
    halves = {p.dtype for p in model.parameters() if p.dtype in HALVES}
    if halves and has_flash_attention(model):
        yield halves.pop()
        return
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False), _Float32() if halves else nullcontext():
        yield torch.float32


def has_flash_attention(model: nn.Module) -> bool:
    """Return whether a model, or a part of it, computes attention in 16 bits only."""
    return bool(_flash_configs(model))


@contextmanager
def other_attention(model: nn.Module) -> Iterator[None]:
    """Compute with torch's attention inside the `with` where the model's own is flash attention."""
    configs = _flash_configs(model)
    for config, _ in configs:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for config, own in configs:
            config._attn_implementation = own


def _flash_configs(model: nn.Module) -> list[tuple[Any, str]]:
    """Return the configurations in a model that name flash attention, with its name."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None))}
    named = [(c, str(getattr(c, "_attn_implementation", ""))) for c in configs.values()]
    return [(config, name) for config, name in named if "flash" in name]


class _Float32(TorchFunctionMode):
    """Hands float32 copies of 16-bit tensors to every function of torch."""

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
    """Return whether a function computes a new tensor, and neither asks nor writes into an old."""
    name = getattr(func, "__name__", "")
    is_getter = name in ("__get__", "__set__", "__delete__")
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return not (is_getter or writes)


def _all_widened(value: Any) -> Any:
    """Return an argument, or what holds some, with `_widened` in place of each value.

    `tree_map` does the same and takes several times as long as a small operation: it is left for
    containers of other types.
    """
    kind = type(value)
    if kind is tuple:
        return tuple([_all_widened(one) for one in value])
    if kind is list:
        return [_all_widened(one) for one in value]
    if kind is dict:
        return {key: _all_widened(one) for key, one in value.items()}
    if kind in NO_TENSORS:
        return value
    if isinstance(value, Tensor | torch.dtype):
        return _widened(value)
    return tree_map(_widened, value)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _wide_dtype(value)
    if isinstance(value, Tensor) and value.dtype in HALVES:
        return value.float()
    return value


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype
