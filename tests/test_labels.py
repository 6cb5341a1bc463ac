"""Labels of rows: as they are written in the data, their order, positions, and weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe
from lora_cli.tasks.classification.labels import (
    Labels,
    has_scores,
    is_multi_hot,
    look_alikes,
    number,
)


class Table(list):
    """Rows in memory that have places."""

    source = "rows.csv"
    sets: dict[str, Any] = {}

    def __init__(self, rows: list[Any], names: dict[str, list[str]] | None = None) -> None:
        super().__init__(row if isinstance(row, dict) else {"label": row} for row in rows)
        self.label_names = names or {}

    def place(self, i: int) -> str:
        return f"rows.csv:{i + 1}"


def reader(decimal: str | None = None, **task: Any) -> Labels:
    """Return what reads the labels of a recipe."""
    sections: dict[str, Any] = {
        "model": {"name": "base"},
        "task": {"type": "sequence_classification", **task},
        "data": {"path": "rows.csv", **({"format": {"decimal": decimal}} if decimal else {})},
    }
    recipe = Recipe.model_validate(sections)
    return Labels(recipe, recipe.task)  # type: ignore[arg-type]


def learned(rows: list[Any], **task: Any) -> Labels:
    """Return the labels of train rows."""
    found = reader(**task)
    found.learn({"train": Table(rows)})
    return found


def problem_of(rows: list[Any], **task: Any) -> str:
    with pytest.raises(LoraError) as caught:
        learned(rows, **task)
    return str(caught.value)


# ---------------------------------------------------------------------------------- which there are


@pytest.mark.parametrize(
    ("n_labels", "n_rows", "are_labels"),
    [(20, 20, True), (21, 21, False), (21, 41, False), (21, 42, True), (30, 61, True)],
)
def test_more_than_twenty_labels_and_more_than_half_the_rows_are_no_labels(
    n_labels: int, n_rows: int, are_labels: bool
) -> None:
    rows = [f"value {i % n_labels:02}" for i in range(n_rows)]
    if are_labels:
        assert learned(rows).names == sorted(set(rows))
    else:
        assert f"has {n_labels} values in {n_rows} rows" in problem_of(rows)


@pytest.mark.parametrize(("n_labels", "n_named", "more"), [(10, 10, 0), (11, 10, 1), (25, 10, 15)])
def test_ten_unknown_values_are_named_and_the_others_counted(
    n_labels: int, n_named: int, more: int
) -> None:
    with pytest.raises(LoraError) as caught:
        learned([f"x{i:02}" for i in range(n_labels)], labels=["no", "yes"])
    found = caught.value.problems
    assert [p.at for p in found[:n_named]] == [f"rows.csv:{i + 1}" for i in range(n_named)]
    counted = [p.what.split(" of ")[0].split()[0] for p in found[n_named:]]
    assert counted == ([str(more)] if more else [])


def test_one_label_is_enough_where_a_row_may_have_none() -> None:
    assert learned([["a"], []], problem="multi_label").names == ["a"]
    assert "there is one label only, `a`" in problem_of(["a", "a"])


def test_labels_that_differ_only_in_notation_are_found() -> None:
    names = ["yes", "Yes ", "no", "1", "true", "0", "2.0", "2", "false"]
    assert look_alikes(names) == [["yes", "Yes "], ["1", "true"], ["0", "false"], ["2.0", "2"]]
    assert look_alikes(["a", "b", "1", "2"]) == []


# -------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("names", "value", "position"),
    [
        (["bad", "good"], "good", 1),
        (["bad", "good"], "0", 0),
        (["bad", "good"], "1", 1),
        (["bad", "good"], "2", None),
        (["bad", "good"], "-1", None),
        (["bad", "good"], "other", None),
        (["5", "2", "0"], "0", 2),  # numbers that are names are no positions
        (["5", "2", "0"], "1", None),
        (["bad", "good"], "000000001", 1),
        (["bad", "good"], "0000000001", None),  # ten digits
    ],
)
def test_a_label_is_found_by_its_name_or_by_its_position(
    names: list[str], value: str, position: int | None
) -> None:
    assert reader(labels=names).position(value) == position


@pytest.mark.parametrize(
    ("value", "found"),
    [(0, ["b"]), (1, ["a"]), (2, ["2"]), (-1, ["-1"]), ("a", ["a"]), (None, None), ([1], None)],
)
def test_positions_of_a_data_set_are_names_of_its_own(value: Any, found: Any) -> None:
    labels = reader()
    labels.learn({"train": Table([0, 1], {"label": ["b", "a"]})})
    assert labels.names == ["b", "a"]
    assert labels.texts_of({"label": value}) == found


MANY: dict[str, Any] = {"problem": "multi_label"}


@pytest.mark.parametrize("named", [None, ["c", "b", "a"], ["2", "1", "0"]])
def test_numbers_in_a_list_are_classes_of_the_data_set(named: list[str] | None) -> None:
    classes = ["a", "b", "c"] if named != ["2", "1", "0"] else ["0", "2", "1"]
    found = reader(labels=named, **MANY)
    rows = Table([[0, 1], [2], []], {"label": classes})
    found.learn({"train": rows})  # type: ignore[dict-item]
    assert found.names == (named or classes)
    wanted = [[classes[0], classes[1]], [classes[2]], []]
    assert [found.texts_of(row) for row in rows] == wanted


def test_classes_of_which_some_have_other_names_are_not_read_by_position() -> None:
    found = reader(labels=["a", "y", "b"])
    with pytest.raises(LoraError, match="`c` is not a label"):
        found.learn({"train": Table([0, 1, 2], {"label": ["a", "b", "c"]})})  # type: ignore[dict-item]


@pytest.mark.parametrize("skipped", ["c", 2])
def test_a_class_is_skipped_by_its_name_or_its_number(skipped: Any) -> None:
    found = reader(skip_labels=[skipped])
    rows = Table([0, 2, 1], {"label": ["a", "b", "c"]})
    found.learn_classes({"train": rows})  # type: ignore[dict-item]
    assert [bool(found.skipped_label(row)) for row in rows] == [False, True, False]


def test_a_skipped_class_is_not_a_label() -> None:
    found = reader(skip_labels=["c"])
    found.learn({"train": Table([0, 1], {"label": ["a", "b", "c"]})})  # type: ignore[dict-item]
    assert found.names == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        ([1, 0, 1], True), ([1.0, 0.0, 0.0], True), ([False, True, False], True), ([0, 0], True),
        ("[0, 1, 1]", True), (["0", "1", "1"], True), ([0, 1], False), ([1], False), ([], False),
        (["a", "a"], False), ([2, 2], False), ([0, 1, 2, 1], False),
        ("0,1,1", True), ("0, 1", False), ("1,2,1", False), ("a,a", False),
    ],
)  # fmt: skip
def test_a_0_or_1_for_each_label_is_not_a_list_of_labels(value: Any, is_one: bool) -> None:
    assert is_multi_hot(value, ",") == is_one
    texts = reader(label_separator=",", **MANY).texts_of({"label": value})
    assert (texts is None) == is_one


@pytest.mark.parametrize("value", [[0.1, 0.9], "[0.1, 0.9]", [0.0, 0.5, 0.5]])
def test_a_score_for_each_label_is_not_a_list_of_labels(value: Any) -> None:
    assert has_scores(value)
    assert reader(**MANY).texts_of({"label": value}) is None
    assert not has_scores([1.0, 2.0])
    assert reader(**MANY).texts_of({"label": [1.0, 2.0]}) == ["1", "2"]


@pytest.mark.parametrize(
    ("marks", "single", "several"),
    [
        ([1, 0, 0], ["a"], ["a"]),
        ([0, "1", 1.0], None, ["b", "c"]),
        ([0, 0, 0], None, []),
        ([True, False, "0"], ["a"], ["a"]),
        ([1, 0, 2], None, None),
        ([1, None, 0], None, None),
    ],
)
def test_marks_are_labels(marks: list[Any], single: Any, several: Any) -> None:
    columns = ["a", "b", "c"]
    row = dict(zip(columns, marks, strict=True))
    for problem, wanted in (("single_label", single), ("multi_label", several)):
        assert reader(label_columns=columns, problem=problem).texts_of(row) == wanted


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ([1, 1, 0], "`a`, `b` are all 1; with `problem: single_label` it is one"),
        ([0, 0, 0], "no label's column is 1; with `problem: single_label` it is one"),
        ([1, "x", 0], "column `b` holds `x`, not 0 or 1"),
    ],
)
def test_marks_that_cannot_be_read_are_named(marks: list[Any], said: str) -> None:
    columns = ["a", "b", "c"]
    labels = reader(label_columns=columns)
    assert labels.mark_error(dict(zip(columns, marks, strict=True)), columns) == said


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (1, 1.0),
        (2.5, 2.5),
        ("-3", -3.0),
        ("1e3", 1000.0),
        (True, None),
        (None, None),
        ("1_0", None),
        ("word", None),
        ([1], None),
        (math.nan, None),
        (math.inf, None),
        (10**400, None),
        (float(torch.finfo(torch.float32).max), float(torch.finfo(torch.float32).max)),
        (-float(torch.finfo(torch.float32).max), -float(torch.finfo(torch.float32).max)),
        (3.5e38, None),
        (-3.5e38, None),
    ],
)
def test_a_number_is_one_that_float32_holds(value: Any, found: float | None) -> None:
    assert number(value) == found


def test_the_first_currency_is_that_of_all_numbers() -> None:
    labels = reader(problem="regression")
    for value in ("5", "5 €", 7, "€ 6", "8"):
        assert labels.number_error({"label": value}) == ""
    message = labels.number_error({"label": "$5"})
    assert message == "column `label` holds `$5`, where rows before it have `€`"
    assert labels.number_error({"label": "5 €"}) == ""


def test_a_decimal_comma_is_read_where_the_recipe_says_so() -> None:
    comma = reader(problem="regression", decimal=",")
    assert comma.number({"label": "1,5"}) == 1.5
    assert comma.number({"label": 2.5}) == 2.5
    assert "not a number" in reader(problem="regression").number_error({"label": "1,5"})


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "is blank"), (" ", "is blank"), (math.nan, "holds `NaN`"), ({"a": 1}, 'holds `{"a"')],
)
def test_a_value_that_is_not_a_number_is_shown(value: Any, said: str) -> None:
    assert said in reader(problem="regression").number_error({"label": value})


# ---------------------------------------------------------------------------------------- weights


def test_balanced_weights_equal_those_of_scikit_learn() -> None:
    values = ["b", "a", "b", "c", "b", "b", "a"]
    labels = learned(values, class_weights="balanced")
    wanted = compute_class_weight("balanced", classes=np.array(labels.names), y=values)
    assert labels.weights is not None
    torch.testing.assert_close(labels.weights, torch.tensor(wanted, dtype=torch.float32))
    assert labels.class_weights == pytest.approx(dict(zip("abc", wanted, strict=True)))


def test_a_label_that_no_row_has_weighs_as_if_one_had_it() -> None:
    labels = learned(["a", "b", "1", "a"], labels=["a", "b", "c"], class_weights="balanced")
    assert labels.class_weights == pytest.approx({"a": 4 / 6, "b": 4 / 6, "c": 4 / 3})


def test_weights_that_are_not_named_are_one() -> None:
    labels = learned(["a", "b"], labels=["a", "b", "c"], class_weights={"b": 0.0, "c": 2.5})
    assert labels.weights is not None
    assert labels.weights.tolist() == [1.0, 0.0, 2.5]
    assert learned(["a", "b"]).weights is None
    one = learned(["a", "b"], labels=["a", "b"], class_weights={"a": 0.0})
    assert one.weights is not None
    assert one.weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": -1.0}, "the weight of `a` is -1"),
        ({"d": 1.0}, "`d` is not a label"),
        ({"a": 0.0, "b": 0.0}, "every label weighs nothing"),
    ],
)
def test_weights_that_are_all_zero_are_rejected(weights: dict[str, float], said: str) -> None:
    assert said in problem_of(["a", "b"], class_weights=weights)
