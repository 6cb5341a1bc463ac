"""Merge an adapter into the weights of its model, in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from lora_cli.adapters.attach import adapter_layers, lora_layers, name_in_base, remove_layers
from lora_cli.adapters.lora_conv import LoRAConv
from lora_cli.adapters.tied_weights import tied_groups, untie, untie_differing
from lora_cli.adapters.token_rows import merge_rows, token_layers
from lora_cli.models.bundle import Bundle


def merge(model: nn.Module) -> list[str]:
    """Replace every adapter layer by its base, after adding the update to the base's weight.

    Modules that share an adapted weight, such as a tied embedding and output layer, no longer share
    it afterwards.

    Returns:
        Names of modules whose weight was shared and no longer is.

    Raises:
        LoraError: If a layer cannot be merged; the model is then unchanged.
    """
    layers, in_place = lora_layers(model), adapter_layers(model)
    for layer in layers.values():
        if isinstance(layer, LoRAConv):
            layer.delta_weight()  # raises if it cannot be merged, before anything is changed
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name_in_base(name, in_place))
    untied: list[str] = []
    for layer in layers.values():
        sharers = users.get(id(layer.weight), [])
        if len(sharers) > 1:
            untied += [other for other in sharers if other not in untied]
        if layer.weight.is_meta:  # a model without weights
            merged = torch.empty_like(layer.weight)
        else:  # one at a time: all merged weights together would take as much memory as the base
            merged = layer.merged_weight(layer.weight.detach().float()).to(layer.weight.dtype)
        layer.replace_weight(nn.Parameter(merged, requires_grad=False))
    merge_rows(list(token_layers(model).values()))
    remove_layers(model)
    return untied


def merge_and_untie(model: nn.Module, ties: Iterable[Collection[str]]) -> list[str]:
    """Merge, and untie weights that are no longer equal.

    They differ if one side was adapted, or if a copy of the weight was trained.

    Args:
        model: The model; its configuration is changed in place as well.
        ties: Groups of names that shared a parameter in the base.

    Returns:
        Names of modules whose weight was shared and no longer is.
    """
    untied = merge(model)
    differing = [name.rpartition(".")[0] for name in untie_differing(model, ties)]
    untied += [name for name in dict.fromkeys(differing) if name not in untied]
    names = dict.fromkeys(name.partition(".")[0] for name in untied)
    parts = [model.parts[name] for name in names] if isinstance(model, Bundle) else [model]
    for part in parts if untied else []:
        _disable_tying(part)
    return untied


def _disable_tying(part: Any) -> None:
    """Turn weight tying off in a model's configuration, and untie the weights that it tied.

    One key of the configuration is for all ties: BERT's output layer shares its weight with the
    embedding, and its bias with another module.
    """
    keys = getattr(part, "get_expanded_tied_weights_keys", None)  # of transformers
    before = keys(all_submodels=True) if keys else {}
    part.config.tie_word_embeddings = False
    after = keys(all_submodels=True) if keys else {}
    shared = {name for group in tied_groups(part) for name in group}
    untie(part, sorted((before.keys() - after.keys()) & shared))
