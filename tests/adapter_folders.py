"""Adapter folders as `lora train` leaves them, but drawn at random instead of trained: quick.

folder = adapter_folders.make(tmp_path, "a", base, seed=1, rank=4)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.models.fingerprint import fingerprint_of
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.training.output_folder import write_recipe
from lora_cli.training.published_adapter import publish_adapter

CPU = torch.device("cpu")


def make(
    top: Path, name: str, base: Path, seed: int = 0, std: float = 0.3, **sections: Any
) -> Path:
    """Write an adapter of a base model, all of whose trained parameters are drawn at random.

    Args:
        top: Gets the recipe, and the folder.
        name: Of the folder.
        base: Folder of the base model.
        seed: Of the parameters.
        std: Of the parameters.
        sections: Of the recipe.
    """
    folder = top / name
    path = tiny.recipe(base, top, **{"output_dir": str(folder), **sections})
    task = build_task(load_recipe(path))
    task.load_processor()
    model, new = task.load_model(CPU)
    base_print = fingerprint_of(task.recipe, model, new)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach(model, task.recipe, new, token_ids=task.learned.token_ids)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.normal_(std=std)
    folder.mkdir(parents=True)
    recipe = task.completed_recipe
    in_full = [*new, *recipe.adapter.train_modules]
    write_recipe(recipe)
    publish_adapter(
        folder, model, recipe, in_full, base_print, task.save_processor, task.base_facts
    )
    return folder
