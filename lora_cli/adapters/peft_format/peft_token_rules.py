"""PEFT's rules for which modules get trained rows of tokens, given a configuration.

`trainable_token_indices` is a list of tokens of the input embedding, or a dictionary of such lists
by suffixes of module names. Modules tied to the input embedding get its rows too, but only if the
whole model declares the tie (`_tied_weights_keys`), and if `get_input_embeddings` returns the very
module that PEFT replaced. So PEFT shares nothing in an encoder-decoder that classifies, nor in a
Marian model whose vocabulary was enlarged, since its embedding then has three names, of which PEFT
replaces the first.

Reimplemented from PEFT 0.21 and tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_cli.adapters.peft_format.peft_rules import base_modules, listed
from lora_cli.adapters.token_rows import TokenRows

Indices = list[int] | dict[str, list[int]]


@dataclass
class TokenReading:
    """The modules to which PEFT gives trained rows for a configuration."""

    ids: dict[str, list[int]] = field(default_factory=dict)
    """The token ids of each module that has its own rows."""
    followers: dict[str, str] = field(default_factory=dict)
    """The modules that get the rows of another module, and the name of that module."""


def token_reading(model: nn.Module, config: dict[str, Any]) -> TokenReading:
    """Return the modules to which PEFT gives trained rows.

    Args:
        model: The base model, with or without trained rows.
        config: The contents of `adapter_config.json`.
    """
    indices, reading = config.get("trainable_token_indices"), TokenReading()
    if not indices:
        return reading
    modules = base_modules(model)
    inputs = _names_of_input_embedding(model, modules)
    first = inputs[0] if inputs else "embed_tokens"
    by_suffix = indices if isinstance(indices, dict) else {first: indices}
    is_tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    tied = _tied_names(model, modules, inputs) if is_tied else []
    tied_suffixes = [
        suffix
        for suffix in by_suffix
        if first.endswith(suffix) or any(n.endswith(suffix) or suffix in n.split(".") for n in tied)
    ]
    differ = any(by_suffix[suffix] != by_suffix[tied_suffixes[0]] for suffix in tied_suffixes)
    left_to_tie = set() if differ or len(by_suffix) < 2 or len(tied_suffixes) < 2 else set(tied)
    for suffix, ids in by_suffix.items():
        matched = [name for name in modules if name.endswith(suffix) and suffix not in left_to_tie]
        reading.ids |= {name: list(ids) for name in matched if name not in reading.ids}
    source = _name_read_by_model(model, inputs)
    if is_tied and source in reading.ids and (config.get("ensure_weight_tying") or not differ):
        matched = [name for name in modules if tied and name.endswith(tuple(tied))]
        reading.followers |= {name: source for name in matched if name not in reading.ids}
    _add_uncalled_shared(reading, modules)
    return reading


def _names_of_input_embedding(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the input embedding, which may have several."""
    try:
        found = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return []
    embedding = found.base if isinstance(found, TokenRows) else found
    return [name for name, module in modules.items() if module is embedding]


def _tied_names(model: nn.Module, modules: dict[str, nn.Module], inputs: list[str]) -> list[str]:
    """Return the modules that the model declares as tied to the input embedding."""
    if not inputs or not isinstance(getattr(model, "_tied_weights_keys", None), dict):
        return []
    weight = modules[inputs[0]]._parameters.get("weight")
    sharers = {n for n, module in modules.items() if module._parameters.get("weight") is weight}
    ties: dict[str, str] = {}
    for name, module in [("", model), *modules.items()]:
        prefix = f"{name}." if name else ""
        of_module = getattr(module, "_tied_weights_keys", None) or {}
        ties |= {prefix + target: prefix + source for target, source in of_module.items()}
    owners = {target.rpartition(".")[0]: s.rpartition(".")[0] for target, s in ties.items()}
    return sorted(name for name, source in owners.items() if source in sharers)


def _name_read_by_model(model: nn.Module, names: list[str]) -> str | None:
    """Return the name from which `get_input_embeddings` reads the embedding."""
    for name in names[1:]:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        original, probe = getattr(parent, child), nn.Identity()
        setattr(parent, child, probe)
        try:
            model_any: Any = model
            if model_any.get_input_embeddings() is probe:
                return name
        finally:
            setattr(parent, child, original)
    return names[0] if names else None


def _add_uncalled_shared(reading: TokenReading, modules: dict[str, nn.Module]) -> None:
    """Make an encoder-decoder's `shared` a follower if encoder and decoder have the same rows.

    `shared` is never called: the encoder and the decoder have embeddings with its weight.
    """
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        prefix = f"{parent}." if parent else ""
        sides = [f"{prefix}{side}.embed_tokens" for side in ("encoder", "decoder")]
        if last != "shared" or name in reading.ids or not all(side in modules for side in sides):
            continue
        weight = module._parameters.get("weight")
        sources = {reading.followers.get(side, side) for side in sides}
        same = all(modules[side]._parameters.get("weight") is weight for side in sides)
        if same and len(sources) == 1 and sources <= reading.ids.keys():
            reading.followers[name] = sources.pop()


# ---------------------------------------------------------------------------------------- write


def written_rows(model: nn.Module) -> tuple[Indices, dict[str, TokenRows]]:
    """Return `trainable_token_indices`, and the layers whose rows are written.

    Of several equivalent forms, use the shortest one that PEFT reads like this tool. In the longest
    form, each module has its own rows, and shared rows are written several times.

    Args:
        model: The model with trained rows.
    """
    layers = _all_token_layers(model)
    owners = {name: layer.token_ids for name, layer in layers.items() if not layer.shares_rows}
    first_names = {id(layers[name]): name for name in reversed(owners)}
    owners = {name: owners[name] for name in sorted(first_names.values(), key=list(layers).index)}
    forms: list[Indices] = [owners]
    if len(owners) == 1:
        (ids,) = owners.values()
        forms = [ids, *({name: ids} for name in layers)]
    forms.append({name: layer.token_ids for name, layer in layers.items()})
    for form in forms:
        reading = token_reading(model, {"trainable_token_indices": form})
        if _agrees(reading, layers):
            return form, {name: layers[name] for name in reading.ids}
    return forms[0], {name: layers[name] for name in owners}


def _all_token_layers(model: nn.Module) -> dict[str, TokenRows]:
    """Return the layers with trained rows, by each of their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, TokenRows)}


def _agrees(reading: TokenReading, layers: dict[str, TokenRows]) -> bool:
    """Return whether PEFT would give each module the rows that it has in this model."""
    sources = {**{name: name for name in reading.ids}, **reading.followers}
    return sources.keys() == layers.keys() and all(
        layers[source].rows is layers[name].rows for name, source in sources.items()
    )


# ------------------------------------------------------------------------------------- differences


def token_differences(model: nn.Module, config: dict[str, Any]) -> list[str]:
    """Return the ways in which PEFT would treat trained rows differently, each with a remedy.

    Args:
        model: The model with trained rows; may be on the meta device.
        config: The configuration that is saved with the adapter.
    """
    layers = _all_token_layers(model)
    if not layers:
        return []
    return list(_token_differences(token_reading(model, config), layers))


def _token_differences(reading: TokenReading, layers: dict[str, TokenRows]) -> Iterator[str]:
    remedy = "to use the adapter in PEFT, merge it"
    if not _agrees(reading, layers):
        lost = sorted(layers.keys() - reading.ids.keys() - reading.followers.keys())
        where = f" in {listed(lost)}" if lost else ""
        yield f"PEFT would not use the trained rows of tokens{where}: {remedy}"
    for name, layer in layers.items():
        if _has_bias(layer.base):
            yield f"PEFT would leave out the bias of `{name}`, of which rows are trained: {remedy}"
        elif not computes_as_peft(layer.base):
            kind = type(layer.base).__name__
            yield (
                f"PEFT would compute `{name}`, of which rows are trained, as a plain embedding, "
                f"and it is a {kind}: {remedy}"
            )


def _has_bias(base: nn.Module) -> bool:
    return isinstance(base, nn.Linear) and base.bias is not None


def computes_as_peft(base: nn.Module) -> bool:
    """Return whether a layer is `embedding(ids) * embed_scale`, or a plain linear layer."""
    if isinstance(base, nn.Linear):
        return type(base).forward is nn.Linear.forward
    if not isinstance(base, nn.Embedding):
        return False
    scale = getattr(base, "embed_scale", None)
    if isinstance(scale, torch.Tensor) and scale.numel() != 1:
        scale = None
    if type(base).forward is nn.Embedding.forward:
        return scale is None or float(scale) == 1.0
    if base.weight.is_meta:
        return scale is not None
    with torch.no_grad():
        tokens = torch.arange(min(4, base.num_embeddings), device=base.weight.device)
        plain = nn.functional.embedding(tokens, base.weight)
        expected = plain if scale is None else plain * torch.as_tensor(scale).to(plain)
        return torch.allclose(base(tokens), expected, rtol=1e-3, atol=1e-6)
