"""Merge adapters into their base model, and verify the merged model before publishing it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli import machine_memory
from lora_cli.adapters.attach import lora_layers, remove_layers
from lora_cli.adapters.load_adapter import load_adapter, verify_base, without_copies
from lora_cli.adapters.merge_layers import merge_and_untie
from lora_cli.adapters.merge_proof import ExpectedWeights, expected_weights, weights_of
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder
from lora_cli.adapters.peft_format.other_names import use_names_of
from lora_cli.adapters.peft_format.peft_experts import with_current_names
from lora_cli.adapters.tied_weights import tied_groups
from lora_cli.errors import IntegrityError, LoraError, warn
from lora_cli.evaluation.open_adapter import check_use
from lora_cli.export.adapter_changes import WeightedAdapter
from lora_cli.export.adapter_task import adapter_task
from lora_cli.export.combine import sum_of_adapters
from lora_cli.export.merge_card import write_origin
from lora_cli.export.merge_in_pieces import MemoryUse, overflow_error, write_merged
from lora_cli.export.merge_plan import NeedsWholeModelError, plan_merge
from lora_cli.export.merge_quantized import (
    BASES,
    Candidate,
    better_candidate,
    in_words,
    measure_trained,
    metric_of,
    use_weights,
)
from lora_cli.export.merged_weights import WeightsProof, prove_weights
from lora_cli.export.target_folder import locked_target
from lora_cli.files import new_folder
from lora_cli.machine_memory import GIB, in_gib
from lora_cli.models.base_model import config_as_written
from lora_cli.models.bundle import Bundle
from lora_cli.models.find_base import checkpoint_files
from lora_cli.models.fingerprint import Fingerprint, fingerprint_of
from lora_cli.models.older_config_names import add_older_names
from lora_cli.recipe import Recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.finite_scores import require_finite
from lora_cli.tensorfile import read_header

TOLERANCE = 1e-4  # of the largest output, in float32; rounding alone stays below 1e-5
ROOM = GIB // 2  # for intermediate results


@dataclass
class MergeResult:
    """The result of `lora merge`."""

    folder: Path
    merged_modules: int
    dtype: torch.dtype
    difference: float | None
    """The largest difference of an output between base + adapter and the merged model, in float32;
    None if the model was merged tensor by tensor."""
    rounding: float | None
    """The largest difference of an output that storing the weights in `dtype` causes."""
    untied: list[str]
    verified: bool
    weights: WeightsProof
    """How the written files compare with those of base and adapter."""
    choice: list[str] = field(default_factory=list)
    """For a quantised base: how the candidates compare, a line each."""
    memory: MemoryUse | None = None
    """The memory that a tensor-by-tensor merge took."""
    reason: str = ""
    """Why the model was merged tensor by tensor, without comparing outputs."""


def merge_adapter(
    base: str | None,
    adapter: Path | Sequence[Path],
    to: Path,
    recipe_file: Path | None = None,
    overrides: list[str] | None = None,
    *,
    weights: Sequence[float] | None = None,
    head: Path | None = None,
    low_memory: bool = False,
) -> MergeResult:
    """Write the merged model, and `merge.json` with its origin.

    Args:
        base: Hub id or folder of the base model; None for the base that the adapter's recipe or
            PEFT configuration names.
        adapter: The folder of the adapter, or those of several adapters whose updates are added.
            The recipe and the tokenizer are those of the first.
        to: The folder to create; it must not exist, or be empty.
        recipe_file: A recipe for an adapter that another tool made.
        overrides: `key=value` strings that override keys of the recipe.
        weights: The factor of each adapter's update; None for 1.
        head: The adapter whose modules trained in full are used, if they differ.
        low_memory: Merge tensor by tensor even if the model fits into memory.

    Raises:
        LoraError: If the adapter is a full model, or `to` is not empty.
        IntegrityError: If the base is not the adapter's, or the merged model is not equal to
            base + adapter.
        NumericsError: If a merged weight does not fit the base checkpoint's dtype.
    """
    folders = [adapter] if isinstance(adapter, Path) else list(adapter)
    with locked_target(to):
        task, saved = adapter_task(folders[0], recipe_file, base, overrides)
        inputs = _Inputs(saved, [WeightedAdapter(saved)])
        if len(folders) > 1 or any(weight != 1 for weight in weights or ()):
            joint, each = sum_of_adapters(folders, weights or [1.0] * len(folders), head)
            inputs = _Inputs(joint, each, head)
        task.trained_in = folders[0]
        task.load_processor()
        check_use(folders[0], task)
        reason = _reason_for_pieces(task.recipe, low_memory)
        if reason:
            try:
                return _merge_in_pieces(task, inputs, to, reason)
            except NeedsWholeModelError as error:
                _warn_of_memory(str(error), reason, low_memory)
        return _merge(task, inputs, to)


@dataclass
class _Inputs:
    """The adapters to merge.

    Args:
        joint: One adapter equal to the sum of all; a single adapter itself.
        each: The adapters.
        head: The adapter whose modules trained in full are used, if the user named one.
    """

    joint: AdapterFolder
    each: list[WeightedAdapter]
    head: Path | None = None


def _merge(task: Task, inputs: _Inputs, to: Path) -> MergeResult:
    """Merge a model that fits into memory."""
    if task.recipe.model.quantization is None:
        return _write(_merged(task, inputs), task, inputs, to)
    trained = measure_trained(task, inputs.joint)
    plain = _without_quantization(task)
    candidates = []
    for name in BASES:
        merged = _merged(plain, inputs, trained.weights if name == "dequantised" else {})
        distance = _difference(merged.outputs.float(), reference=trained.outputs.float())
        value = metric_of(trained, plain, merged.model)
        candidates.append(Candidate(name, distance, value))
    chosen = better_candidate(candidates, trained)
    if chosen.base != BASES[-1]:  # merge again: keeping both models would take twice the memory
        merged = _merged(plain, inputs, trained.weights)
    result = _write(merged, plain, inputs, to)
    result.choice = in_words(candidates, chosen, trained)
    return result


def _without_quantization(task: Task) -> Task:
    """Return the same task on the base in full precision."""
    plain = build_task(task.recipe.with_values({"model.quantization": None}), task.learned)
    plain.trained_in = task.trained_in
    plain.load_processor()
    return plain


# -------------------------------------------------------------------------------- tensor by tensor


def _reason_for_pieces(recipe: Recipe, low_memory: bool) -> str:
    """Return why a base is merged tensor by tensor; empty if the whole model fits into memory."""
    if low_memory:
        return "`--low-memory` merges tensor by tensor"
    needed = 0
    with suppress(LoraError):  # it has several parts, or loading will report the error
        needed = _bytes_in_memory(checkpoint_files(recipe))
    available = machine_memory.available_bytes()
    if needed <= available:
        return ""
    return (
        f"the model in float32 would take {in_gib(needed)}, and {in_gib(available)} are available"
    )


def _bytes_in_memory(files: list[Path]) -> int:
    """Return the memory for merging a whole model: in float32 and as stored, plus `ROOM`."""
    entries = [entry for file in files for entry in read_header(file).values()]
    in_float32 = 4 * sum(math.prod(entry.shape) for entry in entries)
    return in_float32 + sum(entry.end - entry.start for entry in entries) + ROOM


def _merge_in_pieces(task: Task, inputs: _Inputs, to: Path, reason: str) -> MergeResult:
    """Merge tensor by tensor.

    Raises:
        NeedsWholeModelError: If that is impossible with this base.
    """
    choice = []
    if task.recipe.model.quantization is not None:
        task = _without_quantization(task)
        choice.append(
            "merged into the original base, not the dequantised one: which of the two is better "
            "can only be measured with the model in memory"
        )
    plan = plan_merge(task, inputs.each)
    with new_folder(to) as folder:
        weights, memory = write_merged(plan, task, folder)
        proof = {"outputs": {"not_compared": reason}, "weights": weights.facts}
        write_origin(
            folder,
            inputs.each,
            plan.base,
            task.recipe,
            inputs.head,
            proof,
            {"memory": memory.facts},
        )
    facts = (plan.untied, inputs.joint.verified, weights, choice, memory, reason)
    return MergeResult(to, plan.count, plan.dtype, None, None, *facts)


def _warn_of_memory(cause: str, reason: str, low_memory: bool) -> None:
    """Warn that a base has to be loaded as a whole, and may not fit into memory.

    Raises:
        LoraError: If the user asked for a low-memory merge.
    """
    if low_memory:
        what = f"this base cannot be merged tensor by tensor: {cause}"
        raise LoraError(what, "--low-memory", "leave it out: the whole model is loaded then")
    warn(f"{reason}; it is loaded as a whole all the same, since {cause}")


# ---------------------------------------------------------------------------- whole model in memory


@dataclass
class _Merged:
    """A merged model in the dtype of its base's checkpoint, with the results of its checks."""

    model: PreTrainedModel | Bundle
    base: Fingerprint | None
    count: int
    dtype: torch.dtype
    difference: float
    untied: list[str]
    ties: list[list[str]]  # names that shared a parameter in the base
    dequantised: dict[str, Tensor]  # dequantised weights that replaced those of the base
    heads: list[str]  # names of the modules that the task adds
    exact: Tensor  # outputs before the weights were rounded to `dtype`
    outputs: Tensor
    weights: ExpectedWeights


def _merged(task: Task, inputs: _Inputs, dequantised: dict[str, Tensor] | None = None) -> _Merged:
    """Merge a whole model, and check that it is equal to base + adapter.

    Args:
        task: Its recipe names the base.
        inputs: The adapters.
        dequantised: Dequantised weights by module that replace those of the base.
    """
    model, new = task.load_model(torch.device("cpu"), dtype="auto")
    assert isinstance(model, PreTrainedModel | Bundle)
    base = fingerprint_of(task.recipe, model, new)
    for adapter in inputs.each:
        base = verify_base(adapter.saved, base, task.recipe)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    stored = {name: tensor.dtype for name, tensor in _tensors(model)}
    model, ties, dequantised = model.float().eval(), tied_groups(model), dequantised or {}
    use_weights(model, dequantised)
    for saved in {
        id(s): s for s in (inputs.joint, *(adapter.saved for adapter in inputs.each))
    }.values():
        use_names_of(model, saved)
    joint = with_current_names(inputs.joint, model)
    try:
        expected = expected_weights(model, joint.tensors, joint.config)
    except RuntimeError:  # the shapes do not fit this base: loading reports them
        load_adapter(model, joint, new, drawn=task.drawn)
        raise
    load_adapter(model, joint, new, drawn=task.drawn)
    with torch.no_grad():
        before = _outputs(task, model)
        require_finite(before, model, at="--adapter")
        count = len(lora_layers(model))
        untied = _merge_all(model, inputs, ties, new, task)
        if name := expected.disagreement(model):
            raise IntegrityError(
                f"merged, `{name}` is not what the adapter's file says",
                "--adapter",
                "please report this: merging should be exact",
            )
        after = _outputs(task, model)
        _reject_overflow(model, stored)
        difference = _difference(after, reference=before)
        if not difference <= TOLERANCE:
            raise IntegrityError(
                f"merged, the model's outputs differ by {difference:.2e} of the largest",
                "--adapter",
                "please report this: merging should be exact",
            )
        for name, tensor in _tensors(model):  # not `model.to`: buffers have dtypes of their own
            tensor.data = tensor.data.to(stored[name])
        rounded, weights = _outputs(task, model), weights_of(model)
    facts = (model, base, count, dtype, difference, untied, ties, dequantised, new)
    return _Merged(*facts, after, rounded, weights)


def _merge_all(
    model: PreTrainedModel | Bundle,
    inputs: _Inputs,
    ties: list[list[str]],
    new: list[str],
    task: Task,
) -> list[str]:
    """Merge the attached adapter, or each of several; return the modules that became untied.

    Several adapters are merged one after the other, although an equal joint adapter is attached:
    so the compared outputs have been computed in two ways.
    """
    if inputs.each[0].saved is inputs.joint:
        return merge_and_untie(model, ties)
    remove_layers(model)
    untied: list[str] = []
    adapters = [without_copies(model, adapter.saved) for adapter in inputs.each]
    for adapter, saved in zip(inputs.each, adapters, strict=True):
        load_adapter(model, saved, new, drawn=task.drawn)
        for layer in lora_layers(model).values():
            layer.scaling *= adapter.weight
        untied += [name for name in merge_and_untie(model, ties) if name not in untied]
    return untied


def _write(merged: _Merged, task: Task, inputs: _Inputs, to: Path) -> MergeResult:
    """Write a merged model into a folder, and reload it to compare."""
    with new_folder(to) as folder:
        merged.model.save_pretrained(folder)
        if isinstance(merged.model, PreTrainedModel):
            add_older_names(folder, config_as_written(task.recipe))
        task.save_processor(folder)
        reloaded = task.reloaded(folder, merged.dtype).eval()
        _match_requires_grad(reloaded, like=merged.model)
        _require_saved(task, reloaded, merged.weights, merged.outputs)
        origin = (inputs.each, task.recipe, merged.ties, merged.dequantised, merged.heads)
        weights = prove_weights(folder, merged.model, *origin)
        rounding = _difference(merged.outputs.float(), reference=merged.exact)
        proof: dict[str, Any] = {"outputs": {"difference": merged.difference, "rounding": rounding}}
        proof["weights"] = weights.facts
        write_origin(folder, inputs.each, merged.base, task.recipe, inputs.head, proof)
    facts = (merged.count, merged.dtype, merged.difference, rounding, merged.untied)
    return MergeResult(to, *facts, inputs.joint.verified, weights)


def _outputs(task: Task, model: nn.Module) -> Tensor:
    """Return the outputs on the task's probe, whose floats are cast to the model's dtype."""
    # torch uses other kernels for weights that require gradients, even under no_grad
    model.requires_grad_(False)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    probe = {k: v.to(dtype) if v.is_floating_point() else v for k, v in task.probe().items()}
    return task.probed(model, probe)


def _match_requires_grad(reloaded: nn.Module, *, like: nn.Module) -> None:
    """Set `requires_grad` of the reloaded parameters as in the merged model.

    Torch uses other kernels for matrices that require gradients, even under no_grad, so the last
    bit of an output may differ.
    """
    trained = {name for name, parameter in like.named_parameters() if parameter.requires_grad}
    for name, parameter in reloaded.named_parameters():
        parameter.requires_grad_(name in trained)


def _require_saved(
    task: Task, reloaded: nn.Module, weights: ExpectedWeights, outputs: Tensor
) -> None:
    """Reject a saved model whose weights or outputs differ from the merged model."""
    with torch.no_grad():
        same = torch.equal(_outputs(task, reloaded), outputs)
    if not same or weights.disagreement(reloaded) is not None:
        what = "the saved model does not compute what the merged one did"
        raise IntegrityError(what, "--to", "please report this: saving should be exact")


def _difference(outputs: Tensor, *, reference: Tensor) -> float:
    """Return the largest difference, relative to the reference's largest entry or to 1."""
    return float((outputs - reference).abs().max() / reference.abs().max().clamp(min=1.0))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer, a shared one under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _reject_overflow(model: nn.Module, stored: dict[str, torch.dtype]) -> None:
    """Reject a weight that is not finite in the dtype in which it is stored."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.to(stored[name]).isfinite().all()):
            raise overflow_error(name, stored[name])
