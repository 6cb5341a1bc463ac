"""Handle bad steps, whose loss or gradient is NaN or infinite.

A bad step is skipped, several in a row end the run. The cause may be the rows of the step or the
weights. The update is skipped (see `engine.py`), so that bad rows cannot damage the weights. If the
weights are the cause, the next steps are bad too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_cli.adapters.attach import trainable_parameters
from lora_cli.errors import NumericsError
from lora_cli.recipe import Recipe
from lora_cli.training.checkpoints import checkpoints

MAX_BAD_STEPS = 5  # in a row
MAX_PLACES = 8
NOT_FINITE = "the loss or the gradient is NaN or infinity"


@dataclass(frozen=True)
class BadStep:
    """A step whose loss or gradient is NaN or infinite."""

    number: int
    places: Callable[[], list[str]]
    """Returns the locations of its rows."""

    def rows(self) -> str:
        """Return the locations of its rows, for a message."""
        places = self.places()
        others = f" and {len(places) - MAX_PLACES} more" if len(places) > MAX_PLACES else ""
        return f"{', '.join(places[:MAX_PLACES])}{others}"

    def warning(self) -> str:
        """Return the warning to print."""
        return f"warning: step {self.number} is left out: {NOT_FINITE}; its rows: {self.rows()}"


def reject_bad_steps(streak: Sequence[BadStep], recipe: Recipe, limit: int = MAX_BAD_STEPS) -> None:
    """End a run if too many consecutive steps were bad.

    Args:
        streak: The consecutive bad steps up to now.
        recipe: The recipe of the run.
        limit: The number of bad steps that ends the run.

    Raises:
        NumericsError: If there are at least `limit` bad steps.
    """
    if len(streak) < limit:
        return
    first, last = streak[0].number, streak[-1].number
    steps = f"in steps {first} to {last}" if first < last else f"at step {last}"
    # a checkpoint of the previous step would contain the weights that gave this loss
    cause = f"or check the rows of step {first}: {streak[0].rows()}"
    raise _error(f"{NOT_FINITE} {steps}", recipe, first - 1, cause)


def reject_bad_scale(scale: float, step: int, recipe: Recipe) -> None:
    """End an fp16 run whose gradients overflow even with a small loss scale.

    Raises:
        NumericsError: If the scale has been lowered below 1.
    """
    if scale < 1:
        what = f"gradients overflow in fp16 at step {step}, though the loss is not scaled up"
        raise _error(what, recipe, step, "or use bf16 or fp32")


def reject_bad_parameters(model: nn.Module, step: int, recipe: Recipe) -> None:
    """Reject a model whose trained parameters are not finite, before it is saved or evaluated.

    Raises:
        NumericsError: With the name of such a parameter.
    """
    parameters = trainable_parameters(model)
    finite = torch.stack([p.isfinite().all() for p in parameters.values()])
    if not finite.all():
        name = list(parameters)[int(finite.int().argmin())]
        what = f"`{name}` contains NaN or infinity at step {step}"
        raise _error(what, recipe, step, "or shorten longer gradients with `train.max_grad_norm`")


def _error(what: str, recipe: Recipe, bad_from: int, alternative: str) -> NumericsError:
    """Return the error, with a hint that names the good checkpoints: those before a step."""
    steps = [step for step, _ in checkpoints(recipe.output_path)]
    good = [step for step in steps if step < bad_from]
    hint = f"lower the learning rate, lengthen the warm-up, {alternative}"
    if good:
        hint += f"; the checkpoint of step {good[-1]} is good"
    if good != steps:
        hint += "; delete those after it" if good else f"; do not trust that of step {steps[0]}"
    return NumericsError(what, recipe.at("train.optimizer.learning_rate"), hint)
