"""Evaluate a saved adapter for `lora eval`: on the recipe's splits, or on another file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_cli.accelerator import start_accelerator
from lora_cli.data.annotated_folder import annotated_files
from lora_cli.data.detect_format import read_head
from lora_cli.data.input_files import input_form
from lora_cli.data.load_rows import SPLITS
from lora_cli.data.media_folder import media_files
from lora_cli.errors import LoraError, require_file, warn
from lora_cli.evaluation.evaluate_split import evaluate
from lora_cli.evaluation.open_adapter import load_adapted, open_task
from lora_cli.preprocessing.cached_frozen_outputs import with_cached_frozen_outputs
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import Learned, Recipe
from lora_cli.tasks import build_task


def with_test_file(recipe: Recipe, file: Path) -> Recipe:
    """Return the recipe with a file as its test split, and without a validation split.

    Raises:
        LoraError: If there is no such file, or the recipe names no labels and cannot learn them,
            since its train split is on the Hub.
    """
    is_folder = file.is_dir() and bool(media_files(file, recipe))
    if recipe.task.boxes_column is not None and file.is_file():  # a list of images with boxes
        is_folder = annotated_files(file, "test", recipe) is not None
    if not is_folder:
        require_file(file, "--input")
    path, data = str(file.absolute()), recipe.data
    values: dict[str, Any] = {"data.validation": None, "data.test": path, "data.streaming": False}
    values["data.mix"] = {}
    task = build_task(recipe)
    columns = [*task.input_columns().values(), *task.target_columns().values()]
    if not is_folder:
        decimal, thousands = data.number_forms[0]  # if several sets are mixed, those of the first
        form = data.format.model_copy(update={"decimal": decimal, "thousands": thousands})
        values["data.format"] = input_form(file, read_head(file), form, columns)
    if data.mix:  # the metric may be for one set of the mixture, and a file has no sets
        values["evaluate.best"] = None
    if data.name is not None or data.mix:
        if not task.knows_labels:
            raise LoraError(
                "the labels are not known",
                recipe.at("task.labels"),
                "name them in the order of the model's outputs: `--set 'task.labels=[no, yes]'`",
            )
        if task.reads_train:
            hint = "name them in the recipe, or leave them out"
            at = recipe.at("task.class_weights")
            raise LoraError("the weights of the labels are not known", at, hint)
        # nothing reads the train split, as the labels are known
        values |= {"data.name": None, "data.config": None, "data.train": path}
    return recipe.with_values(values)


def definitions_of(recipe: Recipe) -> dict[str, str]:
    """Return the definitions of the loss and of each metric of a recipe, by name.

    Args:
        recipe: A recipe that names its labels, as the recipe of a trained adapter does.
    """
    return build_task(recipe).metric_definitions()


def evaluate_adapter(
    folder: Path, recipe: Recipe, split: str | None = None, learned: Learned | None = None
) -> dict[str, dict[str, float]]:
    """Return the metrics of a saved adapter, by split. The data is checked before loading it.

    Args:
        folder: The adapter's folder.
        recipe: Defines the task and the data.
        split: The split to measure; None measures validation and test.
        learned: Receives values that are learned from the rows, such as the labels.

    Raises:
        LoraError: If the recipe does not have the split, or it is a streamed train split.
        NumericsError: If a row's loss is NaN or infinite.
    """
    present = [name for name in SPLITS if recipe.data.has(name)]
    measured = [name for name in present if name == split or (not split and name != "train")]
    if not measured:
        raise LoraError(
            f"the recipe has no split `{split or 'validation or test'}`",
            recipe.at("data"),
            f"it has {', '.join(present)}; or name a file with `--input FILE`",
        )
    if "train" in measured and recipe.data.streaming:
        hint = "`--set data.streaming=false` reads it as a whole"
        raise LoraError("train is streamed: it has no end", recipe.at("data.streaming"), hint)
    accelerator = start_accelerator(recipe)
    task = open_task(folder, recipe, learned)
    data = load_data(task, measured)
    warnings = (
        task.unknown_input(name, data[name].rows, data[name].examples)[1] for name in measured
    )
    if warning := next(filter(None, warnings), None):
        warn(warning)
    model = load_adapted(folder, task, accelerator)
    splits = with_cached_frozen_outputs(
        task, model, {name: data[name] for name in measured}, accelerator
    )
    return {
        name: evaluate(model, task, encoded, accelerator, strict_loss=True)
        for name, encoded in splits.items()
    }
