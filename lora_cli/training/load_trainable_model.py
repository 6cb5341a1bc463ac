"""Load a base model from disk, and prepare it for the first step."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from lora_cli.adapters.make_trainable import head_in_full, make_trainable
from lora_cli.models.fingerprint import Fingerprint, fingerprint_of
from lora_cli.models.gradient_checkpointing import enable_gradient_checkpointing
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded
from lora_cli.training.seeds import seed_everything
from lora_cli.training.start_from_data import start_from_data


def load_trainable_model(
    task: Task, data: dict[str, Encoded], accelerator: Accelerator
) -> tuple[nn.Module, list[str], Fingerprint | None]:
    """Load the base model, attach the adapter, and try it on the longest example.

    Returns:
        The model, the names of the head's modules that are trained in full, and the fingerprint of
        the base.
    """
    recipe = task.recipe
    seed_everything(recipe.train.seed)
    model, head = task.load_model(accelerator.device)
    base = fingerprint_of(recipe, model, head)
    base = make_trainable(model, recipe, head, base, task.base_facts, task.learned, task.drawn)
    lengths = [int(split.lengths.max()) for split in data.values()]
    longest = max(lengths) if "train" in data else None
    with accelerator.autocast():
        task.fit_to_model(model, longest)
        task.try_training(model, longest)
        if recipe.train.packing:
            task.check_packing(model, data["train"])
    if recipe.adapter.init == "eva":
        start_from_data(model, task, data["train"], accelerator)
    if (mode := recipe.train.gradient_checkpointing) in (True, "offload"):
        enable_gradient_checkpointing(model, recipe, mode)
    return model, head_in_full(model, head), base
