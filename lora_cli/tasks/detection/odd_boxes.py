"""Warnings about suspicious boxes: rotated images, wrong formats, class indices from 1."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from lora_cli.data.boxes import annotated_size, better_format, categories_in
from lora_cli.data.load_rows import Rows
from lora_cli.data.pictures import PictureFacts, picture_facts
from lora_cli.errors import counted
from lora_cli.recipe import ObjectDetectionSpec
from lora_cli.tasks.pictures.odd_pictures import positions_where

SAMPLE = 500  # rows on which other box formats are tried
MIN_OBJECTS, MAX_EXTENT = 20, 0.55  # when boxes in the upper left are suspicious
FIRST_ROTATED = 5  # the first EXIF orientation that swaps width and height
IS_TURNED = "is_turned"


def may_be_turned(facts: PictureFacts, row: dict[str, Any], objects_column: str) -> bool:
    """Return whether EXIF data turn or mirror an image whose boxes may refer to the raw pixels."""
    if facts.orientation < FIRST_ROTATED:
        return facts.orientation > 1
    size = annotated_size(row, objects_column)
    return size is None or facts.width == facts.height


def odd_boxes(
    name: str, rows: Rows, examples: Any, spec: ObjectDetectionSpec, max_objects: int
) -> str | None:
    """Return a warning about boxes that may be wrong and images with too many objects, or None.

    Args:
        name: What the warning calls the rows.
        rows: The rows.
        examples: The rows' examples: a data set or a list.
        spec: The recipe's task, which says how boxes are read.
        max_objects: The number of objects that the model can detect in one image.
    """
    warnings = []
    over = [
        int(example["row"])
        for example in examples
        if len(example["crowd"]) - sum(example["crowd"]) > max_objects
    ]
    if over:
        have = "picture has" if len(over) == 1 else "pictures have"
        warning = f"{len(over):,} {name} {have} more objects than the {max_objects} that "
        warnings.append(
            f"{warning}the model can find, so that some are not learned: {_first_place(rows, over)}"
        )
    if turned := [int(examples[i]["row"]) for i in positions_where(examples, IS_TURNED)]:
        single = len(turned) == 1
        what = f"{len(turned):,} {name} {'picture is' if single else 'pictures are'} turned or "
        what += f"mirrored by {'its' if single else 'their'} EXIF data, and the boxes are read as "
        what += f"of {'the picture' if single else 'the pictures'} seen upright; "
        what += "`lora validate --data "
        warnings.append(f"{what}--show 3` shows where they lie: {_first_place(rows, turned)}")
    if warning := _not_from_zero(rows, examples, spec):
        warnings.append(warning)
    if warning := _left_out(name, rows, examples):
        warnings.append(warning)
    if warning := _in_one_corner(name, examples):
        warnings.append(warning)
    if spec.clip_boxes and (warning := _other_format(name, rows, spec)):
        warnings.append(warning)
    return "; ".join(warnings) or None


def _first_place(rows: Rows, row_indices: list[int]) -> str:
    return rows.place(row_indices[0])


def _left_out(name: str, rows: Rows, examples: Any) -> str:
    """Say how many objects the data mark to be left out of training and evaluation."""
    counts = {int(example["row"]): sum(example["crowd"]) for example in examples}
    marked = [row for row, count in counts.items() if count]
    if not marked:
        return ""
    verb = "is" if sum(counts.values()) == 1 else "are"
    what = f"{counted(sum(counts.values()), 'object')} of {name} {verb} marked as `iscrowd` or "
    return (
        f"{what}`difficult`, and {verb} neither trained nor measured: {_first_place(rows, marked)}"
    )


def _in_one_corner(name: str, examples: Any) -> str:
    """Warn if all boxes lie in the upper left part of their images.

    Such boxes may be in per cent, or relate to a smaller copy of each image: both pass the check
    that boxes lie inside.
    """
    n_objects, max_right, max_lower, max_coordinate = 0, 0.0, 0.0, 0.0
    for example in islice(examples, SAMPLE):
        boxes = np.array(example["boxes"], dtype=np.float64).reshape(-1, 4)
        n_objects += len(boxes)
        if len(boxes):
            max_right = max(max_right, float(boxes[:, 2].max()) / example["width"])
            max_lower = max(max_lower, float(boxes[:, 3].max()) / example["height"])
            max_coordinate = max(max_coordinate, float(boxes.max()))
    if n_objects < MIN_OBJECTS or max(max_right, max_lower) >= MAX_EXTENT:
        return ""
    what = f"the boxes of all {n_objects:,} objects of {name} lie in the upper left part of their "
    what += f"pictures, within {max_right:.0%} of the width and {max_lower:.0%} of the height: "
    what += "are they in per cent, or " if max_coordinate <= 100 else "are they "
    return f"{what}of pictures of another size?"


def _not_from_zero(rows: Rows, examples: Any, spec: ObjectDetectionSpec) -> str:
    """Warn if the data's class indices seem to start at 1."""
    column = spec.objects_column
    if not spec.labels or rows.label_names.get(column):
        return ""
    numbers = (number for row in islice(rows, SAMPLE) for number in categories_in(row.get(column)))
    if not any(isinstance(n, int) and str(n) not in map(str, spec.labels) for n in numbers):
        return ""
    classes = {number for example in examples for number in example["classes"]}
    if not classes or 0 in classes:
        return ""
    what = f"no object has the number 0, the first of `task.labels` (`{spec.labels[0]}`): do the "
    return f"{what}numbers begin at 1? Then name what 0 stands for as the first label"


def _other_format(name: str, rows: Rows, spec: ObjectDetectionSpec) -> str:
    """Warn if all boxes would lie inside their images when read in another format."""
    objects_and_sizes = []
    for i in range(min(SAMPLE, len(rows))):
        row = rows[i]
        facts = picture_facts(row[spec.image_column])
        objects_and_sizes.append((row.get(spec.objects_column), (facts.width, facts.height)))
    if (better := better_format(objects_and_sizes, spec.box_format)) is None:
        return ""
    box_format, leaving = better
    rows_have = "row has a box that leaves" if leaving == 1 else "rows have boxes that leave"
    what = f"{leaving:,} {name} {rows_have} the picture and are cut, and with `task.box_format: "
    return f"{what}{box_format}` none would: is that how they are written?"
