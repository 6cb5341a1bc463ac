"""What of a model is trained, in words that a person reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from lora_cli.adapters.count_parameters import parameter_table
from lora_cli.recipe import Recipe

MOST_NAMES = 8


def trained_in_words(model: nn.Module) -> str:
    """Return how many of a model's parameters are trained, and which.

    Returns:
        `trained: 66 of 25,090 parameters (0.26 %): classifier`.
    """
    rows = parameter_table(model)
    total, every = sum(row.count for row in rows), [row.name for row in rows]
    count = sum(row.count for row in rows if row.trainable)
    words = f"trained: {count:,} of {total:,} parameters ({100 * count / total:.2f} %)"
    trained = {row.name for row in rows if row.trainable}
    return words if count == total else f"{words}: {in_modules(trained, every)}"


def frozen_in_words(model: nn.Module) -> str:
    """Return which modules of a model are frozen: `bert.embeddings, bert.encoder.layer.0-2`."""
    parameters = dict(model.named_parameters())
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    return in_modules(frozen, parameters)


def trained_facts(
    model: nn.Module, recipe: Recipe, groups: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return for the report what the recipe freezes, and learning rates that differ.

    Args:
        model: The model that is trained.
        recipe: Its `adapter.freeze` may name modules.
        groups: The optimizer's parameter groups.
    """
    facts: dict[str, Any] = {}
    if recipe.adapter.frozen_entries:
        facts["frozen"] = frozen_in_words(model)
    if rates := rates_in_words(groups, model):
        facts["learning_rates"] = rates
    return facts


def rates_in_words(groups: Sequence[dict[str, Any]], model: nn.Module) -> dict[str, float]:
    """Return the learning rate of each part of a model, where they differ.

    Args:
        groups: As `parameter_groups` returned them.
        model: Where the parameters are.
    """
    by_rate: dict[float, list[str]] = {}
    for group in groups:
        by_rate.setdefault(group["initial_lr"], []).extend(group["names"])
    if len(by_rate) < 2:
        return {}
    every = [name for name, _ in model.named_parameters()]
    return {in_modules(set(by_rate[rate]), every): rate for rate in sorted(by_rate)}


def in_modules(chosen: Collection[str], every: Iterable[str]) -> str:
    """Return parameters in words: as few modules as hold them and no others.

    Args:
        chosen: Names of parameters.
        every: The names of all parameters of the model.

    Returns:
        `bert.embeddings, bert.encoder.layer.0-2`; of many, those that differ only in numbers are
        joined: `bert.encoder.layer.3-5.attention.self.query.lora_A`.
    """
    tree: dict[str, list[str]] = {}  # a module, or "", and the parameters in it
    for name in every:
        parts = name.split(".")
        for n in range(len(parts) + 1):
            tree.setdefault(".".join(parts[:n]), []).append(name)
    whole = {top for top, names in tree.items() if all(name in chosen for name in names)} - {""}
    tops = [top for top in tree if top in whole and top.rpartition(".")[0] not in whole]
    words = _with_ranges(tops)
    if len(words) > MOST_NAMES:
        words = _joined(tops)
    more = len(words) - MOST_NAMES
    return ", ".join(words[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _joined(names: Iterable[str]) -> list[str]:
    """Return names that differ only in numbers as one: with their range, or else `*`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(name)
    found = []
    for pattern, alike in groups.items():
        numbers = [int(part) for name in alike for part in name.split(".") if part.isdigit()]
        if len(alike) > 1 and numbers == list(range(numbers[0], numbers[0] + len(alike))):
            found.append(pattern.replace(".*", f".{numbers[0]}-{numbers[-1]}"))
        else:
            found.append(pattern if len(alike) > 1 else alike[0])
    return found


def _with_ranges(names: Iterable[str]) -> list[str]:
    """Return names in which numbered neighbours are one range: `layer.0-2`."""
    found: list[tuple[str, int | None, int | None]] = []
    for name in names:
        parent, _, last = name.rpartition(".")
        if not last.isdigit():
            found.append((name, None, None))
        elif found and found[-1][0] == parent and found[-1][2] == int(last) - 1:
            found[-1] = (parent, found[-1][1], int(last))
        else:
            found.append((parent, int(last), int(last)))
    return [
        name if first is None else f"{name}.{first}" + (f"-{last}" if last != first else "")
        for name, first, last in found
    ]
