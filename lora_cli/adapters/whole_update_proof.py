"""Compute the updates of LoHa and LoKr from an adapter's tensors in float64, for `merge_proof`.

Like `merge_proof`, this shares no code with the layers: products are written as sums over named
indices, and shapes are read from the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.match_names import first_match


def whole_update(
    name: str, module: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]
) -> Tensor | None:
    """Return s D of a module in the shape of its weight, or None if it has no LoHa or LoKr update.

    Args:
        name: The module's name.
        module: The base model's module.
        tensors: The adapter's tensors, by names without PEFT's prefix and without `.weight`.
        config: The contents of `adapter_config.json`.
    """
    kind = {"LOHA": "hada_", "LOKR": "lokr_"}.get(config["peft_type"])
    prefix = f"{name}.{kind}"
    factors = {
        key[len(prefix) :]: t.double() for key, t in tensors.items() if key.startswith(prefix)
    }
    if kind is None or not factors:
        return None
    rank = first_match(config.get("rank_pattern") or {}, name, config.get("r", 8))
    alpha = first_match(config.get("alpha_pattern") or {}, name, config.get("alpha", 8))
    update = _product_of_products(factors) if kind == "hada_" else _kronecker(factors)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (alpha / rank * update).reshape(weight.shape)


def _product_of_products(factors: dict[str, Tensor]) -> Tensor:
    """Return LoHa's entrywise product."""
    return _matrix(factors, "w1", "t1") * _matrix(factors, "w2", "t2")


def _kronecker(factors: dict[str, Tensor]) -> Tensor:
    """Return LoKr's Kronecker product: block (i, j) is entry (i, j) of W1 times the whole of W2."""
    first = factors["w1"] if "w1" in factors else _matrix(factors, "w1", "")
    second = factors["w2"] if "w2" in factors else _matrix(factors, "w2", "t2")
    if second.ndim == 3:  # a Conv1d: W1 multiplies the last two dimensions of W2
        blocks = torch.einsum("ac,bdk->badck", first, second)
        return blocks.reshape(second.shape[0], first.shape[0] * second.shape[1], -1)
    blocks = torch.einsum("ac,bd...->abcd...", first, second)
    size = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])
    return blocks.reshape(*size, *second.shape[2:])


def _matrix(factors: dict[str, Tensor], name: str, core: str) -> Tensor:
    """Return the product of two factors, and of the kernel's core tensor if there is one."""
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    if core in factors:
        product: Tensor = torch.einsum("po,pqhw->oqhw", a, factors[core])
        return torch.einsum("oqhw,qi->oihw", product, b)
    return torch.einsum("or,ri->oi", a, b)
