"""Arranges the rows of a pretrained classifier by the names of the recipe's labels.

A base may already have a classifier. Then `id2label` in its config.json names the label of each row
of the last layer. The labels of the recipe may have another order (inferred ones are sorted), or be
fewer or more. Each row is moved to the position of its label, and labels that the base does not
know get new, random rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from lora_cli.adapters.peft_format.tensor_names import adapted_module
from lora_cli.errors import printable
from lora_cli.models.base_model import build_empty, new_modules
from lora_cli.models.find_base import checkpoint_files
from lora_cli.recipe import Recipe

DEFAULT_NAME = re.compile(r"LABEL_\d+")  # transformers' name for a label without a name


def arrange_rows(
    model: nn.Module,
    missing: set[str],
    labels: Sequence[str],
    base: PretrainedConfig,
    recipe: Recipe,
    auto_class: Any,
    extra_outputs: Sequence[str] = (),
) -> str | None:
    """Put the rows of a pretrained classifier in the order of the recipe's labels.

    Args:
        model: The loaded model, with a row for each of `labels`; it is changed in place.
        missing: The names of the parameters that were initialised at random. A parameter of the
            last layer is removed if all its rows come from the checkpoint, and otherwise added.
        labels: The labels of the recipe, in order.
        base: The configuration of the base, with its labels.
        recipe: The recipe, which names the checkpoint.
        auto_class: The transformers class of the model.
        extra_outputs: The names of outputs after those of the labels, which every such model has.

    Returns:
        A note for the user, or None.
    """
    output_parameters = _output_layer(model, labels, base, recipe, auto_class, len(extra_outputs))
    base_labels = base_label_names(base)
    if not output_parameters or not base_labels:
        return None
    is_loaded = not set(output_parameters) & set(missing)
    if all(DEFAULT_NAME.fullmatch(name) for name in base_labels):
        if is_loaded and not all(label.isdecimal() for label in labels):
            return (
                "warning: the base's classifier has labels without names: its outputs stand for "
                f"{_list_names(labels)}, in this order"
            )
        return None
    are_numbers = all(name.isdecimal() for name in base_labels)
    if all(label.isdecimal() for label in labels) and not are_numbers:
        if is_loaded:
            pairs = [
                f"{label} is `{name}`" for label, name in zip(labels, base_labels, strict=False)
            ]
            return f"the base's classifier goes by position: {', '.join(pairs[:10])}"
        return None
    known_labels = match_rows(base_labels, labels)
    rows = [*known_labels, *range(len(base_labels), len(base_labels) + len(extra_outputs))]
    stored = {
        name: parameter.detach().clone() if is_loaded else _read_checkpoint_tensor(name, recipe)
        for name, parameter in output_parameters.items()
    }
    for name, parameter in output_parameters.items():
        source = stored[name]
        if source is None or len(source) != len(base_labels) + len(extra_outputs):
            rows = [None] * len(rows)  # its rows cannot be identified, so all start at random
            known_labels = [None] * len(labels)
            source = None
        _copy_rows(parameter, source, rows, base, is_loaded)
        (missing.discard if source is not None and None not in rows else missing.add)(name)
    new_labels = [label for label, row in zip(labels, known_labels, strict=True) if row is None]
    return _new_labels_note(base_labels, new_labels) if new_labels else None


def _new_labels_note(base_labels: Sequence[str], new: Sequence[str]) -> str:
    """Return the note about labels that the base does not know."""
    return (
        f"the base's classifier knows {_list_names(base_labels)}: the rows of {_list_names(new)} "
        "start at random; labels of the same name would keep theirs"
    )


def rows_of_heads(tensors: Mapping[str, Tensor], head_modules: Collection[str]) -> list[int]:
    """Return the number of rows of each matrix of a model's head that an adapter contains.

    Args:
        tensors: The tensors of the adapter, by name.
        head_modules: The names of the modules that the task adds to the pretrained model.
    """
    prefixes = tuple(f"{head}." for head in head_modules)
    return [
        tensor.shape[0]
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and adapted_module(name) is None and name.startswith(prefixes)
    ]


def match_rows(base_labels: Sequence[str], labels: Sequence[str]) -> list[int | None]:
    """Return the position of each label among a classifier's labels; None if it is not there.

    A name that differs only in case or surrounding spaces matches if that is not ambiguous.
    """
    exact = {name: i for i, name in reversed(list(enumerate(base_labels)))}
    folded: dict[str, list[int]] = {}
    for i, name in enumerate(base_labels):
        folded.setdefault(name.strip().casefold(), []).append(i)
    taken = {exact[label] for label in labels if label in exact}
    rows: list[int | None] = []
    for label in labels:
        row = exact.get(label)
        if row is None:
            matches = [i for i in folded.get(label.strip().casefold(), []) if i not in taken]
            row = matches[0] if len(matches) == 1 else None
            taken |= {row} if row is not None else set()
        rows.append(row)
    return rows


def _list_names(names: Sequence[str]) -> str:
    """Return the first five names as a list in words."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"`{printable(name, 60)}`" for name in names[:5]) + more


def base_label_names(base: PretrainedConfig) -> list[str]:
    """Return the base's labels in the order of its outputs; empty if its numbers have gaps."""
    names = {int(i): str(name) for i, name in (base.id2label or {}).items()}
    return [names[i] for i in range(len(names))] if sorted(names) == list(range(len(names))) else []


def _output_layer(
    model: nn.Module,
    labels: Sequence[str],
    base: PretrainedConfig,
    recipe: Recipe,
    auto_class: Any,
    n_extra: int,
) -> dict[str, nn.Parameter]:
    """Return the parameters with a row for each label, by name.

    If several matrices have that many rows, those are meant that grow with the number of labels.
    """
    n_outputs = len(labels) + n_extra
    heads = tuple(f"{head}." for head in new_modules(model))
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(heads) and parameter.ndim and parameter.shape[0] == n_outputs
    }
    if sum(parameter.ndim > 1 for parameter in found.values()) < 2:
        return found
    config = type(base).from_dict({**base.to_dict(), **_default_label_names(len(labels) + 1)})
    larger = dict(build_empty(auto_class, recipe, config).named_parameters())
    return {name: p for name, p in found.items() if larger[name].shape[0] == n_outputs + 1}


def _default_label_names(count: int) -> dict[str, Any]:
    names = {i: f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _read_checkpoint_tensor(name: str, recipe: Recipe) -> Tensor | None:
    """Return a tensor of the checkpoint, or None if it has none of this name."""
    for file in checkpoint_files(recipe):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - not a dictionary
                found: Tensor = tensors.get_tensor(name)
                return found
    return None


@torch.no_grad()
def _copy_rows(
    parameter: nn.Parameter,
    source: Tensor | None,
    rows: Sequence[int | None],
    base: PretrainedConfig,
    is_loaded: bool,
) -> None:
    """Copy the known rows, and initialise the others as transformers initialises a new layer."""
    for i, row in enumerate(rows):
        if row is not None and source is not None:
            parameter[i] = source[row].to(parameter.device, parameter.dtype)
        elif is_loaded and parameter.ndim > 1:
            parameter[i].normal_(0.0, float(getattr(base, "initializer_range", None) or 0.02))
        elif is_loaded:
            parameter[i].zero_()
