"""Folders of pictures with a file of boxes for each: Pascal VOC's XML, or YOLO's text.

    VOC2012/JPEGImages/1.jpg   VOC2012/Annotations/1.xml   VOC2012/ImageSets/Main/train.txt
    data/train/1.jpg           data/train/1.xml            next to each other, a folder a split
    yolo/train/images/1.jpg    yolo/train/labels/1.txt     yolo/data.yaml: the names, and the splits
    yolo/images/train/1.jpg    yolo/labels/train/1.txt     yolo/classes.txt: the names, one a line

What stands in such files is read by `pascal_voc` and `yolo`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_cli.data import pascal_voc, yolo
from lora_cli.data.boxes import FORMAT
from lora_cli.data.media_folder import SUFFIXES
from lora_cli.data.text_lines import RawRow
from lora_cli.recipe import Recipe

Json = dict[str, Any]


def annotated_files(place: Path, split: str, recipe: Recipe) -> list[Path] | None:
    """Return the pictures of a split, if a file or a folder is one of VOC or YOLO; else None.

    Args:
        place: The folder, a YAML file of YOLO, or a list of VOC.
        split: Its name; where `place` is what the recipe names for the split, all belong to it.
        recipe: Says what the task reads.
    """
    if place.suffix.lower() in yolo.YAML and place.is_file():
        return yolo.pictures_of_split(place, split, recipe)
    if place.suffix == ".txt" and place.parent.name == pascal_voc.LISTS.name:
        return pascal_voc.listed_pictures(place)
    if not place.is_dir():
        return None
    if (lists := place / pascal_voc.LISTS).is_dir():
        for name in yolo.SPLIT_KEYS.get(split, (split,)):
            if (listed := lists / f"{name}.txt").is_file():
                return pascal_voc.listed_pictures(listed)
        whole = lists / pascal_voc.DEFAULT_LIST
        return pascal_voc.listed_pictures(whole) if split == "train" and whole.is_file() else []
    for file in sorted(place.glob("*.y*ml")):
        if (found := yolo.pictures_of_split(file, split, recipe)) is not None:
            return found
    return None


def annotation_of(picture: Path) -> Path | None:
    """Return the file of the boxes of a picture, if there is one."""
    name = picture.stem
    candidates = [picture.with_suffix(".xml"), picture.with_suffix(".txt")]
    parents = list(picture.parents)
    for i, folder in enumerate(parents[:3]):
        inside = picture.parent.relative_to(folder)
        candidates += [folder.parent / x / inside / f"{name}.xml" for x in pascal_voc.XML_FOLDERS]
        candidates += [folder.parent / x / f"{name}.xml" for x in pascal_voc.XML_FOLDERS[:2]]
        if folder.name == "images":
            candidates.append(parents[i + 1] / "labels" / inside / f"{name}.txt")
    return next((file for file in candidates if file.is_file()), None)


def read_annotated(
    files: Sequence[Path], root: Path, column: str, boxes_column: str
) -> Iterator[RawRow]:
    """Yield a row for each picture: its path, and its objects.

    Args:
        files: The pictures.
        root: The folder that places are told from.
        column: Name of the column of the picture.
        boxes_column: Name of the column of the objects.
    """
    used: set[Path] = set()
    first_pixels: dict[Path, int] = {}
    are_xml = any(file.suffix == ".xml" for file in map(annotation_of, files) if file)
    for picture in files:
        place = (
            picture.relative_to(root).as_posix() if picture.is_relative_to(root) else picture.name
        )
        file, error = annotation_of(picture), ""
        objects: Json = {"bbox": [], "category": [], FORMAT: "relative_cxcywh"}
        if file is None and are_xml:
            error = f"there is no `{picture.stem}.xml` with its boxes"
        elif file is not None:
            used.add(file)
            if file.suffix == ".xml":
                if file.parent not in first_pixels:
                    first_pixels[file.parent] = pascal_voc.first_pixel(file.parent)
                objects, error = pascal_voc.read_xml(file, first_pixels[file.parent])
            else:
                objects, error = yolo.read_boxes(file, yolo.labels_for(picture))
            error = f"{file.name}: {error}" if error else ""
        value = {"bytes": None, "path": str(picture)}
        yield RawRow({column: value, boxes_column: objects}, place, error)
    yield from _without_picture(used)


def _without_picture(used: set[Path]) -> Iterator[RawRow]:
    """Yield an error for each file next to those that were read for which there is no picture."""
    for folder, suffix in sorted({(file.parent, file.suffix) for file in used}):
        for file in sorted(folder.glob(f"*{suffix}")):
            if (
                file in used
                or file.name in yolo.NAMES_FILES
                or file.stem.lower().startswith("readme")
            ):
                continue
            if not _has_picture(file):
                yield RawRow(None, file.name, f"there is no picture `{file.stem}` for its boxes")


def _has_picture(file: Path) -> bool:
    above = file.parent.parent
    folders = [file.parent, above / pascal_voc.PICTURES, above / "images", above.parent / "images"]
    folders.append(above.parent / "images" / file.parent.name)
    names = (file.stem + suffix for suffix in SUFFIXES["image"])
    return any((folder / name).is_file() for name in names for folder in folders)
