"""Let float32 trained parameters work inside a model that is stored in 16 bits.

Optimizer updates are too small for 16 bits, so every trained parameter is float32. The low-rank
layers handle the conversion themselves; this module handles heads, modules trained in full, and
biases.
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


def reconcile_dtypes(model: nn.Module, head: Iterable[str]) -> None:
    """Prepare a model with parameters of several dtypes to run with or without autocast.

    Args:
        model: The model with its adapter attached.
        head: Modules whose outputs stay float32; other outputs are cast back to the base's dtype.
    """
    _unify_norms(model)
    _reconcile_with_activations(model, head)


def _unify_norms(model: nn.Module) -> None:
    """Convert normalisations with a float32 bias to float32: torch rejects mixed dtypes there."""
    for module in model.modules():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or bias is None or weight.ndim != 1:
            continue
        if bias.dtype == torch.float32:
            weight.data = weight.data.float()
            for name, statistic in module._buffers.items():  # batch normalisation has them
                if statistic is not None and statistic.is_floating_point():
                    module._buffers[name] = statistic.float()


def _reconcile_with_activations(model: nn.Module, head: Iterable[str]) -> None:
    """Reconcile float32 parameters with 16-bit activations when autocast is off.

    A module with only float32 parameters computes in float32. In a module that also holds 16-bit
    weights (a linear layer whose bias is trained), the float32 parameters are cast when used.

    Args:
        model: The model with its adapter attached.
        head: Modules whose outputs stay float32; other outputs are cast back to the base's dtype.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    base_dtype = next((dtype for dtype in dtypes if dtype.itemsize == 2), None)
    if base_dtype is None:
        return
    head = list(head)
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        float32_names = [key for key, p in parameters.items() if p.dtype == torch.float32]
        if isinstance(module, LoRALayer | TokenRows | QuantizedLinear) or not float32_names:
            continue
        if any(p.dtype == base_dtype for p in module.parameters()):
            _cast_at_use(module, float32_names, base_dtype)
            continue
        module.register_forward_pre_hook(_to_float32)
        if not any(inside(name, top) for top in head):
            module.register_forward_hook(functools.partial(_from_float32, base_dtype))


def _cast_at_use(module: nn.Module, names: list[str], dtype: torch.dtype) -> None:
    """Wrap a module's forward so that it sees some of its own parameters in another dtype."""
    # a partial, because deepcopy replaces the module in it, which it cannot do in a closure
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
    originals = {name: module._parameters[name] for name in names}
    if any(p is not None and torch.is_autocast_enabled(p.device.type) for p in originals.values()):
        return forward(*inputs, **options)
    try:
        for name, parameter in originals.items():
            assert parameter is not None
            module._parameters[name] = parameter.to(dtype)  # type: ignore[assignment]  # not a leaf
        return forward(*inputs, **options)
    finally:
        module._parameters.update(originals)


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
