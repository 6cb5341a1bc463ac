"""Check that all processes of a run agree on the recipe, the data and the parameters.

Each process reads the recipe and the data itself. Different learning rates or rows would go
unnoticed, and with different numbers of steps the processes would wait for each other forever.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from lora_cli import __version__
from lora_cli.adapters.attach import trainable_parameters
from lora_cli.environment import installed_version
from lora_cli.errors import LoraError, NumericsError, Problem
from lora_cli.recipe import Recipe, flat
from lora_cli.training.train_state import TrainState

# paths may differ between machines; the content of the files is compared instead
PATHS = {
    "model.name", "adapter.from", "task.chat_template", "checkpoint.mirror", "data.path",
    "data.train", "data.validation", "data.test",
}  # fmt: skip
MAX_SHOWN = 10  # differences in a message
SAME_RECIPE = "start all processes with the same recipe, flags and versions"
SAME_FILES = "give all processes the same base, data and output folder"


def require_same_recipe(recipe: Recipe, resume: bool, accelerator: Accelerator) -> None:
    """Check that all processes were started with the same recipe and versions.

    Raises:
        LoraError: In the main process; the others end with its exit code.
    """
    if accelerator.num_processes == 1:
        return
    facts = flat(recipe.model_dump(mode="json", by_alias=True))
    facts = {key: value for key, value in facts.items() if not _is_path(key)}
    facts |= {
        "--resume": resume,
        "the version of lora": __version__,
        "the version of Python": platform.python_version(),
        **{f"the version of {name}": installed_version(name) for name in ("torch", "transformers")},
    }
    _compare(facts, accelerator, SAME_RECIPE, recipe)


def _is_path(key: str) -> bool:
    """Return whether a key of a recipe is the path of a file or folder."""
    name = ".".join(["data", *key.split(".")[3:]]) if key.startswith("data.mix.") else key
    return name in PATHS


def require_same_start(
    recipe: Recipe, state: TrainState, model: nn.Module, accelerator: Accelerator
) -> None:
    """Check that all processes have read the same files, and are at the same step.

    Raises:
        LoraError: In the main process; the others end with its exit code.
    """
    if accelerator.num_processes == 1:
        return
    facts = flat(asdict(state))
    # threads, devices and paths may differ; `data.train` here is the hash of the rows
    facts = {
        key: value
        for key, value in facts.items()
        if not key.startswith("machine.")
        and not (key.startswith("recipe.") and _is_path(key.removeprefix("recipe.")))
    }
    facts["the trained parameters"] = checksum(trainable_parameters(model))
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    facts["the weights of the base"] = checksum(frozen)
    facts["the output folder is there"] = recipe.output_path.is_dir()
    _compare(facts, accelerator, SAME_FILES, recipe)


def require_same_parameters(model: nn.Module, step: int, accelerator: Accelerator) -> None:
    """Check, before saving, that all processes still have the same parameters.

    Raises:
        NumericsError: In every process.
    """
    if accelerator.num_processes == 1:
        return
    sums = gather_object([checksum(trainable_parameters(model))])
    others = [str(rank) for rank, value in enumerate(sums) if value != sums[0]]
    if others:
        noun = "process" if len(others) == 1 else "processes"
        raise NumericsError(
            f"after step {step} {noun} {', '.join(others)} and process 0 hold different parameters",
            "the processes of the run",
            "continue from the last checkpoint with `--resume`; do all machines have the same GPUs "
            "and libraries, and is their memory sound?",
        )


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of the names, shapes and bits of tensors; bits are summed on the device."""
    digest = hashlib.sha256()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        integer = integers.get(tensor.element_size(), torch.uint8)
        bits = tensor.detach().contiguous().view(integer)
        sums.append(bits.sum(dtype=torch.int64))
    if sums:
        digest.update(str(torch.stack(sums).tolist()).encode())
    return digest.hexdigest()


def _compare(facts: dict[str, Any], accelerator: Accelerator, hint: str, recipe: Recipe) -> None:
    """Reject facts that differ between the processes."""
    facts_by_rank: list[dict[str, Any]] = gather_object([facts])
    problems = []
    for key in sorted(set().union(*facts_by_rank)):
        values = [str(rank_facts.get(key)) for rank_facts in facts_by_rank]
        different = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if different is not None:
            what = f"the processes differ in `{key}`: process 0 has `{values[0]}`, "
            what += f"process {different} has `{values[different]}`"
            at = recipe.at(key) if hasattr(recipe, key.partition(".")[0]) else "the processes"
            problems.append(Problem(what, at))
    if not problems:
        return
    if not accelerator.is_main_process:
        raise SystemExit(LoraError.exit_code)
    shown, n_hidden = problems[:MAX_SHOWN], len(problems) - MAX_SHOWN
    hint += f" ({n_hidden} more differences)" if n_hidden > 0 else ""
    raise LoraError([*shown[:-1], Problem(shown[-1].what, shown[-1].at, hint)])
