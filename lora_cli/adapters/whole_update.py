"""The base class of LoHa and LoKr, whose update is computed as a full weight matrix.

    y = W0 x + s D x          D (out, in): the product of small factors          s = alpha / rank

The rank of D can be much higher than that of its factors, so D has to be computed, and a step takes
longer than with LoRA. Both are common for image generation models (LyCORIS, Yeh et al. 2024,
https://arxiv.org/abs/2309.14859). The shapes and names of the factors are PEFT's.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name for it
from torch import Tensor, nn

from lora_cli.adapters.lora import LoRALayer, Shape, computes_as_its_kind
from lora_cli.adapters.lora_conv import convolved
from lora_cli.models.quantized_linear import QuantizedLinear


class WholeUpdate(LoRALayer):
    """The base class of LoHa and LoKr on `nn.Linear`, `nn.Conv1d` and `nn.Conv2d`.

    A subclass defines `update_weight`, `shapes` and `peft_names`.
    """

    zero_at_start: ClassVar[tuple[str, ...]]
    """The factors that are initialised with zeros, so that the update starts at zero."""

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Return whether a module is a linear layer, or a convolution of one or two dimensions."""
        if isinstance(base, QuantizedLinear) and base.transposed:
            return False  # it replaces transformers' `Conv1D`, for which PEFT has no such layer
        kinds = nn.Linear | nn.Conv1d | nn.Conv2d
        return isinstance(base, kinds) and computes_as_its_kind(base)

    def to_peft(self, name: str) -> Tensor:
        """Return a parameter of the layer, which PEFT stores unchanged."""
        return self.get_parameter(name).detach()

    def reset_parameters(self) -> None:
        """Draw the factors, kaiming-uniform with a = sqrt(5), except those that start at zero."""
        for name, parameter in self.named_parameters(recurse=False):
            drawn = torch.zeros(parameter.shape, dtype=torch.float32)
            if name not in self.zero_at_start:
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            with torch.no_grad():
                if not parameter.is_meta:
                    parameter.copy_(drawn)

    def update(self, x: Tensor) -> Tensor:
        """Return s D x, in the shape of the base's output."""
        weight = self.update_weight().to(x.dtype)
        if isinstance(self.base, nn.Conv1d | nn.Conv2d):
            return convolved(self.base, x, weight, self.base.groups)
        return F.linear(x, weight)

    def update_weight(self) -> Tensor:
        """Return s D in the shape of the base's weight, with a gradient."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """Return s D in the shape of the base's weight."""
        return self.update_weight().detach()


def weight_shape(base: nn.Module) -> Shape:
    """Return the shape of a layer's weight: (out, in), or (out, in / groups, *kernel)."""
    if isinstance(base, nn.Conv1d | nn.Conv2d):
        return (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
    assert isinstance(base, nn.Linear)
    return (base.out_features, base.in_features)  # a 4-bit weight has another shape


def has_wide_kernel(base: nn.Module) -> bool:
    """Return whether a layer is a convolution with a kernel larger than 1."""
    return math.prod(weight_shape(base)[2:]) > 1


def core_shape(base: nn.Module, rank: int) -> Shape:
    """Return the shape of a kernel's core tensor: (rank, rank, height, width)."""
    height, *width = weight_shape(base)[2:]
    return (rank, rank, height, *(width or [1]))
