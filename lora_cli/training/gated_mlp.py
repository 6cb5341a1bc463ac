"""Let the gated MLPs of decoders add their low-rank updates in the kernel of the gate."""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name for it
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from lora_cli.adapters.lora import LoRALinear
from lora_cli.training.gated_mlp_kernel import gated_product

SILU = (nn.SiLU, type(ACT2FN["silu"]))
GELU = (type(ACT2FN["gelu_pytorch_tanh"]), type(ACT2FN["gelu_new"]))  # by the same approximation
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class GatedMLPs:
    """The gated MLPs within some modules that have plain LoRA without dropout before the gate.

    Args:
        modules: The layers of a model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = [part for module in modules for part in module.modules()]
        mlps: list[Any] = [part for part in parts if _computes_as_llama(part)]
        adapted = [mlp for mlp in mlps if _is_plain(mlp.gate_proj) and _is_plain(mlp.up_proj)]
        self.found = [(mlp, type(mlp)) for mlp in adapted]

    def __enter__(self) -> None:
        """Let them be computed by the kernel."""
        for mlp, own in self.found:  # another class, as torch compiles functions of objects anew
            mlp.__class__ = _with_kernel(own)

    def __exit__(self, *_: object) -> None:
        for mlp, own in self.found:
            mlp.__class__ = own


class _GatedMLP(nn.Module):
    """Comes before an architecture's own class, whose attributes and equation are Llama's."""

    gate_proj: LoRALinear
    up_proj: LoRALinear
    down_proj: Any
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Any:
        """Return down(act(gate(x)) * up(x)), of x (..., in)."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        g, u = gate.base(x), up.base(x)
        in_16_bits = g.dtype == u.dtype and g.dtype in (torch.float16, torch.bfloat16)
        if not (g.is_cuda and in_16_bits and gate.enabled and up.enabled):
            return super().forward(x)
        factors = gate.lora_B.to(g.dtype), up.lora_B.to(g.dtype)
        a = down.lora_A.to(g.dtype) if _is_plain(down) else None
        is_gelu = type(self.act_fn) in GELU
        y, h = gated_product(g, u, _reduced(gate, x, g), _reduced(up, x, u), *factors, a, is_gelu)
        if a is None:
            return down(y)
        z = down.base(y)
        return z + F.linear(h * down.scaling, down.lora_B.to(h.dtype)).to(z.dtype)


def _reduced(layer: LoRALinear, x: Tensor, y: Tensor) -> Tensor:
    """Return s A x in the dtype of y, of x (..., in): (..., rank)."""
    return (F.linear(x, layer.lora_A.to(x.dtype)) * layer.scaling).to(y.dtype)


def _with_kernel(architecture: type[nn.Module]) -> type[nn.Module]:
    """Return the class that computes as an architecture's own, by the kernel; one for each."""
    if architecture not in _CLASSES:
        _CLASSES[architecture] = type(architecture.__name__, (_GatedMLP, architecture), {})
    return _CLASSES[architecture]


def _computes_as_llama(module: nn.Module) -> bool:
    """Return whether a module has the code of Llama's MLP, as those of a hundred others do."""
    own, llama = type(module).forward, LlamaMLP.forward
    if not isinstance(own, FunctionType) or "forward" in module.__dict__:
        return False
    code, known = own.__code__, llama.__code__
    same = code.co_code == known.co_code and code.co_names == known.co_names
    return same and type(module.act_fn) in SILU + GELU


def _is_plain(layer: Any) -> bool:
    """Return whether a layer has plain LoRA; dropout would give its update an input of its own."""
    return type(layer) is LoRALinear and layer.enabled and not layer.dropout.p
