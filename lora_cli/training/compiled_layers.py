"""A model's repeated layers, compiled: torch joins small kernels and keeps fewer activations.

Only the layers are compiled, since they are most of the work and one compilation serves all that
are alike. The rest of the model, and whatever it looks up in Python, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lora_cli.training.stacked_products import StackedProduct, stacked_products

SHAPES = 64  # torch compiles a layer anew for each shape, and by default gives up after 8
MEMORY_BUDGET = 0.8  # of the activations that autograd would keep: the cheapest are computed again
# where there are many; the short texts that batches of few shapes consist of need little memory


class CompiledLayers:
    """The layers of a model of which there are many alike.

    Args:
        model: It runs compiled only within `in_use`.
        few_shapes: Whether batches have few shapes, each of which is compiled; else the second
            compilation is for any length.
    """

    def __init__(self, model: nn.Module, few_shapes: bool) -> None:
        self.layers = repeated_layers(model)
        dynamic = False if few_shapes else None
        self.compiled = [torch.compile(layer.forward, dynamic=dynamic) for layer in self.layers]
        self.memory_budget = 1.0 if few_shapes else MEMORY_BUDGET
        self.products: list[StackedProduct] = []

    def stack_products(self, compute: Callable[[], Any]) -> None:
        """Let linear layers that read the same input be multiplied at once, from now on.

        Args:
            compute: Makes a forward pass.
        """
        self.products = stacked_products(self.layers, compute)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the layers run compiled within the context."""
        own = [layer.__dict__.get("forward") for layer in self.layers]
        with ExitStack() as stack:
            patches = torch._dynamo.config.patch(recompile_limit=SHAPES)
            stack.enter_context(patches)
            budget = torch._functorch.config.patch(activation_memory_budget=self.memory_budget)
            stack.enter_context(budget)
            for product in self.products:
                stack.enter_context(product)
            try:
                for layer, compiled in zip(self.layers, self.compiled, strict=True):
                    layer.forward = compiled
                yield
            finally:
                for layer, forward in zip(self.layers, own, strict=True):
                    if forward is None:
                        del layer.forward
                    else:
                        layer.forward = forward


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of which a model has at least two alike, but none within another."""
    found: list[nn.Module] = []
    for part in model.children():
        alike = isinstance(part, nn.ModuleList) and len({type(layer) for layer in part}) == 1
        if alike and len(part) > 1:  # type: ignore[arg-type]
            found += list(part.children())
        else:
            found += repeated_layers(part)
    return found
