"""Modules of common architectures that one kernel computes, on a GPU: gated MLPs and RMS norms.

As the architecture's own code they are several operations, each of which writes a matrix to memory
that the next one reads, and many of these matrices are kept for the backward pass. Compiled layers
have no such operations left, but it takes half a minute to compile them; these are there at once.
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
from lora_cli.training.stacked_products import StackedUpdates, stacked_updates

IN_16_BITS = (torch.float16, torch.bfloat16)


class ReplacedForward:
    """Lets modules compute by the `forward` of another class, within the context.

    The modules get a subclass of both classes: torch compiles methods of objects anew for each
    object, and those of a class once.

    Args:
        modules: They keep their parameters and their attributes.
        kernel: The class whose `forward` is called; `super().forward` there is the module's own.
    """

    def __init__(self, modules: Iterable[nn.Module], kernel: type[nn.Module]) -> None:
        self.found = [(module, type(module)) for module in modules]
        self.kernel = kernel

    def __enter__(self) -> None:
        for module, own in self.found:
            module.__class__ = _subclass(self.kernel, own)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        for module, own in self.found:
            module.__class__ = own


@functools.cache
def _subclass(kernel: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (kernel, own), {})


def has_code_of(module: nn.Module, architecture: type[nn.Module]) -> bool:
    """Return whether a module's `forward` does what another architecture's does.

    transformers repeats the code of Llama's modules in a hundred architectures.
    """
    own, known = type(module).forward, architecture.forward
    if not isinstance(own, FunctionType) or "forward" in module.__dict__:
        return False
    code, other = own.__code__, known.__code__
    same_numbers = _numbers(code.co_consts) == _numbers(other.co_consts)
    return same_numbers and code.co_code == other.co_code and code.co_names == other.co_names


def _numbers(constants: tuple[Any, ...]) -> list[Any]:
    return [constant for constant in constants if not isinstance(constant, str)]  # docstrings


class _RMSNorm(nn.Module):
    """Comes before an architecture's own class, whose attributes and equation are Llama's."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Any:
        """Return weight * x / sqrt(mean(x^2) + epsilon), of x (..., n), by torch's kernel."""
        if not x.is_cuda or x.dtype != self.weight.dtype:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):  # it might convert x to 32 bits
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class RMSNorms(ReplacedForward):
    """The RMS norms within a model that compute as Llama's, in 16 bits, and are not trained."""

    def __init__(self, model: nn.Module) -> None:
        norms: list[Any] = [part for part in model.modules() if has_code_of(part, LlamaRMSNorm)]
        norms = [norm for norm in norms if norm.weight.dtype in IN_16_BITS]
        super().__init__([norm for norm in norms if not norm.weight.requires_grad], _RMSNorm)


class FusedModules:
    """The gated MLPs and RMS norms of a model, if its layers are not compiled.

    Args:
        model: It runs by kernels only within `in_use`, and only what it computes in 16 bits.
        autocast: Whether torch converts what it computes to 16 bits.
    """

    failure = "the kernels of gated MLPs and norms cannot be used"

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        self.model, self.kind = model, ""
        self.groups: list[ReplacedForward] = []
        self.gates: list[nn.Module] = []
        self.updates: list[StackedUpdates] = []
        in_16_bits = autocast or any(p.dtype in IN_16_BITS for p in model.parameters())
        if in_16_bits and has_triton():
            from lora_cli.training.gated_mlp import GatedMLPs

            norms, mlps = RMSNorms(model), GatedMLPs([model])
            self.groups, self.gates = [norms, mlps], mlps.gates
            pairs = ((mlps, "gated MLP"), (norms, "norm"))
            counts = [counted(len(group.found), noun) for group, noun in pairs if group.found]
            self.kind = " and ".join(counts) + " by one kernel each"  # for the report

    @property
    def layers(self) -> list[nn.Module]:
        """The modules that kernels compute."""
        return [module for group in self.groups for module, _ in group.found]

    def choose_products(self, compute: Callable[[], Any]) -> None:
        """Let low-rank updates with one input share a product from now on.

        Args:
            compute: Makes a forward pass.
        """
        self.updates = stacked_updates([self.model], compute, but=self.gates)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let kernels compute the modules within the context."""
        with ExitStack() as stack:
            parts: list[AbstractContextManager[None]] = [*self.groups, *self.updates]
            for part in parts:
                stack.enter_context(part)
            yield
