"""Objects in pictures: a box and a category for each, read from a row and checked.

Whatever form a row has, here a box is its two corners (x0, y0, x1, y1) in pixels of the picture as
it is seen, the upper left corner of the picture being (0, 0) and the lower right (width, height).
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
FORMAT, SIZE = "box_format", "size"  # what the readers of annotation files add
TOLERANCE = 1.0  # pixels by which a box may leave the picture: it was rounded
LEAVING = 0.2  # share of the rows whose boxes leave the picture, from where on it is odd
SHOWN = 60
SHARES = "shares of the picture?"


class BoxError(ValueError):
    """Objects of a row that cannot be used; the text says why."""


@dataclass(frozen=True)
class Objects:
    """The objects in a picture.

    Args:
        boxes: Corners in pixels (N, 4).
        categories: A name or a number for each.
        crowd: Whether a box is a region of many objects (N,).
    """

    boxes: NDArray[np.float64]
    categories: list[str | int]
    crowd: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.categories)


def categories_in(value: Any) -> list[str | int]:
    """Return the categories of the objects in a cell, each as it stands there.

    Raises:
        BoxError: If they cannot be read.
    """
    return [_category(one.get("category"), i) for i, one in enumerate(_listed(value))]


def crowd_marks_in(value: Any) -> list[bool]:
    """Return of each object in a cell whether it is a region of many, or one to be left out.

    Raises:
        BoxError: If they cannot be read.
    """
    return [bool(one.get("crowd")) for one in _listed(value)]


def said_size(about: Mapping[str, Any]) -> list[int] | None:
    """Return the `width` and `height` that annotations give a picture; None if they do not.

    Both are numbers above 0, or such numbers as text: exports write all three.
    """
    found = []
    for side in ("width", "height"):
        value = about.get(side)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None
        if not (number > 0 and number.is_integer()):
            return None
        found.append(int(number))
    return found


def annotated_size(row: Mapping[str, Any], column: str) -> list[int] | None:
    """Return the size that a row gives its picture: inside its objects, or next to them."""
    value = row.get(column)
    inside = value.get(SIZE) if isinstance(value, dict) else None
    return inside or said_size(row)


def read_objects(
    value: Any,
    size: tuple[int, int],
    box_format: str = "xywh",
    clip: bool = False,
    written_size: Sequence[int] | None = None,
) -> Objects:
    """Return the objects of a picture.

    Args:
        value: What the column holds: a list of objects, or an object of lists.
        size: Width and height of the picture in pixels.
        box_format: How boxes are written, where the cell does not say.
        clip: Cut boxes at the edge of the picture.
        written_size: Width and height that the row gives the picture.

    Raises:
        BoxError: If there is something wrong with one of them.
    """
    items, of_file = _listed(value), None
    if isinstance(value, dict):
        of_file = value.get(FORMAT)
    _require_size(written_size, size)
    categories = [_category(one.get("category"), i) for i, one in enumerate(items)]
    boxes = np.empty((len(items), 4))
    for i, one in enumerate(items):
        try:
            boxes[i] = _corners(one.get("box"), i, size, of_file or box_format, clip)
        except BoxError as error:
            known = (i, size, of_file or box_format, bool(of_file))
            hint = _other_format(str(error), one.get("box"), *known)
            raise BoxError(f"{error}{hint}") from None
    crowd = np.array([bool(one.get("crowd")) for one in items], dtype=bool)
    return Objects(boxes, categories, crowd)


def _listed(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a cell, each with `box`, `category` and `crowd`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BoxError(f"holds the text `{printable(value, SHOWN)}`, not objects") from None
    if isinstance(value, dict):
        return _of_lists(value)
    if not isinstance(value, list):
        held = JSON_NAMES.get(type(value), type(value).__name__)
        raise BoxError("is blank" if value is None else f"holds {held}, not objects")
    found = []
    for i, one in enumerate(value):
        if not isinstance(one, dict):
            held = JSON_NAMES.get(type(one), type(one).__name__)
            raise BoxError(f"holds a list with {held} in it, not objects")
        box, category = _key(one, BOX_KEYS), _key(one, CATEGORY_KEYS)
        for kind, key, keys in (("box", box, BOX_KEYS), ("category", category, CATEGORY_KEYS)):
            if key is None:
                raise BoxError(f"{_named(i)} has no {kind}: no key is called {', '.join(keys[:3])}")
        crowd = _key(one, CROWD_KEYS)
        found.append({
            "box": one[str(box)], "category": one[str(category)],
            "crowd": _flag(one[crowd], i) if crowd else False,
        })  # fmt: skip
    return found


def _of_lists(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects of an object of lists."""
    box, category = _key(value, BOX_KEYS), _key(value, CATEGORY_KEYS)
    for kind, key, keys in (("boxes", box, BOX_KEYS), ("categories", category, CATEGORY_KEYS)):
        if key is None:
            raise BoxError(f"holds no {kind}: no key is called {', '.join(keys[:3])}")
        if not isinstance(value[key], list):
            raise BoxError(f"`{key}` holds {JSON_NAMES.get(type(value[key]))}, not a list")
    boxes, categories = value[str(box)], value[str(category)]
    if len(boxes) != len(categories):
        boxed = "1 box" if len(boxes) == 1 else f"{len(boxes)} boxes"
        named = "1 category" if len(categories) == 1 else f"{len(categories)} categories"
        raise BoxError(f"holds {boxed} and {named}")
    key = _key(value, CROWD_KEYS)
    crowd = value[key] if key else [False] * len(boxes)
    if not isinstance(crowd, list) or len(crowd) != len(boxes):
        raise BoxError(f"`{key}` does not have {counted(len(boxes), 'value')}")
    return [
        {"box": b, "category": c, "crowd": _flag(flag, i)}
        for i, (b, c, flag) in enumerate(zip(boxes, categories, crowd, strict=True))
    ]


def _key(value: dict[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if key in value), None)


def _flag(value: Any, i: int) -> bool:
    if value is None or value in (0, 1):
        return bool(value)
    raise BoxError(f"`iscrowd` of {_named(i)} is `{printable(str(value), SHOWN)}`, not 0 or 1")


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
    shown = printable(json.dumps(value, default=str), SHOWN)
    raise BoxError(f"the category of {_named(i)} is `{shown}`, not a name or a whole number")


def _named(i: int) -> str:
    return f"object {i + 1}"


def _require_size(said: Any, size: tuple[int, int]) -> None:
    """Reject a picture of another size than its annotations say.

    Raises:
        BoxError: If it is not the one that was annotated, or lies on its side.
    """
    if not said or tuple(said) == size or 0 in said:
        return
    width, height = size
    what = f"the boxes are of a picture of {said[0]} x {said[1]} pixels, and the file has "
    what += f"{width} x {height}"
    if tuple(said) == (height, width):
        what += ": width and height are exchanged, as where EXIF data turn a photograph and the "
        what += "boxes were drawn before"
    raise BoxError(what)


def _other_format(
    error: str, value: Any, i: int, size: tuple[int, int], box_format: str, is_of_file: bool
) -> str:
    """Return in which other format a box that is wrong would be right, as a question."""
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
    """Return the corners of a box in pixels, inside the picture."""
    numbers = _numbers(value, i)
    shown = f"[{', '.join(f'{n:g}' for n in numbers)}]"
    relative = box_format.startswith("relative_")
    form = box_format.removeprefix("relative_")
    _reject_other_unit(numbers, shown, i, relative)
    scale = size if relative else (1, 1)
    a, b, c, d = (n * scale[k % 2] for k, n in enumerate(numbers))
    if form == "xyxy":
        if c < a or d < b:
            what = f"the corners of the box of {_named(i)} are swapped, {shown}: the first is the "
            raise BoxError(f"{what}upper left one")
        x0, y0, x1, y1 = a, b, c, d
    elif c < 0 or d < 0:
        raise BoxError(f"the box of {_named(i)} has a size below 0, {shown}")
    elif form == "xywh":
        x0, y0, x1, y1 = a, b, a + c, b + d
    else:
        x0, y0, x1, y1 = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    if x1 <= x0 or y1 <= y0:
        raise BoxError(f"the box of {_named(i)} is empty, {shown}")
    return _inside((x0, y0, x1, y1), i, shown, size, clip)


def _numbers(value: Any, i: int) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise BoxError(f"the box of {_named(i)} is not a list of four numbers")
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in value):
        raise BoxError(f"the box of {_named(i)} holds something that is not a number")
    numbers = [float(n) for n in value]
    if not all(map(math.isfinite, numbers)):
        raise BoxError(f"the box of {_named(i)} holds NaN or infinity")
    return numbers


def _reject_other_unit(numbers: list[float], shown: str, i: int, relative: bool) -> None:
    """Reject pixels where shares are expected, and shares where pixels are."""
    if relative and max(numbers) > 2:
        what = f"the box of {_named(i)} is not in shares of the picture, {shown}: are these pixels?"
        raise BoxError(what)
    if not relative and 0 < max(numbers) <= 1:
        what = f"the box of {_named(i)} is smaller than a pixel, {shown}: are these "
        raise BoxError(what + SHARES)


def _inside(
    box: tuple[float, float, float, float],
    i: int,
    shown: str,
    size: tuple[int, int],
    clip: bool,
) -> tuple[float, float, float, float]:
    """Return a box cut at the edge of the picture."""
    width, height = size
    x0, y0, x1, y1 = box
    cut = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    whole = f"the box of {_named(i)}, {shown},"
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise BoxError(f"{whole} lies outside the picture of {width} x {height} pixels")
    over = max(a - b for a, b in zip((*cut[:2], x1, y1), (x0, y0, *cut[2:]), strict=True))
    if over > TOLERANCE and not clip:
        what = f"{whole} leaves the picture of {width} x {height} pixels by {over:.4g}: "
        raise BoxError(f"{what}`--set task.clip_boxes=true` cuts such boxes at its edge")
    return cut


def better_format(
    known: Sequence[tuple[Any, tuple[int, int]]], box_format: str
) -> tuple[str, int] | None:
    """Return a format in which all boxes lie in their pictures, if those of many rows do not.

    Args:
        known: What rows hold, and the size of the picture of each.
        box_format: How boxes are read.

    Returns:
        The format, and how many rows have a box that leaves its picture; None if all is well.
    """
    known = [(value, size) for value, size in known if not _of_file(value)]
    leaving = sum(not _fits(value, size, box_format) for value, size in known)
    if not leaving or leaving < LEAVING * len(known):
        return None
    prefix = "relative_" * box_format.startswith("relative_")
    others = (prefix + form for form in ("xywh", "xyxy", "cxcywh") if prefix + form != box_format)
    fitting = (f for f in others if all(_fits(value, size, f) for value, size in known))
    return next(((found, leaving) for found in fitting), None)


def _of_file(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.get(FORMAT))


def _fits(value: Any, size: tuple[int, int], box_format: str) -> bool:
    try:
        read_objects(value, size, box_format)
    except BoxError:
        return False
    return True


def are_objects(values: Sequence[Any]) -> bool:
    """Return whether nearly all values of a column are lists of boxes with categories."""
    n_objects, good = 0, 0
    for value in values:
        if isinstance(value, dict | list):
            try:
                n_objects += len(categories_in(value))
                good += 1
            except BoxError:
                continue
    return n_objects > 0 and good >= 0.9 * len(values)


def nested_names(feature: Any) -> list[str]:
    """Return the names of the categories inside a column of a data set, if they have names.

    Args:
        feature: The type of the column: an object of lists, or a list of objects.
    """
    import datasets

    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, dict):
        return []
    kinds = [getattr(inner[key], "feature", inner[key]) for key in CATEGORY_KEYS if key in inner]
    return next((list(k.names) for k in kinds if isinstance(k, datasets.ClassLabel)), [])
