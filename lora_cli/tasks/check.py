"""The second stage of checking: data, labels, metrics and targets, on a model without weights."""

from __future__ import annotations

from torch import nn

from lora_cli.adapters.attach import attach
from lora_cli.errors import LoraError, Problem
from lora_cli.models import load_config
from lora_cli.recipe import Recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.base import check_data


def check_recipe(recipe: Recipe) -> None:
    """Find everything that would stop `lora train` later, and raise it together.

    Raises:
        LoraError: With every problem of the model, the data, the labels and the targets.
    """
    task = build_task(recipe)
    problems: list[Problem] = []
    try:
        task.load_processor()
    except LoraError as error:
        problems += error.problems
    try:
        check_data(task, ("train", "validation", "test"))
    except LoraError as error:
        problems += error.problems
    if not problems:  # the model's shape depends on the labels
        try:
            model, new = task.empty_model()
            attach(model, recipe, new)
        except LoraError as error:
            problems += error.problems
    if problems:
        raise LoraError(problems)


def empty_adapted_model(recipe: Recipe) -> nn.Module:
    """Return the model on the meta device with its adapter attached; needs its config only.

    The data are read only where the recipe does not name the labels.
    """
    task = build_task(recipe)
    task.config = load_config(recipe)
    if not task.knows_labels:
        check_data(task, ())
    model, new = task.empty_model()
    attach(model, recipe, new)
    return model
