"""What `merge_proof` says of LoHa and LoKr: the update that a folder's tensors mean, in float64.

Like the rest of that proof it shares no code with the layers: products are written as sums over
named indices, and the shapes are those of the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.match_names import first_match


def whole_update(
    name: str, module: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]
) -> Tensor | None:
    """Return s D of an adapted module, in the shape of its weight; None if it has no such update.

    Args:
        name: Of the module.
        module: The module of the base.
        tensors: Of the adapter's file, without prefix and `.weight`.
        config: What `adapter_config.json` holds.
    """
    kind = {"LOHA": "hada_", "LOKR": "lokr_"}.get(config["peft_type"])
    before = f"{name}.{kind}"
    own = {key[len(before) :]: t.double() for key, t in tensors.items() if key.startswith(before)}
    if kind is None or not own:
        return None
    rank = first_match(config.get("rank_pattern") or {}, name, config.get("r", 8))
    alpha = first_match(config.get("alpha_pattern") or {}, name, config.get("alpha", 8))
    whole = _product_of_products(own) if kind == "hada_" else _kronecker(own)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (alpha / rank * whole).reshape(weight.shape)


def _product_of_products(own: dict[str, Tensor]) -> Tensor:
    """Return LoHa's entrywise product."""
    return _matrix(own, "w1", "t1") * _matrix(own, "w2", "t2")


def _kronecker(own: dict[str, Tensor]) -> Tensor:
    """Return LoKr's product: an entry of the first times the whole second, block by block."""
    first = own["w1"] if "w1" in own else _matrix(own, "w1", "")
    second = own["w2"] if "w2" in own else _matrix(own, "w2", "t2")
    if second.ndim == 3:  # of a Conv1d: the first meets its last two dimensions
        blocks = torch.einsum("ac,bdk->badck", first, second)
        return blocks.reshape(second.shape[0], first.shape[0] * second.shape[1], -1)
    blocks = torch.einsum("ac,bd...->abcd...", first, second)
    size = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])
    return blocks.reshape(*size, *second.shape[2:])


def _matrix(own: dict[str, Tensor], name: str, core: str) -> Tensor:
    """Return the product of two factors, with a third for the kernel where there is one."""
    a, b = own[f"{name}_a"], own[f"{name}_b"]
    if core in own:
        product: Tensor = torch.einsum("po,pqhw->oqhw", a, own[core])
        return torch.einsum("oqhw,qi->oihw", product, b)
    return torch.einsum("or,ri->oi", a, b)
