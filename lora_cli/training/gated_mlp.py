"""Let a kernel compute the gate of decoders' MLPs, with the low-rank updates around it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name for it
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from lora_cli.adapters.lora import LoRALinear
from lora_cli.training.fused_modules import IN_16_BITS, ReplacedForward, has_code_of
from lora_cli.training.gated_mlp_kernel import gated_product

SILU = (nn.SiLU, type(ACT2FN["silu"]))
GELU = (type(ACT2FN["gelu_pytorch_tanh"]), type(ACT2FN["gelu_new"]))  # by the same approximation


class GatedMLPs(ReplacedForward):
    """The gated MLPs within some modules that the kernel can compute.

    Args:
        modules: A model, or layers of one.
        compiled: Whether the modules are to be compiled. The compiler joins the operations of a
            gate itself, except for low-rank updates; so only MLPs with updates count. Nor do those
            with dropout: it made a step longer, and kept more in memory.
    """

    def __init__(self, modules: Iterable[nn.Module], compiled: bool = False) -> None:
        parts = [part for module in modules for part in module.modules()]
        mlps: list[Any] = [part for part in parts if _computes_as_llama(part)]
        if compiled:
            mlps = [mlp for mlp in mlps if _has_plain_lora(mlp.gate_proj, dropout=False)]
            mlps = [mlp for mlp in mlps if _has_plain_lora(mlp.up_proj, dropout=False)]
        super().__init__(mlps, _GatedMLP)


class _GatedMLP(nn.Module):
    """Comes before an architecture's own class, whose attributes and equation are Llama's."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Any:
        """Return down(act(gate(x)) * up(x)), of x (..., in)."""
        if not x.is_cuda or (x.dtype not in IN_16_BITS and not torch.is_autocast_enabled("cuda")):
            return super().forward(x)
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        g, u = _without_update(gate)(x), _without_update(up)(x)
        if g.dtype != u.dtype or g.dtype not in IN_16_BITS:
            return super().forward(x)
        gate_h, gate_b = _update(gate, x, g)
        up_h, up_b = _update(up, x, u)
        a = down.lora_A.to(g.dtype) if _has_plain_lora(down, dropout=False) else None
        is_gelu = type(self.act_fn) in GELU
        y, h = gated_product(g, u, gate_h, up_h, gate_b, up_b, a, is_gelu)
        if a is None:
            return down(y)
        z = down.base(y)
        return z + F.linear(h * down.scaling, down.lora_B.to(h.dtype)).to(z.dtype)


def _without_update(layer: Any) -> Any:
    """Return what computes a layer's output without its update, or the layer if there is none."""
    return layer.base if _has_plain_lora(layer) else layer


def _update(layer: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of a layer's update in the dtype of y.

    Args:
        layer: A linear layer.
        x: Its input (..., in).
        y: Its output without the update (..., out).

    Returns:
        s A x (..., rank) and B (out, rank); of rank 0 if y is the whole output.
    """
    if not _has_plain_lora(layer):
        return y.new_empty(*y.shape[:-1], 0), y.new_empty(y.shape[-1], 0)
    h = F.linear(layer.dropout(x), layer.lora_A.to(x.dtype)) * layer.scaling
    return h.to(y.dtype), layer.lora_B.to(y.dtype)


def _has_plain_lora(layer: Any, dropout: bool = True) -> bool:
    """Return whether a layer has plain LoRA that is switched on, with dropout or without it."""
    plain = type(layer) is LoRALinear and layer.enabled
    return plain and (dropout or not layer.dropout.p)


def _computes_as_llama(module: nn.Module) -> bool:
    """Return whether a module computes as Llama's MLP does, with SiLU or GELU."""
    return has_code_of(module, LlamaMLP) and type(module.act_fn) in SILU + GELU
