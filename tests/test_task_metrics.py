"""What a task says of its metrics: which there are, what is wrong with them, what they measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import tiny

from lora_cli.metrics import MetricContext, definition
from lora_cli.recipe.spec.recipe import Origin
from lora_cli.tasks.task_metrics import TaskMetrics

Json = dict[str, Any]


class Measured(TaskMetrics):
    """The least that a task says."""

    metric_channel = "label"
    default_metrics = ("accuracy", "f1")
    loss_definition = "mean over the rows"

    def __init__(
        self, weights: Mapping[str, float] | None = None, of_adapter: bool = False, **evaluate: Any
    ) -> None:
        values: Json = tiny.recipe_of().model_dump(exclude_unset=True)
        trusted = evaluate.pop("trusted", False)
        values["model"]["trust_remote_code"] = trusted
        recipe = type(tiny.recipe_of()).model_validate({**values, "evaluate": evaluate})
        self.recipe = recipe.with_origin(Origin(metrics_of_adapter=of_adapter))
        if weights is not None:
            self.loss_weights = weights

    @property
    def metric_context(self) -> MetricContext:
        return MetricContext(n_labels=2, labels=("bad", "good"))


def problems(**evaluate: Any) -> list[str]:
    return [problem.what for problem in Measured(**evaluate).metric_problems()]


def test_the_tasks_own_metrics_are_measured_unless_the_recipe_names_some() -> None:
    assert tuple(Measured().metric_names) == ("accuracy", "f1")
    assert list(Measured(metrics=["precision"]).metric_names) == ["precision"]
    assert list(Measured(metrics=[]).metric_names) == []


def test_a_task_that_chooses_no_rows_answers_all() -> None:
    task = Measured()
    task.choose_rows_to_answer([2, 1])
    assert [task.is_answered(row) for row in range(3)] == [True] * 3


def test_the_best_adapter_is_chosen_by_what_is_measured() -> None:
    assert problems() == []
    assert problems(best={"metric": "loss"}) == []
    assert problems(best={"metric": "f1"}) == []
    assert problems(best={"metric": "loss"}, metrics=[]) == []
    for metric, metrics in (("acuracy", None), ("f1", ["accuracy"]), ("f1", [])):
        assert problems(best={"metric": metric}, metrics=metrics) == [
            f"there is no metric `{metric}` to choose the best adapter by"
        ]
    (problem,) = Measured(best={"metric": "acuracy"}).metric_problems()
    assert "accuracy" in (problem.hint or "")


def test_a_metric_of_a_script_needs_a_direction(tmp_path: Any) -> None:
    script = tmp_path / "mine.py"
    script.write_text("")
    names = [str(script), "accuracy"]
    unknown = ["is a lower or a higher `mine` better?"]
    assert problems(metrics=names, best={"metric": "mine"}) == unknown
    assert problems(metrics=names, best={"metric": "mine", "mode": "min"}) == []
    assert problems(metrics=names, best={"metric": "mine", "mode": "max"}) == []
    assert problems(metrics=names, best={"metric": "accuracy"}) == []  # whose direction is known


def test_code_runs_only_if_the_user_named_it_or_allowed_it(tmp_path: Any) -> None:
    script = tmp_path / "mine.py"
    script.write_text("")
    scripts, hub = [str(script)], ["somebody/metric"]
    assert problems(metrics=scripts) == []
    assert problems(metrics=scripts, of_adapter=True) == [f"metric `{script}` is a Python script"]
    assert problems(metrics=scripts, of_adapter=True, trusted=True) == []
    for of_adapter in (True, False):
        assert problems(metrics=["accuracy"], of_adapter=of_adapter) == []
        assert problems(metrics=hub, of_adapter=of_adapter) == [
            "metric `somebody/metric` is not built in, and on the Hub metrics are Python code"
        ]
        assert problems(metrics=hub, of_adapter=of_adapter, trusted=True) == []
    assert len(problems(metrics=[*scripts, *hub, "accuracy"], of_adapter=True)) == 2


@pytest.mark.parametrize("trusted", [False, True])
def test_the_loss_is_no_metric_to_name(trusted: bool) -> None:
    found = problems(metrics=["accuracy", "loss"], trusted=trusted)
    assert found == ["`loss` is measured always, and not named"]


def test_names_are_checked_for_the_task() -> None:
    (problem,) = problems(metrics=["bleu"])
    assert "bleu" in problem


def test_each_measure_is_defined() -> None:
    task = Measured()
    context = task.metric_context
    accuracy, f1 = (definition(name, context) for name in ("accuracy", "f1"))
    assert task.metric_definitions() == {**accuracy, **f1, "loss": "mean over the rows"}
    assert list(Measured(metrics=[]).metric_definitions()) == ["loss"]


@pytest.mark.parametrize("weights", [{"boxes": 2.5}, {"boxes": 2.5, "classes": 1.0}])
def test_the_terms_of_a_loss_are_defined_where_there_are_several(
    weights: dict[str, float],
) -> None:
    found = Measured(weights, metrics=[]).metric_definitions()
    several = len(weights) > 1
    assert list(found) == ["loss", *(f"loss_{term}" for term in weights if several)]
    if several:
        assert "of weight 2.5: " in found["loss_boxes"]
        assert "of weight 1: " in found["loss_classes"]
