"""Rename columns according to `data.columns`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lora_cli.data.rows import Rows
from lora_cli.data.text_lines import RawRow
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.recipe import Recipe


def renamed_row(row: RawRow, names: Mapping[str, str]) -> RawRow:
    """Return a row with renamed columns.

    Args:
        row: The row as read from the file.
        names: New names by old name.

    Raises:
        LoraError: If a new name is the name of another column.
    """
    if not names or row.columns is None or not names.keys() & row.columns.keys():
        return row
    new_names = renamed_columns(row.columns, names, row.place)
    columns = {new_names.get(name, name): value for name, value in row.columns.items()}
    return replace(row, columns=columns)


def renamed_columns(
    present: Collection[str], names: Mapping[str, str], place: str
) -> dict[str, str]:
    """Return the new names of the columns that are present.

    Raises:
        LoraError: If a new name is the name of another column.
    """
    new_names = {old: new for old, new in names.items() if old in present}
    for old, new in new_names.items():
        if new in present and new not in new_names:
            what = f"`columns` calls the column `{old}` `{new}`, and there is another of that name"
            raise LoraError(what, place, f"give that one another name too: `{new}: other`")
    return new_names


def require_renamed(recipe: Recipe, rows: Rows) -> None:
    """Check that the columns to be renamed exist.

    Raises:
        LoraError: With the columns that exist under neither their old nor their new name.
    """
    present = rows.columns if recipe.data.columns else []
    problems = [
        Problem(
            f"{rows.source} has no column `{old}`, which `columns` calls `{new}`",
            recipe.at(f"data.columns.{old}"),
            did_you_mean(old, present, "its columns are"),
        )
        for old, new in recipe.data.columns.items()
        if present and new not in present
    ]
    if problems:
        raise LoraError(problems)
