"""Merge tensor by tensor, so that a base larger than memory is merged.

Each file of the base is read and written one tensor after the other: what the adapter changes is
computed in float32 and rounded once to the dtype of the file, all else is copied. The files keep
their names, their tensors, dtypes and metadata.

What is not done is to compute outputs: the layers of the model are never together. The tensors that
were written are compared bit by bit instead, as those of every merge are.
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

BYTES_AN_ENTRY = 16  # of the tensor in work: W0, s B A and their sum in float32, and W0 as stored


@dataclass
class MemoryUse:
    """The most memory that merging took, and what it was made of, in bytes."""

    peak: int
    start: int
    adapters: int
    tensor: int
    tensor_name: str

    @property
    def expected(self) -> int:
        """What the formula says."""
        return self.start + self.adapters + self.tensor

    @property
    def in_words(self) -> str:
        """One line for a person."""
        return (
            f"memory: at most {in_gib(self.peak)}; expected {in_gib(self.expected)} = "
            f"{in_gib(self.start)} before + {in_gib(self.adapters)} for the adapter + "
            f"{in_gib(self.tensor)} for the largest tensor that it changes "
            f"(`{self.tensor_name}`, {BYTES_AN_ENTRY} bytes an entry)"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What `merge.json` says of it."""
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
        IntegrityError: If a tensor that was written is not what the files say.
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
    """Write all that `save_pretrained` writes besides the weights."""
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
    """Return the bytes of a tensor, some at a time."""
    own = [one for one in changes if any(n in where for where in _of(one) for n in planned.names)]
    if not own:
        assert planned.source is not None, f"{planned.name} has no source, and nothing changes it"
        return planned.source.chunks()
    tensor = _merged(planned, own).contiguous()
    if not bool(tensor.isfinite().all()):
        raise overflow_error(planned.name, tensor.dtype)
    return [tensor.reshape(-1).view(torch.uint8).numpy().data]


def _of(one: AdapterChanges) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return one.adapted, one.trained, one.of_tokens


def _merged(planned: PlannedTensor, changes: Sequence[AdapterChanges]) -> Tensor:
    """Return a tensor that an adapter changes, in the dtype of the file."""
    dtype = DTYPES[planned.dtype]

    def first(where: Callable[[AdapterChanges], dict[str, Any]]) -> Any:
        found = (where(one).get(name) for one in changes for name in planned.names)
        return next((value for value in found if value is not None), None)

    of_each = (next((n for n in planned.names if n in one.adapted), None) for one in changes)
    updates = [one.adapted[n] for one, n in zip(changes, of_each, strict=True) if n is not None]
    trained, tokens = first(lambda one: one.trained), first(lambda one: one.of_tokens)
    if trained is not None and not updates:
        whole: Tensor = trained if planned.part is None else planned.part.of(trained)
        return whole.to(dtype)
    assert planned.source is not None, f"{planned.name} has no source"
    weight = planned.source.read()
    if updates:
        weight = weight.float()
        for update in updates:
            if planned.part is not None:
                weight = update.of_expert(weight, planned.part, alone=True)
            else:
                weight = update.layer().merged_weight(weight)
        weight = weight.to(dtype)
    if (more := planned.shape[0] - weight.shape[0]) and planned.part is None:
        weight = torch.cat([weight, weight.new_zeros(more, *weight.shape[1:])])
    if tokens is not None:
        weight = weight.index_copy(0, torch.tensor(tokens.token_ids), tokens.rows.to(dtype))
    return weight


def _write_index(folder: Path, old: Path, places: dict[str, str], total: int) -> None:
    """Write which file has which tensor, with what the base's own index says besides."""
    metadata: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        metadata = json.loads(old.read_text(encoding="utf-8")).get("metadata") or {}
    metadata = {**metadata, "total_size": total}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})


def _size(tensor: PlannedTensor) -> int:
    return torch.Size(tensor.shape).numel() * BITS[tensor.dtype] // 8


def _memory(plan: MergePlan, start: int) -> MemoryUse:
    """Return what was used, and what the formula says."""
    of_adapters = sum(
        tensor.numel() * tensor.element_size()
        for one in plan.adapters
        for tensor in one.saved.tensors.values()
    )
    changed = [
        tensor
        for tensors in plan.files.values()
        for tensor in tensors
        if any(name in where for one in plan.changes for where in _of(one) for name in tensor.names)
    ]
    largest = max(changed, key=_size, default=None)
    entries = 0 if largest is None else torch.Size(largest.shape).numel()
    name = "" if largest is None else largest.name
    # the adapter is read again for the proof
    return MemoryUse(peak_bytes(), start, of_adapters, BYTES_AN_ENTRY * entries, name)


def overflow_error(name: str, dtype: torch.dtype) -> NumericsError:
    """Return the error of a weight that is not finite in the dtype that it is kept in."""
    return NumericsError(
        f"`{name}` has entries that {str(dtype).removeprefix('torch.')}, the base "
        "checkpoint's dtype, cannot hold",
        "--base",
        "merge into a copy of the base that is stored in float32",
    )
