"""Read COCO annotations: a JSON file of images, boxes and categories, with one row per image.

    {"images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}],
     "annotations": [{"image_id": 1, "bbox": [x, y, w, h], "category_id": 3, "iscrowd": 0}],
     "categories": [{"id": 3, "name": "cat"}]}

An annotation without a `bbox` gets the bounding box of its polygons or mask. Images are searched
for next to the file, and where COCO's own archives and common exports put them. Each image is
searched for separately, as the images of one file can be in several folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_cli.data.boxes import FORMAT, SIZE, stated_size
from lora_cli.data.json_rows import json_error
from lora_cli.data.media import local_path, media_value
from lora_cli.data.text_lines import RawRow, unreadable
from lora_cli.errors import LoraError, counted, printable

PARTS = ("images", "annotations", "categories")
HEAD_BYTES = 1 << 16
EXPORT_AGAIN = "export or download it again"
Json = dict[str, Any]


def is_coco(file: Path) -> bool:
    """Return whether a file looks like COCO: an object with a list of images or annotations."""
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
    """Return the category names of a file, in the order of their IDs."""
    return list(_categories(_read(file), file).values())


def image_folders(file: Path) -> list[str]:
    """Return the folder of each image of a file, empty for images that are missing."""
    images = _read(file)["images"]
    folders = _candidate_folders(file, images)
    names = (image.get("file_name") for image in images)
    return [
        str(next((folder for folder in folders if _is_there(folder, name)), ""))
        for name in names
        if isinstance(name, str)
    ]


def read_coco(file: Path, column: str, boxes_column: str) -> Iterator[RawRow]:
    """Yield one row per image, with its path and its objects.

    Args:
        file: The JSON file.
        column: Name of the image column.
        boxes_column: Name of the column of objects.

    Raises:
        LoraError: If the file as a whole cannot be read.
    """
    content = _read(file)
    names = _categories(content, file)
    ids = [_number(image.get("id")) for image in content["images"]]
    by_image: dict[Any, list[Json]] = {i: [] for i in ids if isinstance(i, int | str)}
    for n, annotation in enumerate(content["annotations"]):
        image = _number(annotation.get("image_id"))
        if not isinstance(image, int | str) or image not in by_image:
            what = f"it is of picture `{printable(str(image), 60)}`, which is not in `images`"
            yield RawRow(None, f"{file.name}[annotations][{n}]", what)
            continue
        by_image[image].append(annotation)
    folders = _candidate_folders(file, content["images"])
    used_ids: set[Any] = set()
    for n, image in enumerate(content["images"]):
        place = f"{file.name}[images][{n}]"
        name, image_id = image.get("file_name"), _number(image.get("id"))
        if not isinstance(name, str) or not name.strip():
            yield RawRow(None, place, "the picture has no `file_name`")
            continue
        place = f"{file.name}: {printable(name, 200)}"
        if not isinstance(image_id, int | str) or image_id in used_ids:
            what = (
                "no `id`" if image_id not in used_ids else f"the `id` {image_id} of another picture"
            )
            yield RawRow(None, place, f"the picture has {what}")
            continue
        used_ids.add(image_id)
        objects, error = _objects(by_image[image_id], names, image)
        matching_folders = [folder for folder in folders if _is_there(folder, name)] or folders[:1]
        if len(matching_folders) > 1 and matching_folders[0] != folders[0]:
            shown = " and ".join(f"`{folder}`" for folder in matching_folders[:2])
            error = error or f"a picture of this name is in {shown}"
        value = media_value(name, matching_folders[0])
        yield RawRow({column: value, boxes_column: objects}, place, error)


def _read(file: Path) -> Json:
    """Return the content of a file, checked to have all three lists.

    Raises:
        LoraError: If the file is not JSON, or lacks one of the lists.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        what = json_error(error) if not isinstance(error, UnicodeError) else "not UTF-8 text"
        raise LoraError(what, str(file), EXPORT_AGAIN) from error
    for part in PARTS:
        value = content.get(part)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            what = f"the COCO file has no list of objects `{part}`"
            hint = "name the file of the boxes (`instances_….json`), not of captions or of a test"
            raise LoraError(what, str(file), hint)
    return dict(content)


def _categories(content: Json, file: Path) -> dict[int, str]:
    """Return the name of each category by its ID, in order.

    Raises:
        LoraError: If a category has no name or ID, or two categories share one.
    """
    categories: dict[int, str] = {}
    for category in content["categories"]:
        number, name = _number(category.get("id")), category.get("name")
        if not isinstance(number, int) or not isinstance(name, str) or not name.strip():
            what = "a category of the COCO file has no number or no name"
            raise LoraError(what, str(file), "write each as `{id: 1, name: cat}`")
        if number in categories or name.strip() in categories.values():
            what = f"two categories of the COCO file have the number {number} or the name "
            raise LoraError(f"{what}`{printable(name, 60)}`", str(file), "give each its own")
        categories[number] = name.strip()
    return dict(sorted(categories.items()))


def _number(value: Any) -> Any:
    """Return an ID as an integer if an export wrote it as `"7"` or `7.0`."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and str(int(value)) == value:
        return int(value)
    return value


def _objects(annotations: list[Json], names: dict[int, str], image: Json) -> tuple[Json, str]:
    """Return the objects of an image, and the first error in them."""
    boxes, categories, crowd = [], [], []
    for annotation in annotations:
        number = _number(annotation.get("category_id"))
        if not isinstance(number, int) or number not in names:
            shown = f"`category_id: {printable(str(number), 60)}`"
            return {}, f"an annotation has {shown}, which is none of `categories`"
        segmentation = annotation.get("segmentation")
        box = annotation.get("bbox") or _box_of_polygons(segmentation) or _box_of_mask(segmentation)
        if not isinstance(box, list):
            return (
                {},
                f"an annotation of `{names[number]}` has no `bbox`, and no outline or mask",
            )
        boxes.append(box)
        categories.append(names[number])
        crowd.append(annotation.get("iscrowd") or 0)
    objects = {"bbox": boxes, "category": categories, "iscrowd": crowd, FORMAT: "xywh"}
    if size := stated_size(image):
        objects[SIZE] = size
    return objects, ""


def _box_of_polygons(polygons: Any) -> list[float] | None:
    """Return the box (x, y, width, height) of polygons [x, y, x, y, …]; None if there are none."""
    if not isinstance(polygons, list) or not all(isinstance(polygon, list) for polygon in polygons):
        return None
    values = [value for polygon in polygons for value in polygon]
    is_odd = any(len(polygon) % 2 for polygon in polygons)
    if not values or is_odd or not all(isinstance(n, int | float) for n in values):
        return None
    xs, ys = ([n for polygon in polygons for n in polygon[i::2]] for i in (0, 1))
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _box_of_mask(mask: Any) -> list[int] | None:
    """Return the box (x, y, width, height) of a run-length encoded mask; None if it is invalid.

    The runs alternate between pixels outside and inside the mask, in column-major order. They are a
    list of numbers, or a string in the compressed encoding of COCO's tools.
    """
    if not isinstance(mask, dict) or not isinstance(mask.get("size"), list):
        return None
    counts = mask.get("counts")
    runs = _decode_runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or len(mask["size"]) != 2:
        return None
    if not all(type(n) is int and n >= 0 for n in (*mask["size"], *runs)):
        return None
    height, width = mask["size"]
    if sum(runs) != height * width:
        return None
    left, top, right, bottom, offset = width, height, -1, -1, 0
    for i, run in enumerate(runs):
        if i % 2 and run:
            first, last = divmod(offset, height), divmod(offset + run - 1, height)
            left, right = min(left, first[0]), max(right, last[0])
            continues = first[0] != last[0]  # into the next column
            top = 0 if continues else min(top, first[1])
            bottom = height - 1 if continues else max(bottom, last[1])
        offset += run
    return [left, top, right - left + 1, bottom - top + 1] if right >= 0 else None


def _decode_runs(text: str) -> list[int]:
    """Decode a compressed run-length string as in `rleFrString` of pycocotools.

    Each character holds 5 bits, starting at `0`. From the fourth run on, a value is the difference
    from the second to last run. An invalid string gives no runs.
    """
    runs: list[int] = []
    run, bits = 0, 0
    for character in text:
        value = ord(character) - 48
        if not 0 <= value < 64:
            return []
        run |= (value & 31) << bits
        bits += 5
        if value & 32:  # the value continues in the next character
            continue
        if value & 16:
            run -= 1 << bits
        runs.append(run + (runs[-2] if len(runs) > 2 else 0))
        run, bits = 0, 0
    return [] if bits else runs


def _candidate_folders(file: Path, images: list[Json]) -> list[Path]:
    """Return the folders that image names may be relative to, best match first."""
    base, parent = file.parent, file.parent.parent
    split = file.stem.removeprefix("instances_")
    folders = [
        base, base / "images", base / split, base / "images" / split, base / file.stem,
        parent / "images", parent / split, parent / "images" / split, parent,
    ]  # fmt: skip
    names = [str(folder["file_name"]) for folder in images[:50] if folder.get("file_name")]
    best = next(
        (folder for folder in folders if any(_is_there(folder, name) for name in names)),
        base,
    )
    # siblings of a folder of annotations belong to the same data set, others may not
    siblings = [parent] if base.name.lower() == "annotations" else []
    subfolders = [
        folder
        for container in (base, base / "images", *siblings, parent / "images")
        if container.is_dir()
        for folder in sorted(container.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    ]
    return list(dict.fromkeys([best, *folders, *subfolders]))


def _is_there(folder: Path, name: str) -> bool:
    try:
        return Path(local_path(str(folder / name))).is_file()
    except (OSError, ValueError):  # the name is too long, or contains a null character
        return False


def coco_summary(file: Path) -> str:
    """Describe the content of a file in words."""
    content = _read(file)
    images = counted(len(content["images"]), "picture")
    return f"COCO's annotations, {counted(len(content['annotations']), 'object')} in {images}"
