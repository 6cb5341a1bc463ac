"""The part of `Task` about measuring: the terms of its loss, and its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from lora_cli.errors import Problem, did_you_mean
from lora_cli.metrics import (
    LOSS,
    Channel,
    MetricContext,
    check_metric_names,
    definition,
    is_script,
    known_metrics,
    metric_mode,
    result_names,
)
from lora_cli.recipe import Recipe
from lora_cli.tasks.examples import MAIN


class TaskMetrics(ABC):
    """The methods of a task about its loss and its metrics."""

    recipe: Recipe
    metric_channel: Channel
    """What the task's own metrics read (see `metrics.Channel`)."""
    loss_weights: Mapping[str, float] = {MAIN: 1.0}
    """The terms of the loss, with their weights. A term is the mean over its own items."""
    main_term = "labels"
    """The name of the loss's main term in results, if there are several terms."""
    default_metrics: tuple[str, ...]
    """Metrics that are measured if the recipe names none; the first chooses the best adapter."""

    @property
    def train_loss_weights(self) -> Mapping[str, float]:
        """The terms of the loss in training, to which a teacher adds one, with their weights."""
        return self.loss_weights

    def check_metrics(self, channels: set[str]) -> None:  # noqa: B027 - optional
        """Note which channels the metrics read, so that `predictions` fills them."""

    def choose_rows_to_answer(self, sizes: Sequence[int]) -> None:  # noqa: B027 - optional
        """Choose the rows of a split that the model answers, if answering takes long.

        Args:
            sizes: The number of rows of each data set of the split, in their order.
        """

    def is_answered(self, row: int) -> bool:
        """Return whether a row is among those that `choose_rows_to_answer` chose."""
        return True

    @property
    def metric_names(self) -> Sequence[str]:
        """The recipe's metrics, or the task's own."""
        names = self.recipe.evaluate.metrics
        return self.default_metrics if names is None else names

    def metric_problems(self) -> list[Problem]:
        """Return what is wrong with the recipe's metrics, as far as their names show it."""
        names, at = self.metric_names, self.recipe.at("evaluate.metrics")
        problems = check_metric_names(names, self.metric_channel, self.metric_context, at)
        problems += self._untrusted(names, at)
        best = self.recipe.evaluate.best
        if best is None or best.metric == "loss":
            return problems
        at = self.recipe.at("evaluate.best.metric")
        known = ["loss", *(result for name in names for result in result_names(name))]
        builtin = all(name in known_metrics() for name in names)  # what others yield is not known
        of_set, metric = self.recipe.data.set_of_metric(best.metric)
        mix = self.recipe.data.mix
        if of_set is not None and mix[of_set].validation is None:
            what = f"the set `{of_set}` has no validation rows to choose the best adapter by"
            hint = f"give it some: `mix: {{{of_set}: {{validation: {{fraction: 0.1}}}}}}`"
            problems.append(Problem(what, at, hint))
        elif builtin and metric not in known:
            what = f"there is no metric `{best.metric}` to choose the best adapter by"
            measured = [name for name, one in mix.items() if one.validation is not None]
            known += [f"{name}/{metric}" for name in measured for metric in known]
            problems.append(Problem(what, at, did_you_mean(best.metric, known, "measured are")))
        elif best.mode is None and metric_mode(metric) is None:
            what = f"is a lower or a higher `{best.metric}` better?"
            problems.append(Problem(what, at, "set it with `evaluate.best.mode: min`, or `max`"))
        return problems

    def _untrusted(self, names: Sequence[str], at: str) -> list[Problem]:
        """Return a problem for each metric whose code the user has not allowed to run.

        A script that the user's own recipe names by its path is allowed.
        """
        recipe, problems = self.recipe, []
        if recipe.model.trust_remote_code:
            return []
        allow = "read that code; then `--set model.trust_remote_code=true`"
        for name in names:
            if is_script(name) and recipe.origin.metrics_of_adapter:
                problems.append(Problem(f"metric `{name}` is a Python script", at, allow))
            elif not is_script(name) and name not in (LOSS, *known_metrics()):
                what = f"metric `{name}` is not built in, and on the Hub metrics are Python code"
                suggestion = did_you_mean(name, known_metrics(), "built in are")
                problems.append(Problem(what, at, f"{suggestion}; or {allow}"))
        return problems

    def metric_definitions(self) -> dict[str, str]:
        """Return what the loss and each metric measure, by name."""
        lines: dict[str, str] = {}
        for name in self.metric_names:
            lines |= definition(name, self.metric_context)
        lines["loss"] = self.loss_definition
        if len(self.loss_weights) > 1:
            for term, weight in self.loss_weights.items():
                description = (
                    f"a term of the loss, of weight {weight:g}: the mean over the items that "
                )
                lines[self.result_of_term(term)] = f"{description}it counts"
        return lines

    def result_of_term(self, term: str) -> str:
        """Return the name that a term of the loss has in results: `loss_labels`."""
        return f"loss_{self.main_term if term == MAIN else term}"

    @property
    @abstractmethod
    def loss_definition(self) -> str:
        """What the loss measures: the mean of what, and in which unit."""

    @property
    def metric_context(self) -> MetricContext:
        """What the metrics need to know about the task."""
        return MetricContext()
