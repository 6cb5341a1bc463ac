"""The part of `Task` about answers to new inputs, typed or read from a file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_cli.errors import LoraError, Problem
from lora_cli.tasks.task_rows import TaskRows


class TaskAnswers(TaskRows):
    """The methods of a task that answer rows without targets."""

    input_name: str = "input"
    """The name of one input in messages."""
    answer_hint: str = "name another"
    """A hint for an input that cannot be answered."""
    answer_folder: Path | None = None
    """The folder for answers that are files; None for the working directory."""
    answer_files: str = "pictures"
    """The kind of files that answers are written to, as a part of the folder's name."""

    def parse_input(self, typed: str) -> dict[str, Any]:
        """Return a row with the input that a user typed.

        Raises:
            LoraError: If the task reads more than one column.
        """
        first, *others = self.input_columns().values()
        if others:
            raise LoraError(
                f"this model reads `{first}` with `{'`, `'.join(others)}`, not one text",
                "the arguments of `lora predict`",
                "write the rows into a file: `--input FILE --output FILE`",
            )
        return {first: typed}

    def answer_error(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be answered; empty if it can."""
        return self.input_error(row)

    def answer_problem(self, row: dict[str, Any]) -> Problem | None:
        """Return why a row cannot be answered, with a hint; None if it can."""
        what = self.answer_error(row)
        return Problem(what, hint=self.answer_hint) if what else None

    def control_token_in(self, row: dict[str, Any]) -> str | None:
        """Return the first control token that is written out in the texts of a row, or None."""
        return None

    @property
    def reads_control_tokens(self) -> bool:
        """Whether control tokens written out in a text, such as `</s>`, are read as tokens."""
        return False

    def note_control_tokens(self, rows: Sequence[dict[str, Any]]) -> None:
        """Count the rows to be answered in which a control token is written out."""

    def take_warnings(self) -> list[str]:
        """Return warnings about the answers since the last call."""
        return []

    @abstractmethod
    def answer_columns(self) -> dict[str, str]:
        """Return the columns that `answer` adds to a row, with the type of each.

        The types are those of pyarrow: `string`, `double`, `list<string>`.
        """

    @abstractmethod
    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return the values of `answer_columns` for rows without targets, as one batch."""

    def answer_line(self, values: Sequence[Any]) -> str:
        """Return the answer to a typed text in one line, with its probability if it has one."""
        scores = sorted((p for p in values[1:] if isinstance(p, float)), reverse=True)[:1]
        return f"{values[0]}" + (f"\t{scores[0]:.4f}" if scores else "")

    def sample(
        self, model: nn.Module, rows: Sequence[dict[str, Any]]
    ) -> list[tuple[str, str, str]]:
        """Return the model's answers to rows, for people to read before and after training.

        Returns:
            For each row its input, its own answer, and the model's answer, as texts.
        """
        return []

    def draw_pictures(self, model: nn.Module, prompts: Sequence[str]) -> list[Any]:
        """Return the image that the model generates for each text, as a Pillow image."""
        raise NotImplementedError

    @property
    def writer(self) -> Any:
        """The task itself if its model writes text and can converse; otherwise None."""
        return None
