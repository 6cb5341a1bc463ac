"""The part of `Task` about rows: its columns, its labels, and what is wrong with a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lora_cli.data.load_rows import Rows
from lora_cli.data.text_lines import byte_error
from lora_cli.errors import Problem
from lora_cli.recipe import Recipe
from lora_cli.tasks.examples import Encoded, Field


class TaskRows(ABC):
    """The methods of a task about rows. Those about labels are optional."""

    recipe: Recipe

    @abstractmethod
    def fields(self) -> list[Field]:
        """Return the columns that the task reads."""

    def input_columns(self) -> dict[str, str]:
        """Return the columns that the model reads, by their location in the recipe."""
        return {self.recipe.at(f.key): f.column for f in self.fields() if f.role == "input"}

    def target_columns(self) -> dict[str, str]:
        """Return the columns that the model learns to predict, by their location in the recipe."""
        return {self.recipe.at(f.key): f.column for f in self.fields() if f.role == "target"}

    def compared_columns(self) -> list[str]:
        """Return the columns by which rows are compared; by default those that the model reads."""
        return list(self.input_columns().values())

    @property
    def knows_labels(self) -> bool:
        """Whether the recipe says everything that the task needs to know about the labels."""
        return True

    @property
    def reads_train(self) -> bool:
        """Whether the task learns from the train rows even if only other splits are used."""
        return not self.knows_labels

    @property
    def labels(self) -> list[str]:
        """The names of the labels, in the order of the model's outputs; empty without labels."""
        return []

    def labels_of(self, row: dict[str, Any]) -> list[str] | None:
        """Return the labels of a row, for counting and comparing; None if it has none."""
        return None

    @property
    def label_names(self) -> list[str]:
        """The names that `labels_of` and `label_counts` use, if they are not the `labels`."""
        return self.labels

    def answer_of(self, row: dict[str, Any]) -> str | None:
        """Return a row's answer as text, by which contradictions between equal inputs are found."""
        labels = self.labels_of(row)
        return None if labels is None else ", ".join(labels)

    def label_counts(self, rows: Rows) -> dict[str, int]:
        """Return how often each label occurs in the rows, in the order of the labels."""
        return {}

    def learn_names(self, splits: dict[str, Rows]) -> None:  # noqa: B027 - optional
        """Learn the data set's names for numbered labels, before any row is read or skipped."""

    def learn_form(self, splits: dict[str, Rows]) -> None:  # noqa: B027 - optional
        """Learn how the rows are written, before `row_error` checks each of them.

        Values for keys of the recipe are put into `self.learned.task`.
        """

    def learn_from(self, splits: dict[str, Rows]) -> None:  # noqa: B027 - optional
        """Learn from the rows what the recipe leaves open, such as the labels.

        Values for keys of the recipe are put into `self.learned.task`.
        """

    @abstractmethod
    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with a row's inputs; empty if nothing is."""

    @abstractmethod
    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with a row's targets; empty if nothing is."""

    def unsupported(self, row: dict[str, Any]) -> tuple[str, str] | None:
        """Return an error and a hint for a row with content that would be lost."""
        return None

    def needed_columns(self, training: bool = False) -> dict[str, str]:
        """Return the columns that rows must have, by their location in the recipe.

        Args:
            training: Whether the rows are for training, not for evaluation.
        """
        return self.input_columns() | self.target_columns()

    def row_error(self, row: dict[str, Any], training: bool = False) -> str:
        """Return what is wrong with a row; empty if nothing is.

        Args:
            row: The row.
            training: Whether it is for training, not for evaluation.
        """
        return self.input_error(row) or self.target_error(row) or self._byte_error(row)

    def _byte_error(self, row: dict[str, Any]) -> str:
        """Return the column of an answer with bytes that are not text; empty if none has."""
        for (
            field
        ) in self.fields():  # not `target_columns`: locations in the recipe take long to find
            value = row.get(field.column) if field.role == "target" else None
            if isinstance(value, str) and (error := byte_error(value, "UTF-8")):
                return f"column `{field.column}`: {error}"
        return ""

    def skip_reason(self, row: dict[str, Any], split: str) -> str:
        """Return why a row of a split is skipped; empty if it is not."""
        return ""

    def cut_note(self, split: Encoded) -> str | None:
        """Return how many parts of a split's rows were cut, if rows have several parts."""
        return None

    def label_problem(self, row: dict[str, Any], place: str) -> Problem | None:
        """Return what is wrong with the label of a streamed row, unknown to `learn_from`."""
        return None
