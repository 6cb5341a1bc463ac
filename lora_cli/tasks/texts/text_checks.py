"""What keeps a table of texts from being learned, for `lora init`: answers in lists or objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lora_cli.data.answer_choices import require_no_choices, require_one_answer_column
from lora_cli.data.nested_values import require_flat
from lora_cli.data.unsupported_rows import Finding, several_answers
from lora_cli.errors import LoraError
from lora_cli.tasks.proposal import Proposal, Table


def check_texts(table: Table, chosen: Proposal) -> None:
    """Check that texts, and their label, are all that the rows would teach.

    Raises:
        LoraError: If a part that matters is inside objects, or there are several answers to rank.
    """
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


def reject_rows(
    rows: Sequence[dict[str, Any]], place: str, test: Callable[[dict[str, Any]], Finding | None]
) -> None:
    """Reject rows of which some hold what no task reads.

    Raises:
        LoraError: With how many there are, and what the first one has.
    """
    found = [(i, more) for i, row in enumerate(rows, 1) if (more := test(row)) is not None]
    if found:
        number, (other, hint) = found[0]
        meant = "it is" if len(found) == 1 else "they are"
        count = f"{len(found):,} of {len(rows):,} rows cannot be read as {meant} meant"
        raise LoraError(f"{count}; the first has {other}", f"{place}, row {number}", hint)
