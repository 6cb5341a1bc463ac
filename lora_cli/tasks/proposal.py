"""Proposals of tasks for the rows that `lora init` reads.

Each task type returns a proposal from `Task.propose(table, base)`, with a degree of certainty, and
the most certain one is written as a recipe. Nothing else in `lora init` depends on the task types,
so a new type needs no change there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Literal, Protocol

from lora_cli.data.column_kinds import Column
from lora_cli.errors import LoraError
from lora_cli.recipe import TASKS

CONVERSATION_COLUMNS = {  # columns that are read besides the turns, by the conversation's format
    "openai": {"system", "tools", "functions"},
    "sharegpt": {"system", "tools", "functions"},
    "pairs": {"system", "tools", "functions"},
    "alpaca": {"system", "history"},
    "self_instruct": {"system"},
}
NO_LABEL = "none"  # `--label none`: no column is to be used as the label
COLUMN_KEYS = ("_column", "_columns")  # the endings of `task` keys that name columns


class Certainty(IntEnum):
    """How certain a proposal is; the most certain one is used.

    Of several equally certain ones, the first without an error is used, in the order of the task
    types.
    """

    FALLBACK = 1
    """Possible if nothing else fits, such as plain text."""
    UNCLEAR = 2
    """It would be likely, but it is not clear which columns are meant."""
    UNSUITED = 3
    """The rows are for it, but the base model is not."""
    LIKELY = 4
    """The contents of the columns fit."""
    NAMED = 5
    """The names of the columns fit, or the user names the columns."""
    UNREADABLE = 6
    """No task can read the columns; tasks do not use this value."""
    BY_FORM = 7
    """The values have a form that only this task has, such as a tag for each word."""
    ONLY = 8
    """The base model, or the way in which the rows are stored, allows nothing else."""


class BaseFacts(Protocol):
    """The facts about a base model on which proposals depend."""

    @property
    def name(self) -> str:
        """The name of the model as the user wrote it."""

    @property
    def model_type(self) -> str | None:
        """The architecture in transformers (`bert`), or the pipeline in diffusers, if known."""

    @property
    def can_write(self) -> bool:
        """Whether it can generate text; True if that is unknown."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it is an encoder-decoder, which generates one text from another."""

    @property
    def language_codes(self) -> Sequence[str]:
        """Its codes of the languages that it must be told; empty if it needs none."""

    @property
    def is_embedding_model(self) -> bool:
        """Whether it is an embedding model, such as those of sentence-transformers."""

    @property
    def reads_images(self) -> bool | None:
        """Whether its input is images instead of texts; None if that is unknown."""

    @property
    def generates_images(self) -> bool:
        """Whether it generates images, like the models of diffusers."""

    @property
    def picture_side(self) -> int | None:
        """The side of the images that it generates, in pixels, if known."""

    @property
    def reads_audio(self) -> bool:
        """Whether it is a model for speech recognition."""

    @property
    def speaker_size(self) -> int | None:
        """The size of its speaker embeddings, if it is a model for speech synthesis."""

    @property
    def recognises_languages(self) -> bool:
        """Whether it recognises several languages, and must be told which one is spoken."""

    @property
    def lacks_letters(self) -> bool:
        """Whether it was pretrained on recordings only, and needs a new vocabulary of letters."""


DETECTORS = ("yolos", "detr")
"""The types of models for object detection."""


@dataclass(frozen=True)
class Table:
    """The rows for which a task is to be proposed.

    Args:
        columns: The columns, with the kinds of their contents.
        rows: The rows.
        place: The name of the file or folder, for errors.
        text: The column of the text, if the user names it.
        label: The column of the label, if the user names it; `none` if there is none.
        pair: The column of the second text, if the user names it.
        media: The kind of files, if the rows are files in a folder. The first column is then the
            file, and the second one the name of its folder, if the folders are classes.
        are_lines: Whether the two columns are text files with corresponding lines.
    """

    columns: Sequence[Column]
    rows: Sequence[dict[str, Any]]
    place: str
    text: str | None = None
    label: str | None = None
    pair: str | None = None
    media: Literal["image", "audio"] | None = None
    are_lines: bool = False

    @property
    def by_name(self) -> dict[str, Column]:
        """The columns by their names."""
        return {column.name: column for column in self.columns}

    def renamed(self, names: dict[str, str]) -> Table:
        """Return the table with new names for some columns, given by their old names."""
        return replace(
            self,
            columns=[replace(one, name=names.get(one.name, one.name)) for one in self.columns],
            rows=[{names.get(key, key): value for key, value in row.items()} for row in self.rows],
        )

    @property
    def names_columns(self) -> bool:
        """Whether the user names a column."""
        return (self.text, self.label, self.pair) != (None, None, None)


@dataclass
class Proposal:
    """The `task` section that a task type proposes for a table, with reasons.

    Args:
        keys: The keys of the recipe's `task` section, except for lengths in tokens.
        why: The reasons for some of these keys; the reason for the task itself has an empty key.
        inputs: The columns that the model reads and writes.
        labels: How often each label occurs, if there are labels.
        left_out: The reasons why other columns are not read, by column.
        row_error: Returns what is wrong with a row, if more than a missing value may be wrong.
        limits: The columns that each key for a length in tokens limits. If this is None, the key
            `max_length`, if the task has it, limits all inputs together.
        labels_are_folders: Whether the labels are names of folders, which are sorted as text.
        are_ordered: Whether the order of the labels is that of their numbers in the rows.
        check: Raises an error if the rows cannot be used in this way; called only if the proposal
            is used.
        renamed: New names of columns by their old names, if they are read by other names.
        certainty: How certain the proposal is.
        error: The reason why the rows cannot be used in this way, which is raised unless another
            proposal is more certain.
    """

    keys: dict[str, Any]
    why: dict[str, str]
    inputs: list[str]
    labels: Counter[str] | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    row_error: Callable[[dict[str, Any]], str] | None = None
    limits: dict[str, list[str]] | None = None
    labels_are_folders: bool = False
    are_ordered: bool = False
    check: Callable[[], None] | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    certainty: Certainty = Certainty.FALLBACK
    error: LoraError | None = None

    @property
    def is_chat(self) -> bool:
        """Whether rows are conversations, which are rendered by the model's chat template."""
        return self.keys.get("format") in CONVERSATION_COLUMNS

    @property
    def also_read(self) -> set[str]:
        """The columns that conversations may use besides their turns; empty for other rows."""
        return CONVERSATION_COLUMNS.get(self.keys.get("format", ""), set())

    @property
    def used(self) -> set[str]:
        """The columns that the task reads."""
        named = [value for key, value in self.keys.items() if key.endswith(COLUMN_KEYS)]
        columns = [value if isinstance(value, list) else [value] for value in named]
        spec = TASKS.get(self.keys.get("type", ""))
        boxes = spec and spec.model_construct().boxes_column
        read = [self.keys.get("objects_column", boxes)] if boxes else []
        return {*self.inputs, *read, *(name for some in columns for name in some)}


def proposed(
    choose: Callable[[], Proposal | None],
    certainty: Certainty,
    of_error: Certainty | None = None,
) -> Proposal | None:
    """Return the proposal of a function with its certainty, or one with the error that it raises.

    Args:
        choose: The function.
        certainty: The certainty of its proposal.
        of_error: The certainty of an error that it raises; the same by default.
    """
    try:
        found = choose()
    except LoraError as error:
        return Proposal({}, {}, [], certainty=of_error or certainty, error=error)
    if found is not None:
        found.certainty = certainty
    return found
