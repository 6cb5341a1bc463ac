"""Read a folder of images or audio for `lora init`, and choose its held-out files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.data.coco_rows import coco_summary, is_coco
from lora_cli.data.detect_format import DataFile
from lora_cli.data.file_formats import kind_by_name
from lora_cli.data.find_files import files_of
from lora_cli.data.folder_files import files_inside
from lora_cli.data.labelled_text import LABEL_COLUMN
from lora_cli.data.media_folder import (
    SUFFIXES,
    classes_of,
    media_files,
    read_media_files,
    transcript_files,
)
from lora_cli.data.text_encoding import encoding_of
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import TASKS, Recipe
from lora_cli.recipe.spec.task_section import MediaKind
from lora_cli.recipe_draft.box_sources import boxes_beside
from lora_cli.recipe_draft.choose_splits import Keys
from lora_cli.recipe_draft.data_folder import recipe_of_folder, task_reading

UNITS: dict[MediaKind, str] = {"image": "picture", "audio": "recording"}
UTF_8 = "utf-8"
MIN_ROWS_FOR_TENTH = 200


def read_media_folder(folder: Path) -> tuple[DataFile, MediaKind] | None:
    """Read the train files of a folder of images or audio.

    The first column is the media file, the second the label, if the folder has class folders.

    Returns:
        The rows, and the kind of media. None if the folder has no media files, or has a table that
        describes them.
    """
    if not folder.is_dir():
        return None
    tables = (f for f in files_inside(folder) if kind_by_name(f.name) not in (None, "text"))
    if any(tables):
        return None
    for kind in SUFFIXES:
        recipe = recipe_of_folder(folder, task_reading(kind)) if task_reading(kind) else None
        if recipe is not None and (files := media_files(folder, recipe)):
            return _rows_of(folder, recipe, files, kind), kind
    return None


def _texts_of(folder: Path, kind: MediaKind) -> tuple[str, list[str | None], tuple[str, str]]:
    """Read the text files next to the train files.

    Only some tasks use them, but the task is chosen later.

    Returns:
        The name of their column, their texts, and their encoding with its reason.
    """
    for name, spec in TASKS.items():
        section = spec.model_construct()
        if section.transcript_column is not None and kind in section.media_columns.values():
            recipe = recipe_of_folder(folder, {"type": name})
            files = files_of(recipe, "train", "train")
            encoding = _encoding_of(files)
            recipe = recipe_of_folder(folder, {"type": name}, format={"encoding": encoding[0]})
            column = str(recipe.task.transcript_column)
            rows = read_media_files(recipe, files)
            return column, [(row.columns or {}).get(column) for row in rows], encoding
    return "", [], (UTF_8, "")


def _encoding_of(files: Sequence[Path]) -> tuple[str, str]:
    """Return the encoding of the text files next to media files, with its reason."""
    texts = {text: None for candidates in transcript_files(files).values() for text in candidates}
    raw = [part for text in texts if not (part := text.read_bytes()).isascii()]
    first = encoding_of(raw[0]) if raw else (UTF_8, "")
    # UTF-16 texts cannot be joined; for legacy encodings, more text improves the detection
    return first if first[0].startswith("utf-16") else encoding_of(b"\n".join(raw))


def _rows_of(folder: Path, recipe: Recipe, files: list[Path], kind: MediaKind) -> DataFile:
    classes = classes_of(files)
    train = files_of(recipe, "train", "train")
    rows = [row.columns for row in read_media_files(recipe, train) if row.columns is not None]
    summary = counted(len(train), UNITS[kind])
    if classes and recipe.task.label_columns_by_key:
        summary += f" in {counted(len(set(classes.values())), 'folder')} that name their classes"
    columns = [*recipe.task.media_columns, *([LABEL_COLUMN] if classes else [])]
    text, texts, (encoding, why) = _texts_of(folder, kind)
    form = {} if encoding == UTF_8 else {"encoding": encoding}
    if any(texts):
        columns.append(text)
        rows = [{**row, text: content} for row, content in zip(rows, texts, strict=True)]
    return DataFile(folder, form, {"encoding": why}, rows, [], columns, True, summary)


def media_splits(file: DataFile, kind: MediaKind, task: dict[str, Any], target: Path) -> Keys:
    """Choose the held-out files: split folders, annotation files of splits, or drawn files.

    Args:
        file: The rows of a media folder or of an annotation file.
        kind: The kind of media.
        task: The `task` section of the recipe.
        target: Path of the recipe; its paths are relative to that folder.
    """
    recipe = recipe_of_folder(file.path, task)
    unit = UNITS[kind]
    keys: Keys = boxes_beside(file.path, target) if is_coco(file.path) else {}
    stratify = {"stratify": True} if recipe.task.label_columns_by_key else {}
    for split in ("validation", "test"):
        if split in keys:
            continue
        try:
            files = files_of(recipe, split, split)
            what = f"{counted(len(files), unit)} in the folder of this name"
            keys[split] = split, coco_summary(files[0]) if is_coco(files[0]) else what
        except LoraError:
            fraction = 0.1 if len(file.rows) >= MIN_ROWS_FOR_TENTH else 0.2
            why = "drawn from train, as many of each label; " if stratify else "drawn from train; "
            why += f"no {unit} is on both sides"
            keys[split] = ({"from": "train", "fraction": fraction, **stratify}, why)
    return keys
