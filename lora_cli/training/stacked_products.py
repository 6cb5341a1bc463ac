"""Linear layers with the same input, such as q, k and v: one product instead of three.

A GPU multiplies by one large matrix faster than by three small ones. The frozen weights are stacked
into one matrix, and the weight of each layer becomes a view of it, so they take no more memory. The
low-rank updates of such layers become batched products, if they have the same shapes. A forward
pass is observed to find out which layers share an input, so this works for any architecture.

With long texts, stacking the frozen weights gains nothing: their products are large anyway, and
their gradients would have to be copied into one matrix. But A x of their updates takes as long as
reading x, so computing it once instead of three times saves most of that, also in the backward
pass. If the layers have dropout, a kernel does the same without writing their masks to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name for it
from torch import Tensor, nn

from lora_cli.adapters.lora import LoRALinear
from lora_cli.environment import has_triton

HAS_TRITON = has_triton()
IN_16_BITS = (torch.float16, torch.bfloat16)
MAX_RANK = 64  # of kernels; for larger ranks, the sums of their backward pass exceed the registers
MAX_LAYERS = 3  # that share a kernel


class StackedProduct:
    """Linear layers with the same input: the first one computes the outputs of all.

    Args:
        layers: Frozen layers of one dtype on one device, in the order in which they are called.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.layers, self.sizes = layers, [layer.out_features for layer in layers]
        self.weight = _stacked(layers, "weight")
        self.bias = None if layers[0].bias is None else _stacked(layers, "bias")
        self.input: Tensor | None = None
        self.outputs: list[Tensor] = []
        for place, layer in enumerate(layers):
            # set in `__dict__`, because as a submodule it would change the model's state dict
            layer.__dict__["product"], layer.__dict__["place"] = self, place

    def output(self, place: int, x: Tensor) -> Tensor:
        """Return the output of one layer: (..., in) to (..., out)."""
        if place == 0:
            self.input = x
            outputs = F.linear(x, self.weight, self.bias)
            self.outputs = list(torch.split_with_sizes(outputs, self.sizes, -1))
        elif x is not self.input:  # the model sometimes gives the layers different inputs
            layer = self.layers[place]
            return F.linear(x, layer.weight, layer.bias)
        output = self.outputs[place]
        if place == len(self.layers) - 1:
            self.input, self.outputs = None, []
        return output

    def __enter__(self) -> None:
        """Let the layers take their outputs from here."""
        for layer in self.layers:  # torch would compile a method of each object separately
            layer.__class__ = _PartOfProduct

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            layer.__class__ = nn.Linear


class StackedUpdates:
    """The low-rank updates of layers with the same input: the first one computes all of them.

    Args:
        layers: The layers in the order in which they are called.
        batched: Whether to compute batched products, which requires equal shapes, scaling and
            dropout. With dropout, each layer draws its own mask, as it does alone. Otherwise A x is
            one product for all layers.
    """

    def __init__(self, layers: list[LoRALinear], batched: bool = True) -> None:
        self.layers, self.batched = layers, batched
        self.input: Tensor | None = None
        self.updates: list[Tensor] = []
        for place, layer in enumerate(layers):
            layer.__dict__["updates"], layer.__dict__["place"] = self, place

    def update(self, place: int, x: Tensor) -> Tensor:
        """Return the update of one layer: (..., in) to (..., out)."""
        layer = self.layers[place]
        if place == 0:
            updates = self._by_batched_products(x) if self.batched else self._by_one_product(x)
            self.input, self.updates = x, list(updates)
        elif x is not self.input:
            return layer.update(layer.dropout(x))
        update = self.updates[place]
        if place == len(self.layers) - 1:
            self.input, self.updates = None, []
        return update

    def _by_one_product(self, x: Tensor) -> Iterable[Tensor]:
        parts = hidden_of_updates(self.layers, x)
        for layer, hidden in zip(self.layers, parts, strict=True):
            yield F.linear(hidden, layer.lora_B.to(x.dtype))

    def _by_batched_products(self, x: Tensor) -> Iterable[Tensor]:
        flat = x.flatten(0, -2)
        inputs = torch.stack([layer.dropout(flat) for layer in self.layers])
        a = torch.stack([layer.lora_A.to(x.dtype) for layer in self.layers])
        b = torch.stack([layer.lora_B.to(x.dtype) for layer in self.layers])
        scaling = self.layers[0].scaling
        updates = torch.bmm(torch.bmm(inputs, a.transpose(1, 2)) * scaling, b.transpose(1, 2))
        return (update.view(*x.shape[:-1], -1) for update in updates.unbind())

    def __enter__(self) -> None:
        """Let the layers take their updates from here."""
        for layer in self.layers:
            layer.__class__ = _PartOfUpdates

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            layer.__class__ = LoRALinear


def hidden_of_updates(layers: Sequence[LoRALinear], x: Tensor) -> list[Tensor]:
    """Return s A x of each layer, with dropout of x in training.

    Args:
        layers: LoRA layers with one input.
        x: Their input (..., in).

    Returns:
        A matrix (..., rank) for each layer.
    """
    if any(layer.training and layer.dropout.p for layer in layers):
        parts = _products_with_dropout(layers, x)
    else:
        a = torch.cat([layer.lora_A for layer in layers]).to(x.dtype)
        parts = torch.split_with_sizes(F.linear(x, a), [layer.rank for layer in layers], -1)
    return [part * layer.scaling for part, layer in zip(parts, layers, strict=True)]


def _products_with_dropout(layers: Sequence[LoRALinear], x: Tensor) -> Iterable[Tensor]:
    """Return A x of each layer with dropout of x, by a kernel if it supports these layers."""
    if torch.is_autocast_enabled("cuda") and x.is_cuda:
        x = x.to(torch.get_autocast_dtype("cuda"))
    settings = {(layer.rank, layer.dropout.p) for layer in layers}
    by_kernel = x.is_cuda and x.dtype in IN_16_BITS and HAS_TRITON
    if not by_kernel or any(rank > MAX_RANK for rank, _ in settings):
        return [F.linear(layer.dropout(x), layer.lora_A.to(x.dtype)) for layer in layers]
    if len(settings) > 1 or len(layers) > MAX_LAYERS:
        return [part for layer in layers for part in _products_with_dropout([layer], x)]
    from lora_cli.training.lora_dropout_kernel import products_with_dropout

    a = torch.stack([layer.lora_A for layer in layers]).to(x.dtype)
    products: Tensor = products_with_dropout(x, a, new_seed(x), layers[0].dropout.p)
    return products.unbind(-2)


def new_seed(x: Tensor) -> Tensor:
    """Draw a seed (1,) for masks of x from torch's generator, on the device of x."""
    return torch.randint(2**63 - 1, (1,), device=x.device)


class _PartOfUpdates(LoRALinear):
    """A layer whose update comes from `StackedUpdates`."""

    updates: StackedUpdates
    place: int

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output plus the scaled low-rank update, in the base's dtype."""
        y: Tensor = self.base(x)
        return y + self.updates.update(self.place, x).to(y.dtype)


class _PartOfProduct(nn.Linear):
    """A layer whose output comes from a `StackedProduct`."""

    product: StackedProduct
    place: int

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, a part of the product: (..., in) to (..., out)."""
        return self.product.output(self.place, x)


@torch.no_grad()
def _stacked(layers: list[nn.Linear], name: str) -> Tensor:
    """Return the layers' weights or biases as one tensor, and make their own views of it."""
    own = [getattr(layer, name) for layer in layers]
    whole = torch.cat([tensor.data for tensor in own])
    parts = torch.split_with_sizes(whole, [len(tensor) for tensor in own])
    for tensor, part in zip(own, parts, strict=True):
        tensor.data = part
    return whole


def stacked_products(
    parts: Iterable[nn.Module], compute: Callable[[], Any]
) -> list[StackedProduct | StackedUpdates]:
    """Return the products that linear layers within some modules can share.

    Args:
        parts: The modules. Their weights must not be moved in memory from now on.
        compute: Runs a forward pass.
    """
    modules = [module for part in parts for module in part.modules()]
    candidates = [m for m in modules if isinstance(m, nn.Linear) and _is_candidate(m)]
    n_uses: dict[int, int] = {}  # of a weight, by different layers
    for parameter in (p for module in candidates for p in module.parameters()):
        n_uses[id(parameter)] = n_uses.get(id(parameter), 0) + 1
    candidates = [m for m in candidates if all(n_uses[id(p)] == 1 for p in m.parameters())]
    groups = [g for g in _layers_with_one_input(candidates, compute) if len(g) > 1]
    adapters = {module.base: module for module in modules if type(module) is LoRALinear}
    adapted = [[adapters[layer] for layer in group if layer in adapters] for group in groups]
    updates = [StackedUpdates(group) for group in adapted if len(group) > 1 and _match(group)]
    return [*map(StackedProduct, groups), *updates]


def stacked_updates(
    parts: Iterable[nn.Module], compute: Callable[[], Any], but: Iterable[nn.Module] = ()
) -> list[StackedUpdates]:
    """Return the low-rank updates within some modules that can share A x, or have dropout.

    Args:
        parts: The modules that contain the adapted layers.
        compute: Runs a forward pass.
        but: Adapted layers to leave out.
    """
    left_out = set(but)
    modules = [module for part in parts for module in part.modules() if module not in left_out]
    layers = [module for module in modules if type(module) is LoRALinear and module.enabled]
    groups = _layers_with_one_input(layers, compute)
    # a layer alone gains from the kernel if it has dropout
    groups = [group for group in groups if len(group) > 1 or group[0].dropout.p]
    return [StackedUpdates(group, batched=False) for group in groups]


Layer = TypeVar("Layer", bound=nn.Module)


def _layers_with_one_input(
    candidates: Iterable[Layer], compute: Callable[[], Any]
) -> list[list[Layer]]:
    """Return the groups of layers that always read the same tensor, in the order of calls."""
    groups: list[list[Layer]] = []
    last_input: Any = None

    def note(module: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal last_input
        if not groups or inputs[0] is not last_input or not _are_alike(groups[-1][0], module):
            groups.append([])
        groups[-1].append(module)
        last_input = inputs[0]

    hooks = [module.register_forward_pre_hook(note) for module in candidates]
    try:
        with torch.no_grad():
            compute()
    finally:
        for hook in hooks:
            hook.remove()
    return list(_always_together(groups))


def _match(layers: list[LoRALinear]) -> bool:
    """Return whether updates can be batched: equal shapes, scaling and dropout."""
    shapes = {(layer.lora_A.shape, layer.lora_B.shape) for layer in layers}
    settings = {(layer.scaling, layer.dropout.p, layer.enabled) for layer in layers}
    return len(shapes) == len(settings) == 1 and layers[0].enabled


def _is_candidate(module: nn.Linear) -> bool:
    """Return whether a layer is a plain linear layer that is not trained."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    return (
        not any(p.requires_grad for p in module.parameters()) and module.weight.is_floating_point()
    )


def _are_alike(one: Any, other: Any) -> bool:
    """Return whether two layers' weights can be stacked."""
    a, b = one.weight, other.weight
    same = a.dtype == b.dtype and a.device == b.device
    return same and (one.bias is None) == (other.bias is None)


def _always_together(groups: list[list[Layer]]) -> Iterable[list[Layer]]:
    """Return the groups of layers that are always called together, without repetitions."""
    companions: dict[Layer, set[tuple[int, ...]]] = {}
    for group in groups:
        for layer in group:
            companions.setdefault(layer, set()).add(tuple(map(id, group)))
    distinct = {tuple(map(id, group)): group for group in groups if len(set(group)) == len(group)}
    return [g for g in distinct.values() if all(len(companions[layer]) == 1 for layer in g)]
