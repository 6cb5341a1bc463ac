"""COCO's annotations: one JSON file with pictures, boxes and categories; a row for each picture.

    {"images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}],
     "annotations": [{"image_id": 1, "bbox": [x, y, w, h], "category_id": 3, "iscrowd": 0}],
     "categories": [{"id": 3, "name": "cat"}]}

An annotation without a `bbox` has the box around its outline or its mask. The pictures are looked
for next to the file, and where COCO's own archives and the usual exports put them, each by itself:
those of one file can lie in several folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_cli.data.boxes import FORMAT, SIZE, stated_size
from lora_cli.data.json_rows import json_error
from lora_cli.data.media import media_value, written_here
from lora_cli.data.text_lines import RawRow, unreadable
from lora_cli.errors import LoraError, counted, printable

PARTS = ("images", "annotations", "categories")
HEAD_BYTES = 1 << 16
AGAIN = "export or download it again"
Json = dict[str, Any]


def is_coco(file: Path) -> bool:
    """Return whether a file is one object that names pictures and annotations, by its beginning."""
    if file.suffix.lower() != ".json":
        return False
    try:
        with file.open("rb") as opened:
            head = opened.read(HEAD_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n")
            if not head.startswith(b"{"):
                return False
            if re.search(rb'"(images|annotations)"\s*:\s*\[', head):
                return True
            if len(head) < HEAD_BYTES // 2:
                return False
            return re.search(rb'"(images|annotations)"\s*:\s*\[', opened.read()) is not None
    except OSError as error:
        raise unreadable(file, error) from error


def coco_names(file: Path) -> list[str]:
    """Return the names of the categories of a file, in the order of their numbers."""
    return list(_categories(_read(file), file).values())


def places_of_pictures(file: Path) -> list[str]:
    """Return where each picture of a file is, as far as there is one."""
    pictures = _read(file)["images"]
    folders = _folders_of(file, pictures)
    names = (picture.get("file_name") for picture in pictures)
    return [
        str(next((folder for folder in folders if _is_there(folder, name)), ""))
        for name in names
        if isinstance(name, str)
    ]


def read_coco(file: Path, column: str, boxes_column: str) -> Iterator[RawRow]:
    """Yield a row for each picture: its path, and its objects.

    Args:
        file: The JSON file.
        column: Name of the column of the picture.
        boxes_column: Name of the column of the objects.

    Raises:
        LoraError: If the file as a whole cannot be read.
    """
    content = _read(file)
    names = _categories(content, file)
    ids = [_number(picture.get("id")) for picture in content["images"]]
    by_picture: dict[Any, list[Json]] = {i: [] for i in ids if isinstance(i, int | str)}
    for n, one in enumerate(content["annotations"]):
        picture = _number(one.get("image_id"))
        if not isinstance(picture, int | str) or picture not in by_picture:
            what = f"it is of picture `{printable(str(picture), 60)}`, which is not in `images`"
            yield RawRow(None, f"{file.name}[annotations][{n}]", what)
            continue
        by_picture[picture].append(one)
    folders = _folders_of(file, content["images"])
    seen: set[Any] = set()
    for n, picture in enumerate(content["images"]):
        place = f"{file.name}[images][{n}]"
        name, key = picture.get("file_name"), _number(picture.get("id"))
        if not isinstance(name, str) or not name.strip():
            yield RawRow(None, place, "the picture has no `file_name`")
            continue
        place = f"{file.name}: {printable(name, 200)}"
        if not isinstance(key, int | str) or key in seen:
            what = "no `id`" if key not in seen else f"the `id` {key} of another picture"
            yield RawRow(None, place, f"the picture has {what}")
            continue
        seen.add(key)
        objects, error = _objects(by_picture[key], names, picture)
        there = [folder for folder in folders if _is_there(folder, name)] or folders[:1]
        if len(there) > 1 and there[0] != folders[0]:
            shown = " and ".join(f"`{folder}`" for folder in there[:2])
            error = error or f"a picture of this name is in {shown}"
        value = media_value(name, there[0])
        yield RawRow({column: value, boxes_column: objects}, place, error)


def _read(file: Path) -> Json:
    """Return the content of a file, which has all three parts.

    Raises:
        LoraError: If it is not JSON, or lacks one of them.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        what = json_error(error) if not isinstance(error, UnicodeError) else "not UTF-8 text"
        raise LoraError(what, str(file), AGAIN) from error
    for part in PARTS:
        value = content.get(part)
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            what = f"the COCO file has no list of objects `{part}`"
            hint = "name the file of the boxes (`instances_….json`), not of captions or of a test"
            raise LoraError(what, str(file), hint)
    return dict(content)


def _categories(content: Json, file: Path) -> dict[int, str]:
    """Return the name of each category by its number, in order.

    Raises:
        LoraError: If one has no name, or two have the same.
    """
    found: dict[int, str] = {}
    for one in content["categories"]:
        number, name = _number(one.get("id")), one.get("name")
        if not isinstance(number, int) or not isinstance(name, str) or not name.strip():
            what = "a category of the COCO file has no number or no name"
            raise LoraError(what, str(file), "write each as `{id: 1, name: cat}`")
        if number in found or name.strip() in found.values():
            what = f"two categories of the COCO file have the number {number} or the name "
            raise LoraError(f"{what}`{printable(name, 60)}`", str(file), "give each its own")
        found[number] = name.strip()
    return dict(sorted(found.items()))


def _number(value: Any) -> Any:
    """Return an id as a number where it is one that an export wrote as `"7"` or `7.0`."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and str(int(value)) == value:
        return int(value)
    return value


def _objects(annotations: list[Json], names: dict[int, str], picture: Json) -> tuple[Json, str]:
    """Return the objects of a picture, and what is wrong with one of them."""
    boxes, categories, crowd = [], [], []
    for one in annotations:
        number = _number(one.get("category_id"))
        if not isinstance(number, int) or number not in names:
            shown = f"`category_id: {printable(str(number), 60)}`"
            return {}, f"an annotation has {shown}, which is none of `categories`"
        outline = one.get("segmentation")
        box = one.get("bbox") or _box_around(outline) or _box_of_mask(outline)
        if not isinstance(box, list):
            return (
                {},
                f"an annotation of `{names[number]}` has no `bbox`, and no outline or mask",
            )
        boxes.append(box)
        categories.append(names[number])
        crowd.append(one.get("iscrowd") or 0)
    found = {"bbox": boxes, "category": categories, "iscrowd": crowd, FORMAT: "xywh"}
    if size := stated_size(picture):
        found[SIZE] = size
    return found, ""


def _box_around(outlines: Any) -> list[float] | None:
    """Return the box (x, y, width, height) around outlines [x, y, x, y, …]; None without any."""
    if not isinstance(outlines, list) or not all(isinstance(one, list) for one in outlines):
        return None
    numbers = [number for one in outlines for number in one]
    odd = any(len(one) % 2 for one in outlines)
    if not numbers or odd or not all(isinstance(n, int | float) for n in numbers):
        return None
    xs, ys = ([n for one in outlines for n in one[i::2]] for i in (0, 1))
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _box_of_mask(mask: Any) -> list[int] | None:
    """Return the box (x, y, width, height) around a mask of run lengths; None without any.

    The runs are of pixels outside and inside by turns, column by column, in numbers or as COCO's
    tools write them in letters.
    """
    if not isinstance(mask, dict) or not isinstance(mask.get("size"), list):
        return None
    counts = mask.get("counts")
    runs = _runs_in_letters(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or len(mask["size"]) != 2:
        return None
    if not all(type(n) is int and n >= 0 for n in (*mask["size"], *runs)):
        return None
    height, width = mask["size"]
    if sum(runs) != height * width:
        return None
    left, top, right, bottom, at = width, height, -1, -1, 0
    for i, run in enumerate(runs):
        if i % 2 and run:
            first, last = divmod(at, height), divmod(at + run - 1, height)
            left, right = min(left, first[0]), max(right, last[0])
            goes_on = first[0] != last[0]  # into the next column
            top = 0 if goes_on else min(top, first[1])
            bottom = height - 1 if goes_on else max(bottom, last[1])
        at += run
    return [left, top, right - left + 1, bottom - top + 1] if right >= 0 else None


def _runs_in_letters(text: str) -> list[int]:
    """Return the run lengths of a mask as COCO's tools write them: 5 bits a letter, from `0` on.

    From the fourth on, a number is the difference from the one before the last. What they do not
    write gives no runs.
    """
    runs: list[int] = []
    number, bits = 0, 0
    for letter in text:
        value = ord(letter) - 48
        if not 0 <= value < 64:
            return []
        number |= (value & 31) << bits
        bits += 5
        if value & 32:  # another letter belongs to it
            continue
        if value & 16:
            number -= 1 << bits
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number, bits = 0, 0
    return [] if bits else runs


def _folders_of(file: Path, pictures: list[Json]) -> list[Path]:
    """Return the folders that names of pictures may start from, first the first that has one."""
    here, above = file.parent, file.parent.parent
    split = file.stem.removeprefix("instances_")
    folders = [
        here, here / "images", here / split, here / "images" / split, here / file.stem,
        above / "images", above / split, above / "images" / split, above,
    ]  # fmt: skip
    names = [str(one["file_name"]) for one in pictures[:50] if one.get("file_name")]
    best = next((one for one in folders if any(_is_there(one, name) for name in names)), here)
    # the folders beside one that holds nothing but annotations are its own, others may be anyone's
    beside = [above] if here.name.lower() == "annotations" else []
    inside = [
        folder
        for outer in (here, here / "images", *beside, above / "images")
        if outer.is_dir()
        for folder in sorted(outer.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    ]
    return list(dict.fromkeys([best, *folders, *inside]))


def _is_there(folder: Path, name: str) -> bool:
    try:
        return Path(written_here(str(folder / name))).is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a zero
        return False


def coco_summary(file: Path) -> str:
    """Return what a file holds, in words."""
    content = _read(file)
    pictures = counted(len(content["images"]), "picture")
    return f"COCO's annotations, {counted(len(content['annotations']), 'object')} in {pictures}"
