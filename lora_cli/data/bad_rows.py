"""Rows that cannot be used: an error, or left out, as `data.on_bad_row` says."""

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


def without(rows: Rows, errors: dict[int, str], recipe: Recipe) -> Rows:
    """Return the rows without the wrong ones; unless they may be skipped, that is an error.

    Args:
        rows: A split.
        errors: What is wrong, by position.
        recipe: Its `data.on_bad_row` decides.
    """
    if not errors:
        return rows
    places = [f"{rows.place(i)}: {error}" for i, error in errors.items()]
    if recipe.data.on_bad_row == "error":
        problems = [Problem(error, rows.place(i)) for i, error in list(errors.items())[:10]]
        hint = f"fix {'them' if len(errors) > 1 else 'it'}, or skip such rows with {SKIP}"
        if advice := _advice(rows, errors, recipe):
            hint = f"{advice}; or {hint}"
        if len(errors) > 10:
            hint += f"; {counted(len(errors) - 10, 'more row')} cannot be used"
        problems[-1] = replace(problems[-1], hint=hint)
        raise LoraError(problems)
    keep = np.array([i for i in range(len(rows)) if i not in errors], dtype=np.int64)
    return rows.select(keep, places)


def _advice(rows: Rows, errors: dict[int, str], recipe: Recipe) -> str:
    """Return what fixes the commonest errors of all rows at once, or nothing."""
    of_bytes = next((i for i, error in errors.items() if error.startswith("byte 0x")), None)
    if of_bytes is not None:
        source = Path(rows.source)
        if not source.is_file():  # `FOLDER (3 files)`
            folder = Path(rows.source.rpartition(" (")[0])
            source = folder / re.sub(r":\d+$", "", rows.place(of_bytes))
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
    """Yield the places and columns of streamed rows that can be used.

    A wrong row stops; unless rows may be skipped: then `skip` is told its place and its error.
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
