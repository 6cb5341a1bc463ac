"""The second stage of checking: data, labels, metrics and targets, on a model without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_cli.adapters.starting import make_trainable
from lora_cli.data.sources import Rows
from lora_cli.errors import LoraError, Problem
from lora_cli.metrics import MetricSet, known_metrics
from lora_cli.models import load_config
from lora_cli.recipe import Recipe
from lora_cli.tasks import Task, build_task
from lora_cli.tasks.encoding import check_data, encode_located, nothing_trained
from lora_cli.tasks.streaming import Stream

FIRST_ROWS = 100


def check_recipe(recipe: Recipe) -> None:
    """Find everything that would stop `lora train` later, and raise it together.

    Raises:
        LoraError: With every problem of the model, the data, the labels and the targets.
    """
    task = build_task(recipe)
    problems: list[Problem] = []
    with _collected(problems):
        task.load_processor()
    has_processor = not problems
    with _collected(problems):
        _check_metrics(task)
    with _collected(problems):
        splits = check_data(task, ("train", "validation", "test"))
        if has_processor:
            _encode_some(task, splits)
    if has_processor:
        with _collected(problems):
            model, new = task.empty_model()
            make_trainable(model, recipe, new)
    if problems:
        raise LoraError(problems)


@contextmanager
def _collected(problems: list[Problem]) -> Iterator[None]:
    try:
        yield
    except LoraError as error:
        problems += error.problems


def _check_metrics(task: Task) -> None:
    if problems := task.metric_problems():
        raise LoraError(problems)
    if set(task.metric_names) - set(known_metrics()):  # only `evaluate` knows what it can load
        at = task.recipe.at("evaluate.metrics")
        MetricSet(task.metric_names, task.metric_channel, task.metric_context, at)


def _encode_some(task: Task, splits: dict[str, Rows]) -> None:
    """Encode the first rows of each split: what a chat template refuses, it refuses early."""
    for rows in splits.values():
        made = encode_located(task, next(rows.batches(FIRST_ROWS)), rows.place)
        if not any(made) and len(rows) <= FIRST_ROWS:
            raise nothing_trained(task, rows)
    if task.recipe.data.streaming:
        Stream(task).look()


def empty_adapted_model(recipe: Recipe) -> nn.Module:
    """Return the model on the meta device with its adapter attached; needs its config only.

    The data are read only where the recipe does not name the labels.
    """
    task = build_task(recipe)
    task.config = load_config(recipe)
    if not task.knows_labels:
        check_data(task, ())
    model, new = task.empty_model()
    make_trainable(model, recipe, new)
    return model
