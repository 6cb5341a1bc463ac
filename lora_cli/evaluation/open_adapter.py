"""Open a trained adapter, in the same way for every command."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from torch import nn

from lora_cli.accelerator import start_accelerator
from lora_cli.preprocessing.encode import check_data
from lora_cli.recipe import Recipe
from lora_cli.tasks.contract import Task
from lora_cli.tasks.teachers.trained_task import check_use as check_use
from lora_cli.tasks.teachers.trained_task import load_adapted as load_adapted
from lora_cli.tasks.teachers.trained_task import open_task as open_task


def open_adapter(folder: Path, recipe: Recipe) -> tuple[Task, nn.Module, Accelerator]:
    """Return the task, the base model with a folder's adapter, and the accelerator it runs on."""
    accelerator = start_accelerator(recipe)
    task = open_task(folder, recipe)
    if not task.knows_labels:
        check_data(task, ())
    return task, load_adapted(folder, task, accelerator), accelerator
