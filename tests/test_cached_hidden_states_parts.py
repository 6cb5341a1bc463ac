"""Tests of when hidden states are cached, for which examples, and how closely losses must agree."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_cli.preprocessing import cached_hidden_states
from lora_cli.preprocessing.cached_hidden_states import (
    _reason_not_to_cache,
    _require_same_form,
    _shape,
    _ShapeMismatchError,
    _States,
    _TooLargeError,
    passes_over,
    with_cached_hidden_states,
)
from lora_cli.tasks.hidden_states import STATES, CachedState


class Examples(list[Any]):
    """Examples with the interface of a table."""

    def __getitems__(self, positions: list[int]) -> list[Any]:
        return [dict(self[i]) for i in positions]


def split_of(examples: list[Any], lengths: list[int] | None = None) -> Any:
    class Split:
        def __len__(self) -> int:
            return len(examples)

    split: Any = Split()
    split.examples = Examples(examples)
    split.lengths = np.array(lengths or [1] * len(examples))
    return split


class Prepared:
    """A task whose examples are numbers."""

    augments = False

    def __init__(self, micro_batch: int = 2, evaluated: int | None = None) -> None:
        self.micro_batch = micro_batch
        self.recipe = SimpleNamespace(
            evaluate=SimpleNamespace(micro_batch_size=evaluated, baseline=True),
            train=SimpleNamespace(packing=False, seed=5),
            data=SimpleNamespace(cache_bytes=10**6, cache_limit="1 MB"),
            adapter=SimpleNamespace(frozen_entries=[]),
        )
        self.notes: list[str] = []
        self.same_in_any_batch = self.several_inputs = False
        self.frozen_layers: Any = SimpleNamespace(recorded=("a",), frozen=("a", "b"))
        self.frozen_facts: dict[str, str] = {}
        self.drawn: list[Any] = []
        self.differs_at: int | None = None

    def frozen_parts(self, model: nn.Module) -> dict[str, nn.Module]:
        return {}

    def prepare(self, row: Any, rng: Any, training: bool) -> Any:
        assert training
        draw = len(self.drawn) // 4
        self.drawn.append(row)
        changed = draw == self.differs_at and row["x"] == 3
        return {"x": row["x"] + changed}

    def collate(self, rows: list[Any]) -> Any:
        batch = SimpleNamespace(inputs={"x": torch.tensor([row["x"] for row in rows])})
        batch.to = lambda device: batch
        return batch


def states_of(task: Any, layers: Any = None, model: nn.Module | None = None) -> Any:
    accelerator: Any = SimpleNamespace(autocast=contextlib.nullcontext, device="cpu")
    return _States(task, model or nn.Linear(1, 1), accelerator, layers)


@pytest.fixture(autouse=True)
def _as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cached_hidden_states, "prepared_for_evaluation", lambda task, example: example
    )


# ----------------------------------------------------------------------------------- whether


@pytest.mark.parametrize(
    ("steps", "epochs", "baseline", "train", "test"),
    [(None, None, False, 3.0, 1.0), (None, 0.5, True, 0.5, 2.0), (10, None, False, 4.0, 1.0),
     (10, 7.0, True, 4.0, 2.0)],
)  # fmt: skip
def test_how_often_a_run_computes_each_split(
    steps: int | None, epochs: float | None, baseline: bool, train: float, test: float
) -> None:
    recipe: Any = SimpleNamespace(
        train=SimpleNamespace(max_steps=steps, epochs=epochs, step_size=8),
        evaluate=SimpleNamespace(baseline=baseline),
    )
    splits = {"train": split_of([0] * 20), "validation": split_of([0])}
    assert passes_over(recipe, splits) == {"train": train, "test": test}
    assert passes_over(recipe, {}) == {"test": test}


def test_reasons_to_cache_no_split() -> None:
    task: Any = Prepared()
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert _reason_not_to_cache(task, model) == ""
    task.frozen_parts = lambda _: {"other": nn.Linear(1, 1)}
    assert _reason_not_to_cache(task, model) == ""
    task.frozen_parts = lambda _: {"first": model[0]}
    assert "the task keeps" in _reason_not_to_cache(task, model)
    task.several_inputs = True
    assert _reason_not_to_cache(task, model) == "an example has several texts"
    task.same_in_any_batch = True
    assert _reason_not_to_cache(task, model) == "texts share rows"
    task.frozen_layers.recorded = ()
    assert "hand on more than hidden states" in _reason_not_to_cache(task, model)
    task.recipe.data.cache_bytes = 0
    assert _reason_not_to_cache(task, model) == "`data.cache_limit` is 0"


@pytest.mark.parametrize(
    ("name", "packing", "drawn", "agrees", "why"),
    [
        ("train", False, False, True, ""), ("train", True, False, True, "`train.packing`"),
        ("test", True, True, True, ""), ("train", False, True, True, "training draws"),
        ("train", False, False, False, "with it alone"), ("test", False, False, False, "with it"),
    ],
)  # fmt: skip
def test_reasons_not_to_cache_a_split(
    name: str, packing: bool, drawn: bool, agrees: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Prepared()
    task.recipe.train.packing = packing
    monkeypatch.setattr(_States, "inputs_vary", lambda *_: drawn)
    monkeypatch.setattr(_States, "is_equivalent", lambda *_: agrees)
    found = states_of(task).reason_not_to_cache(name, split_of([0]))
    assert found.startswith(why)
    assert bool(found) == bool(why)


@pytest.mark.parametrize(("differs_at", "drawn"), [(None, False), (0, True), (3, True), (4, False)])
def test_augmentation_is_detected_in_four_draws_of_a_batch(
    differs_at: int | None, drawn: bool
) -> None:
    task = Prepared()
    task.differs_at = differs_at
    split = split_of([{"x": i} for i in range(9)])
    assert states_of(task).inputs_vary(split) == drawn
    assert len(task.drawn) == 4 * (4 if differs_at in (None, 4) else differs_at + 1)
    task.augments = True
    assert states_of(task).inputs_vary(split)


def test_a_task_without_preparation_has_no_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_hidden_states.Task, "prepare", Prepared.prepare)
    task = Prepared()
    task.differs_at = 0
    assert not states_of(task).inputs_vary(split_of([{"x": 3}] * 4))
    assert task.drawn == []


@pytest.mark.parametrize(("micro", "evaluated", "size"), [(3, None, 6), (1, None, 2), (3, 5, 5)])
def test_the_number_of_examples_in_a_forward_pass(
    micro: int, evaluated: int | None, size: int
) -> None:
    assert states_of(Prepared(micro, evaluated)).batch_size == size


# ------------------------------------------------------------------------------- agreement


class Layers:
    """Layers whose last outputs, or the inputs of a head, are cached."""

    def __init__(self, first: str | None, last: tuple[str, ...]) -> None:
        self.first, self.last = first, last

    def recording_last(self) -> Layers:
        return Layers(None, self.last)


@pytest.mark.parametrize(
    ("first", "last", "answers", "agrees", "tries"),
    [
        ("head", ("a",), [True], True, 1), ("head", ("a",), [False, True], True, 2),
        ("head", ("a",), [False, False], False, 2), ("head", (), [False], False, 1),
        (None, ("a",), [False], False, 1), (None, ("a",), [True], True, 1),
    ],
)  # fmt: skip
def test_inputs_of_the_head_are_tried_before_outputs_of_the_last_layers(
    first: str | None, last: tuple[str, ...], answers: list[bool], agrees: bool, tries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, asked = nn.Linear(1, 1), []

    def agree_on(self: Any, split: Any, positions: list[int]) -> bool:
        assert not model.training
        asked.append((positions, self.layers.first))
        return answers[len(asked) - 1]

    monkeypatch.setattr(_States, "_outputs_match", agree_on)
    lengths = [5, 9, 1, 3, 7, 2, 8, 4, 6]
    states = states_of(Prepared(), Layers(first, last), model)
    assert states.is_equivalent(split_of([0] * 9, lengths)) is agrees
    # the shortest, the longest and two in between, of 1, 3, 6 and 9 tokens
    assert asked == [([1, 2, 3, 8], first), ([1, 2, 3, 8], None)][:tries]
    assert model.training


@pytest.mark.parametrize(
    ("dtype", "loss", "near", "far"),
    [
        (torch.float32, 0.5, 6.0e-5, 6.2e-5), (torch.float32, 10.0, 6.0e-4, 6.2e-4),
        (torch.bfloat16, 1.0, 0.249, 0.251), (torch.float64, 1.0, 1.13e-13, 1.15e-13),
        (torch.float32, torch.nan, 0.0, None), (torch.float32, torch.inf, 0.0, None),
    ],
)  # fmt: skip
def test_losses_agree_up_to_rounding_of_the_cached_dtype(
    dtype: torch.dtype, loss: float, near: float, far: float | None, monkeypatch: Any
) -> None:
    kept = {"a": CachedState(np.zeros(8, dtype=np.uint8), dtype, (2,))}
    monkeypatch.setattr(_States, "_compute", lambda self, split, positions: [kept])
    brought: list[Any] = []

    class Task(Prepared):
        losses_of: float = 0.0

        def forward(self, model: Any, batch: Any) -> str:
            return "whole"

        def output(self, model: Any, batch: Any) -> str:
            return "kept"

        def batch(self, rows: list[Any]) -> Any:
            brought.extend(row[STATES] for row in rows)
            return self.collate(rows)

        def losses(self, model: Any, output: str, batch: Any) -> Any:
            value = loss + (self.losses_of if output == "kept" else 0.0)
            rows = torch.tensor([value, loss], dtype=torch.float64)
            return {"loss": rows, "other": torch.zeros(2, dtype=torch.float64)}

    task = Task()
    split = split_of([{"x": 1}, {"x": 2}, {"x": 3}])
    for difference, agrees in ((near, True), (far, False)):
        if difference is not None:
            task.losses_of = difference
            assert states_of(task)._outputs_match(split, [0, 2]) is agrees
    assert brought[:2] == [kept, kept]


# ---------------------------------------------------------------------------------- keeping


def test_examples_of_the_same_shape_are_computed_together() -> None:
    lengths = [2, 3, 2, 1, 3, 2, 2, 2]
    examples = [{"ids": list(range(n)), "row": 7, "mask": np.ones(1)} for n in lengths]
    assert _shape(examples[1]) == (3, 1)
    found = states_of(Prepared(1))._groups(split_of(examples))
    assert found == [[3], [0, 2], [5, 6], [7], [1, 4]]


def kept(n: int, dtype: torch.dtype = torch.float32) -> dict[str, CachedState]:
    return {"a": CachedState(np.arange(n, dtype=np.uint8), dtype, (2,))}


@pytest.mark.parametrize(
    ("limit", "error"),
    [(60, None), (40, None), (39, 40.0), (30, 40.0), (29, 60.0)],
)
def test_caching_ends_as_soon_as_the_limit_will_be_exceeded(
    limit: int, error: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # two groups of two examples: with one token, then with two tokens, of ten bytes each
    split = split_of([0] * 4, [1, 1, 2, 2])
    monkeypatch.setattr(_States, "_compute", lambda self, split, group: [kept(10) for _ in group])
    rows = states_of(Prepared())._rows(split, [[0, 1], [2, 3]], limit, kept(10))
    if error is None:
        assert list(rows) == [{"a": bytes(range(10))}] * 4
        return
    with pytest.raises(_TooLargeError) as caught:
        list(rows)
    assert caught.value.n_bytes == error


def test_states_may_only_differ_in_length() -> None:
    _require_same_form(kept(10), kept(20))
    with pytest.raises(_ShapeMismatchError):
        _require_same_form(kept(10), kept(10, torch.float16))


def test_the_hash_covers_only_frozen_tensors() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    states = states_of(Prepared(), model=model)
    before = states._hash()
    with torch.no_grad():
        model[0].bias.add_(1.0)
    assert states._hash() == before
    with torch.no_grad():
        model[0].weight.add_(1.0)
    frozen = states._hash()
    assert frozen != before
    model[1].running_mean.add_(1.0)
    assert states._hash() != frozen


def test_splits_share_the_cache_limit_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = Prepared()
    limits: list[int] = []

    def added(self: Any, split: Any, limit: int) -> Any:
        limits.append(limit)
        if split.n_bytes > limit:
            raise _TooLargeError(split.n_bytes)
        return f"kept {split.name}", split.n_bytes

    passes = {"once": 1.0, "twice": 2.0}
    monkeypatch.setattr(cached_hidden_states, "passes_over", lambda *_: passes)
    monkeypatch.setattr(cached_hidden_states, "find_layers", lambda *_: task.frozen_layers)
    monkeypatch.setattr(_States, "reason_not_to_cache", lambda self, name, split: split.why)
    monkeypatch.setattr(_States, "with_states", added)
    splits: Any = {
        name: SimpleNamespace(name=name, n_bytes=n_bytes, why=why)
        for name, n_bytes, why in (
            ("once", 1, ""), ("twice", 600_000, ""), ("large", 600_000, ""),
            ("odd", 1, "it is odd"), ("small", 400_000, ""),
        )
    }  # fmt: skip
    accelerator: Any = None
    found = with_cached_hidden_states(task, nn.Linear(1, 1), splits, accelerator)
    assert limits == [1_000_000, 400_000, 400_000]
    assert [found[name] == f"kept {name}" for name in splits] == [False, True, False, False, True]
    assert found["once"] is splits["once"]
    said = task.frozen_facts["frozen_layers"]
    for part in (
        "layers: 2 in evaluation mode; once: not kept: the run computes it once; twice: kept, ",
        "large: not kept: it takes about ", "odd: not kept: it is odd; small: kept, ",
    ):  # fmt: skip
        assert part in said
    assert task.notes == [f"frozen {said}"]
    monkeypatch.setattr(
        cached_hidden_states, "_reason_not_to_cache", lambda *_: "there is a reason"
    )
    found = with_cached_hidden_states(task, nn.Linear(1, 1), splits, accelerator)
    assert found == splits
    assert "once: not kept: there is a reason" in task.frozen_facts["frozen_layers"]
