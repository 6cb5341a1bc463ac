"""The saved state of a run: what is needed to go on as if nothing had happened.

A checkpoint holds the trained parameters (in PEFT's format), the optimizer, the loss scale, and the
position. It holds nothing of the frozen base, and no random state: the order and the dropout of a
step follow from (seed, step). Tensors are in safetensors, the rest in JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters.folder import read_tensors, restore, save_adapter
from lora_cli.errors import IntegrityError, LoraError, Problem
from lora_cli.files import new_folder, publish, verify_manifest, write_json
from lora_cli.recipe import AdapterSpec, Recipe

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer.json"
FOLDER = "checkpoints"
TARGETS = {"target_modules", "exclude_modules", "layers"}  # `adapter.from` names the modules


@dataclass
class TrainState:
    """Where a run stands."""

    step: int = 0
    seconds: float = 0.0
    """Time in training steps, evaluations not counted."""
    examples: int = 0
    tokens: int = 0
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of validation and test before training."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Prompts with what the model wrote before training."""
    best: dict[str, Any] | None = None
    """Metric, mode, value, step and epoch of the best evaluation."""
    without_improvement: int = 0
    """Evaluations since the last that early stopping counts as an improvement."""
    stopped_early: bool = False
    skipped_steps: int = 0
    """Steps that fp16's loss scale gave up because a gradient overflowed."""
    unlogged_steps: int = 0
    """Steps since the last line of the log."""
    unlogged_loss: float = 0.0
    """Sum of their losses."""
    scaler: dict[str, Any] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    """What the optimizer keeps besides tensors."""
    data: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each split."""
    recipe: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    output: Path,
    state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    in_full: list[str],
) -> Path:
    """Write `checkpoints/step-NNNNNN`, whole or not at all, then delete the oldest.

    The newest `checkpoint.keep` are kept, and that of the best evaluation.
    """
    target = output / FOLDER / f"step-{state.step:06d}"
    tensors, state.optimizer = _optimizer_state(optimizer)
    with new_folder(target) as folder:
        save_adapter(folder, model, recipe, in_full)
        save_file(tensors, folder / OPTIMIZER_FILE)
        write_json(folder / STATE_FILE, asdict(state))
    # one of a later step is damaged, or this run had not resumed from an earlier
    older = [(step, old) for step, old in checkpoints(output) if step <= state.step]
    for step, old in older[: -recipe.checkpoint.keep]:
        if state.best is None or step != state.best["step"]:
            shutil.rmtree(old)
    return target


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of a run's checkpoints, oldest first."""
    found = ((re.fullmatch(r"step-(\d+)", p.name), p) for p in (output / FOLDER).glob("step-*"))
    return sorted((int(name[1]), path) for name, path in found if name)


def load_checkpoint(
    output: Path, warn: Callable[[str], None] | None = None
) -> tuple[Path, TrainState] | None:
    """Return the newest whole checkpoint and its state, or None if there is none.

    Args:
        output: The output folder of the run.
        warn: Is told of every newer checkpoint that is damaged.

    Raises:
        IntegrityError: If there are checkpoints and none is whole.
    """
    damaged: list[Problem] = []
    for _, folder in reversed(checkpoints(output)):
        try:
            if not verify_manifest(folder):
                raise IntegrityError("the manifest is missing", str(folder))
            state = TrainState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        except (IntegrityError, OSError, ValueError, TypeError) as error:
            damaged += (
                error.problems
                if isinstance(error, LoraError)
                else [Problem(str(error), str(folder))]
            )
            continue
        if damaged and warn is not None:
            for problem in damaged:
                warn(f"warning: damaged checkpoint: {problem.what} at {problem.at}")
            warn(f"going on from the one before, {folder.name}")
        return folder, state
    if damaged:
        hint = (
            f"no checkpoint is whole; start again in another folder, or without {output / FOLDER}"
        )
        last = damaged[-1]
        raise IntegrityError([*damaged[:-1], Problem(last.what, last.at, hint)])
    return None


def clear_leftovers(output: Path) -> None:
    """Delete what a process left behind that was killed while it wrote a checkpoint."""
    for leftover in (output / FOLDER).glob(".step-*"):
        shutil.rmtree(leftover)


def peek_state(output: Path) -> TrainState | None:
    """Return the newest checkpoint's state without looking at its tensors, or None."""
    for _, folder in reversed(checkpoints(output)):
        try:
            return TrainState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return None


def adopt_adapter(recipe: Recipe) -> None:
    """Let a run that is resumed go on without the adapter that it once started from.

    What came from that adapter stands in the checkpoint. `refuse_changes` finds out if the recipe
    says otherwise.
    """
    state, spec = peek_state(recipe.output_path), recipe.adapter
    if spec.from_ is None or state is None:
        return
    saved = AdapterSpec.model_validate(state.recipe["adapter"])
    said = {key: getattr(spec, key) for key in spec.model_fields_set - TARGETS}
    recipe.adapter = saved.model_copy(update=said)
    recipe._started = True


def restore_checkpoint(
    folder: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put a checkpoint's parameters and optimizer state into a freshly built run."""
    restore(model, read_tensors(folder))
    _load_optimizer(optimizer, load_file(folder / OPTIMIZER_FILE), state.optimizer)


def publish_adapter(
    output: Path, model: nn.Module, recipe: Recipe, in_full: list[str], processor: Any
) -> None:
    """Put what is trained into the output folder itself, where users look for it.

    With full fine-tuning that is a whole model folder.
    """
    staging = output / ".publish.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    if recipe.adapter.type == "full":
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
    else:
        save_adapter(staging, model, recipe, in_full)
    publish(staging, output)


def restore_published(output: Path, model: nn.Module, recipe: Recipe) -> None:
    """Load what `publish_adapter` wrote into the model that it was written from."""
    if recipe.adapter.type == "full":
        assert isinstance(model, PreTrainedModel)
        # by transformers, which may have divided the file or named its tensors otherwise
        saved = type(model).from_pretrained(output, dtype=torch.float32)
        model.load_state_dict(saved.state_dict())
    else:
        restore(model, read_tensors(output))


def refuse_changes(saved: TrainState, recipe: Recipe, data: dict[str, str] | None = None) -> None:
    """Refuse to go on with another recipe or other data; where the result lies may change.

    Args:
        saved: The state of the run.
        recipe: The recipe now.
        data: SHA-256 of each split now; None if they have not been read.
    """
    facts = recipe_facts(recipe)
    if data is None:
        _adopt_findings(facts["task"], saved.recipe["task"])
    before, now = _flat(saved.recipe), _flat(facts)
    problems = [
        Problem(
            f"the run was started with `{key}: {before.get(key)}`, the recipe now says "
            f"`{now.get(key)}`",
            recipe.at(key),
        )
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    problems += [
        Problem(f"the rows of {split} are not those the run was started with")
        for split in sorted(saved.data.keys() | (data or {}).keys())
        if data is not None and saved.data.get(split) != data.get(split)
    ]
    if problems:
        last = problems[-1]
        problems[-1] = Problem(
            last.what,
            last.at,
            "start a new run in another folder with `-o DIR`, or restore what it was started with",
        )
        raise LoraError(problems)


def _adopt_findings(task: dict[str, Any], saved: dict[str, Any]) -> None:
    """Take over what a run found in its data, where the recipe leaves it to the data."""
    if "labels" in task and task["labels"] is None:
        task["labels"] = saved.get("labels")
    if task.get("class_weights") == "balanced" and isinstance(saved.get("class_weights"), dict):
        task["class_weights"] = saved["class_weights"]


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe must not change when a run is resumed."""
    return recipe.model_dump(
        mode="json",
        by_alias=True,
        exclude={
            "output_dir": True,
            "train": {"workers", "trackers"},
            "evaluate": {"baselines"},
            "checkpoint": True,
        },
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors by `parameter name/key`, and its other values likewise."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value.detach().cpu().contiguous().clone()
                else:
                    rest[f"{name}/{key}"] = value
    return tensors, rest


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    values: dict[str, dict[str, Any]] = {}
    for path, value in (*tensors.items(), *rest.items()):
        name, _, key = path.rpartition("/")
        values.setdefault(name, {})[key] = value
    for group in optimizer.param_groups:
        steps_on_gpu = group.get("fused") or group.get("capturable")
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in values.get(name, {}).items():
                if isinstance(value, Tensor) and (key != "step" or steps_on_gpu):
                    value = value.to(parameter.device)
                optimizer.state[parameter][key] = value
