"""Stream train rows: check and encode them as they are read, pass after pass."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lora_cli.data.bad_rows import without_errors
from lora_cli.data.load_rows import stream_rows
from lora_cli.data.text_lines import RawRow
from lora_cli.errors import LoraError, counted
from lora_cli.preprocessing.encode import encode_located
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Example

CHUNK = 100  # rows encoded together


class Stream:
    """Iterates over the examples of the train rows endlessly.

    An example's `row` is the number of its row, not counting rows with errors; the count continues
    from one pass to the next. Its `place` is the location of the row.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.skipped = 0  # rows of the first pass without an example
        self.first_error = ""

    def __iter__(self) -> Iterator[Example]:
        number, self.skipped = 0, 0
        is_first = True
        while True:
            is_empty = True
            for examples in self._one_pass(is_first):
                yield from ({**example, "row": number} for example in examples)
                is_empty = is_empty and not examples
                number += 1
            if is_empty:
                self._reject()
            is_first = False

    def check_start(self) -> None:
        """Check and encode the first rows, so that errors that concern all rows show early."""
        next(self._one_pass(is_first=False), None)

    def note(self) -> str | None:
        """Return a message with the number of skipped rows, or None."""
        if not self.skipped:
            return None
        return (
            f"skipped {counted(self.skipped, 'row')} of the stream; the first: {self.first_error}"
        )

    def _one_pass(self, is_first: bool) -> Iterator[list[Example]]:
        """Yield the examples of each row without an error."""

        def skip(place: str, error: str) -> None:
            if is_first:
                self.skipped += 1
                self.first_error = self.first_error or f"{place}: {error}"

        task = self.task

        def used_rows() -> Iterator[RawRow]:
            for row in stream_rows(task.recipe):
                if row.columns is not None and (reason := task.skip_reason(row.columns, "train")):
                    skip(row.place, reason)
                else:
                    yield row

        def row_error(row: dict[str, Any]) -> str:
            return task.row_error(row, training=True)

        rows = without_errors(used_rows(), row_error, task.recipe, skip)
        while chunk := list(islice(rows, CHUNK)):
            for place, row in chunk:
                if problem := task.label_problem(row, place):
                    raise LoraError([problem])
            places = [place for place, _ in chunk]
            encoded = encode_located(task, [row for _, row in chunk], places.__getitem__, True)
            for place, examples in zip(places, encoded, strict=True):
                if not examples:
                    skip(place, f"nothing to train is left within {task.length_limit}")
                yield [{**example, "place": place} for example in examples]

    def _reject(self) -> None:
        what, hint = "the train split has no rows", "name a file that has some"
        if self.skipped:
            what = (
                f"none of {counted(self.skipped, 'row')} can be used; the first: {self.first_error}"
            )
            hint = "is the column named correctly? `data.on_bad_row: skip` leaves no row here"
        raise LoraError(what, self.task.recipe.at("data.train"), hint)
