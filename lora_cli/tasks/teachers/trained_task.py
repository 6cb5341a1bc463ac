"""Opens a trained adapter: the task of its recipe, and the base model with the adapter."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from torch import nn

from lora_cli.adapters.load_adapter import load_adapter, verify_base
from lora_cli.adapters.peft_format.adapter_folder import read_adapter
from lora_cli.files import finish_publishing, reject_links_outside, verify_manifest
from lora_cli.models.base_facts import require_facts, warn_of_own_processor
from lora_cli.models.fingerprint import fingerprint_of
from lora_cli.recipe import RECIPE_FILE, Learned, Recipe, check_labels, read_computation
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task


def open_task(folder: Path, recipe: Recipe, learned: Learned | None = None) -> Task:
    """Return the task of a recipe; with `adapter.type: full`, the folder is the model."""
    if recipe.adapter.type == "full":
        recipe = recipe.with_values({"model.name": str(folder.absolute())})
    task = build_task(recipe, learned)
    task.trained_in = folder
    task.load_processor()
    return task


def load_adapted(folder: Path, task: Task, accelerator: Accelerator) -> nn.Module:
    """Return the base model with the adapter of a folder, in eval mode.

    Raises:
        IntegrityError: If the folder is damaged, or the adapter was trained on another base.
    """
    if task.recipe.adapter.type == "full":
        reject_links_outside(folder)
        finish_publishing(folder)
        verify_manifest(folder)
        check_labels(folder, task.completed_recipe)
        model = task.load_model(accelerator.device)[0].eval()
        with accelerator.autocast():
            task.fit_to_model(model)
        return model
    saved = read_adapter(folder)
    check_use(folder, task)
    model, new = task.load_model(accelerator.device)
    verify_base(saved, fingerprint_of(task.recipe, model, new), task.recipe)
    load_adapter(model, saved, new, drawn=task.drawn)
    with accelerator.autocast():
        task.fit_to_model(model.eval())
    return model.eval()


def check_use(folder: Path, task: Task) -> None:
    """Check that an adapter is used with the labels and the base's settings of its training.

    Raises:
        IntegrityError: If they differ.
    """
    check_labels(folder, task.completed_recipe)
    trained = read_computation(folder)
    if trained is not None:
        require_facts(trained["base"], task.base_facts, task.recipe, f"the adapter {folder}")
    elif not (folder / RECIPE_FILE).is_file():
        warn_of_own_processor(folder, task.recipe)
