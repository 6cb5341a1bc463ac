"""What `lora init` asks each task type: are these rows for you, and how certain is that?

A type answers with `Task.propose(table, base)`, and the most certain proposal is drafted. Nothing
else of `lora init` knows a task type, so that a new one needs no change there.
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

CONVERSATION_COLUMNS = {  # that are read besides the turns, by the format of the conversation
    "openai": {"system", "tools", "functions"},
    "sharegpt": {"system", "tools", "functions"},
    "pairs": {"system", "tools", "functions"},
    "alpaca": {"system", "history"},
    "self_instruct": {"system"},
}
NO_LABEL = "none"  # `--label none`: there is a label, but it is not wanted
COLUMN_KEYS = ("_column", "_columns")  # how the keys of a task end that name columns


class Certainty(IntEnum):
    """How much speaks for a proposal; the one with the most is taken.

    Of equally certain ones it is the first that has no error, in the order of the task types.
    """

    FALLBACK = 1
    """Nothing speaks against it: text alone."""
    UNCLEAR = 2
    """It would be likely, but it is not clear which columns are meant."""
    UNSUITED = 3
    """The rows are for it, but the base model is not."""
    LIKELY = 4
    """By what the columns hold."""
    NAMED = 5
    """By names of columns that go together, or because the user names them."""
    UNREADABLE = 6
    """No task reads what the columns hold; tasks themselves are never so certain."""
    BY_FORM = 7
    """Each value has a form that nothing else has: as many tags as words."""
    ONLY = 8
    """The base model, or how the rows are stored, leaves nothing else."""


class BaseFacts(Protocol):
    """What a proposal depends on of a base model."""

    @property
    def name(self) -> str:
        """As the user wrote it."""

    @property
    def model_type(self) -> str | None:
        """What transformers calls its architecture (`bert`), diffusers its pipeline, if known."""

    @property
    def can_write(self) -> bool:
        """It continues texts; True where that is not known."""

    @property
    def is_encoder_decoder(self) -> bool:
        """It reads one text and writes another."""

    @property
    def language_codes(self) -> Sequence[str]:
        """The languages that it asks for, by its own codes; none, if it asks for none."""

    @property
    def embeds(self) -> bool:
        """It turns texts into vectors, as models of sentence-transformers do."""

    @property
    def sees(self) -> bool | None:
        """It reads pictures and no texts; None where that is not known."""

    @property
    def draws(self) -> bool:
        """It draws pictures, as models of diffusers do."""

    @property
    def picture_side(self) -> int | None:
        """The side of the pictures that it draws, in pixels, if that is known."""

    @property
    def hears(self) -> bool:
        """It writes down what is said in recordings."""

    @property
    def speaker_size(self) -> int | None:
        """How many numbers tell it who speaks, if it says texts aloud."""

    @property
    def hears_languages(self) -> bool:
        """It hears several languages, and needs to know which is spoken."""

    @property
    def lacks_letters(self) -> bool:
        """It was pretrained on recordings alone, and gets a vocabulary of letters."""


DETECTORS = ("yolos", "detr")
"""The types of models that find objects in pictures."""


@dataclass(frozen=True)
class Table:
    """Rows for which a task is wanted.

    Args:
        columns: What the columns hold.
        rows: The rows.
        place: Name of the file or folder, for errors.
        text: The column of the text, if the user names it.
        label: The column of the label, if the user names it; `none` if there is none.
        pair: The column of the second text, if the user names it.
        media: The rows are files of this kind in a folder: the first column is the file, the second
            the name of its folder, if the folders are classes.
        are_lines: The two columns are text files, paired line by line.
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
        """Return the table with other names of columns."""
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
    """The task that rows are for, as one task type sees it, and the reason for each key.

    Args:
        keys: The keys of the recipe's `task`, but for lengths in tokens.
        why: The reasons for some of these keys; for the task itself under the empty name.
        inputs: The columns that the model reads and writes.
        labels: How often each label stands, if there are labels.
        left_out: Of the other columns, why they are not read.
        row_error: Says what is wrong with a row, where more than a missing value can be.
        limits: For each key that limits a length in tokens, the columns that it limits. None:
            `max_length` limits all inputs together, where the task has this key.
        labels_are_folders: The labels are names of folders, which all tools order as text.
        are_ordered: The labels stand in the order of the numbers that rows have for them.
        check: Raises an error if the rows cannot be used so; called if the proposal is taken.
        renamed: The names by which columns are read, where these are not their own.
        certainty: How much speaks for it.
        error: What keeps the rows from being used so; it is raised if nothing is more certain.
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
        """Whether a row is a conversation, written with the model's chat template."""
        return self.keys.get("format") in CONVERSATION_COLUMNS

    @property
    def also_read(self) -> set[str]:
        """The columns that conversations are read from besides their turns, where there are any."""
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
    """Return what a function proposes, or the error that keeps it from that.

    Args:
        choose: The function.
        certainty: Of what it returns.
        of_error: Of an error that it raises; the same by default.
    """
    try:
        found = choose()
    except LoraError as error:
        return Proposal({}, {}, [], certainty=of_error or certainty, error=error)
    if found is not None:
        found.certainty = certainty
    return found
