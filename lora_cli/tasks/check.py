"""The second stage of checking: data, labels, metrics and targets, on a model without weights."""

from __future__ import annotations

from torch import nn

from lora_cli.adapters.attach import attach
from lora_cli.data.sources import Rows
from lora_cli.errors import LoraError, Problem
from lora_cli.models import load_config
from lora_cli.recipe import Recipe
from lora_cli.tasks import Task, build_task
from lora_cli.tasks.base import check_data, encode_located

FIRST_ROWS = 100


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
    problems += task.metric_problems()
    try:
        splits = check_data(task, ("train", "validation", "test"))
        if not problems:
            _encode_some(task, splits)
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


def _encode_some(task: Task, splits: dict[str, Rows]) -> None:
    """Encode the first rows of each split: what a chat template refuses, it refuses early."""
    for rows in splits.values():
        encode_located(task, next(rows.batches(FIRST_ROWS)), rows, 0)


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
