"""Merge tensor by tensor, so that a base larger than memory can be merged.

Each file of the base is read and written one tensor after the other: tensors that the adapter
changes are computed in float32 and rounded once to the dtype of the file, others are copied. The
files keep their names, tensors, dtypes and metadata.

Outputs are not compared, since the model is never loaded as a whole. The written tensors are
compared bit by bit instead, as in every merge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.errors import NumericsError
from lora_cli.export.adapter_changes import AdapterChanges
from lora_cli.export.merge_plan import MergePlan, PlannedTensor
from lora_cli.export.merged_weights import WeightsProof, prove_weights
from lora_cli.files import write_json
from lora_cli.machine_memory import in_gib, peak_bytes, resident_bytes
from lora_cli.models.base_model import config_as_written
from lora_cli.models.find_base import INDEX, WEIGHTS
from lora_cli.models.older_config_names import add_older_names
from lora_cli.models.stored_tensors import DTYPES
from lora_cli.recipe import Recipe
from lora_cli.tasks.contract import Task
from lora_cli.tensorfile import BITS, header_bytes, read_metadata

BYTES_AN_ENTRY = 16  # for the current tensor: W0, s B A and their sum in float32, and W0 as stored


@dataclass
class MemoryUse:
    """The peak memory of a merge, and what it consists of, in bytes."""

    peak: int
    start: int
    adapters: int
    tensor: int
    tensor_name: str

    @property
    def expected(self) -> int:
        """The peak according to the formula."""
        return self.start + self.adapters + self.tensor

    @property
    def in_words(self) -> str:
        """A line for the user."""
        return (
            f"memory: at most {in_gib(self.peak)}; expected {in_gib(self.expected)} = "
            f"{in_gib(self.start)} before + {in_gib(self.adapters)} for the adapter + "
            f"{in_gib(self.tensor)} for the largest tensor that it changes "
            f"(`{self.tensor_name}`, {BYTES_AN_ENTRY} bytes an entry)"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The entry of `merge.json`."""
        formula = f"start + adapters + {BYTES_AN_ENTRY} x entries of the largest adapted tensor"
        return {
            "peak_bytes": self.peak,
            "expected_bytes": self.expected,
            "formula": formula,
            "start_bytes": self.start,
            "adapters_bytes": self.adapters,
            "tensor_bytes": self.tensor,
            "tensor": self.tensor_name,
        }


@torch.no_grad()
def write_merged(plan: MergePlan, task: Task, folder: Path) -> tuple[WeightsProof, MemoryUse]:
    """Write the merged model's configuration, weights and processor, and compare the weights.

    Raises:
        NumericsError: If a merged weight does not fit the dtype of the file.
        IntegrityError: If a written tensor differs from what the source files imply.
    """
    start = resident_bytes()
    _save_config(plan, task.recipe, folder)
    task.save_processor(folder)
    total, places = 0, dict[str, str]()
    for file, tensors in plan.files.items():
        _write_file(folder / file.name, tensors, read_metadata(file), plan.changes)
        places |= {tensor.name: file.name for tensor in tensors}
        total += sum(_size(tensor) for tensor in tensors)
    names = [file.name for file in plan.files]
    if names != [WEIGHTS]:
        _write_index(folder, next(iter(plan.files)).parent / INDEX, places, total)
    origin = (plan.adapters, task.recipe, plan.ties, dict[str, Tensor](), plan.heads)
    proof = prove_weights(folder, plan.model, *origin, in_parts=True)
    return proof, _memory(plan, start)


def _save_config(plan: MergePlan, recipe: Recipe, folder: Path) -> None:
    """Write everything that `save_pretrained` writes except the weights."""
    plan.model.save_pretrained(folder, state_dict={})
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    write_json(config, {**values, "dtype": str(plan.dtype).removeprefix("torch.")})
    add_older_names(folder, config_as_written(recipe))


def _write_file(
    file: Path,
    tensors: Sequence[PlannedTensor],
    metadata: dict[str, str],
    changes: Sequence[AdapterChanges],
) -> None:
    """Write a safetensors file, one tensor after the other."""
    with file.open("wb") as handle:
        handle.write(header_bytes({t.name: (t.dtype, t.shape) for t in tensors}, metadata))
        for planned in tensors:
            for chunk in _bytes_of(planned, changes):
                handle.write(chunk)


def _bytes_of(planned: PlannedTensor, changes: Sequence[AdapterChanges]) -> Iterable[Any]:
    """Return the bytes of a tensor in chunks."""
    relevant = [
        change
        for change in changes
        if any(n in mapping for mapping in _mappings(change) for n in planned.names)
    ]
    if not relevant:
        assert planned.source is not None, f"{planned.name} has no source, and nothing changes it"
        return planned.source.chunks()
    tensor = _merged(planned, relevant).contiguous()
    if not bool(tensor.isfinite().all()):
        raise overflow_error(planned.name, tensor.dtype)
    return [tensor.reshape(-1).view(torch.uint8).numpy().data]


def _mappings(change: AdapterChanges) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return change.adapted, change.trained, change.of_tokens


def _merged(planned: PlannedTensor, changes: Sequence[AdapterChanges]) -> Tensor:
    """Return the merged tensor, in the dtype of the file."""
    dtype = DTYPES[planned.dtype]

    def first(mapping_of: Callable[[AdapterChanges], dict[str, Any]]) -> Any:
        values = (mapping_of(change).get(name) for change in changes for name in planned.names)
        return next((value for value in values if value is not None), None)

    names = (next((n for n in planned.names if n in change.adapted), None) for change in changes)
    updates = [change.adapted[n] for change, n in zip(changes, names, strict=True) if n is not None]
    trained, tokens = first(lambda change: change.trained), first(lambda change: change.of_tokens)
    if trained is not None and not updates:
        full: Tensor = trained if planned.part is None else planned.part.of(trained)
        return full.to(dtype)
    assert planned.source is not None, f"{planned.name} has no source"
    weight = planned.source.read()
    if updates:
        weight = weight.float()
        for update in updates:
            if planned.part is not None:
                weight = update.merged_expert(weight, planned.part, alone=True)
            else:
                weight = update.layer().merged_weight(weight)
        weight = weight.to(dtype)
    if (n_new := planned.shape[0] - weight.shape[0]) and planned.part is None:
        weight = torch.cat([weight, weight.new_zeros(n_new, *weight.shape[1:])])
    if tokens is not None:
        weight = weight.index_copy(0, torch.tensor(tokens.token_ids), tokens.rows.to(dtype))
    return weight


def _write_index(folder: Path, old: Path, places: dict[str, str], total: int) -> None:
    """Write the index of the files' tensors, with the metadata of the base's index."""
    metadata: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        metadata = json.loads(old.read_text(encoding="utf-8")).get("metadata") or {}
    metadata = {**metadata, "total_size": total}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})


def _size(tensor: PlannedTensor) -> int:
    return torch.Size(tensor.shape).numel() * BITS[tensor.dtype] // 8


def _memory(plan: MergePlan, start: int) -> MemoryUse:
    """Return the memory that was used, and the terms of the formula."""
    adapter_bytes = sum(
        tensor.numel() * tensor.element_size()
        for change in plan.adapters
        for tensor in change.saved.tensors.values()
    )
    changed = [
        tensor
        for tensors in plan.files.values()
        for tensor in tensors
        if any(
            name in mapping
            for change in plan.changes
            for mapping in _mappings(change)
            for name in tensor.names
        )
    ]
    largest = max(changed, key=_size, default=None)
    entries = 0 if largest is None else torch.Size(largest.shape).numel()
    name = "" if largest is None else largest.name
    # the proof reads the adapter again
    return MemoryUse(peak_bytes(), start, adapter_bytes, BYTES_AN_ENTRY * entries, name)


def overflow_error(name: str, dtype: torch.dtype) -> NumericsError:
    """Return the error for a weight that is not finite in the dtype in which it is stored."""
    return NumericsError(
        f"`{name}` has entries that {str(dtype).removeprefix('torch.')}, the base "
        "checkpoint's dtype, cannot hold",
        "--base",
        "merge into a copy of the base that is stored in float32",
    )
