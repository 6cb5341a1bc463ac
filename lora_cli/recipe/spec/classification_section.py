"""The keys that all classification tasks share: the label, several labels, or a number."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.errors import counted
from lora_cli.recipe.spec.section import Conflicts, Probability, Word
from lora_cli.recipe.spec.task_section import AnswerKind, TaskSection

ANSWERS = {  # Python that a model card uses to print an answer
    "single_label": "model.config.id2label[scores.argmax().item()]",
    "multi_label": "[model.config.id2label[i] for i, score in enumerate(scores) if score > 0]",
    "regression": "scores.item()",
}


def head_of(labels: list[str]) -> str:
    """Return the arguments that create the model's head in the code of a model card."""
    if labels:
        return ", num_labels=len(labels), id2label=dict(enumerate(labels))"
    return ", num_labels=1"


class ClassificationSection(TaskSection):
    """The keys of the labels."""

    baselines = frozenset({"base", "majority", "none"})

    type: str
    """The type of task."""

    label_column: Word = "label"
    """Column of the label: a word, an integer, a number (for regression), or several labels."""

    label_columns: Annotated[list[Word], Field(min_length=2)] | None = None
    """Columns of 0 and 1 (or false and true), one for each label, instead of `label_column`. The
    names of the columns are the labels, unless `labels` gives others. With `single_label`, each row
    has exactly one 1."""

    labels: Annotated[list[str | int], Field(min_length=1)] | None = None
    """Names of the labels, in order. Integers in the data are read as positions in this list,
    counted from 0. Default: the values found in the train split, sorted."""

    skip_labels: list[str | int] = Field(default_factory=list)
    """Labels that mark a row without an answer, such as `-` in SNLI. Rows with one of them are left
    out of every split, and counted."""

    problem: Literal["single_label", "multi_label", "regression"] = "single_label"
    """One label per row, any number of labels per row, or one number per row."""

    label_separator: Word | None = None
    """The separator between the labels of a row, if a column with several labels is text."""

    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Weight of each label in the loss: by name, or `balanced` (number of rows / (number of labels
    x number of rows with the label), counted in the train split)."""

    label_smoothing: Probability = 0.0
    """Share of the target probability that is spread evenly over all labels."""

    def conflicts(self) -> Conflicts:
        """Yield the keys that do not go with `problem`, and labels that appear twice."""
        if self.problem != "single_label" and self.label_smoothing:
            what = f"`label_smoothing` has no meaning with `problem: {self.problem}`"
            yield "label_smoothing", what, "leave it out, or set `problem: single_label`"
        if self.problem == "regression":
            for key in ("labels", "class_weights"):
                if getattr(self, key):
                    yield key, f"`{key}` has no meaning with `problem: regression`", "leave it out"
        if self.skip_labels and (self.problem != "single_label" or self.label_columns):
            what = "`skip_labels` is for one label a row, in `label_column`"
            yield "skip_labels", what, "leave it out, or set `problem: single_label`"
        for label in {str(label).strip() for label in self.skip_labels}:
            if label in {str(name).strip() for name in self.labels or ()}:
                what = f"`{label}` is in `labels`, and in `skip_labels`"
                yield "skip_labels", what, "leave it in one of the two"
        if self.label_separator is not None and self.problem != "multi_label":
            what = f"`label_separator` has no meaning with `problem: {self.problem}`"
            yield "label_separator", what, "leave it out, or set `problem: multi_label`"
        if self.label_columns is not None:
            yield from self._column_conflicts(self.label_columns)
        for label, times in Counter(str(label).strip() for label in self.labels or ()).items():
            if not label:
                yield "labels", "a label of `labels` is blank", "give it a name"
            elif times > 1:
                what = f"the label `{label}` appears {times} times in `labels`"
                yield "labels", what, "list each label once, in the order of the model's outputs"

    def _column_conflicts(self, columns: list[str]) -> Conflicts:
        if self.problem == "regression":
            what = "`label_columns` has no meaning with `problem: regression`"
            yield "label_columns", what, "name the column of the number as `label_column`"
        if self.label_separator is not None:
            what = "`label_separator` divides one column, not `label_columns`"
            yield "label_separator", what, "leave one of the two out"
        if self.labels is not None and len(self.labels) != len(columns):
            names = counted(len(self.labels), "name")
            what = f"{names} in `labels` for {len(columns)} `label_columns`"
            yield "labels", what, "name each column's label, in the same order, or leave them out"
        for column, times in Counter(columns).items():
            if times > 1:
                what = f"the column `{column}` appears {times} times in `label_columns`"
                yield "label_columns", what, "list each column once"

    @property
    def target_columns(self) -> list[str]:
        """The column of the label, or the columns of the labels."""
        return self.label_columns or [self.label_column]

    @property
    def answer_kind(self) -> AnswerKind:
        """The `problem`."""
        return self.problem

    @property
    def label_columns_by_key(self) -> dict[str, str]:
        """The columns of the labels, if there are any."""
        if self.problem == "regression":
            return {}
        if self.label_columns:
            return {f"task.label_columns.{i}": c for i, c in enumerate(self.label_columns)}
        return {"task.label_column": self.label_column}
