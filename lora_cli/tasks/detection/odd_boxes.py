"""What a user should know of the boxes of a split: they may be of a picture that lies otherwise."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from lora_cli.data.boxes import annotated_size, better_format, categories_in
from lora_cli.data.load_rows import Rows
from lora_cli.data.pictures import PictureFacts, picture_facts
from lora_cli.errors import counted
from lora_cli.recipe import ObjectDetectionSpec
from lora_cli.tasks.pictures.odd_pictures import where

SAMPLE = 500  # rows of which the format of the boxes is tried
MANY, HALF = 20, 0.55  # objects, and share of a side, by which boxes in one corner are odd
TURNS = 5  # from this EXIF orientation on, width and height are exchanged
IS_TURNED = "is_turned"


def may_be_turned(facts: PictureFacts, row: dict[str, Any], objects_column: str) -> bool:
    """Return whether EXIF data turn or mirror a picture, and nothing says if its boxes go along."""
    if facts.orientation < TURNS:
        return facts.orientation > 1
    size = annotated_size(row, objects_column)
    return size is None or facts.width == facts.height


def odd_boxes(
    name: str, rows: Rows, examples: Any, spec: ObjectDetectionSpec, most: int
) -> str | None:
    """Return a warning of boxes that may be wrong, and of pictures with too many.

    Args:
        name: What the rows are called.
        rows: The rows.
        examples: Of the rows: a data set, or a list.
        spec: Says how boxes are read.
        most: Objects that the model can find in a picture.
    """
    said = []
    over = [
        int(example["row"])
        for example in examples
        if len(example["crowd"]) - sum(example["crowd"]) > most
    ]
    if over:
        have = "picture has" if len(over) == 1 else "pictures have"
        warning = f"{len(over):,} {name} {have} more objects than the {most} that "
        said.append(f"{warning}the model can find, so that some are not learned: {_at(rows, over)}")
    if turned := [int(examples[i]["row"]) for i in where(examples, IS_TURNED)]:
        one = len(turned) == 1
        what = f"{len(turned):,} {name} {'picture is' if one else 'pictures are'} turned or "
        what += f"mirrored by {'its' if one else 'their'} EXIF data, and the boxes are read as of "
        what += f"{'the picture' if one else 'the pictures'} seen upright; `lora validate --data "
        said.append(f"{what}--show 3` shows where they lie: {_at(rows, turned)}")
    if warning := _not_from_zero(rows, examples, spec):
        said.append(warning)
    if warning := _left_out(name, rows, examples):
        said.append(warning)
    if warning := _in_one_corner(name, examples):
        said.append(warning)
    if spec.clip_boxes and (warning := _other_format(name, rows, spec)):
        said.append(warning)
    return "; ".join(said) or None


def _at(rows: Rows, found: list[int]) -> str:
    return rows.place(found[0])


def _left_out(name: str, rows: Rows, examples: Any) -> str:
    """Return how many objects are neither trained nor measured, as the data mark them."""
    counts = {int(example["row"]): sum(example["crowd"]) for example in examples}
    marked = [row for row, count in counts.items() if count]
    if not marked:
        return ""
    verb = "is" if sum(counts.values()) == 1 else "are"
    what = f"{counted(sum(counts.values()), 'object')} of {name} {verb} marked as `iscrowd` or "
    return f"{what}`difficult`, and {verb} neither trained nor measured: {_at(rows, marked)}"


def _in_one_corner(name: str, examples: Any) -> str:
    """Return that no box reaches the right or lower half of its picture, if that is so of many.

    Boxes in per cent, and those of a smaller copy of the picture, lie in it all the same.
    """
    n_objects, right, lower, largest = 0, 0.0, 0.0, 0.0
    for example in islice(examples, SAMPLE):
        boxes = np.array(example["boxes"], dtype=np.float64).reshape(-1, 4)
        n_objects += len(boxes)
        if len(boxes):
            right = max(right, float(boxes[:, 2].max()) / example["width"])
            lower = max(lower, float(boxes[:, 3].max()) / example["height"])
            largest = max(largest, float(boxes.max()))
    if n_objects < MANY or max(right, lower) >= HALF:
        return ""
    what = f"the boxes of all {n_objects:,} objects of {name} lie in the upper left part of their "
    what += f"pictures, within {right:.0%} of the width and {lower:.0%} of the height: are they "
    what += "in per cent, or " if largest <= 100 else ""
    return f"{what}of pictures of another size?"


def _not_from_zero(rows: Rows, examples: Any, spec: ObjectDetectionSpec) -> str:
    """Return that numbers of labels seem to count from 1, where none is 0."""
    column = spec.objects_column
    if not spec.labels or rows.label_names.get(column):
        return ""
    numbers = (number for row in islice(rows, SAMPLE) for number in categories_in(row.get(column)))
    if not any(isinstance(n, int) and str(n) not in map(str, spec.labels) for n in numbers):
        return ""
    found = {number for example in examples for number in example["classes"]}
    if not found or 0 in found:
        return ""
    what = f"no object has the number 0, the first of `task.labels` (`{spec.labels[0]}`): do the "
    return f"{what}numbers begin at 1? Then name what 0 stands for as the first label"


def _other_format(name: str, rows: Rows, spec: ObjectDetectionSpec) -> str:
    """Return that all boxes would lie in their pictures in another format, if that is so."""
    known = []
    for i in range(min(SAMPLE, len(rows))):
        row = rows[i]
        facts = picture_facts(row[spec.image_column])
        known.append((row.get(spec.objects_column), (facts.width, facts.height)))
    if (found := better_format(known, spec.box_format)) is None:
        return ""
    form, leaving = found
    rows_have = "row has a box that leaves" if leaving == 1 else "rows have boxes that leave"
    what = f"{leaving:,} {name} {rows_have} the picture and are cut, and with `task.box_format: "
    return f"{what}{form}` none would: is that how they are written?"
