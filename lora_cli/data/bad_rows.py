"""Handle unusable rows: raise an error or skip them, according to `data.on_bad_row`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_cli.data.rows import Rows
from lora_cli.data.text_lines import RawRow, encoding_hint
from lora_cli.errors import LoraError, Problem, counted
from lora_cli.recipe import Recipe

SKIP = "`--set data.on_bad_row=skip`"


def drop_bad_rows(rows: Rows, errors: dict[int, str], recipe: Recipe) -> Rows:
    """Return a split without its unusable rows, if `data.on_bad_row` is `skip`.

    Args:
        rows: The rows of a split.
        errors: Error messages by row index.
        recipe: The recipe, whose `data.on_bad_row` decides.

    Raises:
        LoraError: If there are such rows and `data.on_bad_row` is `error`.
    """
    if not errors:
        return rows
    places = [f"{rows.place(i)}: {error}" for i, error in errors.items()]
    if recipe.data.on_bad_row == "error":
        problems = [Problem(error, rows.place(i)) for i, error in list(errors.items())[:10]]
        hint = f"fix {'them' if len(errors) > 1 else 'it'}, or skip such rows with {SKIP}"
        if fix := _common_fix(rows, errors, recipe):
            hint = f"{fix}; or {hint}"
        if len(errors) > 10:
            hint += f"; {counted(len(errors) - 10, 'more row')} cannot be used"
        problems[-1] = replace(problems[-1], hint=hint)
        raise LoraError(problems)
    keep = np.array([i for i in range(len(rows)) if i not in errors], dtype=np.int64)
    return rows.select(keep, places)


def _common_fix(rows: Rows, errors: dict[int, str], recipe: Recipe) -> str:
    """Return a hint that fixes a common error in all rows at once; empty if there is none."""
    undecodable = next((i for i, error in errors.items() if error.startswith("byte 0x")), None)
    if undecodable is not None:
        source = Path(rows.source)
        if not source.is_file():  # `FOLDER (3 files)`
            folder = Path(rows.source.rpartition(" (")[0])
            source = folder / re.sub(r":\d+$", "", rows.place(undecodable))
        return encoding_hint(source, recipe.data.format.encoding)
    if any(re.search("fields? where there", error) for error in errors.values()):
        return "a text that holds the delimiter needs quotation marks around it"
    return ""


def without_errors(
    rows: Iterator[RawRow],
    error_of: Callable[[dict[str, Any]], str],
    recipe: Recipe,
    skip: Callable[[str, str], None],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and columns of each usable row of a stream.

    Args:
        rows: The rows as they are read.
        error_of: Returns the error message of a row; empty if the row is usable.
        recipe: The recipe, whose `data.on_bad_row` decides what happens to unusable rows.
        skip: Called with the place and error of each row that is skipped.

    Raises:
        LoraError: At the first unusable row, if `data.on_bad_row` is `error`.
    """
    for row in rows:
        error = row.error or error_of(row.columns or {})
        if not error:
            assert row.columns is not None
            yield row.place, row.columns
        elif recipe.data.on_bad_row == "error":
            raise LoraError(
                error,
                row.place,
                f"fix it, or skip such rows with {SKIP}",
            )
        else:
            skip(row.place, error)
