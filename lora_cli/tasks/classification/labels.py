"""Reads the labels of a classification from the data: their names, positions and weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_cli.characters import difference_of_form, folded
from lora_cli.data.cell_values import (
    FLOAT32_MAX,
    NumberForm,
    binary_value,
    currency_of,
    other_forms,
    read_number,
    split_labels,
)
from lora_cli.data.file_formats import is_blank
from lora_cli.data.label_lists import listed_labels
from lora_cli.data.load_rows import Rows, stream_label_names
from lora_cli.errors import LoraError, Problem, counted, did_you_mean, printable
from lora_cli.recipe import Recipe
from lora_cli.recipe.spec.classification_section import ClassificationSection

MAX_SHOWN = 60  # characters of a value in a message
LABELS_INTRO = "the labels are"
MARK_PAIRS = ({"0", "1"}, {"false", "true"})


class Labels:
    """The labels of a classification, in the order of the model's outputs."""

    def __init__(self, recipe: Recipe, spec: ClassificationSection) -> None:
        self.recipe, self.spec = recipe, spec
        # of a ClassLabel column of the Hub, whose rows contain positions
        self.class_names: list[str] = []
        self.names = [_text(label) for label in spec.labels or spec.label_columns or []]
        self.class_weights = spec.class_weights
        self.weights: Tensor | None = None
        self._first_currency = ""  # the currency of the numbers in a regression, if any

    def learn(self, splits: dict[str, Rows]) -> None:
        """Find the labels and their weights in the loss.

        Raises:
            LoraError: If there are none, or only one; if values in the data are not labels.
        """
        if self.recipe.data.streaming:
            self._learn_classes(stream_label_names(self.recipe))
        self.learn_classes(splits)
        if not self.names:
            self.names = self._infer(splits)
        duplicates = [label for label, n in Counter(self.names).items() if n > 1]
        if duplicates:
            what = f"the label `{duplicates[0]}` appears twice"
            raise LoraError(what, self.recipe.at("task.labels"), "name each label once")
        counts = {name: self.count(rows) for name, rows in splits.items()}
        self._reject_unknown(splits, counts)
        if len(self.names) < 2 and self.spec.problem == "single_label":
            raise LoraError(
                f"there is one label only, `{self.names[0]}`",
                self.recipe.at("task.label_column"),
                "is it the right column, and are all rows there? One label teaches nothing",
            )
        if self.class_weights == "balanced" and "train" in splits:
            n_labelled = sum(self.texts_of(row) is not None for row in splits["train"])
            self.class_weights = self._balanced(counts["train"], n_labelled)
        self.weights = self._weights()

    def learn_classes(self, splits: dict[str, Rows]) -> None:
        """Read the names of numbered labels from data sets of the Hub."""
        for rows in splits.values():
            self._learn_classes(rows.label_names)

    def _learn_classes(self, names: dict[str, list[str]]) -> None:
        self.class_names = names.get(self.spec.label_column, self.class_names)
        self._look_up_classes()

    def _look_up_classes(self) -> None:
        # if the recipe has other names for all of them, these rename the classes by position
        known = any(name in self._positions for name in self.class_names)
        self._by_class_name = known or not self._names

    def _infer(self, splits: dict[str, Rows]) -> list[str]:
        """Return the names of the labels from the data set, or the values in the train rows."""
        column = self.spec.label_column
        if "train" not in splits:
            raise LoraError(
                "the labels are not known",
                self.recipe.at("task.labels"),
                "name them in the order of the model's outputs: `--set 'task.labels=[no, yes]'`",
            )
        rows = splits["train"]
        if column in rows.label_names:
            return [name for name in rows.label_names[column] if name not in self.skipped]
        values = self.count(rows)
        self._require_one_kind(rows)
        if not values:
            what = f"no row of the train split has a label in `{column}`"
            raise LoraError(what, rows.source, "is it the right column?")
        if len(values) > 20 and len(values) > len(rows) / 2:
            raise LoraError(
                f"column `{column}` has {counted(len(values), 'value')} in "
                f"{counted(len(rows), 'row')}",
                self.recipe.at("task.label_column"),
                "is it the label? If it is a number to predict, `--set task.problem=regression`",
            )
        return _sorted(values)

    def _require_one_kind(self, rows: Rows) -> None:
        """Check that a mixture does not have numbers as labels in one set, and names in another.

        Raises:
            LoraError: If it does, since the numbers would become additional labels.
        """
        found = {name: self.count(rows.select(at)) for name, at in rows.sets.items()}
        kinds = {name: {number(v) is not None for v in values} for name, values in found.items()}
        numbered, named = (
            next((name for name, kind in kinds.items() if kind == {value}), None)
            for value in (True, False)
        )
        if numbered is not None and named is not None:
            what = f"the labels of the set `{numbered}` are numbers, and those of `{named}` names"
            hint = "name the labels in the order of the numbers, `--set 'task.labels=[no, yes]'`"
            raise LoraError(what, self.recipe.at("task.label_column"), hint)

    def count(self, rows: Rows) -> Counter[str]:
        """Return how often each value occurs in the rows."""
        return Counter(value for row in rows for value in self.texts_of(row) or ())

    def texts_of(self, row: dict[str, Any]) -> list[str] | None:
        """Return the labels of a row as texts, or None if they cannot be read."""
        if self.spec.label_columns is not None:
            return self._labels_of_marks(row, self.spec.label_columns)
        value = row.get(self.spec.label_column)
        if self.spec.problem == "multi_label":
            if (items := listed_labels(value)) is not None:
                value = items
            elif isinstance(value, str) and self.spec.label_separator is not None:
                parts = split_labels(value, self.spec.label_separator)
                return None if is_multi_hot(parts) else parts
            if not isinstance(value, list) or any(_is_blank(item) for item in value):
                return None
            if is_multi_hot(value) or has_scores(value):
                return None
            return [self._named(item) for item in value]
        if _is_blank(value):
            return None
        if listed_labels(value) is not None and _text(value) not in self.names:
            return None  # a list of several labels, unless a single label has such a name
        return [self._named(value)]

    def _named(self, value: Any) -> str:
        """Return a label as text; for a position in a ClassLabel column, the name of the class."""
        if isinstance(value, int) and 0 <= value < len(self.class_names) and self._by_class_name:
            return self.class_names[value]
        return _text(value)

    @property
    def skipped(self) -> set[str]:
        """The labels whose rows are skipped."""
        return {_text(name) for name in self.spec.skip_labels}

    def skipped_label(self, row: dict[str, Any]) -> str:
        """Return which of `skip_labels` a row has, by name or as written in the row; else empty."""
        texts = self.texts_of(row)
        if not texts:
            return ""
        raw = _text(row.get(self.spec.label_column))
        return next((text for text in (texts[0], raw) if text in self.skipped), "")

    def _labels_of_marks(self, row: dict[str, Any], columns: list[str]) -> list[str] | None:
        """Return the labels whose columns contain a 1; None if a column has neither 0 nor 1."""
        marks = [binary_value(row.get(column)) for column in columns]
        if None in marks or (self.spec.problem == "single_label" and sum(map(bool, marks)) != 1):
            return None
        return [name for name, mark in zip(self.names, marks, strict=True) if mark]

    def number(self, row: dict[str, Any]) -> float | None:
        """Return the target of a row in a regression, or None if it is not a number."""
        value = row.get(self.spec.label_column)
        if not isinstance(value, str):
            return number(value)
        return read_number(value, self.number_form)

    @property
    def number_form(self) -> NumberForm:
        """The format of numbers that are texts, such as their decimal mark."""
        return NumberForm(*self.recipe.data.number_forms[0])

    def number_error(self, row: dict[str, Any]) -> str:
        """Return why a row has no valid number: none, or another currency than earlier rows."""
        column = self.spec.label_column
        value = row.get(column)
        if self.number(row) is None:
            return not_a_number(column, value, self.number_form)
        currency = currency_of(value) if isinstance(value, str) else ""
        self._first_currency = self._first_currency or currency
        if currency and currency != self._first_currency:
            other = f"where rows before it have `{self._first_currency}`"
            return f"column `{column}` {_describe_cell(value)}, {other}"
        return ""

    def mark_error(self, row: dict[str, Any], columns: list[str]) -> str:
        """Return why the columns of 0 and 1 of a row cannot be read."""
        for column in columns:
            if binary_value(value := row.get(column)) is None:
                return f"column `{column}` {_describe_cell(value)}, not 0 or 1"
        marked = [column for column in columns if binary_value(row.get(column))]
        many = f"`{'`, `'.join(marked)}` are all 1" if marked else "no label's column is 1"
        return f"{many}; with `problem: single_label` it is one"

    def _reject_unknown(self, splits: dict[str, Rows], counts: dict[str, Counter[str]]) -> None:
        problems = []
        for name, values in counts.items():
            unknown = [value for value in _sorted(values) if self.position(value) is None]
            places: dict[str, str] = {}
            for i, row in enumerate(splits[name] if unknown else ()):
                for value in self.texts_of(row) or ():
                    if value not in places and self.position(value) is None:
                        places[value] = splits[name].place(i)
            problems += [
                Problem(
                    f"`{printable(value, MAX_SHOWN)}` is not a label "
                    f"({counted(values[value], 'row')} of {name})",
                    places[value],
                    self._hint_for(value),
                )
                for value in unknown[:10]
            ]
            if len(unknown) > 10:
                what = f"{counted(len(unknown) - 10, 'more value')} of {name} are not labels"
                hint = f"is `{self.spec.label_column}` the column of the label?"
                problems.append(Problem(what, splits[name].source, hint))
        if problems:
            raise LoraError(problems)

    def _hint_for(self, value: str) -> str:
        """Return a hint for a value that is not a label."""
        last_position = len(self.names) - 1
        for name in self.names:
            if difference := difference_of_form(value, name):
                return f"it is the label `{name}` but for {difference}: write both alike"
        if value == "-1":
            has_teacher = self.recipe.train.distill is not None
            remedy = (
                "leave its cell empty, and the teacher answers it"
                if has_teacher
                else "leave such rows out"
            )
            return f"-1 often stands for a row without a label: {remedy}"
        if value.isdecimal() and self._by_number:
            return f"positions are 0 to {last_position}: {', '.join(self.names[:20])}"
        known = did_you_mean(value, self.names, LABELS_INTRO)
        return f"{known}; fix the rows, or name it in `task.labels`"

    def problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return the problem of a row with a value that is no label."""
        for value in self.texts_of(row) or ():
            if self.position(value) is None:
                return Problem(
                    f"`{printable(value, MAX_SHOWN)}` is not a label", place, self._hint_for(value)
                )
        return None

    @property
    def names(self) -> list[str]:
        """The names of the labels."""
        return self._names

    @names.setter
    def names(self, names: list[str]) -> None:
        self._names = names
        # a mapping, since there may be tens of thousands, and every row looks one up
        self._positions = {name: i for i, name in reversed(list(enumerate(names)))}
        self._by_number = not any(name.isdecimal() for name in names)
        self._look_up_classes()

    def position(self, value: str) -> int | None:
        """Return the position of a label that is given by its name or position; None if unknown."""
        if (found := self._positions.get(value)) is not None:
            return found
        if value.isdecimal() and len(value) < 10 and int(value) < len(self.names):
            # the recipe has names and the data positions, as in GLUE
            return int(value) if self._by_number else None
        return None

    def _balanced(self, values: Counter[str], n_rows: int) -> dict[str, float]:
        """Return balanced class weights by label: rows / (labels x rows of the label)."""
        counts = dict.fromkeys(self.names, 0)
        for value, count in values.items():
            position = self.position(value)
            assert position is not None
            counts[self.names[position]] += count
        return {
            label: n_rows / (len(self.names) * max(count, 1)) for label, count in counts.items()
        }

    def _weights(self) -> Tensor | None:
        weights = self.class_weights
        if not isinstance(weights, dict):
            return None
        at = self.recipe.at("task.class_weights")
        problems = [
            Problem(
                f"`{name}` is not a label", at, did_you_mean(name, self.names, "the labels are")
            )
            for name in weights
            if name not in self._positions
        ]
        problems += [
            Problem(f"the weight of `{name}` is {weight}", at, "a weight is 0 or more: 1 is usual")
            for name, weight in weights.items()
            if not 0 <= weight < math.inf
        ]
        if not problems and not any(weights.get(label, 1.0) for label in self.names):
            what = "every label weighs nothing, so nothing is learned"
            problems.append(Problem(what, at, "give one a weight above 0, or leave them out"))
        if problems:
            raise LoraError(problems)
        return torch.tensor([float(weights.get(label, 1.0)) for label in self.names])


def _is_blank(value: Any) -> bool:
    """Return whether a value cannot be a label: it is empty, NaN (in parquet files), or a list."""
    return isinstance(value, list | dict) or is_blank(value)


def is_multi_hot(value: Any, separator: str | None = None) -> bool:
    """Return whether a cell contains a 0 or 1 for each label, instead of a list of labels.

    A list of labels has no duplicates, so a list of marks is recognised by having some.

    Args:
        value: The value of the cell.
        separator: The separator of the labels in a text.
    """
    items = listed_labels(value) if isinstance(value, str) else value
    if items is None and isinstance(value, str) and separator is not None:
        items = split_labels(value, separator)
    if not isinstance(items, list):
        return False
    marks = [_text(item) for item in items]
    return len(set(marks)) < len(marks) and any(set(marks) <= pair for pair in MARK_PAIRS)


def has_scores(value: Any) -> bool:
    """Return whether a list contains fractions, which are scores of labels rather than labels."""
    items = listed_labels(value) if isinstance(value, str) else value
    return isinstance(items, list) and any(
        isinstance(item, float) and not item.is_integer() for item in items
    )


def look_alikes(names: Sequence[str]) -> list[list[str]]:
    """Return groups of labels that differ only in case, spaces, or the notation of a number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = folded(name)
        key = {"true": "1", "false": "0"}.get(key, key)
        value = number(key)
        groups.setdefault(key if value is None else str(value), []).append(name)
    return [alike for alike in groups.values() if len(alike) > 1]


def _text(value: Any) -> str:
    """Return a label as text: 1, 1.0 and " 1" are the same label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def number(value: Any) -> float | None:
    """Return a value as a number, or None if it is not one within the range of float32."""
    if isinstance(value, str):
        return read_number(value)  # Python's `float` accepts 1_0 as ten
    if isinstance(value, bool):
        return None
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return result if abs(result) <= FLOAT32_MAX else None  # false for NaN too


def not_a_number(column: str, value: Any, form: NumberForm) -> str:
    """Return the error for a value that is not a number, and how it might be read as one."""
    how = other_forms(value, form) if isinstance(value, str) else ""
    return f"column `{column}` {_describe_cell(value)}, not a number" + (f"; {how}" if how else "")


def _describe_cell(value: Any) -> str:
    """Return a description of a cell for a message, with its value as JSON."""
    if is_blank(value) and value == value:
        return "is blank"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"holds `{printable(text, MAX_SHOWN)}`"


def _sorted(values: Counter[str]) -> list[str]:
    """Return the labels sorted: by value if all are numbers, else by name."""
    numbers = {value: number(value) for value in values}
    if None in numbers.values():
        return sorted(values)
    return sorted(values, key=lambda value: (numbers[value], value))
