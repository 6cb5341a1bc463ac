"""Plan a tensor-by-tensor merge: which tensors are written, before any is read or written.

The model is built without weights, for its names, shapes and ties. Each tensor to write comes from
the base's files, possibly under another name (if a tie ends), or only from the adapter (a head).
Not every base can be merged this way: `NeedsWholeModelError` is raised if a tensor can only be
determined by loading the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lora_cli.adapters.attach import lora_layers
from lora_cli.adapters.load_adapter import load_adapter, verify_base
from lora_cli.adapters.merge_layers import merge_and_untie
from lora_cli.adapters.peft_format.other_names import use_names_of
from lora_cli.adapters.peft_format.peft_experts import with_current_names
from lora_cli.adapters.peft_format.saved_buffers import without_buffers
from lora_cli.adapters.tied_weights import tied_groups
from lora_cli.errors import IntegrityError
from lora_cli.export.adapter_changes import AdapterChanges, WeightedAdapter, changes_of
from lora_cli.export.merged_weights import label_rows
from lora_cli.models.base_model import load_config, new_modules
from lora_cli.models.checkpoint_names import CheckpointNames
from lora_cli.models.find_base import checkpoint_files, source_of
from lora_cli.models.fingerprint import Fingerprint, fingerprint_of
from lora_cli.models.stored_tensors import DTYPES, FLOATS, ExpertPart, Stored
from lora_cli.tasks.contract import Task
from lora_cli.tensorfile import BITS, read_header


class NeedsWholeModelError(Exception):
    """The base cannot be merged tensor by tensor. The message, a clause, says why."""


@dataclass
class PlannedTensor:
    """A tensor to write.

    Args:
        name: Its name in the file.
        dtype: Its dtype, as safetensors names it.
        shape: Its shape.
        source: The base's tensor; None if only the adapter has it.
        names: The model's names of the parameter; empty for a tensor that is copied unchanged.
        part: The part of the parameter, if the tensor belongs to one expert.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Stored | None
    names: list[str] = field(default_factory=list)
    part: ExpertPart | None = None


@dataclass
class MergePlan:
    """The tensors to write, and their sources, none of which has been read yet.

    Args:
        model: The merged model on the meta device.
        adapters: The adapters to merge into the base.
        base: The fingerprint of the base.
        ties: Groups of names that shared a parameter in the base.
        untied: Names of the modules that no longer share their weight.
        heads: Names of the modules that the task adds.
        count: The number of merged modules.
        changes: The parameters that each adapter changes.
        files: The tensors to write by the base's file.
        dtype: The dtype of the weights according to the configuration.
    """

    model: PreTrainedModel
    adapters: Sequence[WeightedAdapter]
    base: Fingerprint | None
    ties: list[list[str]]
    untied: list[str]
    heads: list[str]
    count: int
    changes: list[AdapterChanges]
    files: dict[Path, list[PlannedTensor]]
    dtype: torch.dtype


def plan_merge(task: Task, adapters: Sequence[WeightedAdapter]) -> MergePlan:
    """Check base and adapters, and plan which tensors are written.

    Args:
        task: A task with its processor loaded; its recipe names the base.
        adapters: The adapters; their tensors are renamed to the model's names.

    Raises:
        NeedsWholeModelError: If this base or this adapter requires loading the whole model.
        IntegrityError: If the base is not the adapter's, or a tensor does not fit.
    """
    model, _ = task.empty_model()
    if not isinstance(model, PreTrainedModel):
        raise NeedsWholeModelError("the base has several parts")
    files = checkpoint_files(task.recipe)
    if not files:
        raise NeedsWholeModelError("the base has no safetensors files")
    _complete_config(task, model)
    stored = _StoredParameters(files, model)
    missing = stored.missing(bool(task.recipe.model.add_tokens))
    for names in tied_groups(model):
        tied = [stored.by_name[name] for name in names if name in stored.by_name]
        if not all(tied[0].same_bytes(adapter) for adapter in tied[1:]):  # they are loaded untied
            what = f"its files have several values of `{names[0]}` and what shares it"
            raise NeedsWholeModelError(what)
    heads = new_modules(model, missing) if task.has_head else []
    head_prefixes = tuple(f"{head}." for head in heads)
    if absent := [name for name in missing if not name.startswith(head_prefixes)]:
        what = f"its checkpoint has no tensor of its own for `{absent[0]}`"
        raise NeedsWholeModelError(what)
    task.drawn = frozenset(missing)
    fingerprint = fingerprint_of(task.recipe, model, heads)
    for adapter in adapters:
        fingerprint = verify_base(adapter.saved, fingerprint, task.recipe)
    ties, count, untied = tied_groups(model), 0, []
    for adapter in adapters:
        use_names_of(model, adapter.saved)
        if len(without_buffers(adapter.saved.tensors, model)) < len(adapter.saved.tensors):
            raise NeedsWholeModelError("the adapter's buffers have to be compared with the base's")
        load_adapter(model, with_current_names(adapter.saved, model), heads, drawn=task.drawn)
        count = max(count, len(lora_layers(model)))
        untied += [name for name in merge_and_untie(model, ties) if name not in untied]
    changes = [changes_of(adapter, model) for adapter in adapters]
    stored.update_groups()
    planner = _Planner(task, model, stored, ties, changes, heads)
    facts = (fingerprint, ties, untied, heads, count, changes)
    planned = planner.planned()
    _require_complete(model, stored.names, planned)
    return MergePlan(model, adapters, *facts, planned, planner.dtype)


def _require_complete(
    model: PreTrainedModel, names: CheckpointNames, planned: dict[Path, list[PlannedTensor]]
) -> None:
    """Reject a plan that leaves parameters of the loaded model without a tensor in the files.

    The ties of the loaded model follow from its configuration, not from earlier ties.
    """
    places = (
        names.find(tensor.name, tensor.shape) for tensors in planned.values() for tensor in tensors
    )
    written = {place.part.parameter if place.part else place.name for place in places}
    with torch.device("meta"):
        loaded = type(model)(model.config)
    shared = [name for group in tied_groups(loaded) for name in group]
    unshared = (n for n, _ in loaded.named_parameters(remove_duplicate=False) if n not in shared)
    for group in [*tied_groups(loaded), *([name] for name in unshared)]:
        if written.isdisjoint(group):
            raise NeedsWholeModelError(f"no file would have `{group[0]}`")


def _complete_config(task: Task, model: PreTrainedModel) -> None:
    """Complete a model built from its configuration as loading it would."""
    if model.can_generate():
        source = source_of(task.recipe)
        with suppress(OSError):  # there is none
            model.generation_config = GenerationConfig.from_pretrained(
                source["pretrained_model_name_or_path"], revision=source["revision"]
            )
    task.adjust_config(model)


class _StoredParameters:
    """Locates the parameters of a model in the files of its checkpoint."""

    def __init__(self, files: Iterable[Path], model: nn.Module) -> None:
        self.model, self.names = model, CheckpointNames(model)
        self.tensors = {
            file: [Stored(file, name, entry) for name, entry in read_header(file).items()]
            for file in files
        }
        self.by_name: dict[str, Stored] = {}
        self.rows: dict[str, int] = {}  # the number of rows of parameters that are stored in parts
        for tensor in (t for of_file in self.tensors.values() for t in of_file):
            place = self.names.find(tensor.name, tensor.entry.shape)
            if place.name is not None:
                self.by_name[place.name] = tensor
            if place.part is not None:
                name = place.part.parameter
                self.rows[name] = self.rows.get(name, 0) + tensor.entry.shape[0]
        self.update_groups()

    def update_groups(self) -> None:
        """Update which names share a parameter."""
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        sharers: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            sharers.setdefault(id(parameter), []).append(name)
        self.groups = list(sharers.values())
        self.group_of = {name: group for group in self.groups for name in group}

    def is_in_parts(self, name: str) -> bool:
        """Return whether the files hold all parts of a parameter."""
        return self.rows.get(name) == self.parameters[name].shape[:2].numel()

    def missing(self, may_grow: bool) -> list[str]:
        """Return the parameters that the files lack, or hold in a different shape.

        Args:
            may_grow: Whether a matrix may have more rows in the model, for new tokens.
        """
        missing = []
        for group in self.groups:
            shape = tuple(self.parameters[group[0]].shape)
            stored = [self.by_name[name].entry.shape for name in group if name in self.by_name]
            fits = any(
                s == shape or (may_grow and s[1:] == shape[1:] and s[0] < shape[0]) for s in stored
            )
            if not fits and not any(self.is_in_parts(name) for name in group):
                missing.append(group[0])
        return missing


class _Planner:
    """Plans the tensor to write for each tensor of a checkpoint."""

    def __init__(
        self,
        task: Task,
        model: PreTrainedModel,
        stored: _StoredParameters,
        ties: list[list[str]],
        changes: Sequence[AdapterChanges],
        heads: list[str],
    ) -> None:
        self.task, self.model, self.stored, self.changes = task, model, stored, changes
        self.tied = {name: group for group in ties for name in group}
        self.buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
        self.heads = tuple(f"{head}." for head in heads)
        base = load_config(task.recipe)
        # if the architecture changes, as from a language model to a classifier, the model's own
        # names are used, and tensors that only the base has are left out
        self.same_kind = type(model).__name__ in (base.architectures or [])
        floats = (t.entry.dtype for t in stored.by_name.values() if t.entry.dtype in FLOATS)
        self.stored_dtype = next(floats, "F32")
        dtype = getattr(base, "dtype", None) or DTYPES[self.stored_dtype]
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.head_rows = label_rows(model, task.recipe)
        self.changed = {
            name
            for change in changes
            for names in (change.adapted, change.trained, change.of_tokens)
            for name in names
        }

    def planned(self) -> dict[Path, list[PlannedTensor]]:
        """Return the tensors to write by the base's file."""
        files: dict[Path, list[PlannedTensor]] = {}
        for file, tensors in self.stored.tensors.items():
            planned = [self._planned(tensor) for tensor in tensors]
            files[file] = [tensor for tensor in planned if tensor is not None]
        written = {n for tensors in files.values() for t in tensors for n in t.names}
        last = files[list(files)[-1]]
        for group in self.stored.groups:
            if written.isdisjoint(group) and not any(map(self.stored.is_in_parts, group)):
                last.append(self._added(group))
        for file_tensors in files.values():  # so that each is aligned to its entries' size
            file_tensors.sort(key=lambda tensor: -BITS[tensor.dtype])
        self._check_frozen()
        return files

    def _planned(self, source: Stored) -> PlannedTensor | None:
        entry = source.entry
        place = self.stored.names.find(source.name, entry.shape)
        name = place.part.parameter if place.part else place.name
        if name is None or name not in self.stored.group_of:  # unknown, or a buffer
            shape = self.buffers.get(name or source.name, entry.shape)
            if shape != entry.shape:  # BART's vocabulary bias, if tokens were added
                raise NeedsWholeModelError(f"`{source.name}` gets entries that no file has")
            kept_name = source.name if self.same_kind else name
            if kept_name is None:
                return None
            return PlannedTensor(kept_name, entry.dtype, entry.shape, source)
        group = self.stored.group_of[name]
        shape = tuple(self.stored.parameters[name].shape) if place.part is None else entry.shape
        if place.part is None and place.name is not None:
            tensor_name = source.name if self.same_kind else place.name
        else:
            tensor_name = source.name
        planned = PlannedTensor(tensor_name, entry.dtype, shape, source, group, place.part)
        self._require_simple(planned)
        return planned

    def _require_simple(self, planned: PlannedTensor) -> None:
        """Reject tensors that can only be determined by loading the model."""
        source, name = planned.source, planned.names[0]
        assert source is not None
        changed = not self.changed.isdisjoint(planned.names)
        in_full = any(n in change.trained for change in self.changes for n in planned.names)
        if changed and planned.dtype not in FLOATS:
            raise NeedsWholeModelError(f"`{name}` is stored as {planned.dtype}")
        if in_full:
            return
        if self.head_rows and name.startswith(self.heads):
            raise NeedsWholeModelError("the outputs of its head are put into another order")
        if source.entry.shape != planned.shape:
            rows = range(source.entry.shape[0], planned.shape[0])
            ids = {
                i
                for change in self.changes
                for n in planned.names
                if n in change.of_tokens
                for i in change.of_tokens[n].token_ids
            }
            if not ids.issuperset(rows):
                raise NeedsWholeModelError(f"`{name}` gets rows that no file has")

    def _added(self, group: list[str]) -> PlannedTensor:
        """Plan a parameter that has no tensor of its own in the base's files."""
        sharers = [other for name in group for other in self.tied.get(name, [])]
        source = next((self.stored.by_name[n] for n in sharers if n in self.stored.by_name), None)
        trained = any(name in change.trained for change in self.changes for name in group)
        assert source is not None or trained, f"{group[0]} is in no file, and loading missed it"
        shape = tuple(self.stored.parameters[group[0]].shape)
        if source is not None:
            planned = PlannedTensor(group[0], source.entry.dtype, shape, source, group)
            self._require_simple(planned)
            return planned
        return PlannedTensor(group[0], self.stored_dtype, shape, None, group)

    def _check_frozen(self) -> None:
        """Reject an adapter whose copies of base weights differ from this base's."""
        for change in self.changes:
            for name, tensor in change.frozen.items():
                group = [name, *self.tied.get(name, [])]
                source = next(
                    (self.stored.by_name[n] for n in group if n in self.stored.by_name), None
                )
                if source is None:
                    continue
                of_base = source.read()
                coarser = min(of_base.dtype, tensor.dtype, key=lambda dtype: dtype.itemsize)
                if not torch.equal(of_base.to(coarser), tensor.to(coarser)):
                    what = f"`{name}` of the base is not the one it was trained on"
                    hint = "is this the base model that the adapter was trained on?"
                    raise IntegrityError(what, "--adapter", hint)
