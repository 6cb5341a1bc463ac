"""Rows of a picture with boxes, for `lora init`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_cli.data.boxes import BoxError, are_objects, categories_in, read_objects
from lora_cli.data.media import is_media, media_value
from lora_cli.data.media_folder import SAMPLE, are_media
from lora_cli.data.pictures import picture_facts
from lora_cli.errors import LoraError, counted
from lora_cli.tasks.proposal import DETECTORS, BaseFacts, Certainty, Proposal, Table, proposed

FORMS = ("xywh", "xyxy", "relative_cxcywh", "relative_xywh", "relative_xyxy")
LARGEST, STEP = 640, 32  # pixels
Json = dict[str, Any]


def propose_objects(table: Table, base: BaseFacts) -> Proposal | None:
    """Return which objects of a picture a table has; see `Task.propose`."""
    rows = table.rows[:SAMPLE]
    column = next(
        (c.name for c in table.columns if are_objects([row.get(c.name) for row in rows])), None
    )
    if column is None or base.draws or table.label not in (None, column):
        return None
    return proposed(lambda: _of_objects(table, base, column), Certainty.ONLY)


def _of_objects(table: Table, base: BaseFacts, column: str) -> Proposal:
    """Return the task of rows with a picture and objects.

    Raises:
        LoraError: If no column holds pictures, or the model does not find objects.
    """
    names = [c.name for c in table.columns if c.name != column]
    image = next((name for name in names if _holds_media(table, name)), None)
    if image is None:
        what = f"`{column}` holds boxes, and no column holds the pictures that they are in"
        raise LoraError(what, table.place, f"the columns are {', '.join(names) or 'no others'}")
    if base.model_type not in DETECTORS and base.model_type is not None:
        what = f"`{base.name}` does not find objects, and {table.place} holds boxes"
        raise LoraError(what, "--model", "use YOLOS or DETR, such as hustvl/yolos-tiny")
    counts = Counter(name for row in table.rows for name in _names_in(row.get(column)))
    keys: Json = {"type": "object_detection"}
    why = {"": f"boxes of {counted(len(counts), 'label')}"}
    if image != "image":
        keys["image_column"], why["image_column"] = image, "the pictures"
    if column != "objects":
        keys["objects_column"], why["objects_column"] = column, "a list of boxes and labels"
    known = [(row[column], size) for row in table.rows[:SAMPLE] if (size := _size(row.get(image)))]
    if known:
        form = next((form for form in FORMS if _fits(known, form)), FORMS[0])
        if form != FORMS[0]:
            keys["box_format"], why["box_format"] = form, "read so, all boxes lie in their pictures"
        longest = max(max(size) for _, size in known)
        keys["image_size"] = min(LARGEST, -(-longest // STEP) * STEP)
        why["image_size"] = f"the largest picture has {longest:,} pixels a side; more is slower"
    left_out = {name: "not needed" for name in names if name != image}

    def row_error(row: Json) -> str:
        try:
            categories_in(row.get(column))
        except BoxError as error:
            return str(error)
        return ""

    return Proposal(keys, why, [image], counts, left_out, row_error)


def _holds_media(table: Table, name: str) -> bool:
    values = [row.get(name) for row in table.rows[:SAMPLE]]
    return are_media(values)


def _names_in(value: Any) -> set[str]:
    try:
        return {str(category) for category in categories_in(value)}
    except BoxError:
        return set()


def _size(value: Any) -> tuple[int, int] | None:
    """Return the size of a picture, if it can be read from here."""
    value = media_value(value)
    facts = picture_facts(value) if is_media(value) else None
    return None if facts is None or facts.error else (facts.width, facts.height)


def _fits(known: Sequence[tuple[Any, tuple[int, int]]], form: str) -> bool:
    """Return whether the boxes of all pictures lie inside, read in one form."""
    for value, size in known:
        try:
            read_objects(value, size, form)
        except BoxError:
            return False
    return True
