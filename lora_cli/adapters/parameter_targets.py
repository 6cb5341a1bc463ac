"""Resolve the single parameters that get an adapter (`target_parameters`), mostly experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import nn

from lora_cli.adapters.lora import LoRALayer
from lora_cli.adapters.lora_parameter import expert_parameters, innermost, misfit
from lora_cli.errors import Problem, did_you_mean
from lora_cli.recipe import Recipe

Place = tuple[str, str]  # the names of a module and of its parameter


def places_of(model: nn.Module, entries: Collection[str]) -> list[Place]:
    """Return the parameters whose names equal or end in one of the entries, in model order.

    Args:
        model: The base model, with or without an adapter.
        entries: Names or suffixes, as in PEFT's `target_parameters`.
    """
    layers = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, LoRALayer))
    return [
        (name, key)
        for name, module in model.named_modules()
        if name and not name.startswith(layers)
        for key, _ in innermost(module).named_parameters(recurse=False)
        if any(_ends(f"{name}.{key}", entry) for entry in entries)
    ]


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def resolve_parameters(
    model: nn.Module,
    recipe: Recipe,
    adapted: Collection[str],
    is_in_full: Callable[[str], bool],
) -> tuple[list[Place], list[Problem]]:
    """Return the parameters that the recipe names, and a problem for each invalid entry.

    Args:
        model: The base model; may be on the meta device.
        recipe: Its `adapter.target_parameters` names them.
        adapted: Modules that get an adapter through `target_modules`.
        is_in_full: Returns whether a module is trained in full, or must stay frozen.
    """
    entries, at = recipe.adapter.target_parameters, recipe.at("adapter.target_parameters")
    problems = []
    for entry in entries:
        places = places_of(model, [entry])
        if not places:
            problems.append(Problem(f"`{entry}` matches no parameter", at, _hint(model, entry)))
            continue
        name, key = places[0]
        reason = misfit(model.get_submodule(name), key)
        hint = _hint(model, entry)
        if reason is None and name in adapted:
            reason = "belongs to a module that `target_modules` adapts"
            hint = "leave one of the two out; `target_modules: []` adapts parameters alone"
        if reason is None and is_in_full(name):
            reason, hint = "is trained in full", "it needs no adapter; leave it out"
        if reason is not None:
            what = f"`{entry}` matches {name}.{key}, which {reason}"
            problems.append(Problem(what, at, hint))
    if duplicate := next((e for i, e in enumerate(entries) if e in entries[:i]), None):
        problems.append(Problem(f"`{duplicate}` is written twice", at, "write it once"))
    return places_of(model, entries), problems


def _hint(model: nn.Module, entry: str) -> str | None:
    """Return a hint with similar names: the experts' if the model has any, otherwise weights'."""
    experts = short_names(expert_parameters(model))
    if experts:
        return did_you_mean(entry, experts, "the model's experts are")
    weights = short_names(name for name, p in model.named_parameters() if p.ndim in (2, 3))
    return did_you_mean(entry, weights, "the model has no experts stored as one tensor; it has")


def short_names(names: Iterable[str]) -> list[str]:
    """Return the parts of names after the layer's number: `mlp.experts.down_proj`."""
    short: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        short[".".join(parts[max(numbers, default=-1) + 1 :])] = None
    return list(short)


def frozen_experts_note(model: nn.Module, recipe: Recipe) -> str | None:
    """Return a note if a recipe adapts all linear layers but leaves the experts frozen.

    Args:
        model: The base model, with or without an adapter.
        recipe: Its `adapter` section says what is adapted.
    """
    spec = recipe.adapter
    if spec.type != "lora" or spec.target_parameters:
        return None
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if spec.target_modules != "all-linear" and not (spec.target_modules is None and output):
        return None  # without an output embedding, the default is only the attention
    experts = {n: p for n, p in expert_parameters(model).items() if not p.requires_grad}
    if not experts:
        return None
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(parameter.numel() for parameter in experts.values()) / total
    names = ", ".join(short_names(experts))
    # updates of parameters allow neither dropout nor another initialisation
    settings = ["--set adapter.dropout=0"] if spec.dropout else []
    settings += ["--set adapter.init=default"] if spec.init != "default" else []
    command = " ".join([*settings, f"--set 'adapter.target_parameters=[{names}]'"])
    return (
        f"`all-linear` leaves the experts frozen, {share:.0%} of the parameters: they are no "
        f"linear layers; to adapt them too: `{command}`"
    )
