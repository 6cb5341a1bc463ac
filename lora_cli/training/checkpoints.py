"""Checkpoints on the disk: what is needed to go on as if nothing had happened.

A checkpoint holds the trained parameters (in PEFT's format), the optimizer, the loss scale, and the
position. It holds nothing of the frozen base, and no random state: the order and the dropout of a
step follow from (seed, step). Tensors are in safetensors, the rest in JSON; nothing is pickled.
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
from transformers import PreTrainedModel

from lora_cli.adapters.attach import lora_layers, trainable_parameters
from lora_cli.adapters.peft_format.adapter_folder import (
    adapter_tensors,
    ranks_of,
    read_tensors,
    restore,
    save_adapter,
    weight_files,
)
from lora_cli.adapters.peft_format.tensor_names import PREFIX
from lora_cli.adapters.peft_format.write_diffusion_file import write_diffusers_file
from lora_cli.errors import IntegrityError, LoraError, Problem
from lora_cli.files import (
    STAGING,
    forbidden,
    new_folder,
    publish,
    recover,
    require_space,
    sha256_of,
    verify_manifest,
    write_json,
)
from lora_cli.models.base_facts import write_computation
from lora_cli.models.bundle import Bundle, part_names
from lora_cli.models.fingerprint import Fingerprint
from lora_cli.models.older_config_names import add_older_names
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


# tensors that an optimizer keeps for each parameter
MOMENTS = {"adamw": 2.0, "adamw_8bit": 0.6, "sgd": 1.0, "adafactor": 0.1}
OTHER_BYTES = 2**20  # logs, report, plots: what is small


def optimizer_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Return what the optimizer will keep, in bytes."""
    trained = sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())
    return int(MOMENTS[recipe.train.optimizer.type] * trained)


def require_space_for_checkpoints(model: nn.Module, recipe: Recipe) -> None:
    """Check that the disk has room for the run.

    There are `checkpoint.keep` checkpoints, that of the best evaluation, and one that is written
    before the oldest goes; and the adapter in the output folder, likewise old and new.

    Raises:
        ResourceError: If there is less room than that.
    """
    trained = sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())
    trained += sum(b.nbytes for layer in lora_layers(model).values() for b in layer.buffers(False))
    one = trained + optimizer_bytes(model, recipe)
    there = sum(f.stat().st_size for f in (recipe.output_path / FOLDER).rglob("*") if f.is_file())
    published = 2 * trained * (2 if part_names(model) else 1)  # with the file of diffusers
    needed = (recipe.checkpoint.keep + 2) * one + published + OTHER_BYTES - there
    require_space(recipe.output_path, needed, recipe.at("output_dir"))


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
    """Write `checkpoints/step-NNNNNN`, whole or not at all, then delete the oldest.

    The newest `checkpoint.keep` are kept, and that of the best evaluation.
    """
    target = output / FOLDER / f"step-{state.step:06d}"
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
    # one of a later step is damaged, or this run had not resumed from an earlier
    older = [(step, old) for step, old in checkpoints(output) if step <= state.step]
    for step, old in older[: -recipe.checkpoint.keep]:
        if state.best is None or step != state.best["step"]:
            leaving = old.with_name(f".{old.name}.old")  # never a part under its own name
            old.rename(leaving)
            shutil.rmtree(leaving)
    return target


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of a run's checkpoints, oldest first.

    Raises:
        ResourceError: If the system does not let them be listed: that is not to have none.
    """
    try:
        paths = list((output / FOLDER).iterdir())  # `glob` passes over what it may not list
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise forbidden(output / FOLDER) from error
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in paths)
    return sorted((int(name[1]), path) for name, path in found if name)


def load_checkpoint(
    output: Path, warn: Callable[[str], None] | None = None
) -> tuple[Path, TrainState] | None:
    """Return the newest whole checkpoint and its state, or None if there is none.

    Args:
        output: The output folder of the run.
        warn: Is called with a line about every newer checkpoint that is damaged.

    Raises:
        IntegrityError: If there are checkpoints and none is whole.
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
    """Put right what a process left behind that was killed while it wrote into the folder."""
    recover(output)
    recover(output / FOLDER)


def peek_state(output: Path) -> TrainState | None:
    """Return the newest checkpoint's state without looking at its tensors, or None."""
    for _, folder in reversed(checkpoints(output)):
        try:
            return read_state(folder / STATE_FILE)
        except (OSError, ValueError, TypeError):
            continue
    return None


def adopt_adapter(recipe: Recipe, learned: Learned) -> None:
    """Let a run that is resumed go on with the parameters of its checkpoint.

    They are neither decomposed from weights again, nor read from the adapter that the run once
    started from. `reject_changes` finds out if the recipe says otherwise.

    Args:
        recipe: May name an adapter to start from.
        learned: Gets the adapter section that the run was started with then.
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
    said = {key: getattr(spec, key) for key in spec.model_fields_set - TARGETS}
    learned.adapter = saved.with_values(said)


def _ranks(output: Path) -> dict[str, int]:
    """Return the rank of each module in the newest checkpoint whose file can be read."""
    for _, folder in reversed(checkpoints(output)):
        try:
            return ranks_of(folder)
        except (IntegrityError, OSError):
            continue
    return {}


def restore_checkpoint(
    folder: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put a checkpoint's parameters and optimizer state into a freshly built run.

    Raises:
        IntegrityError: If a tensor is missing, foreign, of another shape or not finite.
    """
    read_header(folder / OPTIMIZER_FILE)
    tensors = load_file(folder / OPTIMIZER_FILE)
    problems = optimizer_problems(optimizer, tensors, state, folder / OPTIMIZER_FILE)
    if problems:
        last = problems[-1]
        raise IntegrityError([*problems[:-1], Problem(last.what, last.at, _without(folder))])
    restore_parameters(folder, model)
    for name, written in state.sha256.items():  # whatever the manifest says by now
        if sha256_of(folder / name) != written:
            what = f"`{name}` is not the file that was written with `{STATE_FILE}`"
            raise IntegrityError(what, str(folder / name), _without(folder))
    load_optimizer(optimizer, tensors, state.optimizer)


def restore_parameters(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's parameters into a freshly built run.

    Raises:
        IntegrityError: If they are not those that are trained.
    """
    tensors, wanted = read_tensors(folder), adapter_tensors(model)
    shapes = {name.removeprefix(PREFIX): tensor.shape for name, tensor in wanted.items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        saved = tensors[name].shape if name in tensors else None
        if saved != shapes.get(name):
            what = f"`{name}` is {_shape(saved)}, and should be {_shape(shapes.get(name))}"
            files = (f for f in weight_files(folder) if name.startswith(f.rpartition("/")[0]))
            file = folder / next(files, weight_files(folder)[0])
            raise IntegrityError(what, str(file), _without(folder))
    restore(model, tensors)


def _without(folder: Path) -> str:
    return (
        f"remove {folder}: `--resume` then goes on from the checkpoint before it, if there is one"
    )


def _shape(shape: torch.Size | None) -> str:
    return "not there" if shape is None else f"of shape {list(shape)}"


SaveProcessor = Callable[[Path, dict[str, Any] | None], None]


def publish_adapter(
    output: Path,
    model: nn.Module,
    recipe: Recipe,
    in_full: list[str],
    base: Fingerprint | None,
    save_processor: SaveProcessor | None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Put what is trained into the output folder itself, where users look for it.

    With full fine-tuning that is a whole model folder. The processor that was trained with, and
    what else decides the computation (`facts`), stay with it.
    """
    staging = output / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    if recipe.adapter.type == "full":
        assert isinstance(model, PreTrainedModel | Bundle)
        model.save_pretrained(staging)
        add_older_names(staging, {})
    else:
        save_adapter(staging, model, recipe, in_full, base)
        if part_names(model):  # what diffusers reads by itself, where it has a place for it
            write_diffusers_file(staging)
    if save_processor is not None:
        save_processor(staging, facts)
    if facts is not None:
        write_computation(staging, recipe, facts)
    publish(staging, output)


def restore_published(output: Path, model: nn.Module, recipe: Recipe) -> None:
    """Load what `publish_adapter` wrote into the model that it was written from."""
    if recipe.adapter.type == "full":
        for name, part in model.parts.items() if isinstance(model, Bundle) else [("", model)]:
            kind: Any = type(part)
            key = "dtype" if isinstance(part, PreTrainedModel) else "torch_dtype"
            # by its own library, which may have divided the file or named its tensors otherwise
            saved = kind.from_pretrained(output / name, **{key: torch.float32})
            part.load_state_dict(saved.state_dict())
    else:
        restore(model, read_tensors(output))
