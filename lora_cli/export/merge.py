"""Base + adapter -> a stand-alone model folder, proved equal before it is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli import __version__
from lora_cli.adapters.attach import lora_layers, merge
from lora_cli.adapters.find_adapter import shown_name
from lora_cli.adapters.load_adapter import load_adapter, verify_base
from lora_cli.adapters.merge_proof import ExpectedWeights, expected_weights, weights_of
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder, read_adapter
from lora_cli.adapters.peft_format.other_names import use_names_of
from lora_cli.adapters.peft_format.peft_experts import with_current_names
from lora_cli.adapters.tied_weights import separate, tied_groups
from lora_cli.errors import IntegrityError, LoraError, NumericsError
from lora_cli.evaluation.open_adapter import check_use
from lora_cli.export.merge_quantized import (
    BASES,
    Candidate,
    better,
    in_words,
    measured,
    use_numbers,
    what_was_trained,
)
from lora_cli.export.merged_weights import WeightsProof, prove_weights
from lora_cli.export.target_folder import locked_target
from lora_cli.files import new_folder, write_json
from lora_cli.models.base_facts import read_tokenizer
from lora_cli.models.base_model import load_tokenizer
from lora_cli.models.bundle import Bundle
from lora_cli.models.fingerprint import Fingerprint, fingerprint_of
from lora_cli.recipe import (
    RECIPE_FILE,
    TASKS,
    Recipe,
    load_adapter_recipe,
    load_recipe,
)
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.finite_scores import require_finite

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
TOLERANCE = 1e-4  # of the largest output, in float32; rounding alone stays below 1e-5


@dataclass
class MergeResult:
    """What `lora merge` reports."""

    folder: Path
    merged_modules: int
    dtype: torch.dtype
    difference: float
    """Largest difference of an output between base + adapter and merged, both in float32."""
    rounding: float
    """Largest difference that storing the weights in `dtype` makes."""
    untied: list[str]
    verified: bool
    weights: WeightsProof
    """How the files that were written compare with those of base and adapter."""
    choice: list[str] = field(default_factory=list)
    """Of a quantised base: how the models compare that it could be merged into."""


def merge_adapter(
    base: str | None,
    adapter: Path,
    to: Path,
    recipe_file: Path | None = None,
    overrides: list[str] | None = None,
) -> MergeResult:
    """Write the merged model, and `merge.json`, which says what it was merged from.

    Args:
        base: Hub id or folder of the base model. None: the one that the adapter's recipe or PEFT
            configuration names.
        adapter: Folder of the adapter.
        to: Folder that is made; it must not exist, or be empty.
        recipe_file: Recipe of an adapter that another tool made.
        overrides: `key=value` each, over keys of the recipe.

    Raises:
        LoraError: If the adapter is a full model, or `to` holds something.
        IntegrityError: If the base is not the adapter's, or the merged model is not equal to
            base + adapter.
        NumericsError: If a merged weight does not fit the base checkpoint's dtype.
    """
    with locked_target(to):
        return _merge(base, adapter, to, recipe_file, overrides)


def _merge(
    base: str | None,
    adapter: Path,
    to: Path,
    recipe_file: Path | None,
    overrides: list[str] | None,
) -> MergeResult:
    """Merge, once the folder is ours."""
    task, saved = adapter_task(adapter, recipe_file, base, overrides)
    task.trained_in = adapter
    task.load_processor()
    check_use(adapter, task)
    if task.recipe.model.quantization is None:
        return _write(_merged(task, saved), task, saved, to)
    trained = what_was_trained(task, saved)
    plain = build_task(task.recipe.with_values({"model.quantization": None}), task.learned)
    plain.trained_in = adapter
    plain.load_processor()
    candidates = []
    for name in BASES:
        merged = _merged(plain, saved, trained.weights if name == "dequantised" else {})
        distance = _difference(merged.outputs.float(), trained.outputs.float())
        value = measured(trained, plain, merged.model)
        candidates.append(Candidate(name, distance, value))
    chosen = better(candidates, trained)
    if chosen.base != BASES[-1]:  # two merged models at once would need twice the memory
        merged = _merged(plain, saved, trained.weights)
    result = _write(merged, plain, saved, to)
    result.choice = in_words(candidates, chosen, trained)
    return result


@dataclass
class _Merged:
    """A merged model in the dtype of its base's checkpoint, and what has been proved of it."""

    model: PreTrainedModel | Bundle
    base: Fingerprint | None
    count: int
    dtype: torch.dtype
    difference: float
    untied: list[str]
    ties: list[list[str]]  # names that shared a parameter in the base
    numbers: dict[str, Tensor]  # weights that some modules of the base got before
    heads: list[str]  # names of the modules that the task adds
    exact: Tensor  # outputs before its weights were stored in `dtype`
    outputs: Tensor
    weights: ExpectedWeights


def _merged(task: Task, saved: AdapterFolder, numbers: dict[str, Tensor] | None = None) -> _Merged:
    """Return the merged model, proved equal to base + adapter.

    Args:
        task: Its recipe says which base.
        saved: The adapter.
        numbers: Weights that some modules of the base get before.
    """
    model, new = task.load_model(torch.device("cpu"), dtype="auto")
    assert isinstance(model, PreTrainedModel | Bundle)
    verified_base = verify_base(saved, fingerprint_of(task.recipe, model, new), task.recipe)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    stored = {name: tensor.dtype for name, tensor in _tensors(model)}
    model, ties, numbers = model.float().eval(), tied_groups(model), numbers or {}
    use_numbers(model, numbers)
    use_names_of(model, saved)
    saved = with_current_names(saved, model)
    expected = expected_weights(model, saved.tensors, saved.config)
    load_adapter(model, saved, new, drawn=task.drawn)
    with torch.no_grad():
        before = _outputs(task, model)
        require_finite(before, model, at="--adapter")
        count = len(lora_layers(model))
        untied = _merge_apart(model, ties)
        if name := expected.disagreement(model):
            raise IntegrityError(
                f"merged, `{name}` is not what the adapter's file says",
                "--adapter",
                "please report this: merging should be exact",
            )
        after = _outputs(task, model)
        _reject_overflow(model, stored)
        difference = _difference(after, before)
        if not difference <= TOLERANCE:
            raise IntegrityError(
                f"merged, the model's outputs differ by {difference:.2e} of the largest",
                "--adapter",
                "please report this: merging should be exact",
            )
        for name, tensor in _tensors(model):  # not `model.to`: buffers have dtypes of their own
            tensor.data = tensor.data.to(stored[name])
        rounded, weights = _outputs(task, model), weights_of(model)
    facts = (model, verified_base, count, dtype, difference, untied, ties, numbers, new)
    return _Merged(*facts, after, rounded, weights)


def _write(merged: _Merged, task: Task, saved: AdapterFolder, to: Path) -> MergeResult:
    """Write a merged model into a folder, and read it again to compare."""
    with new_folder(to) as folder:
        merged.model.save_pretrained(folder)
        task.save_processor(folder)
        reloaded = task.reloaded(folder, merged.dtype).eval()
        _require_saved(task, reloaded, merged.weights, merged.outputs)
        origin = (saved, task.recipe, merged.ties, merged.numbers, merged.heads)
        weights = prove_weights(folder, merged.model, *origin)
        rounding = _difference(merged.outputs.float(), merged.exact)
        proof = {"outputs": {"difference": merged.difference, "rounding": rounding}}
        _write_origin(folder, saved.path, merged.base, proof | {"weights": weights.facts})
    facts = (merged.count, merged.dtype, merged.difference, rounding, merged.untied)
    return MergeResult(to, *facts, saved.verified, weights)


def _outputs(task: Task, model: nn.Module) -> Tensor:
    """Return what a model makes of the task's probe, whose numbers get the model's dtype."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    probe = {k: v.to(dtype) if v.is_floating_point() else v for k, v in task.probe().items()}
    return task.probed(model, probe)


def _merge_apart(model: PreTrainedModel | Bundle, ties: list[list[str]]) -> list[str]:
    """Merge, and give each side of a tie that was parted a weight of its own; return their names.

    The sides may have been parted by the low-rank update of one, or by a copy that was trained.
    """
    untied = merge(model)
    parted = [name.rpartition(".")[0] for name in separate(model, ties)]
    untied += [name for name in dict.fromkeys(parted) if name not in untied]
    for name in untied:
        part = model.parts[name.partition(".")[0]] if isinstance(model, Bundle) else model
        config: Any = part.config
        config.tie_word_embeddings = False
    return untied


def _require_saved(
    task: Task, reloaded: nn.Module, weights: ExpectedWeights, outputs: Tensor
) -> None:
    """Reject a saved model that is not the merged one, in a weight or in what it computes."""
    with torch.no_grad():
        same = torch.equal(_outputs(task, reloaded), outputs)
    if not same or weights.disagreement(reloaded) is not None:
        what = "the saved model does not compute what the merged one did"
        raise IntegrityError(what, "--to", "please report this: saving should be exact")


def adapter_task(
    adapter: Path,
    recipe_file: Path | None = None,
    base: str | None = None,
    overrides: list[str] | None = None,
) -> tuple[Task, AdapterFolder]:
    """Return the task that an adapter was trained for, and the adapter.

    The recipe is the one beside the adapter, or `recipe_file`, or follows from PEFT's
    configuration.
    """
    recipe = None
    if recipe_file is not None:
        recipe = load_recipe(recipe_file, overrides or [])
    elif (adapter / RECIPE_FILE).is_file():
        recipe = load_adapter_recipe(adapter, overrides or [])
    elif overrides:
        raise LoraError(
            f"{adapter} holds no {RECIPE_FILE} whose keys could be set",
            f"--set {overrides[0]}",
            "give a recipe with `--recipe`",
        )
    if recipe is not None and recipe.adapter.type == "full":
        hint = "use the folder as it is: there is nothing to merge"
        raise LoraError(f"{adapter} is already a complete model", "--adapter", hint)
    if base is not None and Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().absolute())
    saved = read_adapter(adapter)
    if recipe is None:
        recipe = _recipe_of(saved, base)
    elif base is not None:
        places = {**recipe.origin.places, "model.name": f"--base {base}"}
        recipe = recipe.with_values({"model.name": base})
        recipe = recipe.with_origin(replace(recipe.origin, places=places))
    # merging is done on the CPU, in the dtype of the checkpoint
    recipe = recipe.with_values({"model.dtype": None, "model.attention": None})
    return build_task(recipe), saved


def _write_origin(
    folder: Path, adapter: Path, base: Fingerprint | None, proof: dict[str, Any]
) -> None:
    """Write down what a merged folder was made from, and what was proved of it."""
    facts = {"lora_version": __version__, "adapter": shown_name(adapter)}
    named = {} if base is None else {"base": base.facts}
    write_json(folder / "merge.json", facts | named | {"proof": proof})


def _recipe_of(saved: AdapterFolder, base: str | None) -> Recipe:
    """Return what PEFT's configuration, the tensors and the base say of the task."""
    named = saved.config.get("task_type")
    kind = next((k for k, spec in TASKS.items() if named and spec.peft_task_type == named), None)
    name = base or saved.config.get("base_model_name_or_path")
    if kind is None or not name:
        what = f"{saved.path} does not say what it was trained for"
        if named:
            what = f"{saved.path} was trained for `{named}`, for which there is no task here"
        hint = "give a recipe with `--recipe`, for its `model` and `task`"
        raise LoraError(what if kind is None else f"{saved.path} names no base", "--adapter", hint)
    recipe = Recipe.model_validate(
        {"model": {"name": name}, "task": {"type": kind}, "data": {"path": "none.csv"}}
    )
    if tokens := _new_tokens(saved, recipe):
        recipe = recipe.with_values({"model.add_tokens": tokens})
    task = build_task(recipe)
    task.complete_from(saved.tensors)
    return task.completed_recipe


def _new_tokens(saved: AdapterFolder, recipe: Recipe) -> list[str]:
    """Return the tokens that the tokenizer beside an adapter has besides those of its base."""
    has_tokenizer = any((saved.path / name).is_file() for name in TOKENIZER_FILES)
    if not saved.config.get("trainable_token_indices") or not has_tokenizer:
        return []
    own = read_tokenizer(saved.path, recipe).get_vocab()
    known = load_tokenizer(recipe).get_vocab()
    return sorted(own.keys() - known.keys(), key=own.__getitem__)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer, a shared one under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _reject_overflow(model: nn.Module, stored: dict[str, torch.dtype]) -> None:
    """Reject a weight that is not finite in the dtype that it is kept in."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.to(stored[name]).isfinite().all()):
            raise NumericsError(
                f"`{name}` has entries that {str(stored[name]).removeprefix('torch.')}, the base "
                "checkpoint's dtype, cannot hold",
                "--base",
                "merge into a copy of the base that is stored in float32",
            )
