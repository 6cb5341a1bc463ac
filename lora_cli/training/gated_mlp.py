"""Gated MLPs of decoders whose gate, with the low-rank updates around it, is one kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name for it
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from lora_cli.adapters.lora import LoRALinear
from lora_cli.training.fused_modules import ReplacedForward, has_code_of
from lora_cli.training.gated_mlp_kernel import gated_product
from lora_cli.training.stacked_products import IN_16_BITS, MAX_RANK, hidden_of_updates, new_seed

SILU = (nn.SiLU, type(ACT2FN["silu"]))
GELU = (type(ACT2FN["gelu_pytorch_tanh"]), type(ACT2FN["gelu_new"]))  # by the same approximation


class GatedMLPs(ReplacedForward):
    """The gated MLPs within some modules that can use the kernel.

    Args:
        modules: A model, or some of its layers.
        compiled: Whether the modules will be compiled. The compiler fuses the operations of a gate
            itself, but not the low-rank updates, so only MLPs with updates use the kernel.
    """

    def __init__(self, modules: Iterable[nn.Module], compiled: bool = False) -> None:
        parts = [part for module in modules for part in module.modules()]
        mlps: list[Any] = [part for part in parts if _computes_as_llama(part)]
        if compiled:
            mlps = [mlp for mlp in mlps if _has_plain_lora(mlp.gate_proj)]
            mlps = [mlp for mlp in mlps if _has_plain_lora(mlp.up_proj)]
        super().__init__(mlps, _GatedMLP)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers whose updates, or a part of them, the kernel computes."""
        mlps: list[Any] = [mlp for mlp, _ in self.replaced]
        return [layer for mlp in mlps for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


class _GatedMLP(nn.Module):
    """A base class put before an architecture's own class, whose equation is Llama's."""

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
        (gate_h, gate_b), (up_h, up_b) = _updates((gate, up), x, (g, u))
        a, seed, p = None, None, 0.0
        if _has_plain_lora(down):
            a = down.lora_A.to(g.dtype)
            if down.training and down.dropout.p:
                seed, p = new_seed(x), down.dropout.p
        is_gelu = type(self.act_fn) in GELU
        y, h = gated_product(g, u, gate_h, up_h, gate_b, up_b, a, seed, p, is_gelu)
        if a is None:
            return down(y)
        z = down.base(y)
        return z + F.linear(h * down.scaling, down.lora_B.to(h.dtype)).to(z.dtype)


def _without_update(layer: Any) -> Any:
    """Return the base of a layer whose update the kernel adds; otherwise the layer itself."""
    return layer.base if _has_plain_lora(layer) else layer


def _updates(
    layers: tuple[Any, Any], x: Tensor, outputs: tuple[Tensor, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return the factors of the updates of two layers, in the dtype of their outputs.

    Args:
        layers: Linear layers, with LoRA or without it.
        x: Their input (..., in).
        outputs: The output of each layer, without the update that the kernel adds (..., out).

    Returns:
        s A x (..., rank) and B (out, rank) of each layer; of rank 0 if the kernel adds no update.
    """
    with_update = [layer for layer in layers if _has_plain_lora(layer)]
    hidden = hidden_of_updates(with_update, x) if with_update else []
    factors = []
    for layer, y in zip(layers, outputs, strict=True):
        if _has_plain_lora(layer):
            h, b = hidden.pop(0), layer.lora_B
        else:
            h, b = x.new_empty(*x.shape[:-1], 0), y.new_empty(y.shape[-1], 0)
        factors.append((h.to(y.dtype), b.to(y.dtype)))
    return factors


def _has_plain_lora(layer: Any) -> bool:
    """Return whether a layer has plain LoRA that is enabled, with a rank that the kernel supports.

    Args:
        layer: A linear layer, with LoRA or without it.
    """
    return type(layer) is LoRALinear and layer.enabled and layer.rank <= MAX_RANK


def _computes_as_llama(module: nn.Module) -> bool:
    """Return whether a module has the code of Llama's MLP, with SiLU or GELU."""
    return has_code_of(module, LlamaMLP) and type(module.act_fn) in SILU + GELU
