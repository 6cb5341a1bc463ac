"""Which modules get trained rows of tokens in PEFT, for a configuration: PEFT's own rules.

`trainable_token_indices` is a list of tokens, of the input embedding, or a dictionary of such lists
by the ends of modules' names. What shares the input embedding's weight gets its rows too, but only
where the whole model says so (`_tied_weights_keys`), and where what `get_input_embeddings` returns
is the very module that PEFT replaced. So an encoder-decoder that classifies shares nothing in PEFT;
nor does a Marian model whose vocabulary was made larger, since its embedding then stands in three
places, of which PEFT replaces the first.

Written down from PEFT 0.21 and tested against it.
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
    """Which modules have trained rows, as PEFT reads a configuration."""

    ids: dict[str, list[int]] = field(default_factory=dict)
    """The tokens, by the names of the modules that have rows of their own."""
    followers: dict[str, str] = field(default_factory=dict)
    """Modules that get the rows of another one, and that one."""


def token_reading(model: nn.Module, config: dict[str, Any]) -> TokenReading:
    """Return which modules get trained rows.

    Args:
        model: The base model, with or without trained rows.
        config: What `adapter_config.json` holds.
    """
    indices, reading = config.get("trainable_token_indices"), TokenReading()
    if not indices:
        return reading
    modules = base_modules(model)
    inputs = _names_of_input_embedding(model, modules)
    first = inputs[0] if inputs else "embed_tokens"
    named = indices if isinstance(indices, dict) else {first: indices}
    is_tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    tied = _tied_names(model, modules, inputs) if is_tied else []
    together = [
        end
        for end in named
        if first.endswith(end) or any(n.endswith(end) or end in n.split(".") for n in tied)
    ]
    differ = any(named[end] != named[together[0]] for end in together)
    left_to_tie = set() if differ or len(named) < 2 or len(together) < 2 else set(tied)
    for end, ids in named.items():
        ends_so = [name for name in modules if name.endswith(end) and end not in left_to_tie]
        reading.ids |= {name: list(ids) for name in ends_so if name not in reading.ids}
    read = _name_that_is_read(model, inputs)
    if is_tied and read in reading.ids and (config.get("ensure_weight_tying") or not differ):
        ends_so = [name for name in modules if tied and name.endswith(tuple(tied))]
        reading.followers |= {name: read for name in ends_so if name not in reading.ids}
    _add_unused(reading, modules)
    return reading


def _names_of_input_embedding(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the input embedding, which may stand in several places."""
    try:
        found = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return []
    embedding = found.base if isinstance(found, TokenRows) else found
    return [name for name, module in modules.items() if module is embedding]


def _tied_names(model: nn.Module, modules: dict[str, nn.Module], inputs: list[str]) -> list[str]:
    """Return the modules that share the input embedding's weight because the model says so."""
    if not inputs or not isinstance(getattr(model, "_tied_weights_keys", None), dict):
        return []
    weight = modules[inputs[0]]._parameters.get("weight")
    sharing = {n for n, module in modules.items() if module._parameters.get("weight") is weight}
    ties: dict[str, str] = {}
    for name, module in [("", model), *modules.items()]:
        start = f"{name}." if name else ""
        of_module = getattr(module, "_tied_weights_keys", None) or {}
        ties |= {start + target: start + source for target, source in of_module.items()}
    owners = {target.rpartition(".")[0]: s.rpartition(".")[0] for target, s in ties.items()}
    return sorted(name for name, source in owners.items() if source in sharing)


def _name_that_is_read(model: nn.Module, names: list[str]) -> str | None:
    """Return the place at which `get_input_embeddings` finds the embedding."""
    for name in names[1:]:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        kept, other = getattr(parent, child), nn.Identity()
        setattr(parent, child, other)
        try:
            model_any: Any = model
            if model_any.get_input_embeddings() is other:
                return name
        finally:
            setattr(parent, child, kept)
    return names[0] if names else None


def _add_unused(reading: TokenReading, modules: dict[str, nn.Module]) -> None:
    """Let the `shared` of an encoder-decoder follow where both sides have the same rows.

    It computes nothing: the encoder and the decoder have embeddings with its weight.
    """
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        start = f"{parent}." if parent else ""
        both = [f"{start}{side}.embed_tokens" for side in ("encoder", "decoder")]
        if last != "shared" or name in reading.ids or not all(side in modules for side in both):
            continue
        weight = module._parameters.get("weight")
        sources = {reading.followers.get(side, side) for side in both}
        same = all(modules[side]._parameters.get("weight") is weight for side in both)
        if same and len(sources) == 1 and sources <= reading.ids.keys():
            reading.followers[name] = sources.pop()


# ---------------------------------------------------------------------------------------- write


def written_rows(model: nn.Module) -> tuple[Indices, dict[str, TokenRows]]:
    """Return what the configuration says of trained rows, and the layers whose rows are written.

    Of the ways to say it, the shortest that PEFT reads as this tool does. In the longest, each
    module has rows of its own, and those that are shared are written several times.

    Args:
        model: The model with trained rows.
    """
    ours = _every_layer(model)
    owners = {name: layer.token_ids for name, layer in ours.items() if not layer.shares_rows}
    first_names = {id(ours[name]): name for name in reversed(owners)}
    owners = {name: owners[name] for name in sorted(first_names.values(), key=list(ours).index)}
    ways: list[Indices] = [owners]
    if len(owners) == 1:
        (ids,) = owners.values()
        ways = [ids, *({name: ids} for name in ours)]
    ways.append({name: layer.token_ids for name, layer in ours.items()})
    for way in ways:
        reading = token_reading(model, {"trainable_token_indices": way})
        if _agrees(reading, ours):
            return way, {name: ours[name] for name in reading.ids}
    return ways[0], {name: ours[name] for name in owners}


def _every_layer(model: nn.Module) -> dict[str, TokenRows]:
    """Return the layers with trained rows by each of their names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, TokenRows)}


def _agrees(reading: TokenReading, ours: dict[str, TokenRows]) -> bool:
    """Return whether each module gets in PEFT the rows that it has here."""
    sources = {**{name: name for name in reading.ids}, **reading.followers}
    return sources.keys() == ours.keys() and all(
        ours[source].rows is ours[name].rows for name, source in sources.items()
    )


# -------------------------------------------------------------------------------- what would differ


def token_differences(model: nn.Module, config: dict[str, Any]) -> list[str]:
    """Return how PEFT would read trained rows otherwise than this tool; each with the way out.

    Args:
        model: The model with trained rows; may be on the meta device.
        config: The configuration that stands beside the adapter.
    """
    ours = _every_layer(model)
    if not ours:
        return []
    return list(_token_differences(token_reading(model, config), ours))


def _token_differences(reading: TokenReading, ours: dict[str, TokenRows]) -> Iterator[str]:
    merged = "to use the adapter in PEFT, merge it"
    if not _agrees(reading, ours):
        lost = sorted(ours.keys() - reading.ids.keys() - reading.followers.keys())
        where = f" in {listed(lost)}" if lost else ""
        yield f"PEFT would not use the trained rows of tokens{where}: {merged}"
    for name, layer in ours.items():
        if _has_bias(layer.base):
            yield f"PEFT would leave out the bias of `{name}`, of which rows are trained: {merged}"
        elif not computes_as_peft(layer.base):
            kind = type(layer.base).__name__
            yield (
                f"PEFT would compute `{name}`, of which rows are trained, as a plain embedding, "
                f"and it is a {kind}: {merged}"
            )


def _has_bias(base: nn.Module) -> bool:
    return isinstance(base, nn.Linear) and base.bias is not None


def computes_as_peft(base: nn.Module) -> bool:
    """Return whether it is `embedding(ids) * embed_scale`, or a plain linear layer."""
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
        wanted = plain if scale is None else plain * torch.as_tensor(scale).to(plain)
        return torch.allclose(base(tokens), wanted, rtol=1e-3, atol=1e-6)
