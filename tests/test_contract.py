"""What the contract of tasks computes itself: a batch's loss, its predictions, their inputs."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_cli.tasks import contract
from lora_cli.tasks.contract import Task, prepared_for_evaluation
from lora_cli.tasks.examples import Batch, Prediction
from lora_cli.tasks.hidden_states import STATES

MODEL: Any = "model"


class Small(Task):
    """A task whose output is twice the input, with a loss of two terms."""

    loss_weights = {"loss": 1.0, "extra": 0.5}  # type: ignore[assignment]
    train_loss_weights = {"loss": 1.0, "teacher": 3.0}  # type: ignore[assignment]
    terms = ("loss", "extra")

    def __init__(self) -> None:
        self.frozen_layers = None
        self.recipe: Any = SimpleNamespace(train=SimpleNamespace(seed=5))

    def forward(self, model: Any, batch: Batch) -> Tensor:
        assert model is MODEL
        return 2 * batch.inputs["x"]

    def losses(self, model: Any, output: Any, batch: Batch) -> dict[str, Tensor]:
        assert model is MODEL
        second = self.terms[1]
        return {"loss": output + batch.targets["y"], second: output * 10}

    def predictions(self, model: Any, output: Any, batch: Batch) -> list[Prediction]:
        assert model is MODEL
        return [Prediction(row, float(x), None) for row, x in zip(batch.rows, output, strict=True)]

    def collate(self, examples: Any) -> Batch:
        x = torch.tensor([float(one["x"]) for one in examples])
        items = {"loss": torch.ones(len(x)), self.terms[1]: torch.full((len(x),), 2.0)}
        return Batch(
            {"x": x}, {"y": torch.ones(len(x))}, items, 7, [one["row"] for one in examples]
        )


Small.__abstractmethods__ = frozenset()  # what is not asked for here

BATCH = [{"x": 1.0, "row": 4}, {"x": 3.0, "row": 2}]


@pytest.mark.parametrize(("second", "weight"), [("extra", 0.5), ("teacher", 3.0)])
def test_a_loss_is_the_weighted_sum_of_its_terms(second: str, weight: float) -> None:
    task = Small()
    task.terms = ("loss", second)
    batch = task.batch(BATCH)
    wanted = (2 + 1) + (6 + 1) + weight * 10 * (2 + 6)
    assert float(task.loss(MODEL, batch)) == wanted


def test_predictions_have_the_losses_and_items_of_each_term() -> None:
    task = Small()
    found = task.predict(MODEL, task.batch(BATCH))
    assert [(one.row, one.prediction) for one in found] == [(4, 2.0), (2, 6.0)]
    assert [one.losses for one in found] == [
        {"loss": (3.0, 1.0), "extra": (20.0, 2.0)}, {"loss": (7.0, 1.0), "extra": (60.0, 2.0)},
    ]  # fmt: skip


def test_cached_states_enter_the_model_and_are_no_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Small()
    entered: list[Any] = []

    @contextmanager
    def skipping(states: Any) -> Any:
        entered.append(states)
        yield

    task.frozen_layers = SimpleNamespace(skipping=skipping)  # type: ignore[assignment]
    monkeypatch.setattr(
        contract, "states_of_batch", lambda kept, inputs: {"kept": (kept, list(inputs))}
    )
    monkeypatch.setattr(
        contract, "without_states",
        lambda inputs: ({"x": inputs["x"]}, {k: v for k, v in inputs.items() if k != "x"}),
    )  # fmt: skip
    plain = task.batch(BATCH)
    assert task.output(MODEL, plain).tolist() == [2.0, 6.0]
    assert entered == []
    kept = task.batch([{**one, STATES: i} for i, one in enumerate(BATCH)])
    assert kept.inputs["kept"] == ([0, 1], ["x"])
    assert task.output(MODEL, kept).tolist() == [2.0, 6.0]
    assert entered == [{"kept": ([0, 1], ["x"])}]


def test_an_example_is_drawn_by_its_seed_and_row_in_every_evaluation() -> None:
    class Drawing(Small):
        def prepare(self, example: Any, rng: np.random.Generator, training: bool) -> Any:
            assert not training
            return {**example, "drawn": rng.random()}

    found = prepared_for_evaluation(Drawing(), {"row": 7, "x": 1})
    assert found == {"row": 7, "x": 1, "drawn": np.random.default_rng((5, 7)).random()}


def test_examples_are_prepared_by_tasks_that_draw_or_keep_outputs() -> None:
    class Prepares(Small):
        def prepare(self, example: Any, rng: Any, training: bool) -> Any:
            return example

    class Keeps(Small):
        def frozen_outputs(self, model: Any, batch: Any) -> Any:
            return {}

    assert [kind().prepares for kind in (Small, Prepares, Keeps)] == [False, True, True]


def test_what_a_task_does_not_say_of_itself_does_not_hold() -> None:
    task = Small()
    for name in (
        "same_in_any_batch", "several_inputs", "waits_for_device", "couples_examples",
        "compares_rows", "joins_examples", "augments", "has_head",
    ):  # fmt: skip
        assert getattr(task, name) is False, name
    assert task.max_length is None
