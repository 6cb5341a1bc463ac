"""Which evaluation is the best so far, and whether it is time to stop looking for a better."""

from __future__ import annotations

import math
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_split import best_by
from lora_cli.recipe import Recipe
from lora_cli.tasks.contract import Task
from lora_cli.training.train_state import TrainState


class Judge:
    """Judges evaluations by one metric; what it finds goes into the state of the run.

    Args:
        recipe: Its `evaluate` section says by what, and how patiently.
        task: Has a metric of its own, where the recipe names none.
    """

    def __init__(self, recipe: Recipe, task: Task) -> None:
        self.recipe = recipe
        self.metric, self.mode = best_by(recipe, task)

    def value(self, metrics: dict[str, float]) -> float:
        """Return the metric that decides.

        Raises:
            LoraError: If it was not measured.
        """
        if self.metric not in metrics:
            raise LoraError(
                f"there is no metric `{self.metric}`",
                self.recipe.at("evaluate.best.metric"),
                f"validation gives {', '.join(metrics)}",
            )
        return metrics[self.metric]

    def warning(self, metrics: dict[str, float], step: int) -> str | None:
        """Return what to say of a metric that is not a number, else None."""
        value = self.value(metrics)
        if math.isfinite(value):
            return None
        return (
            f"warning: `{self.metric}` is {value} at step {step}: it chooses no adapter, and does "
            "not count for early stopping; `evaluate.best` can name another metric"
        )

    def improved(self, metrics: dict[str, float], state: TrainState, epoch: float) -> bool:
        """Return whether an evaluation is the best; decide whether it is time to stop.

        One that is not a number says nothing of whether the model improves, so it uses up no
        patience.
        """
        value, best = self.value(metrics), state.best
        if not math.isfinite(value):
            return False
        sign = 1 if self.mode == "max" else -1
        gain = sign * (value - best["value"]) if best else math.inf
        improved = gain > 0
        if improved:
            state.best = self._facts(value, state.step, epoch)
        stopping = self.recipe.evaluate.early_stopping
        enough = improved and gain > (stopping.min_delta if stopping else 0.0)
        state.without_improvement = 0 if enough else state.without_improvement + 1
        state.stopped_early = bool(stopping and state.without_improvement >= stopping.patience)
        return improved

    def _facts(self, value: float, step: int, epoch: float) -> dict[str, Any]:
        facts = {"metric": self.metric, "mode": self.mode, "value": value}
        return facts | {"step": step, "epoch": epoch}
