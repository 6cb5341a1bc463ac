"""How a student's labels and tokens are compared with its teacher's, one value at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.tasks.causal_lm import CausalLM
from lora_cli.tasks.classification.classification_task import Classification
from lora_cli.tasks.examples import IGNORED, Batch
from lora_cli.tasks.sequence_classification import SequenceClassification
from lora_cli.tasks.task_rows import TaskRows
from lora_cli.tasks.teachers.distillation_loss import (
    TopTokens,
    label_divergence,
    multi_label_divergence,
    token_divergence,
    top_tokens,
)
from lora_cli.tasks.teachers.distilled_causal_lm import DistilledCausalLM
from lora_cli.tasks.teachers.distilled_classification import (
    DistilledClassification,
    DistilledSequenceClassification,
    _is_ignored,
)

NAMELESS = ["LABEL_0", "LABEL_1"]


def order(theirs: list[str], ours: list[str]) -> list[int]:
    own: Any = SimpleNamespace(
        labels=ours, teacher=SimpleNamespace(task=SimpleNamespace(labels=theirs))
    )
    return DistilledClassification._find_teacher_positions(own)


@pytest.mark.parametrize(
    ("theirs", "ours", "found"),
    [
        (["a", "b", "c"], ["c", "a", "b"], [2, 0, 1]), (["No", "Yes"], ["yes", "no"], [1, 0]),
        (NAMELESS, ["0", "1"], [0, 1]), (NAMELESS, ["LABEL_1", "LABEL_0"], [1, 0]),
        (["0", "1"], ["1", "0"], [1, 0]),
    ],
)  # fmt: skip
def test_labels_are_found_among_the_teacher_s_outputs(
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
def test_a_label_that_only_one_model_has_is_named(
    theirs: list[str], ours: list[str], said: str
) -> None:
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
    assert _is_ignored(labels) == ignored


@pytest.mark.parametrize("several", [False, True])
def test_rows_without_a_label_are_not_items_of_the_labels_loss(
    several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def labels_and_items(self: Any, examples: list[Any]) -> Any:
        given.extend(examples)
        labels = torch.tensor([example["labels"] for example in examples])
        return labels.float() if several else labels, torch.tensor([2.0, 3.0, 4.0])

    monkeypatch.setattr(Classification, "labels_and_items", labels_and_items)
    own: Any = object.__new__(DistilledSequenceClassification)
    own.label_spec = SimpleNamespace(problem="multi_label" if several else "single_label")
    own.reader = SimpleNamespace(names=["a", "b"])
    none, one, trial = ([IGNORED] * 2, [0, 1], [0, 0]) if several else (IGNORED, 1, 0)
    examples = [{"labels": one, "x": 5}, {"labels": none, "x": 6}, {"labels": trial, "x": 7}]
    labels, items = own.labels_and_items(examples)
    assert labels.tolist() == [one, none, trial]
    assert items.tolist() == [2.0, 0.0, 4.0]
    assert given[1]["labels"] == trial
    monkeypatch.setattr(DistilledClassification, "is_unlabelled", lambda self, row: row is None)
    monkeypatch.setattr(Classification, "label_of", lambda self, row: row)
    assert own.label_of(None) == none
    assert own.label_of(one) == one


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("label", [None, "", "a"])
def test_only_train_rows_may_have_no_label(
    label: str | None, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: Any = object.__new__(DistilledSequenceClassification)
    own.label_spec = SimpleNamespace(target_columns=["label"])
    monkeypatch.setattr(
        SequenceClassification, "row_error", lambda *_: "of the label", raising=False
    )
    monkeypatch.setattr(SequenceClassification, "input_error", lambda *_: "of the input")
    monkeypatch.setattr(Classification, "row_error", lambda *_: "of the label")
    found = own.row_error({"label": label, "text": "x"}, training)
    assert found == ("of the input" if training and not label else "of the label")
    assert own.row_error({"label": label, "text": "x"}) == "of the label"


def test_only_train_rows_need_no_column_of_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = object.__new__(DistilledSequenceClassification)
    text, both = {"task.text_column": "text"}, {"task.text_column": "text", "task.label": "label"}
    monkeypatch.setattr(SequenceClassification, "input_columns", lambda _: text)
    monkeypatch.setattr(TaskRows, "needed_columns", lambda _, training=False: both)
    assert own.needed_columns(training=True) == text
    assert own.needed_columns(training=False) == own.needed_columns() == both


@pytest.mark.parametrize("several", [False, True])
def test_the_losses_of_labels_are_those_of_rows_that_have_one(
    several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Batch] = []

    def losses(self: Any, model: Any, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        given.append(batch)
        return {"loss": torch.tensor([5.0, 6.0])}

    for kind in (SequenceClassification, Classification):
        monkeypatch.setattr(kind, "losses", losses, raising=False)
    own: Any = object.__new__(DistilledSequenceClassification)
    own.label_spec = SimpleNamespace(problem="multi_label" if several else "single_label")
    own.teacher_positions = torch.tensor([1, 0])
    own.teacher = SimpleNamespace(spec=SimpleNamespace(temperature=2.0))
    labels = torch.tensor([[1, 0], [IGNORED] * 2] if several else [1, IGNORED])
    torch.manual_seed(0)
    output, said = torch.randn(2, 2), torch.randn(2, 2)
    inputs = {"input_ids": torch.tensor([1, 2])}
    targets = {"labels": labels, "teacher_logits": said}
    items = {"loss": torch.ones(2), "teacher": torch.ones(2)}
    batch = Batch(inputs, targets, items, 7, [3, 4])
    found = own.losses(None, output, batch)
    assert found["loss"].tolist() == [5.0, 0.0]
    compare = multi_label_divergence if several else label_divergence
    torch.testing.assert_close(found["teacher"], compare(output, said[:, [1, 0]], 2.0))
    (read,) = given
    assert read.inputs is inputs
    assert read.targets["labels"].tolist() == labels.clamp(min=0).tolist()
    assert (read.items, read.cost, read.rows) == (items, 7, [3, 4])
    monkeypatch.setattr(DistilledSequenceClassification, "answers", lambda self, of: said)
    del targets["teacher_logits"]
    again = own.losses(None, output, batch)
    assert torch.equal(again["teacher"], found["teacher"])
    assert own.frozen_outputs(None, batch) == {"teacher_logits": said}
    del items["teacher"]
    assert own.losses(None, output, batch).keys() == {"loss"}


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
        (Reader(["a", "b", "z"]), Reader(["a", "z", "b"]), "in 2 tokens: `z` is 2 there, 1 here"),
        (Reader(["a"], by_letter=True), Reader(["a"]), "divides a text otherwise than that of `m`"),
    ],
)
def test_tokens_have_to_be_those_of_the_teacher(theirs: Reader, ours: Reader, said: str) -> None:
    own: Any = SimpleNamespace(
        teacher_task=SimpleNamespace(tokenizer=theirs), tokenizer=ours,
        recipe=SimpleNamespace(model=SimpleNamespace(name="m")),
    )  # fmt: skip
    if not said:
        DistilledCausalLM._require_same_tokens(own)
        return
    with pytest.raises(LoraError) as caught:
        DistilledCausalLM._require_same_tokens(own)
    assert said in caught.value.problems[0].what


@pytest.mark.parametrize(("known", "scored", "compared"), [(9, 12, 9), (12, 9, 9), (9, 9, 9)])
def test_padding_of_an_embedding_is_not_compared(known: int, scored: int, compared: int) -> None:
    text = SimpleNamespace(vocab_size=known)
    config = SimpleNamespace(get_text_config=lambda: text)
    own: Any = SimpleNamespace(teacher_task=SimpleNamespace(config=config))
    assert DistilledCausalLM._n_tokens(own, torch.zeros(3, scored)) == compared


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("colour", [False, True])
def test_a_row_without_a_label_is_shown_by_its_input(
    several: bool, colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(self: Any, example: Any, colour: bool) -> tuple[list[str], str]:
        return [f"label {example['labels']}"], f"{example['x']} {colour}"

    monkeypatch.setattr(SequenceClassification, "shown", shown, raising=False)
    own: Any = object.__new__(DistilledSequenceClassification)
    own.label_spec = SimpleNamespace(problem="multi_label" if several else "single_label")
    own.reader = SimpleNamespace(names=["a", "b"])
    none, one = ([IGNORED] * 2, [0, 1]) if several else (IGNORED, 1)
    assert own.shown({"labels": none, "x": 5}, colour) == (["without a label"], f"5 {colour}")
    assert own.shown({"labels": one, "x": 6}, colour) == ([f"label {one}"], f"6 {colour}")


def taught(**more: Any) -> Any:
    own: Any = object.__new__(DistilledCausalLM)
    text = SimpleNamespace(vocab_size=6)
    own.teacher = SimpleNamespace(
        spec=SimpleNamespace(temperature=2.0, weight=0.25), model=lambda: "teacher",
        task=None,
    )  # fmt: skip
    own.config = SimpleNamespace(get_text_config=lambda: text)
    for name, value in more.items():
        setattr(own, name, value)
    return own


def batch(**targets: Any) -> Batch:
    """Return two rows of four tokens, of which three are trained."""
    labels = torch.tensor([[IGNORED, 3, 4, IGNORED], [IGNORED, IGNORED, 5, IGNORED]])
    positions = torch.tensor([0, 1, 5])
    return Batch(
        {}, {"labels": labels, "positions": positions, **targets},
        {"loss": torch.tensor([2.0, 1.0]), "teacher": torch.tensor([2.0, 1.0])}, 8, [0, 1],
    )  # fmt: skip


def said(seed: int, count: int = 3) -> TopTokens:
    torch.manual_seed(seed)
    return top_tokens(torch.randn(count, 6), 2.0)


@pytest.mark.parametrize("kept", [True, False])
def test_the_teacher_s_term_of_a_row_is_the_sum_over_its_trained_tokens(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = said(1)
    monkeypatch.setattr(CausalLM, "losses", lambda *_: {"loss": torch.tensor([7.0, 8.0])})
    monkeypatch.setattr(
        DistilledCausalLM, "teacher_task",
        SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(
            vocab_size=6))),
    )  # fmt: skip
    own = taught()
    monkeypatch.setattr(DistilledCausalLM, "answers", lambda *_: pytest.fail("kept") if kept else
                        answers)  # fmt: skip
    given = batch(teacher_top_ids=answers.ids, teacher_top_log_p=answers.log_p) if kept else batch()
    torch.manual_seed(2)
    output = torch.randn(2, 4, 9)  # three entries of the student's embedding only fill it up
    found = own.losses(None, output, given)
    assert found["loss"].tolist() == [7.0, 8.0]
    by_token = token_divergence(output.flatten(0, 1)[[0, 1, 5], :6], answers, 2.0)
    torch.testing.assert_close(found["teacher"], torch.stack([by_token[:2].sum(), by_token[2]]))
    del given.items["teacher"]
    assert own.losses(None, output, given).keys() == {"loss"}


def test_answers_are_cached_for_each_example(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = said(3)
    monkeypatch.setattr(DistilledCausalLM, "answers", lambda *_: answers)
    found = taught().frozen_outputs(None, batch())
    assert [list(map(len, found[key])) for key in ("teacher_top_ids", "teacher_top_log_p")] == [
        [2, 1], [2, 1],
    ]  # fmt: skip
    assert torch.equal(torch.cat(list(found["teacher_top_ids"])), answers.ids)
    assert torch.equal(torch.cat(list(found["teacher_top_log_p"])), answers.log_p)


def test_cached_answers_are_used_if_complete() -> None:
    answers = said(4)
    kept = DistilledCausalLM._cached_answers(batch(teacher_top_ids=answers.ids,
                                      teacher_top_log_p=answers.log_p))  # fmt: skip
    assert kept is not None
    assert torch.equal(kept.ids, answers.ids)
    assert torch.equal(kept.log_p, answers.log_p)
    assert DistilledCausalLM._cached_answers(batch()) is None
    assert DistilledCausalLM._cached_answers(batch(teacher_top_ids=answers.ids)) is None
    assert DistilledCausalLM._cached_answers(batch(teacher_top_log_p=answers.log_p)) is None


@pytest.mark.parametrize("mark", [{}, {"taught": 1}])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("has_answers", [True, False])
def test_a_batch_brings_the_teacher_s_items_and_answers(
    mark: dict[str, int], count: int, has_answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = torch.arange(1.0, count + 1)
    monkeypatch.setattr(CausalLM, "collate", lambda *_: Batch({}, {}, {"loss": items}, 0, []))
    examples = [dict(mark) for _ in range(count)]
    if has_answers:
        for i, example in enumerate(examples):
            answers = said(i, i + 1)
            example |= {"teacher_top_ids": answers.ids, "teacher_top_log_p": answers.log_p}
    found = taught().collate(examples)
    assert found.items.keys() == ({"loss", "teacher"} if mark else {"loss"})
    if mark:
        assert torch.equal(found.items["teacher"], items)
        assert found.items["teacher"] is not items
    keys = ("teacher_top_ids", "teacher_top_log_p")
    assert found.targets.keys() == (set(keys) if has_answers else set())
    for key in found.targets:
        assert torch.equal(found.targets[key], torch.cat([example[key] for example in examples]))


@pytest.mark.parametrize(("own_size", "scored"), [(6, 9), (9, 6), (6, 6)])
def test_only_the_teacher_s_logits_of_the_student_s_tokens_are_used(
    own_size: int, scored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    logits = torch.randn(2, 4, scored)
    asked: list[Any] = []
    reader = SimpleNamespace(logits=lambda *given: asked.append(given) or logits)
    monkeypatch.setattr(DistilledCausalLM, "teacher_task", reader)
    text = SimpleNamespace(vocab_size=own_size)
    given = batch()
    found = taught(config=SimpleNamespace(get_text_config=lambda: text)).answers(given)
    wanted = top_tokens(logits.flatten(0, 1)[[0, 1, 5], :6], 2.0)
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.log_p, wanted.log_p)
    assert asked == [("teacher", given.inputs)]


def test_terms_are_weighted_and_the_cache_depends_on_the_temperature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert taught().train_loss_weights == {"loss": 0.75, "teacher": 0.25}
    monkeypatch.setattr(CausalLM, "cache_key", lambda _: ["a"])
    own = taught()
    own.teacher.cache_key = lambda: ["b"]
    assert own.cache_key() == ["a", "b", "temperature 2.0"]
    assert dict(own.frozen_parts(None)) == {"teacher": "teacher"}
    monkeypatch.setattr(CausalLM, "features", lambda _: {"x": "int32"})
    assert own.train_features() == {"x": "int32", "taught": "int8"}
