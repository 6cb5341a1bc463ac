"""Recordings that may be wrong: clipped, far too loud, of several texts, or no longer there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_cli.data.load_rows import Rows
from lora_cli.data.media import described, media_error, media_hash
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


def odd_rows(name: str, rows: Rows, examples: Any, audio: str, text: str) -> str | None:
    """Return a warning of odd recordings, and of those that have several texts.

    Args:
        name: What the rows are called in the warning.
        rows: The rows.
        examples: Of the rows: a data set, or a list.
        audio: The column of the recordings.
        text: The column of the texts.
    """
    several = several_texts(name, rows, audio, text)
    return "; ".join(filter(None, (odd_recordings(name, rows, examples), several))) or None


def several_texts(name: str, rows: Rows, audio: str, text: str) -> str | None:
    """Return a warning of recordings that stand in several rows, each time with another text.

    Most often such rows are the parts of a recording, whose beginnings and ends stand in columns
    that are not read.
    """
    first: dict[str, tuple[int, str]] = {}
    found: dict[str, tuple[int, int]] = {}
    for i, row in enumerate(rows):
        if media_error(row, [audio]):
            continue
        key = media_hash(row[audio])
        place, said = first.setdefault(key, (i, str(row.get(text))))
        if said != str(row.get(text)):
            found.setdefault(key, (place, i))
    if not found:
        return None
    (one, other), *_ = found.values()
    verb = "stands" if len(found) == 1 else "stand"
    return (
        f"{counted(len(found), f'{name} recording')} {verb} in several rows with different texts, "
        f"such as {described(rows[one][audio])} in {rows.place(one)} and {rows.place(other)}: each "
        "row is heard as the whole recording; if rows are parts of it, write a file for each part"
    )


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
