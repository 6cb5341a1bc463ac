"""Find annotated images for `lora init`: COCO files, and folders with annotation files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from lora_cli.data.annotated_folder import annotation_file
from lora_cli.data.coco_rows import coco_names, coco_summary, is_coco
from lora_cli.data.detect_format import DataFile
from lora_cli.data.file_rows import read_files
from lora_cli.data.find_files import files_of
from lora_cli.data.media_folder import is_media_file
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import TASKS
from lora_cli.recipe.spec import is_file
from lora_cli.recipe_draft.choose_splits import SPLIT_WORDS, Keys, files_beside
from lora_cli.recipe_draft.data_folder import recipe_of_folder

SAMPLE = 100  # number of images whose annotation files are inspected
YOLO_LINE = re.compile(r"\d[.\deE+-]*(\s+[-+.\deE]+){4,}\s*")


def read_boxes(source: Path) -> DataFile | None:
    """Return the train rows of a COCO file or an annotated folder; None for other sources."""
    if not source.is_dir() and not _is_annotation_file(source):
        return None
    task = next(
        {"type": name} for name, spec in TASKS.items() if spec.model_construct().boxes_column
    )
    recipe = recipe_of_folder(source, task)
    try:
        files = files_of(recipe, "train", "train")
    except LoraError:
        return None
    if is_coco(files[0]):
        summary = coco_summary(files[0])
    elif is_media_file(files[0]) and any(map(_has_boxes, files[:SAMPLE])):
        summary = f"{counted(len(files), 'picture')} with a file of boxes each"
    else:
        return None
    rows = list(read_files(recipe, files))
    readable: list[dict[str, Any]] = [
        r.columns for r in rows if r.columns is not None and not r.error
    ]
    errors = [row for row in rows if row.columns is None or row.error]
    column, boxes = next(iter(recipe.task.media_columns)), recipe.task.boxes_column
    return DataFile(source, {}, {}, readable, errors, [column, str(boxes)], True, summary)


def boxes_beside(source: Path, target: Path) -> Keys:
    """Return the COCO files of validation and test that belong to a train file.

    They are next to it (`instances_val2017.json`), or in sibling folders that are named by split
    (`valid/_annotations.coco.json`).

    Args:
        source: The train file.
        target: Where the recipe will be written; its paths are relative to that folder.
    """
    keys: Keys = {}
    for split in SPLIT_WORDS:
        for other in [*files_beside(source, split), *_in_sibling_folders(source, split)][:1]:
            what = f"{other.name} next to the file"
            if other.parent != source.absolute().parent:
                what = f"in the folder {other.parent.name} next to that of the file"
            try:
                names = coco_names(other) if is_coco(other) else None
            except LoraError:
                names = None
            unknown = sorted(set(names or ()) - set(coco_names(source)))
            if names is None or unknown:
                reason = f"train has no label `{unknown[0]}`" if unknown else "it has no boxes"
                keys[""] = None, f"{what} is not used: {reason}"
                continue
            path = os.path.relpath(other, target.absolute().parent)
            keys[split] = path if is_file(path) else f"./{path}", f"{what}: {coco_summary(other)}"
    return keys


def _in_sibling_folders(source: Path, split: str) -> list[Path]:
    """Return the file of the same name in the folder of another split, for one in `train/`."""
    folder = source.absolute().parent
    if not re.fullmatch(r"(?i)train(ing)?(\d{4})?", folder.name):
        return []
    folder_pattern = re.compile(rf"(?i)({SPLIT_WORDS[split]})(\d{{4}})?")
    candidates = (other / source.name for other in sorted(folder.parent.iterdir()))
    return [
        file for file in candidates if folder_pattern.fullmatch(file.parent.name) and file.is_file()
    ]


def _is_annotation_file(source: Path) -> bool:
    return source.is_file() and (source.suffix.lower() in (".yaml", ".yml") or is_coco(source))


def _has_boxes(image: Path) -> bool:
    """Return whether the file next to an image has boxes; a text file may be its caption."""
    file = annotation_file(image)
    if file is None or file.suffix == ".xml":
        return file is not None
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return bool(lines) and all(YOLO_LINE.fullmatch(line) for line in lines if line.strip())
