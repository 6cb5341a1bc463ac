"""Read and check the objects in an image: a box and a category each.

Whatever the input format, a box here is its two corners (x0, y0, x1, y1) in pixels of the displayed
image, whose upper left corner is (0, 0) and lower right corner (width, height).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.file_formats import is_blank
from lora_cli.data.json_rows import JSON_NAMES
from lora_cli.errors import counted, printable

BOX_KEYS = ("bbox", "bboxes", "box", "boxes")
CATEGORY_KEYS = (
    "category", "categories", "category_id", "label", "labels", "class", "classes", "class_labels",
)  # fmt: skip
CROWD_KEYS = ("iscrowd", "is_crowd")
FORMAT, SIZE = "box_format", "size"  # keys that the readers of annotation files add
TOLERANCE = 1.0  # pixels a box may extend beyond the image because of rounding
OUTSIDE_SHARE = 0.2  # share of rows with boxes outside the image that suggests a wrong format
MAX_SHOWN = 60
SHARES = "shares of the picture?"


class BoxError(ValueError):
    """The objects of a row cannot be used; the message says why."""


@dataclass(frozen=True)
class Objects:
    """The objects in an image.

    Args:
        boxes: Corners in pixels (N, 4).
        categories: The name or number of each category.
        crowd: Whether each box is a crowd region of many objects (N,).
    """

    boxes: NDArray[np.float64]
    categories: list[str | int]
    crowd: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.categories)


def categories_in(value: Any) -> list[str | int]:
    """Return the categories of the objects in a cell, unconverted.

    Raises:
        BoxError: If the objects cannot be read.
    """
    return [_category(item.get("category"), i) for i, item in enumerate(_objects_in(value))]


def crowd_flags_in(value: Any) -> list[bool]:
    """Return for each object in a cell whether it is a crowd region, or to be ignored.

    Raises:
        BoxError: If the objects cannot be read.
    """
    return [bool(item.get("crowd")) for item in _objects_in(value)]


def stated_size(annotation: Mapping[str, Any]) -> list[int] | None:
    """Return the `width` and `height` of an image according to its annotations; None if absent.

    Both may be numbers or numeric strings. Values of 0 or less, which some exports write, count as
    absent.
    """
    size = []
    for side in ("width", "height"):
        value = annotation.get(side)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None
        if not (number > 0 and number.is_integer()):
            return None
        size.append(int(number))
    return size


def annotated_size(row: Mapping[str, Any], column: str) -> list[int] | None:
    """Return the image size that a row states, inside its objects or next to them."""
    value = row.get(column)
    inside = value.get(SIZE) if isinstance(value, dict) else None
    return inside or stated_size(row)


def read_objects(
    value: Any,
    size: tuple[int, int],
    box_format: str = "xywh",
    clip: bool = False,
    written_size: Sequence[int] | None = None,
) -> Objects:
    """Return the objects of an image.

    Args:
        value: The value of the column: a list of objects, or an object of lists.
        size: Width and height of the image in pixels.
        box_format: Format of the boxes, if the cell does not state it.
        clip: Clip boxes to the image.
        written_size: Width and height of the image according to the row.

    Raises:
        BoxError: If an object is invalid.
    """
    items, own_format = _objects_in(value), None
    if isinstance(value, dict):
        own_format = value.get(FORMAT)
    _require_size(written_size, size)
    categories = [_category(item.get("category"), i) for i, item in enumerate(items)]
    boxes = np.empty((len(items), 4))
    for i, item in enumerate(items):
        try:
            boxes[i] = _corners(item.get("box"), i, size, own_format or box_format, clip)
        except BoxError as error:
            context = (i, size, own_format or box_format, bool(own_format))
            hint = _other_format(str(error), item.get("box"), *context)
            raise BoxError(f"{error}{hint}") from None
    crowd = np.array([bool(item.get("crowd")) for item in items], dtype=bool)
    return Objects(boxes, categories, crowd)


def _objects_in(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a cell, each with `box`, `category` and `crowd`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BoxError(f"holds the text `{printable(value, MAX_SHOWN)}`, not objects") from None
    if isinstance(value, dict):
        return _objects_of_lists(value)
    if not isinstance(value, list):
        kind_of_value = JSON_NAMES.get(type(value), type(value).__name__)
        raise BoxError("is blank" if value is None else f"holds {kind_of_value}, not objects")
    objects = []
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            kind_of_value = JSON_NAMES.get(type(item), type(item).__name__)
            raise BoxError(f"holds a list with {kind_of_value} in it, not objects")
        box, category = _key(item, BOX_KEYS), _key(item, CATEGORY_KEYS)
        for kind, key, keys in (("box", box, BOX_KEYS), ("category", category, CATEGORY_KEYS)):
            if key is None:
                raise BoxError(f"{_named(i)} has no {kind}: no key is called {', '.join(keys[:3])}")
        crowd = _key(item, CROWD_KEYS)
        objects.append({
            "box": item[str(box)], "category": item[str(category)],
            "crowd": _crowd_flag(item[crowd], i) if crowd else False,
        })  # fmt: skip
    return objects


def _objects_of_lists(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects that a cell stores as an object of lists."""
    box, category = _key(value, BOX_KEYS), _key(value, CATEGORY_KEYS)
    for kind, key, keys in (("boxes", box, BOX_KEYS), ("categories", category, CATEGORY_KEYS)):
        if key is None:
            raise BoxError(f"holds no {kind}: no key is called {', '.join(keys[:3])}")
        if not isinstance(value[key], list):
            raise BoxError(f"`{key}` holds {JSON_NAMES.get(type(value[key]))}, not a list")
    boxes, categories = value[str(box)], value[str(category)]
    if len(boxes) != len(categories):
        box_count = "1 box" if len(boxes) == 1 else f"{len(boxes)} boxes"
        category_count = "1 category" if len(categories) == 1 else f"{len(categories)} categories"
        raise BoxError(f"holds {box_count} and {category_count}")
    key = _key(value, CROWD_KEYS)
    crowd = value[key] if key else [False] * len(boxes)
    if not isinstance(crowd, list) or len(crowd) != len(boxes):
        raise BoxError(f"`{key}` does not have {counted(len(boxes), 'value')}")
    return [
        {"box": b, "category": c, "crowd": _crowd_flag(flag, i)}
        for i, (b, c, flag) in enumerate(zip(boxes, categories, crowd, strict=True))
    ]


def _key(value: dict[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if key in value), None)


def _crowd_flag(value: Any, i: int) -> bool:
    if value is None or value in (0, 1):
        return bool(value)
    raise BoxError(f"`iscrowd` of {_named(i)} is `{printable(str(value), MAX_SHOWN)}`, not 0 or 1")


def _category(value: Any, i: int) -> str | int:
    """Return a category as a name or a number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and not is_blank(value):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if is_blank(value):
        raise BoxError(f"{_named(i)} has a blank category")
    shown = printable(json.dumps(value, default=str), MAX_SHOWN)
    raise BoxError(f"the category of {_named(i)} is `{shown}`, not a name or a whole number")


def _named(i: int) -> str:
    return f"object {i + 1}"


def _require_size(stated: Any, size: tuple[int, int]) -> None:
    """Reject an image whose size differs from the one in its annotations.

    Raises:
        BoxError: If the annotations are of a different image, or of this one before its rotation.
    """
    if not stated or tuple(stated) == size or 0 in stated:
        return
    width, height = size
    what = f"the boxes are of a picture of {stated[0]} x {stated[1]} pixels, and the file has "
    what += f"{width} x {height}"
    if tuple(stated) == (height, width):
        what += ": width and height are exchanged, as where EXIF data turn a photograph and the "
        what += "boxes were drawn before"
    raise BoxError(what)


def _other_format(
    error: str, value: Any, i: int, size: tuple[int, int], box_format: str, is_of_file: bool
) -> str:
    """Return a question that suggests the format in which an invalid box would be valid."""
    if error.endswith(SHARES):
        return "" if is_of_file else " Then set `task.box_format: relative_…`"
    for form in ("xyxy", "xywh"):
        other = "relative_" * box_format.startswith("relative_") + form
        try:
            _corners(value, i, size, other, False)
        except BoxError:
            continue
        if other == box_format or (is_of_file and box_format != "xywh"):
            return ""
        if is_of_file:
            return "; or are these two corners? COCO's boxes are [x, y, width, height]"
        return f"; or is it `task.box_format: {other}`?"
    return ""


def _corners(
    value: Any, i: int, size: tuple[int, int], box_format: str, clip: bool
) -> tuple[float, float, float, float]:
    """Return the corners of a box in pixels, inside the image."""
    numbers = _numbers(value, i)
    box_text = f"[{', '.join(f'{n:g}' for n in numbers)}]"
    relative = box_format.startswith("relative_")
    form = box_format.removeprefix("relative_")
    _reject_other_unit(numbers, box_text, i, relative)
    scale = size if relative else (1, 1)
    a, b, c, d = (n * scale[k % 2] for k, n in enumerate(numbers))
    if form == "xyxy":
        if c < a or d < b:
            what = (
                f"the corners of the box of {_named(i)} are swapped, {box_text}: the first is the "
            )
            raise BoxError(f"{what}upper left one")
        x0, y0, x1, y1 = a, b, c, d
    elif c < 0 or d < 0:
        raise BoxError(f"the box of {_named(i)} has a size below 0, {box_text}")
    elif form == "xywh":
        x0, y0, x1, y1 = a, b, a + c, b + d
    else:
        x0, y0, x1, y1 = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    if x1 <= x0 or y1 <= y0:
        raise BoxError(f"the box of {_named(i)} is empty, {box_text}")
    return _clipped((x0, y0, x1, y1), i, box_text, size, clip)


def _numbers(value: Any, i: int) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise BoxError(f"the box of {_named(i)} is not a list of four numbers")
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in value):
        raise BoxError(f"the box of {_named(i)} holds something that is not a number")
    numbers = [float(n) for n in value]
    if not all(map(math.isfinite, numbers)):
        raise BoxError(f"the box of {_named(i)} holds NaN or infinity")
    return numbers


def _reject_other_unit(numbers: list[float], box_text: str, i: int, relative: bool) -> None:
    """Reject pixels where relative coordinates are expected, and the reverse."""
    if relative and max(numbers) > 2:
        what = (
            f"the box of {_named(i)} is not in shares of the picture, {box_text}: are these pixels?"
        )
        raise BoxError(what)
    if not relative and 0 < max(numbers) <= 1:
        what = f"the box of {_named(i)} is smaller than a pixel, {box_text}: are these "
        raise BoxError(what + SHARES)


def _clipped(
    box: tuple[float, float, float, float],
    i: int,
    box_text: str,
    size: tuple[int, int],
    clip: bool,
) -> tuple[float, float, float, float]:
    """Return a box clipped to the image."""
    width, height = size
    x0, y0, x1, y1 = box
    cut = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    subject = f"the box of {_named(i)}, {box_text},"
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise BoxError(f"{subject} lies outside the picture of {width} x {height} pixels")
    overhang = max(a - b for a, b in zip((*cut[:2], x1, y1), (x0, y0, *cut[2:]), strict=True))
    if overhang > TOLERANCE and not clip:
        what = f"{subject} leaves the picture of {width} x {height} pixels by {overhang:.4g}: "
        raise BoxError(f"{what}`--set task.clip_boxes=true` cuts such boxes at its edge")
    return cut


def better_format(
    samples: Sequence[tuple[Any, tuple[int, int]]], box_format: str
) -> tuple[str, int] | None:
    """Return a format in which all boxes are inside their images, if many are outside now.

    Args:
        samples: The objects of each row, and the size of its image.
        box_format: The current format.

    Returns:
        The better format, and the number of rows with a box outside its image; None if the current
        format fits or no format does.
    """
    samples = [(value, size) for value, size in samples if not _has_own_format(value)]
    n_outside = sum(not _fits(value, size, box_format) for value, size in samples)
    if not n_outside or n_outside < OUTSIDE_SHARE * len(samples):
        return None
    prefix = "relative_" * box_format.startswith("relative_")
    other_formats = (
        prefix + form for form in ("xywh", "xyxy", "cxcywh") if prefix + form != box_format
    )
    fitting = (f for f in other_formats if all(_fits(value, size, f) for value, size in samples))
    return next(((form, n_outside) for form in fitting), None)


def _has_own_format(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.get(FORMAT))


def _fits(value: Any, size: tuple[int, int], box_format: str) -> bool:
    try:
        read_objects(value, size, box_format)
    except BoxError:
        return False
    return True


def are_objects(values: Sequence[Any]) -> bool:
    """Return whether nearly all values of a column are lists of boxes with categories."""
    n_objects, n_valid = 0, 0
    for value in values:
        if isinstance(value, dict | list):
            try:
                n_objects += len(categories_in(value))
                n_valid += 1
            except BoxError:
                continue
    return n_objects > 0 and n_valid >= 0.9 * len(values)


def nested_names(feature: Any) -> list[str]:
    """Return the category names in the type of a column; empty if it has none.

    Args:
        feature: The `datasets` feature of the column: an object of lists, or a list of objects.
    """
    import datasets

    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, dict):
        return []
    kinds = [getattr(inner[key], "feature", inner[key]) for key in CATEGORY_KEYS if key in inner]
    return next((list(k.names) for k in kinds if isinstance(k, datasets.ClassLabel)), [])
