"""Train single rows of an embedding: those of new tokens, or of tokens that get another meaning.

The module sees its weight with these rows exchanged for trained ones; all others are the base's,
bit for bit. An output layer that shares the embedding's weight gets the same rows.

    weight[ids] = rows          rows (tokens, dim)

It is what PEFT's `trainable_token_indices` does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora_parameter import replaced


class TokenRows(nn.Module):
    """An embedding or an output layer, some rows of whose weight are trained.

    Args:
        base: The layer; it is kept as the child `base`.
        token_ids: Which rows.
        rows: The trained rows of another layer with the same weight; None for rows of its own.
    """

    peft_names: ClassVar[dict[str, str]] = {"rows": "token_adapter.trainable_tokens_delta"}
    """PEFT's name of the parameter, beneath the name of the module."""

    def __init__(
        self, base: nn.Module, token_ids: Sequence[int], rows: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.token_ids = list(token_ids)
        self.shares_rows = rows is not None
        self.enabled = True
        if rows is None:
            start = self.weight.detach()[self._index(self.weight)]
            rows = nn.Parameter(start.to(torch.float32))  # an optimizer's steps need the digits
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the trained rows: some models look at its dtype or device."""
        return self.base.get_parameter("weight")

    def __getattr__(self, name: str) -> Any:
        """Return what is asked of the layer: models read more of an embedding than its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base: Any = super().__getattr__("base")
            return getattr(base, name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return what the layer makes of its inputs with the trained rows."""
        if not self.enabled:
            return self.base(*inputs, **options)
        with replaced(self.base, "weight", self.merged_weight(self.weight)):
            return self.base(*inputs, **options)

    def merged_weight(self, w0: Tensor) -> Tensor:
        """Return a weight with the trained rows in it, in its own dtype."""
        return w0.index_copy(0, self._index(w0), self.rows.to(w0.dtype))

    def to_peft(self, name: str) -> Tensor:
        """Return the rows, which PEFT stores as they are."""
        return self.get_parameter(name).detach()

    def from_peft(self, name: str, tensor: Tensor) -> None:
        """Set the rows."""
        with torch.no_grad():
            self.get_parameter(name).copy_(tensor)

    def _index(self, weight: Tensor) -> Tensor:
        return torch.tensor(self.token_ids, device=weight.device)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"tokens={self.token_ids}"


def token_layers(model: nn.Module) -> dict[str, TokenRows]:
    """Return the layers with trained rows, by the names of the modules that they replace."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TokenRows)}


def embedding_names(model: nn.Module) -> list[str]:
    """Return the modules whose rows belong to tokens: the embedding, and the output layer.

    An output layer that shares the embedding's weight is not named.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[int, str] = {}
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, method, lambda: None)()
        except NotImplementedError:  # transformers' models of pictures have none
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and id(module) in names:
            found.setdefault(id(weight), names[id(module)])
    return list(found.values())


def sharing(model: nn.Module, name: str) -> list[str]:
    """Return the names of all modules that share their weight with one, itself included."""
    weight = model.get_submodule(name)._parameters["weight"]
    return [
        other
        for other, module in model.named_modules(remove_duplicate=False)
        if module._parameters.get("weight") is weight
    ]


def add_token_rows(
    model: nn.Module, name: str, token_ids: Sequence[int], others: Iterable[str] = ()
) -> TokenRows:
    """Put a layer with trained rows into the place of a module, and of others that share them.

    Args:
        model: The model, changed in place.
        name: The module.
        token_ids: Which rows of its weight.
        others: Modules that get the same rows.
    """
    layer = TokenRows(model.get_submodule(name), token_ids)
    layers = {id(layer.base): layer}
    for place in [name, *others]:
        module = model.get_submodule(place)
        if module is layer:
            continue
        if id(module) not in layers:
            layers[id(module)] = TokenRows(module, token_ids, layer.rows)
        new = layers[id(module)].train(module.training)
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return layer


def merge_rows(at_work: Collection[TokenRows]) -> None:
    """Give the bases of layers their weights with the trained rows; what is shared stays shared."""
    merged: dict[tuple[int, int], nn.Parameter] = {}
    for layer in at_work:
        key = (id(layer.base._parameters["weight"]), id(layer.rows))
        if key not in merged:
            weight = layer.merged_weight(layer.weight.detach()).detach()
            merged[key] = nn.Parameter(weight, requires_grad=False)
    kept = {id(layer.base): layer.base._parameters["weight"] for layer in at_work}
    for layer in at_work:
        layer.base._parameters["weight"] = merged[id(kept[id(layer.base)]), id(layer.rows)]
