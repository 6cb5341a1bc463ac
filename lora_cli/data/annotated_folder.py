"""Folders of images with one annotation file each: Pascal VOC (XML) or YOLO (text).

    VOC2012/JPEGImages/1.jpg   VOC2012/Annotations/1.xml   VOC2012/ImageSets/Main/train.txt
    data/train/1.jpg           data/train/1.xml            side by side, one folder per split
    yolo/train/images/1.jpg    yolo/train/labels/1.txt     yolo/data.yaml: class names and splits
    yolo/images/train/1.jpg    yolo/labels/train/1.txt     yolo/classes.txt: one class name per line

`pascal_voc` and `yolo` parse the annotation files themselves.
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


def annotated_files(path: Path, split: str, recipe: Recipe) -> list[Path] | None:
    """Return the images of a split if the path is a VOC or YOLO dataset; otherwise None.

    Args:
        path: A dataset folder, the YAML file of a YOLO dataset, or a VOC image list.
        split: Name of the split. If the recipe names `path` for this split, all of its images
            belong to the split.
        recipe: The recipe whose task reads the images.
    """
    if path.suffix.lower() in yolo.YAML_SUFFIXES and path.is_file():
        return yolo.images_of_split(path, split, recipe)
    if path.suffix == ".txt" and path.parent.name == pascal_voc.LISTS.name:
        return pascal_voc.listed_images(path)
    if not path.is_dir():
        return None
    if (lists := path / pascal_voc.LISTS).is_dir():
        for name in yolo.SPLIT_KEYS.get(split, (split,)):
            if (listed := lists / f"{name}.txt").is_file():
                return pascal_voc.listed_images(listed)
        default_list = lists / pascal_voc.DEFAULT_LIST
        return (
            pascal_voc.listed_images(default_list)
            if split == "train" and default_list.is_file()
            else []
        )
    for file in sorted(path.glob("*.y*ml")):
        if (images := yolo.images_of_split(file, split, recipe)) is not None:
            return images
    return None


def annotation_file(image: Path) -> Path | None:
    """Return the annotation file of an image; None if it has none."""
    name = image.stem
    candidates = [image.with_suffix(".xml"), image.with_suffix(".txt")]
    parents = list(image.parents)
    for i, folder in enumerate(parents[:3]):
        relative_folder = image.parent.relative_to(folder)
        candidates += [
            folder.parent / x / relative_folder / f"{name}.xml" for x in pascal_voc.XML_FOLDERS
        ]
        candidates += [folder.parent / x / f"{name}.xml" for x in pascal_voc.XML_FOLDERS[:2]]
        if folder.name == "images":
            candidates.append(parents[i + 1] / "labels" / relative_folder / f"{name}.txt")
    return next((file for file in candidates if file.is_file()), None)


def read_annotated(
    files: Sequence[Path], root: Path, column: str, boxes_column: str
) -> Iterator[RawRow]:
    """Yield one row per image, with its path and its objects.

    Args:
        files: The images.
        root: The folder that the places in error messages are relative to.
        column: Name of the image column.
        boxes_column: Name of the column of objects.
    """
    annotation_files: set[Path] = set()
    first_pixels: dict[Path, int] = {}
    are_xml = any(file.suffix == ".xml" for file in map(annotation_file, files) if file)
    for image in files:
        place = image.relative_to(root).as_posix() if image.is_relative_to(root) else image.name
        file, error = annotation_file(image), ""
        objects: Json = {"bbox": [], "category": [], FORMAT: "relative_cxcywh"}
        if file is None and are_xml:
            error = f"there is no `{image.stem}.xml` with its boxes"
        elif file is not None:
            annotation_files.add(file)
            if file.suffix == ".xml":
                if file.parent not in first_pixels:
                    first_pixels[file.parent] = pascal_voc.first_pixel(file.parent)
                objects, error = pascal_voc.read_xml(file, first_pixels[file.parent])
            else:
                objects, error = yolo.read_boxes(file, yolo.labels_for(image))
            error = f"{file.name}: {error}" if error else ""
        value = {"bytes": None, "path": str(image)}
        yield RawRow({column: value, boxes_column: objects}, place, error)
    yield from _annotations_without_image(annotation_files)


def _annotations_without_image(annotation_files: set[Path]) -> Iterator[RawRow]:
    """Yield an error for each annotation file in the same folders that has no image."""
    for folder, suffix in sorted({(file.parent, file.suffix) for file in annotation_files}):
        for file in sorted(folder.glob(f"*{suffix}")):
            if (
                file in annotation_files
                or file.name in yolo.NAMES_FILES
                or file.stem.lower().startswith("readme")
            ):
                continue
            if not _has_image(file):
                yield RawRow(None, file.name, f"there is no picture `{file.stem}` for its boxes")


def _has_image(file: Path) -> bool:
    parent = file.parent.parent
    folders = [
        file.parent,
        parent / pascal_voc.IMAGE_FOLDER,
        parent / "images",
        parent.parent / "images",
    ]
    folders.append(parent.parent / "images" / file.parent.name)
    names = (file.stem + suffix for suffix in SUFFIXES["image"])
    return any((folder / name).is_file() for name in names for folder in folders)
