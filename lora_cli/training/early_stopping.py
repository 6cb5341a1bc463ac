"""Find the best evaluation so far, and stop early if the metric no longer improves."""

from __future__ import annotations

import math
from typing import Any

from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_split import best_by
from lora_cli.recipe import Recipe
from lora_cli.tasks.contract import Task
from lora_cli.training.train_state import TrainState


class Judge:
    """Compares evaluations by one metric, and keeps the best in the state of the run.

    Args:
        recipe: The `evaluate` section defines the metric, and when to stop early.
        task: Supplies a default metric.
    """

    def __init__(self, recipe: Recipe, task: Task) -> None:
        self.recipe = recipe
        self.metric, self.mode = best_by(recipe, task)

    def value_of(self, metrics: dict[str, float]) -> float:
        """Return the value of the metric that selects the best adapter.

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
        """Return a warning if the metric is NaN or infinite, otherwise None."""
        value = self.value_of(metrics)
        if math.isfinite(value):
            return None
        return (
            f"warning: `{self.metric}` is {value} at step {step}: it chooses no adapter, and does "
            "not count for early stopping; `evaluate.best` can name another metric"
        )

    def used_metric_of(self, best: dict[str, Any]) -> bool:
        """Return whether the best evaluation so far was selected by the same metric."""
        return (best["metric"], best["mode"]) == (self.metric, self.mode)

    def best_of(self, metrics: dict[str, float], position: dict[str, Any]) -> dict[str, Any] | None:
        """Return an evaluation as the state of a run stores the best one; None if not finite.

        Args:
            metrics: The metrics of the evaluation.
            position: The `step` and the `epoch` of the adapter.
        """
        value = self.value_of(metrics)
        facts = {"metric": self.metric, "mode": self.mode, "value": value}
        location = {key: position[key] for key in ("step", "epoch")}
        return facts | location if math.isfinite(value) else None

    def improved(self, metrics: dict[str, float], state: TrainState, epoch: float) -> bool:
        """Return whether an evaluation is the best so far; update the state of the run.

        Values that are not finite do not show whether the model improves, so they do not count
        for early stopping either.
        """
        value, best = self.value_of(metrics), state.best
        if not math.isfinite(value):
            return False
        gain = math.inf
        if best is not None:
            gain = value - best["value"] if self.mode == "max" else best["value"] - value
        improved = gain > 0
        if improved:
            state.best = self.best_of(metrics, {"step": state.step, "epoch": epoch})
        rule = self.recipe.evaluate.early_stopping
        improved_enough = improved and gain > (rule.min_delta if rule else 0.0)
        state.without_improvement = 0 if improved_enough else state.without_improvement + 1
        state.stopped_early = rule is not None and state.without_improvement >= rule.patience
        return improved
