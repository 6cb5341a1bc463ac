"""Checks of `lora init` on tables of texts, such as for answers in lists or objects."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from lora_cli.data.answer_choices import require_no_choices, require_one_answer_column
from lora_cli.data.nested_values import require_flat
from lora_cli.data.unsupported_rows import Finding, several_answers
from lora_cli.errors import LoraError
from lora_cli.tasks.proposal import Proposal, Table

MOSTLY = 0.9  # of the rows
BYTES = re.compile(r"(?s)b('.*'|\".*\")")


def check_texts(table: Table, chosen: Proposal) -> None:
    """Check that texts, and their label, are all that the rows would teach.

    Raises:
        LoraError: If texts are written as bytes, if a part that matters is inside objects, or if
            there are several answers to rank.
    """
    for column in chosen.inputs:
        _require_decoded([row.get(column) for row in table.rows], column, table.place)
    if chosen.is_chat:
        return
    if not table.names_columns:
        require_no_choices(table.columns, table.rows, table.place)
        if chosen.labels is None and "problem" not in chosen.keys:
            require_one_answer_column(table.columns, chosen.inputs, table.place)
        require_flat(table.columns, table.rows, table.place, chosen.labels is not None)
    if table.text is None or chosen.labels is not None:
        # texts that are learned alone say nothing of the other columns, if the user says so
        learned = chosen.keys.get("label_column") if table.text is not None else None
        reject_rows(table.rows, table.place, lambda row: several_answers(row, learned))


def _require_decoded(values: Sequence[Any], column: str, place: str) -> None:
    """Reject texts in the form of Python's bytes literals: `b'a film'`.

    Raises:
        LoraError: If they are; its hint decodes them.
    """
    if not values or sum(_is_bytes(value) for value in values) < MOSTLY * len(values):
        return
    hint = "decode them before they are written: `.decode()`"
    if place.lower().endswith((".csv", ".tsv")):
        mark = ", sep='\\t'" if place.lower().endswith(".tsv") else ""
        script = (
            f"import ast, pandas; rows = pandas.read_csv({place!r}{mark}); rows[{column!r}] = "
            f"[ast.literal_eval(text).decode() for text in rows[{column!r}]]; "
            "rows.to_csv('decoded.csv', index=False)"
        )
        hint = f'decode them: `python -c "{script}"`'
    raise LoraError(f"`{column}` is written as Python writes bytes: `b'…'`", place, hint)


def _is_bytes(value: Any) -> bool:
    return isinstance(value, str) and BYTES.fullmatch(value.strip()) is not None


def reject_rows(
    rows: Sequence[dict[str, Any]], place: str, test: Callable[[dict[str, Any]], Finding | None]
) -> None:
    """Reject a table in which some rows contain what no task reads.

    Raises:
        LoraError: With how many there are, and what the first one has.
    """
    found = [(i, more) for i, row in enumerate(rows, 1) if (more := test(row)) is not None]
    if found:
        number, (other, hint) = found[0]
        meant = "it is" if len(found) == 1 else "they are"
        count = f"{len(found):,} of {len(rows):,} rows cannot be read as {meant} meant"
        raise LoraError(f"{count}; the first has {other}", f"{place}, row {number}", hint)
