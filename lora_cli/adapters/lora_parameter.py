r"""LoRA on one parameter of a module: an update of the tensor itself, for what is no layer.

The experts of a mixture are one parameter of three dimensions, and the module that holds it
multiplies as it sees fit. So it sees the sum in the parameter's place while it runs:

    W_e + s B_e A_e         for each expert e; s = alpha / rank, each expert of its own rank

Where it multiplies by the sum, the factors are multiplied one after the other (`LowRankSum`); a
compiled layer adds the sum up.

Shapes: A (experts, rank, in), B (experts, out, rank), and W (experts, out, in), or (experts, in,
out) in a module that says `is_transposed`. Of a parameter of two dimensions (a router), A is
(rank, in), B (out, rank) and W (out, in).

Two parameters of one module make two nested layers, as in PEFT, whose class for this is
`ParamWrapper`; the first parameter's is the inner one. There is no dropout: the update never sees
an input.
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
    """A module of which one parameter has a low-rank update.

    Args:
        base: The module, or such a layer on another of its parameters.
        parameter: Name of the parameter in the module.
        rank: Rank of the update, of each expert.
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
        """Return False: such a layer is never chosen for a module as a whole."""
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
        """None: what else the module holds does not belong to the parameter."""
        return None

    def replace_weight(self, weight: nn.Parameter) -> None:
        """Give the module another parameter, as the merged one."""
        setattr(self.owner, self.parameter, weight)

    def __getattr__(self, name: str) -> Any:
        """Return what is asked of the module: models read more of such modules than their call."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base: Any = super().__getattr__("base")
            return getattr(innermost(base), name)

    def reset_parameters(self) -> None:
        """Draw A, kaiming-uniform with a = sqrt(5), of all experts as one matrix; set B to zero."""
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
        """Return what the module makes of its inputs with the updated parameter."""
        if not self.enabled:
            return self.base(*inputs, **options)
        updated = self.updated_weight()
        whole = torch.compiler.is_compiling() or not multiplies_by_torch(self.owner)
        with replaced(self.owner, self.parameter, updated.whole if whole else updated):
            return self.base(*inputs, **options)

    def updated_weight(self) -> LowRankSum:
        """Return W + s B A in the parameter's layout; both matrices get gradients."""
        a, b = self.lora_A, self.scaling * self.lora_B
        if is_transposed(self.owner, a.ndim):
            return LowRankSum(self.weight, a.transpose(-2, -1), b.transpose(-2, -1))
        return LowRankSum(self.weight, b, a)

    def delta_weight(self) -> Tensor:
        """Return s B A in the parameter's shape."""
        return self._laid_out(self.scaling * (self.lora_B.detach() @ self.lora_A.detach()))

    def _laid_out(self, delta: Tensor) -> Tensor:
        return delta.transpose(-2, -1) if is_transposed(self.owner, delta.ndim) else delta

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"parameter={self.parameter}, {super().extra_repr()}"


def innermost(module: nn.Module) -> nn.Module:
    """Return the module beneath the layers that are put onto it, one or several."""
    while isinstance(module, LoRALayer):
        module = module.base
    return module


def is_transposed(owner: nn.Module, ndim: int) -> bool:
    """Return whether a module stores its experts as (experts, in, out)."""
    return ndim == 3 and bool(getattr(owner, "is_transposed", False))


def multiplies_by_torch(owner: nn.Module) -> bool:
    """Return whether the code of experts uses torch's functions, not kernels of its own."""
    how = getattr(getattr(owner, "config", None), "_experts_implementation", None)
    return how in (None, "eager", "batched_mm", "grouped_mm")


def update_shapes(owner: nn.Module, parameter: str, rank: int) -> dict[str, Shape]:
    """Return the shapes of A and B for a parameter which such an update fits."""
    *experts, n_out, n_in = owner.get_parameter(parameter).shape
    if is_transposed(owner, len(experts) + 2):
        n_out, n_in = n_in, n_out
    return {"lora_A": (*experts, rank, n_in), "lora_B": (*experts, n_out, rank)}


def peft_shapes(owner: nn.Module, parameter: str, rank: int) -> dict[str, Shape]:
    """Return the shapes of the same two in PEFT's file."""
    shapes = update_shapes(owner, parameter, rank)
    *experts, _, n_in = shapes["lora_A"]
    all_ranks = rank * math.prod(experts)
    return {"lora_A": (all_ranks, n_in), "lora_B": (shapes["lora_B"][-2], all_ranks)}


def misfit(owner: nn.Module, parameter: str) -> str | None:
    """Return why a parameter can have no such update, or None if it can."""
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
    """Let a module's own code see another tensor as one of its parameters."""
    kept = owner._parameters[name]
    try:
        owner._parameters[name] = value  # type: ignore[assignment]  # no leaf, or no tensor
        yield
    finally:
        owner._parameters[name] = kept
