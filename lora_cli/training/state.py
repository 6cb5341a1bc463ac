"""The saved state of a run: what is needed to go on as if nothing had happened.

A checkpoint holds the trained parameters (in PEFT's format), the optimizer, the loss scale, and the
position. It holds nothing of the frozen base, and no random state: the order and the dropout of a
step follow from (seed, step). Tensors are in safetensors, the rest in JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters.folder import read_tensors, restore, save_adapter
from lora_cli.errors import IntegrityError, LoraError, Problem
from lora_cli.files import new_folder, publish, verify_manifest, write_json
from lora_cli.recipe import Recipe

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer.json"
FOLDER = "checkpoints"


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
    best: dict[str, Any] | None = None
    """Metric, mode, value, step and epoch of the best evaluation."""
    without_improvement: int = 0
    stopped_early: bool = False
    skipped_steps: int = 0
    """Steps that fp16's loss scale gave up because a gradient overflowed."""
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
    """Write `checkpoints/step-NNNNNN`, whole or not at all, then delete the oldest."""
    target = output / FOLDER / f"step-{state.step:06d}"
    tensors, rest = _optimizer_state(optimizer)
    state.optimizer = rest
    with new_folder(target) as folder:
        save_adapter(folder, model, recipe, in_full)
        save_file(tensors, folder / OPTIMIZER_FILE)
        write_json(folder / STATE_FILE, asdict(state))
    for old in checkpoints(output)[: -recipe.checkpoint.keep]:
        shutil.rmtree(old)
    return target


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted((output / FOLDER).glob("step-*"))


def load_checkpoint(output: Path) -> tuple[Path, TrainState] | None:
    """Return the newest whole checkpoint and its state, or None if there is none.

    Raises:
        IntegrityError: If there are checkpoints and none is whole.
    """
    damaged: list[Problem] = []
    for folder in reversed(checkpoints(output)):
        try:
            if not verify_manifest(folder):
                raise IntegrityError("the manifest is missing", str(folder))
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            return folder, TrainState(**state)
        except (IntegrityError, OSError, ValueError, TypeError) as error:
            damaged += (
                error.problems
                if isinstance(error, LoraError)
                else [Problem(str(error), str(folder))]
            )
    if damaged:
        raise IntegrityError(damaged)
    return None


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
        load_model(model, output / "model.safetensors")
    else:
        restore(model, read_tensors(output))


def refuse_changes(saved: TrainState, recipe: Recipe, data: dict[str, str]) -> None:
    """Refuse to go on with another recipe or other data; where the result lies may change."""
    problems = []
    before, now = _flat(saved.recipe), _flat(_comparable(recipe))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            problems.append(
                Problem(
                    f"the run was started with `{key}: {before.get(key)}`, the recipe now says "
                    f"`{now.get(key)}`",
                    recipe.at(key),
                )
            )
    for split in sorted(saved.data.keys() | data.keys()):
        if saved.data.get(split) != data.get(split):
            problems.append(Problem(f"the rows of {split} are not those the run was started with"))
    if problems:
        last = problems[-1]
        problems[-1] = Problem(
            last.what,
            last.at,
            "start a new run in another folder with `-o DIR`, or restore what it was started with",
        )
        raise LoraError(problems)


def _comparable(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(
        mode="json",
        by_alias=True,
        exclude={"output_dir": True, "train": {"workers", "trackers"}, "checkpoint": True},
    )


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe must not change when a run is resumed."""
    return _comparable(recipe)


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
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in values.get(name, {}).items():
                if isinstance(value, Tensor) and not (key == "step" and not parameter.is_cuda):
                    value = value.to(parameter.device)
                optimizer.state[parameter][key] = value
