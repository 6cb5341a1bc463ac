"""Read trained rows of embeddings from PEFT's files: `trainable_token_indices`.

The configuration says which tokens (`peft_token_rules`). Despite its name,
`<module>.token_adapter.trainable_tokens_delta` holds the rows themselves. Modules that share a
weight and have equal rows in the file are trained as one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder
from lora_cli.adapters.peft_format.peft_tensors import MISMATCH_HINT
from lora_cli.adapters.peft_format.peft_token_rules import (
    TokenReading,
    computes_as_peft,
    token_reading,
)
from lora_cli.errors import Problem

ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")


LARGER = (
    "the vocabulary was made larger: name the new tokens, in the order of their ids, in "
    "`model.add_tokens` of a recipe"
)
RESIZED = (
    "the vocabulary was made larger, to rows of no token (`pad_to_multiple_of`) or with a low-rank "
    "update of the new rows: merge the adapter in PEFT, into a base with "
    "`resize_token_embeddings({})`; or train it again, with `model.add_tokens`"
)


@dataclass
class SavedRows:
    """The trained rows of a module, in ascending order of the token ids."""

    name: str
    token_ids: list[int]
    rows: Tensor
    others: list[str]
    """Further modules that get the same rows."""


def split_rows(adapter: AdapterFolder) -> tuple[AdapterFolder, dict[str, Tensor]]:
    """Return an adapter without its trained rows, and the rows by module name."""
    tensors = adapter.tensors
    rows = {match[1]: t for name, t in tensors.items() if (match := ROWS.fullmatch(name))}
    other_tensors = {name: t for name, t in tensors.items() if not ROWS.fullmatch(name)}
    return replace(adapter, tensors=other_tensors), rows


def saved_rows(
    model: nn.Module, rows: dict[str, Tensor], adapter: AdapterFolder
) -> tuple[list[SavedRows], list[Problem]]:
    """Return the trained rows of an adapter, and a problem for each set that does not fit.

    Args:
        model: The base model.
        rows: The rows by module name, as `split_rows` returned them.
        adapter: Provides the configuration.
    """
    row_sets: list[SavedRows] = []
    problems: list[Problem] = []
    reading = token_reading(model, adapter.config)
    _add_own_rows(reading, rows, adapter)
    for name in reading.ids.keys() - rows.keys():
        what = f"the trained rows of `{name}` are missing"
        problems.append(Problem(what, hint=MISMATCH_HINT))
    for name, tensor in rows.items():
        ids, source = reading.ids.get(name), rows.get(reading.followers.get(name, ""))
        if source is not None and torch.equal(source, tensor):
            continue  # PEFT writes them twice if it writes the whole embedding
        if ids is None:
            what = f"`{name}` has trained rows, and the configuration does not say of which tokens"
            problems.append(Problem(what, hint=MISMATCH_HINT))
            continue
        others = [other for other, source in reading.followers.items() if source == name]
        misfits = (
            _misfit(place, model.get_submodule(place), ids, tensor, adapter)
            for place in (name, *others)
        )
        if problem := next(filter(None, misfits), None):
            problems.append(problem)
            continue
        order = sorted(range(len(ids)), key=ids.__getitem__)
        row_sets.append(SavedRows(name, sorted(ids), tensor[order], others))
    return _joined(model, row_sets), problems


def _add_own_rows(reading: TokenReading, rows: dict[str, Tensor], adapter: AdapterFolder) -> None:
    """Use the separate rows that this tool wrote for a module, where PEFT would share rows.

    This happens if a base's configuration ties two weights that differ in its checkpoint.
    """
    by_module = adapter.config.get("trainable_token_indices")
    if not adapter.verified or not isinstance(by_module, dict):
        return
    for name, source in list(reading.followers.items()):
        has_own = name in by_module and name in rows and source in rows
        if has_own and not torch.equal(rows[name], rows[source]):
            del reading.followers[name]
            reading.ids[name] = list(by_module[name])


def _joined(model: nn.Module, row_sets: list[SavedRows]) -> list[SavedRows]:
    """Join equal rows of modules that share a weight."""
    joined: list[SavedRows] = []
    for saved in row_sets:
        weight = model.get_submodule(saved.name)._parameters["weight"]
        for other in joined:
            if (
                model.get_submodule(other.name)._parameters["weight"] is weight
                and other.token_ids == saved.token_ids
                and torch.equal(other.rows, saved.rows)
            ):
                other.others += [saved.name, *saved.others]
                break
        else:
            joined.append(saved)
    return joined


def _misfit(
    name: str, module: nn.Module, ids: list[int], tensor: Tensor, adapter: AdapterFolder
) -> Problem | None:
    weight = module._parameters.get("weight")
    if weight is None or not isinstance(module, nn.Embedding | nn.Linear):
        return Problem(f"`{name}` has trained rows, and is no embedding and no output layer")
    size, dim = weight.shape
    if max(ids, default=0) >= size:
        what = f"the adapter has the row of the token {max(ids)}, and `{name}` has rows 0 to "
        return Problem(f"{what}{size - 1:,}", hint=LARGER)
    if tuple(tensor.shape) != (len(ids), dim):
        what = f"the trained rows of `{name}` are {tuple(tensor.shape)}, "
        return Problem(f"{what}the model needs {(len(ids), dim)}")
    if not adapter.verified and getattr(module, "bias", None) is not None:
        what = f"`{name}` has a bias, which PEFT leaves out where it trains single rows"
        return Problem(what, hint="train it again with this tool, or use it in PEFT")
    if not adapter.verified and not computes_as_peft(module):
        what = f"`{name}` is a {type(module).__name__}, which PEFT computes as a plain embedding "
        hint = "train it again with this tool, or use it in PEFT"
        return Problem(f"{what}where it trains single rows", hint=hint)
    return None
