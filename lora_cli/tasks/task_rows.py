"""What a task owes to the rows: its columns, its labels, and what is wrong with a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lora_cli.data.load_rows import Rows
from lora_cli.data.text_lines import byte_error
from lora_cli.errors import Problem
from lora_cli.recipe import Recipe
from lora_cli.tasks.examples import Encoded, Field


class TaskRows(ABC):
    """The part of a task that knows what a row is; a task without labels says nothing of them."""

    recipe: Recipe

    @abstractmethod
    def fields(self) -> list[Field]:
        """Return the columns that the task reads."""

    def input_columns(self) -> dict[str, str]:
        """Return the columns that the model reads, by the place of the key that names them."""
        return {self.recipe.at(f.key): f.column for f in self.fields() if f.role == "input"}

    def target_columns(self) -> dict[str, str]:
        """Return the columns that it learns to answer, likewise."""
        return {self.recipe.at(f.key): f.column for f in self.fields() if f.role == "target"}

    def compared_columns(self) -> list[str]:
        """Return the columns by which rows count as equal: what the model reads."""
        return list(self.input_columns().values())

    @property
    def knows_labels(self) -> bool:
        """Whether the recipe says all that the task has to know of the labels."""
        return True

    @property
    def reads_train(self) -> bool:
        """Whether the task learns something from the train rows whatever split is asked for."""
        return not self.knows_labels

    @property
    def labels(self) -> list[str]:
        """Names of the labels, in the order of the model's outputs, if it has labels."""
        return []

    def labels_of(self, row: dict[str, Any]) -> list[str] | None:
        """Return what a row's answer is called, to count and to compare; None if it has no name."""
        return None

    @property
    def label_names(self) -> list[str]:
        """What `labels_of` and `label_counts` speak of, if that is not each of the `labels`."""
        return self.labels

    def answer_of(self, row: dict[str, Any]) -> str | None:
        """Return a row's answer as text, to find equal inputs with different answers."""
        labels = self.labels_of(row)
        return None if labels is None else ", ".join(labels)

    def label_counts(self, rows: Rows) -> dict[str, int]:
        """Return how often each label stands in the rows, in the order of the labels."""
        return {}

    def learn_form(self, splits: dict[str, Rows]) -> None:  # noqa: B027 - optional
        """Learn how the rows are written, before `row_error` judges each of them.

        What recipes have a key for goes into `self.learned.task`.
        """

    def learn_from(self, splits: dict[str, Rows]) -> None:  # noqa: B027 - optional
        """Learn from the rows what the recipe leaves open, such as the labels.

        What recipes have a key for goes into `self.learned.task`.
        """

    @abstractmethod
    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the columns that the model reads, or nothing."""

    @abstractmethod
    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the columns that it learns to answer, or nothing."""

    def unsupported(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """Return what a row holds that no task reads though it changes its meaning, and a hint."""
        return None

    def needed_columns(self, training: bool = False) -> dict[str, str]:
        """Return the columns that rows must have, by the place of the key that names them.

        Args:
            training: Whether the rows are to be trained, and not measured.
        """
        return self.input_columns() | self.target_columns()

    def row_error(self, row: dict[str, Any], training: bool = False) -> str:
        """Return what is wrong with a row, or nothing.

        Args:
            row: The row.
            training: Whether it is to be trained, and not measured.
        """
        return self.input_error(row) or self.target_error(row) or self._byte_error(row)

    def _byte_error(self, row: dict[str, Any]) -> str:
        """Return which column that is read holds bytes that are no text, or nothing."""
        for field in self.fields():  # without their places in the recipe, which take long to find
            value = row.get(field.column) if field.role == "target" else None
            if isinstance(value, str) and (error := byte_error(value, "UTF-8")):
                return f"column `{field.column}`: {error}"
        return ""

    def skip_reason(self, row: dict[str, Any], split: str) -> str:
        """Return why the recipe leaves a row of a split out, or nothing."""
        return ""

    def cut_note(self, split: Encoded) -> str | None:
        """Return how many parts of a split's rows were cut, where a row has several parts."""
        return None

    def label_problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return what is wrong with the label of a streamed row, which `learn_from` did not see."""
        return None
