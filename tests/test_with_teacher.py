"""How a student's labels and tokens are compared with its teacher's, one value at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lora_cli.errors import LoraError
from lora_cli.tasks.classification.classification_task import Classification
from lora_cli.tasks.examples import IGNORED
from lora_cli.tasks.teachers import with_teacher
from lora_cli.tasks.teachers.with_teacher import (
    TaughtCausalLM,
    TaughtClassification,
    TaughtSequenceClassification,
)

NAMELESS = ["LABEL_0", "LABEL_1"]


def order(theirs: list[str], ours: list[str]) -> list[int]:
    own: Any = SimpleNamespace(
        labels=ours, teacher=SimpleNamespace(task=SimpleNamespace(labels=theirs))
    )
    return TaughtClassification._order(own)


@pytest.mark.parametrize(
    ("theirs", "ours", "found"),
    [
        (["a", "b", "c"], ["c", "a", "b"], [2, 0, 1]), (["No", "Yes"], ["yes", "no"], [1, 0]),
        (NAMELESS, ["0", "1"], [0, 1]), (NAMELESS, ["LABEL_1", "LABEL_0"], [1, 0]),
        (["0", "1"], ["1", "0"], [1, 0]),
    ],
)  # fmt: skip
def test_labels_stand_where_the_teacher_has_them(
    theirs: list[str], ours: list[str], found: list[int]
) -> None:
    assert order(theirs, ours) == found


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (["a", "b"], ["a", "c"], "it has no label `c`; its labels are `a`, `b`"),
        (["a", "b", "c"], ["c", "a"], "it has the label `b`, which the recipe does not have"),
        (NAMELESS, ["1", "0"], "its 2 labels have no names"), (NAMELESS, ["no", "yes"], "its 2 l"),
        (list("abcdefg"), ["x"], "`a`, `b`, `c`, `d`, `e` and 2 more"),
        (list("abcde"), ["x"], "`a`, `b`, `c`, `d`, `e`"),
    ],
)  # fmt: skip
def test_other_labels_are_named(theirs: list[str], ours: list[str], said: str) -> None:
    with pytest.raises(LoraError) as caught:
        order(theirs, ours)
    (problem,) = caught.value.problems
    assert said in problem.what
    assert problem.what.endswith("more") == said.endswith("more")


@pytest.mark.parametrize(
    ("labels", "ignored"),
    [(IGNORED, True), (3, False), ([IGNORED, IGNORED], True), ([0, 1], False), ([], False),
     (np.array([IGNORED]), True)],
)  # fmt: skip
def test_which_examples_have_no_label(labels: Any, ignored: bool) -> None:
    assert with_teacher._is_ignored(labels) == ignored


@pytest.mark.parametrize("several", [False, True])
def test_rows_without_a_label_are_no_items_of_the_labels(
    several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def labels_and_items(self: Any, examples: list[Any]) -> Any:
        given.extend(examples)
        labels = torch.tensor([example["labels"] for example in examples])
        return labels.float() if several else labels, torch.tensor([2.0, 3.0, 4.0])

    monkeypatch.setattr(Classification, "labels_and_items", labels_and_items)
    own: Any = object.__new__(TaughtSequenceClassification)
    own.label_spec = SimpleNamespace(problem="multi_label" if several else "single_label")
    own.reader = SimpleNamespace(names=["a", "b"])
    none, one, trial = ([IGNORED] * 2, [0, 1], [0, 0]) if several else (IGNORED, 1, 0)
    examples = [{"labels": one, "x": 5}, {"labels": none, "x": 6}, {"labels": trial, "x": 7}]
    labels, items = own.labels_and_items(examples)
    assert labels.tolist() == [one, none, trial]
    assert items.tolist() == [2.0, 0.0, 4.0]
    assert given[1]["labels"] == trial
    monkeypatch.setattr(TaughtClassification, "is_unlabelled", lambda self, row: row is None)
    monkeypatch.setattr(Classification, "label_of", lambda self, row: row)
    assert own.label_of(None) == none
    assert own.label_of(one) == one


class Reader:
    """A tokenizer of a few tokens."""

    def __init__(self, tokens: list[str], by_letter: bool = False) -> None:
        self.vocabulary = {token: i for i, token in enumerate(tokens) if token}
        self.by_letter = by_letter

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(text)] if self.by_letter else [1]}


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (Reader(["a", "b"]), Reader(["a", "b"]), ""),
        (Reader(["a", "c", "b"]), Reader(["a", "b", "c"]), "in 2 tokens: `b` is 2 there, 1 here"),
        (Reader(["a", "b", "z", "c"]), Reader(["a", "b"]), "2 tokens: `c` is 3 there, no token h"),
        (Reader(["a"]), Reader(["a", "b", "", "c"]), "2 tokens: `b` is no token there, 1 here"),
        (Reader(["a"], by_letter=True), Reader(["a"]), "divides a text otherwise than that of `m`"),
    ],
)
def test_tokens_have_to_be_those_of_the_teacher(theirs: Reader, ours: Reader, said: str) -> None:
    own: Any = SimpleNamespace(
        reader_of_teacher=SimpleNamespace(tokenizer=theirs), tokenizer=ours,
        recipe=SimpleNamespace(model=SimpleNamespace(name="m")),
    )  # fmt: skip
    if not said:
        TaughtCausalLM._require_same_tokens(own)
        return
    with pytest.raises(LoraError) as caught:
        TaughtCausalLM._require_same_tokens(own)
    assert said in caught.value.problems[0].what


@pytest.mark.parametrize(("known", "scored", "compared"), [(9, 12, 9), (12, 9, 9), (9, 9, 9)])
def test_tokens_that_only_fill_up_an_embedding_are_not_compared(
    known: int, scored: int, compared: int
) -> None:
    text = SimpleNamespace(vocab_size=known)
    config = SimpleNamespace(get_text_config=lambda: text)
    own: Any = SimpleNamespace(reader_of_teacher=SimpleNamespace(config=config))
    assert TaughtCausalLM._n_tokens(own, torch.zeros(3, scored)) == compared
