"""What a task owes to those who ask its model: what is typed or read from a file, and answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_cli.errors import LoraError, Problem
from lora_cli.tasks.task_rows import TaskRows


class TaskAnswers(TaskRows):
    """The part of a task that answers rows without targets."""

    input_name: str = "input"
    """What one thing to be answered is called."""
    answer_hint: str = "name another"
    """What to do where one cannot be answered."""
    answer_folder: Path | None = None
    """Where answers go that are files; None: the working directory."""

    def parse_input(self, typed: str) -> dict[str, Any]:
        """Return a row that holds what a user typed.

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
        """Return why a row cannot be answered, or nothing."""
        return self.input_error(row)

    def answer_problem(self, row: dict[str, Any]) -> Problem | None:
        """Return why a row cannot be answered, with what to do about it, or nothing."""
        what = self.answer_error(row)
        return Problem(what, hint=self.answer_hint) if what else None

    def control_token_in(self, row: dict[str, Any]) -> str | None:
        """Return the first control token that is spelled out in what the model reads of a row."""
        return None

    @property
    def reads_control_tokens(self) -> bool:
        """Whether a control token that is spelled out in a text is read as the token."""
        return False

    def note_control_tokens(self, rows: Sequence[dict[str, Any]]) -> None:
        """Count the rows to be answered in which a control token is spelled out."""

    def take_warnings(self) -> list[str]:
        """Return what a user should know of the answers since the last call, each with a count."""
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
        """Return in one line what `answer` says of a typed text: the answer, and how sure it is."""
        scores = sorted((p for p in values[1:] if isinstance(p, float)), reverse=True)[:1]
        return f"{values[0]}" + (f"\t{scores[0]:.4f}" if scores else "")

    def sample(
        self, model: nn.Module, rows: Sequence[dict[str, Any]]
    ) -> list[tuple[str, str, str]]:
        """Return what the model makes of rows, to be read before and after training.

        Returns:
            For each row (what was asked, what the row wants, what the model says), in words.
        """
        return []

    def draw_pictures(self, model: nn.Module, prompts: Sequence[str]) -> list[Any]:
        """Return the picture that a model draws for each text, as Pillow has it."""
        raise NotImplementedError

    @property
    def writer(self) -> Any:
        """The task itself, if its model writes text and can converse; else None."""
        return None
