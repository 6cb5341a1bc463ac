"""The rows of a pretrained classifier go by the names of their labels, not by their positions.

A base may come with a classifier of its own: `id2label` of its config.json says which row of the
last layer stands for which label. A recipe has its labels in another order (inferred ones are
sorted), or some of them, or more. Each row is put where its label is; labels that the base does not
know get a row of their own, drawn at random.
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

UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls a label without a name


def arrange_rows(
    model: nn.Module,
    missing: set[str],
    labels: Sequence[str],
    base: PretrainedConfig,
    recipe: Recipe,
    auto_class: Any,
    behind: Sequence[str] = (),
) -> str | None:
    """Put the rows of a pretrained classifier in the order of the recipe's labels.

    Args:
        model: The model as it was loaded, with a row for each of `labels`; it is changed in place.
        missing: Names of parameters that were drawn at random, since the checkpoint lacks them or
            has another number of rows; it is changed too: what of the last layer is the
            checkpoint's row by row is taken out, what is not is added.
        labels: Of the recipe, in order.
        base: The configuration of the base, with its own labels.
        recipe: Names the checkpoint.
        auto_class: The transformers class of the model.
        behind: Names of outputs behind those of the labels, which every such model has.

    Returns:
        What a user should know, or None.
    """
    outputs = _output_layer(model, labels, base, recipe, auto_class, len(behind))
    own = own_names(base)
    if not outputs or not own:
        return None
    is_loaded = not set(outputs) & set(missing)
    if all(UNNAMED.fullmatch(name) for name in own):
        if is_loaded and not all(label.isdecimal() for label in labels):
            return (
                "warning: the base's classifier has labels without names: its outputs stand for "
                f"{_listed(labels)}, in this order"
            )
        return None
    are_numbers = all(name.isdecimal() for name in own)
    if all(label.isdecimal() for label in labels) and not are_numbers:
        if is_loaded:
            pairs = [f"{label} is `{name}`" for label, name in zip(labels, own, strict=False)]
            return f"the base's classifier goes by position: {', '.join(pairs[:10])}"
        return None
    known_labels = match_rows(own, labels)
    rows = [*known_labels, *range(len(own), len(own) + len(behind))]
    stored = {
        name: parameter.detach().clone() if is_loaded else _stored(name, recipe)
        for name, parameter in outputs.items()
    }
    for name, parameter in outputs.items():
        source = stored[name]
        if source is None or len(source) != len(own) + len(behind):
            rows = [None] * len(rows)  # of unknown names: it starts at random
            known_labels = [None] * len(labels)
            source = None
        _place(parameter, source, rows, base, is_loaded)
        (missing.discard if source is not None and None not in rows else missing.add)(name)
    new = [label for label, row in zip(labels, known_labels, strict=True) if row is None]
    return _note_of_new(own, new) if new else None


def _note_of_new(own: Sequence[str], new: Sequence[str]) -> str:
    """Return what to say of labels that the base does not know."""
    return (
        f"the base's classifier knows {_listed(own)}: the rows of {_listed(new)} start at random; "
        "labels of the same name would keep theirs"
    )


def rows_of_heads(tensors: Mapping[str, Tensor], heads: Collection[str]) -> list[int]:
    """Return the number of rows of each matrix that an adapter holds of a model's head.

    Args:
        tensors: Of the adapter, by name.
        heads: Names of the modules that the task adds to the pretrained model.
    """
    tops = tuple(f"{head}." for head in heads)
    return [
        tensor.shape[0]
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and adapted_module(name) is None and name.startswith(tops)
    ]


def match_rows(own: Sequence[str], labels: Sequence[str]) -> list[int | None]:
    """Return the row of each label among a classifier's own, by name, whatever its case."""
    exact = {name: i for i, name in reversed(list(enumerate(own)))}
    folded: dict[str, list[int]] = {}
    for i, name in enumerate(own):
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


def _listed(names: Sequence[str]) -> str:
    """Return the first names in words."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"`{printable(name, 60)}`" for name in names[:5]) + more


def own_names(base: PretrainedConfig) -> list[str]:
    """Return the base's labels in the order of its outputs; none if they are not numbered so."""
    names = {int(i): str(name) for i, name in (base.id2label or {}).items()}
    return [names[i] for i in range(len(names))] if sorted(names) == list(range(len(names))) else []


def _output_layer(
    model: nn.Module,
    labels: Sequence[str],
    base: PretrainedConfig,
    recipe: Recipe,
    auto_class: Any,
    n_behind: int,
) -> dict[str, nn.Parameter]:
    """Return the parameters that have a row for each label: those that grow with their number."""
    n_outputs = len(labels) + n_behind
    heads = tuple(f"{head}." for head in new_modules(model))
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(heads) and parameter.ndim and parameter.shape[0] == n_outputs
    }
    if sum(parameter.ndim > 1 for parameter in found.values()) < 2:
        return found
    config = type(base).from_dict({**base.to_dict(), **_numbered(len(labels) + 1)})
    larger = dict(build_empty(auto_class, recipe, config).named_parameters())
    return {name: p for name, p in found.items() if larger[name].shape[0] == n_outputs + 1}


def _numbered(count: int) -> dict[str, Any]:
    names = {i: f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _stored(name: str, recipe: Recipe) -> Tensor | None:
    """Return a tensor of the checkpoint, or None if it is not there under this name."""
    for file in checkpoint_files(recipe):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                found: Tensor = tensors.get_tensor(name)
                return found
    return None


@torch.no_grad()
def _place(
    parameter: nn.Parameter,
    source: Tensor | None,
    rows: Sequence[int | None],
    base: PretrainedConfig,
    is_loaded: bool,
) -> None:
    """Copy the rows that are known; draw the others as transformers draws a new layer."""
    for i, row in enumerate(rows):
        if row is not None and source is not None:
            parameter[i] = source[row].to(parameter.device, parameter.dtype)
        elif is_loaded and parameter.ndim > 1:
            parameter[i].normal_(0.0, float(getattr(base, "initializer_range", None) or 0.02))
        elif is_loaded:
            parameter[i].zero_()
