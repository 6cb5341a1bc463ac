"""Checks of recordings: clipped, far too loud, with conflicting texts, or unreadable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_cli.data.load_rows import Rows
from lora_cli.data.media import media_error, media_hash, media_name
from lora_cli.data.recordings import RecordingError, RecordingFacts, recording_facts
from lora_cli.errors import LoraError, counted

ODD_FEATURES = {"is_clipped": "bool", "is_too_loud": "bool"}


def odd_facts(facts: RecordingFacts) -> dict[str, bool]:
    """Return the facts that `odd_recordings` needs, to be stored in an example."""
    return {"is_clipped": facts.is_clipped, "is_too_loud": facts.is_too_loud}


def odd_recordings(name: str, rows: Rows, examples: Any) -> str | None:
    """Return a warning about recordings that are clipped or far too loud, or None.

    Args:
        name: What the warning calls the rows.
        rows: The rows.
        examples: The rows' examples: a data set or a list.
    """
    warnings = []
    for key, defect in {
        "is_clipped": "clipped: its loudest samples were cut off at full scale",
        "is_too_loud": "far beyond full scale, as if its numbers had not been scaled",
    }.items():
        row_indices = [int(example["row"]) for example in examples if example[key]]
        if row_indices:
            is_one = len(set(row_indices)) == 1
            verb = "is" if is_one else "are"
            text = defect if is_one else defect.replace("its", "their")
            count = counted(len(set(row_indices)), f"{name} recording")
            warnings.append(f"{count} {verb} {text} (the first: {rows.place(row_indices[0])})")
    return "; ".join(warnings) or None


def odd_rows(name: str, rows: Rows, examples: Any, audio: str, text: str) -> str | None:
    """Return a warning about odd recordings and recordings with conflicting texts, or None.

    Args:
        name: What the warning calls the rows.
        rows: The rows.
        examples: The rows' examples: a data set or a list.
        audio: The column of the recordings.
        text: The column of the texts.
    """
    conflicts = conflicting_texts(name, rows, audio, text)
    return "; ".join(filter(None, (odd_recordings(name, rows, examples), conflicts))) or None


def conflicting_texts(name: str, rows: Rows, audio: str, text: str) -> str | None:
    """Return a warning about recordings that are in several rows with different texts, or None.

    Most often such rows are segments of a recording, whose start and end are in columns that are
    not read.
    """
    first_seen: dict[str, tuple[int, str]] = {}
    conflicts: dict[str, tuple[int, int]] = {}
    for i, row in enumerate(rows):
        if media_error(row, [audio]):
            continue
        key = media_hash(row[audio])
        place, first_text = first_seen.setdefault(key, (i, str(row.get(text))))
        if first_text != str(row.get(text)):
            conflicts.setdefault(key, (place, i))
    if not conflicts:
        return None
    (a, b), *_ = conflicts.values()
    verb = "stands" if len(conflicts) == 1 else "stand"
    return (
        f"{counted(len(conflicts), f'{name} recording')} {verb} in several rows with different "
        f"texts, such as {media_name(rows[a][audio])} in {rows.place(a)} and {rows.place(b)}: each "
        "row is heard as the whole recording; if rows are parts of it, write a file for each part"
    )


def recording_error(row: dict[str, Any], column: str) -> str:
    """Decode the recording of a row; return why it cannot be read, or an empty string."""
    if error := media_error(row, [column]):
        return error
    error = recording_facts(row[column]).error
    return f"`{media_name(row[column])}` {error}" if error else ""


@contextmanager
def require_readable(value: dict[str, Any]) -> Iterator[None]:
    """Turn a failure to read a recording, in the body of the `with`, into a `LoraError`.

    Raises:
        LoraError: If the file has become unreadable since the rows were checked.
    """
    try:
        yield
    except RecordingError as error:  # the file was intact when the rows were checked
        what = f"`{media_name(value)}` {error}; it was whole when the run began"
        hint = "put the file back; a run that was interrupted goes on with `--resume`"
        raise LoraError(what, str(value["path"] or ""), hint) from error
