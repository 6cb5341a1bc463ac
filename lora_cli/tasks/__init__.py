"""Tasks: what differs between kinds of work. One file each, named as the recipe's `task.type`."""

from __future__ import annotations

from typing import assert_never

from lora_cli.recipe import (
    CausalLMSpec,
    ImageClassificationSpec,
    Learned,
    Recipe,
    SequenceClassificationSpec,
    TokenClassificationSpec,
)
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Batch, Encoded, Example, Prediction


def build_task(recipe: Recipe, learned: Learned | None = None) -> Task:
    """Return the task that the recipe names.

    Args:
        recipe: The recipe.
        learned: Gets what the task learns of its rows; None: a new one, `task.learned`.
    """
    task = _task_of(recipe)
    if learned is not None:
        task.learned = learned
    return task


def _task_of(recipe: Recipe) -> Task:
    match recipe.task:
        case SequenceClassificationSpec():
            from lora_cli.tasks.sequence_classification import SequenceClassification

            return SequenceClassification(recipe, recipe.task)
        case TokenClassificationSpec():
            from lora_cli.tasks.token_classification import TokenClassification

            return TokenClassification(recipe, recipe.task)
        case CausalLMSpec():
            from lora_cli.tasks.causal_lm import CausalLM

            return CausalLM(recipe, recipe.task)
        case ImageClassificationSpec():
            from lora_cli.tasks.image_classification import ImageClassification

            return ImageClassification(recipe, recipe.task)
        case _:
            assert_never(recipe.task)


__all__ = ["Batch", "Encoded", "Example", "Prediction", "Task", "build_task"]
