"""Fused kernels for modules of common architectures on a GPU: gated MLPs and RMS norms.

The architecture's own code computes them by several operations. Each of them writes a matrix that
the next one reads, and many of these matrices are kept for the backward pass. Compiling the layers
would fuse such operations too, but takes half a minute; these kernels are ready at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name for it
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_cli.environment import has_triton
from lora_cli.errors import counted
from lora_cli.training.stacked_products import IN_16_BITS, StackedUpdates, stacked_updates


class ReplacedForward:
    """A context in which modules use the `forward` of another class.

    The class of each module is changed to a subclass of both classes. (Assigning a method to each
    object would make torch compile it once per object, instead of once per class.)

    Args:
        modules: The modules, which keep their parameters and attributes.
        kernel: The class whose `forward` is used. `super().forward` in it is the module's own.
    """

    def __init__(self, modules: Iterable[nn.Module], kernel: type[nn.Module]) -> None:
        self.replaced = [(module, type(module)) for module in modules]
        self.kernel = kernel

    def __enter__(self) -> None:
        for module, own in self.replaced:
            module.__class__ = _subclass(self.kernel, own)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        for module, own in self.replaced:
            module.__class__ = own


@functools.cache
def _subclass(kernel: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (kernel, own), {})


def has_code_of(module: nn.Module, architecture: type[nn.Module]) -> bool:
    """Return whether a module's `forward` has the same code as that of another class.

    transformers copies the code of Llama's modules into a hundred architectures.
    """
    own, known = type(module).forward, architecture.forward
    if not isinstance(own, FunctionType) or "forward" in module.__dict__:
        return False
    code, other = own.__code__, known.__code__
    same_constants = _constants(code.co_consts) == _constants(other.co_consts)
    return same_constants and code.co_code == other.co_code and code.co_names == other.co_names


def _constants(constants: tuple[Any, ...]) -> list[Any]:
    return [constant for constant in constants if not isinstance(constant, str)]  # no docstrings


class _RMSNorm(nn.Module):
    """A base class put before an architecture's own class, whose equation is Llama's."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Any:
        """Return weight * x / sqrt(mean(x^2) + epsilon), of x (..., n), by torch's kernel."""
        if not x.is_cuda or x.dtype != self.weight.dtype:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):  # it might convert x to 32 bits
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class RMSNorms(ReplacedForward):
    """The frozen RMS norms of a model that have Llama's equation and weights in 16 bits."""

    def __init__(self, model: nn.Module) -> None:
        norms: list[Any] = [part for part in model.modules() if has_code_of(part, LlamaRMSNorm)]
        norms = [norm for norm in norms if norm.weight.dtype in IN_16_BITS]
        super().__init__([norm for norm in norms if not norm.weight.requires_grad], _RMSNorm)


class FusedModules:
    """The gated MLPs and RMS norms of a model whose layers are not compiled.

    Args:
        model: The model. It uses the kernels only within `in_use`, and only in 16 bits.
        autocast: Whether torch's autocast makes it compute in 16 bits.
    """

    failure = "the kernels of gated MLPs and norms cannot be used"

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        self.model, self.kind = model, ""
        self.groups: list[ReplacedForward] = []
        self.in_kernel: list[nn.Module] = []
        self.updates: list[StackedUpdates] = []
        in_16_bits = autocast or any(p.dtype in IN_16_BITS for p in model.parameters())
        if in_16_bits and has_triton():
            from lora_cli.training.gated_mlp import GatedMLPs

            norms, mlps = RMSNorms(model), GatedMLPs([model])
            self.groups, self.in_kernel = [norms, mlps], mlps.layers
            pairs = ((mlps, "gated MLP"), (norms, "norm"))
            counts = [counted(len(group.replaced), noun) for group, noun in pairs if group.replaced]
            self.kind = " and ".join(counts) + " by one kernel each"  # for the report

    @property
    def layers(self) -> list[nn.Module]:
        """The modules that have a kernel."""
        return [module for group in self.groups for module, _ in group.replaced]

    def choose_products(self, compute: Callable[[], Any]) -> None:
        """From now on, let low-rank updates share the product A x, or compute it by a kernel.

        Those with the same input share it; those with dropout use the kernel for dropout.

        Args:
            compute: Runs a forward pass.
        """
        self.updates = stacked_updates([self.model], compute, but=self.in_kernel)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the kernels within the context."""
        with ExitStack() as stack:
            parts: list[AbstractContextManager[None]] = [*self.groups, *self.updates]
            for part in parts:
                stack.enter_context(part)
            yield
