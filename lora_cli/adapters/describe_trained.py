"""Describe in words which parts of a model are trained."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from lora_cli.adapters.count_parameters import parameter_table
from lora_cli.recipe import Recipe

MAX_NAMES = 8


def trained_in_words(model: nn.Module) -> str:
    """Return a line with the number of trained parameters, and where they are.

    Returns:
        For example `trained: 66 of 25,090 parameters (0.26 %): classifier`.
    """
    rows = parameter_table(model)
    total, names = sum(row.count for row in rows), [row.name for row in rows]
    count = sum(row.count for row in rows if row.trainable)
    line = f"trained: {count:,} of {total:,} parameters ({100 * count / total:.2f} %)"
    trained = {row.name for row in rows if row.trainable}
    return line if count == total else f"{line}: {in_modules(trained, names)}"


def frozen_in_words(model: nn.Module) -> str:
    """Return which modules of a model are frozen: `bert.embeddings, bert.encoder.layer.0-2`."""
    parameters = dict(model.named_parameters())
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    return in_modules(frozen, parameters)


def trained_facts(
    model: nn.Module, recipe: Recipe, groups: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the frozen modules and differing learning rates, for the report.

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
    """Return the learning rate of each part of a model; empty if all are equal.

    Args:
        groups: As `parameter_groups` returned them.
        model: The model that holds the parameters.
    """
    by_rate: dict[float, list[str]] = {}
    for group in groups:
        by_rate.setdefault(group["initial_lr"], []).extend(group["names"])
    if len(by_rate) < 2:
        return {}
    names = [name for name, _ in model.named_parameters()]
    return {in_modules(set(by_rate[rate]), names): rate for rate in sorted(by_rate)}


def in_modules(chosen: Collection[str], all_names: Iterable[str]) -> str:
    """Describe parameters by the fewest modules that contain exactly them.

    Args:
        chosen: Names of the parameters to describe.
        all_names: The names of all parameters of the model.

    Returns:
        For example `bert.embeddings, bert.encoder.layer.0-2`. In long lists, names that differ
        only in numbers are joined: `bert.encoder.layer.3-5.attention.self.query.lora_A`.
    """
    tree: dict[str, list[str]] = {}  # the parameters of each module; "" is the model
    for name in all_names:
        parts = name.split(".")
        for n in range(len(parts) + 1):
            tree.setdefault(".".join(parts[:n]), []).append(name)
    complete = {top for top, names in tree.items() if all(name in chosen for name in names)} - {""}
    tops = [top for top in tree if top in complete and top.rpartition(".")[0] not in complete]
    words = _with_ranges(tops)
    if len(words) > MAX_NAMES:
        words = _joined(tops)
    more = len(words) - MAX_NAMES
    return ", ".join(words[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _joined(names: Iterable[str]) -> list[str]:
    """Join names that differ only in numbers, with their range, or with `*` if it has gaps."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(name)
    joined = []
    for pattern, members in groups.items():
        numbers = [int(part) for name in members for part in name.split(".") if part.isdigit()]
        if len(members) > 1 and numbers == list(range(numbers[0], numbers[0] + len(members))):
            joined.append(pattern.replace(".*", f".{numbers[0]}-{numbers[-1]}"))
        else:
            joined.append(pattern if len(members) > 1 else members[0])
    return joined


def _with_ranges(names: Iterable[str]) -> list[str]:
    """Join consecutive numbered names into a range: `layer.0-2`."""
    ranges: list[tuple[str, int | None, int | None]] = []
    for name in names:
        parent, _, last = name.rpartition(".")
        if not last.isdigit():
            ranges.append((name, None, None))
        elif ranges and ranges[-1][0] == parent and ranges[-1][2] == int(last) - 1:
            ranges[-1] = (parent, ranges[-1][1], int(last))
        else:
            ranges.append((parent, int(last), int(last)))
    return [
        name if first is None else f"{name}.{first}" + (f"-{last}" if last != first else "")
        for name, first, last in ranges
    ]
