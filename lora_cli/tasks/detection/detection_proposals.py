"""Proposal of an object detection task for `lora init`, from rows of images with boxes."""

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

BOX_FORMATS = ("xywh", "xyxy", "relative_cxcywh", "relative_xywh", "relative_xyxy")
MAX_IMAGE_SIZE, SIZE_MULTIPLE = 640, 32  # pixels
Json = dict[str, Any]


def propose_objects(table: Table, base: BaseFacts) -> Proposal | None:
    """Propose object detection if a column holds boxes; see `Task.propose`."""
    rows = table.rows[:SAMPLE]
    column = next(
        (c.name for c in table.columns if are_objects([row.get(c.name) for row in rows])), None
    )
    if column is None or base.generates_images or table.label not in (None, column):
        return None
    return proposed(lambda: _propose_task(table, base, column), Certainty.ONLY)


def _propose_task(table: Table, base: BaseFacts, column: str) -> Proposal:
    """Propose the task of rows that hold an image and its objects.

    Raises:
        LoraError: If no column holds images, or the model is not an object detector.
    """
    names = [c.name for c in table.columns if c.name != column]
    image = next((name for name in names if _holds_media(table, name)), None)
    if image is None:
        what = f"`{column}` holds boxes, and no column holds the pictures that they are in"
        raise LoraError(what, table.place, f"the columns are {', '.join(names) or 'no others'}")
    if base.model_type not in DETECTORS and base.model_type is not None:
        what = f"`{base.name}` does not find objects, and {table.place} holds boxes"
        raise LoraError(what, "--model", "use YOLOS or DETR, such as hustvl/yolos-tiny")
    counts = Counter(name for row in table.rows for name in _category_names(row.get(column)))
    keys: Json = {"type": "object_detection"}
    reasons = {"": f"boxes of {counted(len(counts), 'label')}"}
    if image != "image":
        keys["image_column"], reasons["image_column"] = image, "the pictures"
    if column != "objects":
        keys["objects_column"], reasons["objects_column"] = column, "a list of boxes and labels"
    samples = [
        (row[column], size) for row in table.rows[:SAMPLE] if (size := _image_size(row.get(image)))
    ]
    if samples:
        default = BOX_FORMATS[0]
        box_format = next((form for form in BOX_FORMATS if _fits(samples, form)), default)
        if box_format != default:
            keys["box_format"] = box_format
            reasons["box_format"] = "read so, all boxes lie in their pictures"
        longest = max(max(size) for _, size in samples)
        keys["image_size"] = min(MAX_IMAGE_SIZE, -(-longest // SIZE_MULTIPLE) * SIZE_MULTIPLE)
        reasons["image_size"] = f"the largest picture has {longest:,} pixels a side; more is slower"
    left_out = {name: "not needed" for name in names if name != image}

    def row_error(row: Json) -> str:
        try:
            categories_in(row.get(column))
        except BoxError as error:
            return str(error)
        return ""

    return Proposal(keys, reasons, [image], counts, left_out, row_error)


def _holds_media(table: Table, name: str) -> bool:
    values = [row.get(name) for row in table.rows[:SAMPLE]]
    return are_media(values)


def _category_names(value: Any) -> set[str]:
    try:
        return {str(category) for category in categories_in(value)}
    except BoxError:
        return set()


def _image_size(value: Any) -> tuple[int, int] | None:
    """Return the width and height of an image, or None if the file cannot be read from here."""
    value = media_value(value)
    facts = picture_facts(value) if is_media(value) else None
    return None if facts is None or facts.error else (facts.width, facts.height)


def _fits(samples: Sequence[tuple[Any, tuple[int, int]]], box_format: str) -> bool:
    """Return whether all boxes lie inside their images when read in a given format."""
    for value, size in samples:
        try:
            read_objects(value, size, box_format)
        except BoxError:
            return False
    return True
