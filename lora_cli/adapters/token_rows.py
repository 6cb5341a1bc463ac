"""Train single rows of an embedding, for new tokens or for tokens that are given a new meaning.

The module computes with its weight after these rows have been replaced by the trained ones; all
other rows stay bit-identical to the base's. An output layer that shares the embedding's weight
gets the same rows.

    weight[ids] = rows          rows (tokens, dim)

This is PEFT's `trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora_parameter import replaced


class TokenRows(nn.Module):
    """An embedding or an output layer in which some rows of the weight are trained.

    Args:
        base: The layer to wrap; it becomes the child `base`.
        token_ids: The indices of the trained rows.
        rows: The trained rows of a layer that shares this weight; None to create new ones.
    """

    peft_names: ClassVar[dict[str, str]] = {"rows": "token_adapter.trainable_tokens_delta"}
    """The parameter's name in PEFT, relative to the module."""

    def __init__(
        self, base: nn.Module, token_ids: Sequence[int], rows: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.token_ids = list(token_ids)
        self.shares_rows = rows is not None
        self.enabled = True
        if rows is None:
            initial_rows = self.weight.detach()[self._index(self.weight)]
            rows = nn.Parameter(
                initial_rows.to(torch.float32)
            )  # 16 bits would lose small optimizer updates
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the trained rows: some models read its dtype or device."""
        return self.base.get_parameter("weight")

    def __getattr__(self, name: str) -> Any:
        """Look attributes up in the base: models read more of an embedding than its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base: Any = super().__getattr__("base")
            return getattr(base, name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the base with the trained rows in its weight."""
        if not self.enabled:
            return self.base(*inputs, **options)
        with replaced(self.base, "weight", self.merged_weight(self.weight)):
            return self.base(*inputs, **options)

    def merged_weight(self, w0: Tensor) -> Tensor:
        """Return a copy of `w0` with the trained rows in it, in its dtype."""
        return w0.index_copy(0, self._index(w0), self.rows.to(w0.dtype))

    def to_peft(self, name: str) -> Tensor:
        """Return the rows, which PEFT stores unchanged."""
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
    """Return the layers with trained rows, by the names of the modules that they replaced."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TokenRows)}


def embedding_names(model: nn.Module) -> list[str]:
    """Return the names of the modules with one row per token: the embedding and the output layer.

    An output layer that shares the embedding's weight is left out.
    """
    names = {id(module): name for name, module in model.named_modules()}
    names_by_weight: dict[int, str] = {}
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, method, lambda: None)()
        except NotImplementedError:  # transformers' image models have none
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and id(module) in names:
            names_by_weight.setdefault(id(weight), names[id(module)])
    return list(names_by_weight.values())


def sharing(model: nn.Module, name: str) -> list[str]:
    """Return the names of all modules that share a module's weight, including its own name."""
    weight = model.get_submodule(name)._parameters["weight"]
    return [
        other_name
        for other_name, module in model.named_modules(remove_duplicate=False)
        if module._parameters.get("weight") is weight
    ]


def add_token_rows(
    model: nn.Module, name: str, token_ids: Sequence[int], others: Iterable[str] = ()
) -> TokenRows:
    """Replace a module by a layer with trained rows, and tied modules by layers that share them.

    Args:
        model: The model, changed in place.
        name: The module to replace.
        token_ids: The indices of the trained rows.
        others: Further modules that get the same rows.
    """
    layer = TokenRows(model.get_submodule(name), token_ids)
    layers = {id(layer.base): layer}
    for module_name in [name, *others]:
        module = model.get_submodule(module_name)
        if module is layer:
            continue
        if id(module) not in layers:
            layers[id(module)] = TokenRows(module, token_ids, layer.rows)
        new = layers[id(module)].train(module.training)
        parent, _, child = module_name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return layer


def merge_rows(layers: Collection[TokenRows]) -> None:
    """Write the trained rows into the layers' base weights; tied weights stay tied."""
    merged: dict[tuple[int, int], nn.Parameter] = {}
    for layer in layers:
        key = (id(layer.base._parameters["weight"]), id(layer.rows))
        if key not in merged:
            weight = layer.merged_weight(layer.weight.detach()).detach()
            merged[key] = nn.Parameter(weight, requires_grad=False)
    old_weights = {id(layer.base): layer.base._parameters["weight"] for layer in layers}
    for layer in layers:
        layer.base._parameters["weight"] = merged[id(old_weights[id(layer.base)]), id(layer.rows)]
