"""Recordings that may be wrong: clipped, far too loud, or no longer there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_cli.data.load_rows import Rows
from lora_cli.data.media import described, media_error
from lora_cli.data.recordings import RecordingError, RecordingFacts, recording_facts
from lora_cli.errors import LoraError, counted

ODD_FEATURES = {"is_clipped": "bool", "is_too_loud": "bool"}


def odd_facts(facts: RecordingFacts) -> dict[str, bool]:
    """Return what an example says of its recording, by which `odd_recordings` finds it."""
    return {"is_clipped": facts.is_clipped, "is_too_loud": facts.is_too_loud}


def odd_recordings(name: str, rows: Rows, examples: Any) -> str | None:
    """Return a warning of recordings that are clipped, or far too loud.

    Args:
        name: What the rows are called in the warning.
        rows: The rows.
        examples: Of the rows: a data set, or a list.
    """
    said = []
    for key, what in {
        "is_clipped": "clipped: its loudest samples were cut off at full scale",
        "is_too_loud": "far beyond full scale, as if its numbers had not been scaled",
    }.items():
        found = [int(example["row"]) for example in examples if example[key]]
        if found:
            is_one = len(set(found)) == 1
            verb = "is" if is_one else "are"
            text = what if is_one else what.replace("its", "their")
            count = counted(len(set(found)), f"{name} recording")
            said.append(f"{count} {verb} {text} (the first: {rows.place(found[0])})")
    return "; ".join(said) or None


def recording_error(row: dict[str, Any], column: str) -> str:
    """Return why the recording of a row cannot be read, or nothing; it is decoded."""
    if error := media_error(row, [column]):
        return error
    error = recording_facts(row[column]).error
    return f"`{described(row[column])}` {error}" if error else ""


@contextmanager
def still_whole(value: dict[str, Any]) -> Iterator[None]:
    """Say that a recording which is read within the context cannot be read any more.

    Raises:
        LoraError: If it cannot.
    """
    try:
        yield
    except RecordingError as error:  # it was whole when the rows were checked
        what = f"`{described(value)}` {error}; it was whole when the run began"
        hint = "put the file back; a run that was interrupted goes on with `--resume`"
        raise LoraError(what, str(value["path"] or ""), hint) from error
