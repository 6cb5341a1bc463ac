"""Let what is trained in float32 work inside a model that is stored in 16 bits.

An optimizer's steps are too small for 16 bits, so every trained parameter is float32. The low-rank
layers see to that themselves; this is for the rest: heads, modules trained in full, and biases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora import LoRALayer
from lora_cli.adapters.match_names import inside
from lora_cli.adapters.token_rows import TokenRows
from lora_cli.models.quantized_linear import QuantizedLinear


def let_dtypes_meet(model: nn.Module, head: Iterable[str]) -> None:
    """Make a model with parameters of several dtypes one that can run, with or without autocast.

    Args:
        model: The model with its adapter attached.
        head: Modules whose outputs stay float32; those of others return to their input's dtype.
    """
    _unify_norms(model)
    _compute_in_own_dtype(model, head)


def _unify_norms(model: nn.Module) -> None:
    """Make every normalisation with a float32 bias float32 as a whole: torch accepts no mixture."""
    for module in model.modules():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or bias is None or weight.ndim != 1:
            continue
        if bias.dtype == torch.float32:
            weight.data = weight.data.float()
            for name, statistic in module._buffers.items():  # of batch normalisation
                if statistic is not None and statistic.is_floating_point():
                    module._buffers[name] = statistic.float()


def _compute_in_own_dtype(model: nn.Module, head: Iterable[str]) -> None:
    """Let the float32 parameters of a 16-bit model meet its activations, where autocast does not.

    A module that is float32 as a whole computes in float32. Of one that also holds 16-bit weights
    (a linear layer whose bias is trained), the float32 parameters are cast at their use.

    Args:
        model: The model with its adapter attached.
        head: Modules whose outputs stay float32; those of others return to their input's dtype.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    base_dtype = next((dtype for dtype in dtypes if dtype.itemsize == 2), None)
    if base_dtype is None:
        return
    head = list(head)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        wide = [key for key, p in own.items() if p.dtype == torch.float32]
        if isinstance(module, LoRALayer | TokenRows | QuantizedLinear) or not wide:
            continue
        if any(p.dtype == base_dtype for p in module.parameters()):
            _cast_at_use(module, wide, base_dtype)
            continue
        module.register_forward_pre_hook(_to_float32)
        if not any(inside(name, top) for top in head):
            module.register_forward_hook(functools.partial(_from_float32, base_dtype))


def _cast_at_use(module: nn.Module, names: list[str], dtype: torch.dtype) -> None:
    """Let a module's forward see some of its own parameters in another dtype."""
    # a partial, whose module a copy of the model exchanges for its own, as of no closure
    forward = functools.partial(_forward_with_casts, module, module.forward, names, dtype)
    module.forward = forward


def _forward_with_casts(
    module: nn.Module,
    forward: Callable[..., Any],
    names: list[str],
    dtype: torch.dtype,
    *inputs: Any,
    **options: Any,
) -> Any:
    kept = {name: module._parameters[name] for name in names}
    if any(p is not None and torch.is_autocast_enabled(p.device.type) for p in kept.values()):
        return forward(*inputs, **options)
    try:
        for name, parameter in kept.items():
            assert parameter is not None
            module._parameters[name] = parameter.to(dtype)  # type: ignore[assignment]  # no leaf
        return forward(*inputs, **options)
    finally:
        module._parameters.update(kept)


def _to_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.float()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and not torch.is_autocast_enabled(value.device.type)
        else value
        for value in inputs
    )


def _from_float32(
    dtype: torch.dtype, _module: nn.Module, _inputs: tuple[Any, ...], output: Any
) -> Any:
    if isinstance(output, Tensor) and not torch.is_autocast_enabled(output.device.type):
        return output.to(dtype)
    return output
