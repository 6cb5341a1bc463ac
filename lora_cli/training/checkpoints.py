"""Write and read checkpoints, from which a run continues as if it had not been interrupted.

A checkpoint contains the trained parameters (in PEFT's format), the state of the optimizer, and the
`TrainState`: the position, the counts, the best evaluation. It contains neither frozen weights nor
random states, since the order and the dropout of a step depend only on (seed, step). Tensors are
saved as safetensors, everything else as JSON; nothing is pickled.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.adapters.attach import lora_layers, trainable_parameters
from lora_cli.adapters.peft_format.adapter_folder import (
    adapter_tensors,
    ranks_of,
    read_tensors,
    restore,
    save_adapter,
    weight_files,
)
from lora_cli.adapters.peft_format.saved_buffers import without_buffers
from lora_cli.adapters.peft_format.tensor_names import PREFIX
from lora_cli.errors import IntegrityError, LoraError, Problem
from lora_cli.files import (
    forbidden,
    new_folder,
    recover,
    require_space,
    sha256_of,
    verify_manifest,
    write_json,
)
from lora_cli.models.base_facts import write_computation
from lora_cli.models.bundle import part_names
from lora_cli.models.fingerprint import Fingerprint
from lora_cli.recipe import AdapterSpec, Learned, Recipe
from lora_cli.tensorfile import read_header
from lora_cli.training.optimizer_state import (
    described,
    load_optimizer,
    optimizer_problems,
    optimizer_state,
)
from lora_cli.training.train_state import TrainState, read_state

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer.json"
FOLDER = "checkpoints"
TARGETS = {"target_modules", "exclude_modules", "layers"}  # `adapter.from` names the modules
# size of an optimizer's state, relative to the parameters
MOMENTS = {"adamw": 2.0, "adamw_8bit": 0.6, "sgd": 1.0, "adafactor": 0.1}
OTHER_BYTES = 2**20  # for logs, report and plots


def checkpoint_folder(output: Path, step: int) -> Path:
    """Return the folder of the checkpoint after a step, in an output folder."""
    return output / FOLDER / f"step-{step:06d}"


def save_checkpoint(
    output: Path,
    state: TrainState,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    recipe: Recipe,
    in_full: list[str],
    base: Fingerprint | None,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write `checkpoints/step-NNNNNN`, completely or not at all, then delete old checkpoints.

    The newest `checkpoint.keep` checkpoints are kept, and the one of the best evaluation.

    Args:
        output: The output folder of the run.
        state: The state of the run.
        optimizer: The optimizer, whose state is written.
        model: The model, whose trained parameters are written.
        recipe: The recipe.
        in_full: The names of the modules that are trained in full.
        base: The fingerprint of the base.
        facts: The facts of the base that affect outputs besides its tensors.

    Returns:
        The folder of the checkpoint.
    """
    target = checkpoint_folder(output, state.step)
    tensors, state.optimizer = optimizer_state(optimizer)
    state.optimizer_tensors = {name: described(tensor) for name, tensor in tensors.items()}
    with new_folder(target) as folder:
        save_adapter(folder, model, recipe, in_full, base)
        if facts is not None:
            write_computation(folder, recipe, facts)
        save_file(tensors, folder / OPTIMIZER_FILE)
        files = (*weight_files(folder), OPTIMIZER_FILE)
        state.sha256 = {name: sha256_of(folder / name) for name in files}
        write_json(folder / STATE_FILE, asdict(state))
    # later ones are not counted: they are damaged, or the run would have resumed from them
    candidates = [(step, old) for step, old in checkpoints(output) if step <= state.step]
    for step, old in candidates[: -recipe.checkpoint.keep]:
        if state.best is None or step != state.best["step"]:
            # rename first, so that folders with this name are always complete
            renamed = old.with_name(f".{old.name}.old")
            old.rename(renamed)
            shutil.rmtree(renamed)
    return target


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of a run's checkpoints, oldest first.

    Raises:
        ResourceError: If there is no permission to read the folder.
    """
    try:
        # `glob` would silently skip a folder without permission
        paths = list((output / FOLDER).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise forbidden(output / FOLDER) from error
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in paths)
    return sorted((int(name[1]), path) for name, path in matches if name)


def load_checkpoint(
    output: Path, warn: Callable[[str], None] | None = None
) -> tuple[Path, TrainState] | None:
    """Return the newest complete checkpoint and its state, or None if there is none.

    Args:
        output: The output folder of the run.
        warn: Called with a line about each newer checkpoint that is damaged.

    Raises:
        IntegrityError: If there are checkpoints, and all are damaged.
    """
    damaged: list[Problem] = []
    for step, folder in reversed(checkpoints(output)):
        try:
            if not verify_manifest(folder, *weight_files(folder), OPTIMIZER_FILE, STATE_FILE):
                raise IntegrityError("the manifest is missing", str(folder))
            state = read_state(folder / STATE_FILE)
            if state.step != step:
                raise IntegrityError(f"it is the checkpoint of step {state.step}", str(folder))
        except PermissionError as error:
            raise forbidden(folder) from error
        except (IntegrityError, OSError, ValueError, TypeError) as error:
            damaged += (
                error.problems
                if isinstance(error, LoraError)
                else [Problem("its state cannot be read by this version", str(folder / STATE_FILE))]
            )
            continue
        if damaged and warn is not None:
            for problem in damaged:
                warn(f"warning: damaged checkpoint: {problem.what} at {problem.at}")
            warn(f"continuing from the one before, {folder.name}")
        return folder, state
    if damaged:
        hint = (
            f"no checkpoint is whole; start again in another folder, or without {output / FOLDER}"
        )
        last = damaged[-1]
        raise IntegrityError([*damaged[:-1], Problem(last.what, last.at, hint)])
    return None


def clear_leftovers(output: Path) -> None:
    """Finish or undo the file operations of a process that was killed while writing."""
    recover(output)
    recover(output / FOLDER)


def peek_state(output: Path) -> TrainState | None:
    """Return the state of the newest checkpoint without checking its tensors, or None."""
    for _, folder in reversed(checkpoints(output)):
        try:
            return read_state(folder / STATE_FILE)
        except (OSError, ValueError, TypeError):
            continue
    return None


def adopt_adapter(recipe: Recipe, learned: Learned) -> None:
    """Prepare to resume a run whose parameters are in its checkpoint.

    They are then neither computed from the base's weights again, nor read from the adapter that the
    run started from. `reject_changes` checks later whether the recipe has changed.

    Args:
        recipe: The recipe; it may name an adapter to start from.
        learned: Receives the adapter section with which the run was started.
    """
    state, spec = peek_state(recipe.output_path), recipe.adapter
    if state is None:
        return
    learned.in_checkpoint = True
    if spec.init == "eva":
        learned.ranks = _ranks(recipe.output_path)
    if spec.from_ is None:
        return
    saved = AdapterSpec.model_validate(state.recipe["adapter"])
    changes = {key: getattr(spec, key) for key in spec.model_fields_set - TARGETS}
    learned.adapter = saved.with_values(changes)


def _ranks(output: Path) -> dict[str, int]:
    """Return the rank of each module, from the newest checkpoint that can be read."""
    for _, folder in reversed(checkpoints(output)):
        try:
            return ranks_of(folder)
        except (IntegrityError, OSError):
            continue
    return {}


def restore_checkpoint(
    folder: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load a checkpoint's parameters and optimizer state into a new run.

    Raises:
        IntegrityError: If a tensor is missing, unknown, not finite, or has another shape.
    """
    read_header(folder / OPTIMIZER_FILE)
    tensors = load_file(folder / OPTIMIZER_FILE)
    problems = optimizer_problems(optimizer, tensors, state, folder / OPTIMIZER_FILE)
    if problems:
        last = problems[-1]
        raise IntegrityError([*problems[:-1], Problem(last.what, last.at, _hint_without(folder))])
    restore_parameters(folder, model)
    for name, written in state.sha256.items():  # an edited manifest cannot change these hashes
        if sha256_of(folder / name) != written:
            what = f"`{name}` is not the file that was written with `{STATE_FILE}`"
            raise IntegrityError(what, str(folder / name), _hint_without(folder))
    load_optimizer(optimizer, tensors, state.optimizer)


def restore_parameters(folder: Path, model: nn.Module) -> None:
    """Load a checkpoint's parameters into a new run.

    Raises:
        IntegrityError: If they are not the parameters that the run trains.
    """
    tensors, expected = without_buffers(read_tensors(folder), model), adapter_tensors(model)
    shapes = {name.removeprefix(PREFIX): tensor.shape for name, tensor in expected.items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        saved = tensors[name].shape if name in tensors else None
        if saved != shapes.get(name):
            what = f"`{name}` is {_shape(saved)}, and should be {_shape(shapes.get(name))}"
            files = (f for f in weight_files(folder) if name.startswith(f.rpartition("/")[0]))
            file = folder / next(files, weight_files(folder)[0])
            raise IntegrityError(what, str(file), _hint_without(folder))
    restore(model, tensors)


def _hint_without(folder: Path) -> str:
    return (
        f"remove {folder}: `--resume` then goes on from the checkpoint before it, if there is one"
    )


def _shape(shape: torch.Size | None) -> str:
    return "not there" if shape is None else f"of shape {list(shape)}"


def optimizer_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Return the size of the optimizer's state, in bytes."""
    trained = sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())
    return int(MOMENTS[recipe.train.optimizer.type] * trained)


def require_space_for_checkpoints(model: nn.Module, recipe: Recipe) -> None:
    """Check that the disk has enough space for the files of a run.

    These are `checkpoint.keep` checkpoints, the one of the best evaluation, one that is written
    before the oldest is deleted, and the old and the new adapter in the output folder.

    Raises:
        ResourceError: If there is not enough space.
    """
    trained = sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())
    trained += sum(b.nbytes for layer in lora_layers(model).values() for b in layer.buffers(False))
    checkpoint_bytes = trained + optimizer_bytes(model, recipe)
    existing = sum(
        f.stat().st_size for f in (recipe.output_path / FOLDER).rglob("*") if f.is_file()
    )
    published = 2 * trained * (2 if part_names(model) else 1)  # includes the file for diffusers
    needed = (recipe.checkpoint.keep + 2) * checkpoint_bytes + published + OTHER_BYTES - existing
    require_space(recipe.output_path, needed, recipe.at("output_dir"))
