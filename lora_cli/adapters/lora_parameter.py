r"""LoRA on a single parameter of a module, for parameters that are not the weight of a layer.

The experts of a mixture are one three-dimensional parameter, which the module that holds it
multiplies in its own way. So while that module runs, the parameter is replaced by the sum

    W_e + s B_e A_e         for each expert e; s = alpha / rank, where rank is that of one expert

When the module multiplies by the sum, the factors are applied one after the other (`LowRankSum`);
in a compiled layer, the sum is computed.

Shapes: A (experts, rank, in), B (experts, out, rank), and W (experts, out, in), or (experts, in,
out) in a module with `is_transposed`. For a two-dimensional parameter (a router), A is (rank, in),
B (out, rank) and W (out, in).

Two adapted parameters of one module become two nested layers, as with PEFT's `ParamWrapper`; the
first parameter's layer is the inner one. There is no dropout, since the update has no input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora import LoRALayer, Shape
from lora_cli.adapters.low_rank_sum import LowRankSum
from lora_cli.errors import counted
from lora_cli.models.quantized_linear import QuantizedLinear


class LoRAParameter(LoRALayer):
    """A module with a low-rank update of one parameter.

    Args:
        base: The module, or a `LoRAParameter` on another of its parameters.
        parameter: Name of the parameter in the module.
        rank: Rank of each expert's update.
        alpha: Numerator of the scaling.
        use_rslora: Scale by alpha / sqrt(rank).
    """

    def __init__(
        self,
        base: nn.Module,
        parameter: str,
        rank: int,
        alpha: float,
        use_rslora: bool = False,
    ) -> None:
        self.parameter = parameter  # before the base class asks for its device
        shapes = update_shapes(innermost(base), parameter, rank)
        super().__init__(base, rank, alpha, 0.0, use_rslora, shapes)

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Return False: this layer is never chosen for a whole module."""
        return False

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return innermost(self.base)

    @property
    def weight(self) -> Tensor:
        """The parameter, without the update."""
        return self.owner.get_parameter(self.parameter)

    @property
    def bias(self) -> None:
        """None: a bias of the module does not belong to the parameter."""
        return None

    def replace_weight(self, weight: nn.Parameter) -> None:
        """Set the module's parameter, for example to the merged one."""
        setattr(self.owner, self.parameter, weight)

    def __getattr__(self, name: str) -> Any:
        """Look attributes up in the module: models do more with such modules than call them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base: Any = super().__getattr__("base")
            return getattr(innermost(base), name)

    def reset_parameters(self) -> None:
        """Draw all experts' A as one kaiming-uniform matrix with a = sqrt(5); set B to zero."""
        flat = torch.empty(self.lora_A.numel() // self.lora_A.shape[-1], self.lora_A.shape[-1])
        nn.init.kaiming_uniform_(flat, a=math.sqrt(5))
        with torch.no_grad():
            if not self.lora_A.is_meta:
                self.lora_A.copy_(flat.reshape(self.lora_A.shape))
            self.lora_B.zero_()

    def to_peft(self, name: str) -> Tensor:
        """Return A as (experts x rank, in), or B as (out, rank x experts)."""
        tensor = self.get_parameter(name).detach()
        if tensor.ndim == 2:
            return tensor
        if name == "lora_A":
            return tensor.flatten(0, 1)
        return tensor.permute(1, 2, 0).flatten(1)

    def from_peft(self, name: str, tensor: Tensor) -> None:
        """Set A or B to what PEFT stored."""
        parameter = self.get_parameter(name)
        if name == "lora_B" and parameter.ndim == 3:
            tensor = tensor.reshape(-1, len(parameter)).T  # (experts, out x rank)
        with torch.no_grad():
            parameter.copy_(tensor.reshape(parameter.shape))

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the module with the updated parameter."""
        if not self.enabled:
            return self.base(*inputs, **options)
        weight = self.updated_weight()
        needs_sum = torch.compiler.is_compiling() or not uses_torch_products(self.owner)
        with replaced(self.owner, self.parameter, weight.total if needs_sum else weight):
            return self.base(*inputs, **options)

    def updated_weight(self) -> LowRankSum:
        """Return W + s B A in the parameter's layout; both matrices get gradients."""
        a, b = self.lora_A, self.scaling * self.lora_B
        if is_transposed(self.owner, a.ndim):
            return LowRankSum(self.weight, a.transpose(-2, -1), b.transpose(-2, -1))
        return LowRankSum(self.weight, b, a)

    def delta_weight(self) -> Tensor:
        """Return s B A in the parameter's shape."""
        return self._in_layout(self.scaling * (self.lora_B.detach() @ self.lora_A.detach()))

    def _in_layout(self, delta: Tensor) -> Tensor:
        return delta.transpose(-2, -1) if is_transposed(self.owner, delta.ndim) else delta

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"parameter={self.parameter}, {super().extra_repr()}"


def innermost(module: nn.Module) -> nn.Module:
    """Return the module inside one or more nested adapter layers."""
    while isinstance(module, LoRALayer):
        module = module.base
    return module


def is_transposed(owner: nn.Module, ndim: int) -> bool:
    """Return whether a module stores its experts as (experts, in, out)."""
    return ndim == 3 and bool(getattr(owner, "is_transposed", False))


def uses_torch_products(owner: nn.Module) -> bool:
    """Return whether the experts' code uses torch functions instead of custom kernels."""
    implementation = getattr(getattr(owner, "config", None), "_experts_implementation", None)
    return implementation in (None, "eager", "batched_mm", "grouped_mm")


def update_shapes(owner: nn.Module, parameter: str, rank: int) -> dict[str, Shape]:
    """Return the shapes of A and B for a parameter."""
    *experts, n_out, n_in = owner.get_parameter(parameter).shape
    if is_transposed(owner, len(experts) + 2):
        n_out, n_in = n_in, n_out
    return {"lora_A": (*experts, rank, n_in), "lora_B": (*experts, n_out, rank)}


def peft_shapes(owner: nn.Module, parameter: str, rank: int) -> dict[str, Shape]:
    """Return the shapes of A and B in PEFT's file."""
    shapes = update_shapes(owner, parameter, rank)
    *experts, _, n_in = shapes["lora_A"]
    all_ranks = rank * math.prod(experts)
    return {"lora_A": (all_ranks, n_in), "lora_B": (shapes["lora_B"][-2], all_ranks)}


def misfit(owner: nn.Module, parameter: str) -> str | None:
    """Return why a parameter cannot have a low-rank update, or None if it can."""
    tensor = owner.get_parameter(parameter)
    if isinstance(owner, QuantizedLinear):
        return "belongs to a quantised layer, which `target_modules` adapts"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "is the kernel of a convolution, which `target_modules` adapts"
    if tensor.ndim not in (2, 3):
        return (
            f"has {counted(tensor.ndim, 'dimension')}, and only parameters of 2 or 3 can be adapted"
        )
    return None if tensor.is_floating_point() else "does not hold floating-point numbers"


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hold the weights of several experts in one tensor, by name."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if not isinstance(module, LoRALayer)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and misfit(module, key) is None and "expert" in name.lower()
    }


@contextmanager
def replaced(owner: nn.Module, name: str, value: Tensor | LowRankSum) -> Iterator[None]:
    """Replace a parameter of a module by another tensor within the context."""
    original = owner._parameters[name]
    try:
        owner._parameters[name] = value  # type: ignore[assignment]  # not a leaf, or not a tensor
        yield
    finally:
        owner._parameters[name] = original
