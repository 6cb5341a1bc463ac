"""A folder of pictures or of sound, for `lora init`: its rows, and which of them are held out."""

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
FEWEST_FOR_A_TENTH = 200


def read_media_folder(folder: Path) -> tuple[DataFile, MediaKind] | None:
    """Return the train files of a folder of pictures or sound, and which of the two they are.

    Their first column is the file, the second the label, if the folders in it name classes.

    Returns:
        None if the folder holds no such files, or a table that describes them.
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
    """Return the column of the text files next to the train files, what they hold, their encoding.

    Some tasks read them and others do not: which one is meant is decided later.
    """
    for name, spec in TASKS.items():
        blank = spec.model_construct()
        if blank.transcript_column is not None and kind in blank.media_columns.values():
            recipe = recipe_of_folder(folder, {"type": name})
            files = files_of(recipe, "train", "train")
            encoding = _encoding_of(files)
            recipe = recipe_of_folder(folder, {"type": name}, format={"encoding": encoding[0]})
            column = str(recipe.task.transcript_column)
            rows = read_media_files(recipe, files)
            return column, [(row.columns or {}).get(column) for row in rows], encoding
    return "", [], (UTF_8, "")


def _encoding_of(files: Sequence[Path]) -> tuple[str, str]:
    """Return the encoding of the text files next to files, and what says so."""
    texts = {text: None for found in transcript_files(files).values() for text in found}
    raw = [part for text in texts if not (part := text.read_bytes()).isascii()]
    first = encoding_of(raw[0]) if raw else (UTF_8, "")
    # two bytes a letter cannot be joined; of older encodings, more letters tell more
    return first if first[0].startswith("utf-16") else encoding_of(b"\n".join(raw))


def _rows_of(folder: Path, recipe: Recipe, files: list[Path], kind: MediaKind) -> DataFile:
    classes = classes_of(files)
    train = files_of(recipe, "train", "train")
    rows = [row.columns for row in read_media_files(recipe, train) if row.columns is not None]
    about = counted(len(train), UNITS[kind])
    if classes and recipe.task.label_columns_by_key:
        about += f" in {counted(len(set(classes.values())), 'folder')} that name their classes"
    columns = [*recipe.task.media_columns, *([LABEL_COLUMN] if classes else [])]
    text, texts, (encoding, why) = _texts_of(folder, kind)
    form = {} if encoding == UTF_8 else {"encoding": encoding}
    if any(texts):
        columns.append(text)
        rows = [{**row, text: own} for row, own in zip(rows, texts, strict=True)]
    return DataFile(folder, form, {"encoding": why}, rows, [], columns, True, about)


def media_splits(file: DataFile, kind: MediaKind, task: dict[str, Any], target: Path) -> Keys:
    """Return which files are held out: those of a split in a folder, or next to it, or drawn.

    Args:
        file: The rows of a folder, or of a file with the boxes of pictures.
        kind: What the files are.
        task: The keys of the recipe's `task`.
        target: Where the recipe will be written; its paths are relative to that folder.
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
            fraction = 0.1 if len(file.rows) >= FEWEST_FOR_A_TENTH else 0.2
            why = "drawn from train, as many of each label; " if stratify else "drawn from train; "
            why += f"no {unit} is on both sides"
            keys[split] = ({"from": "train", "fraction": fraction, **stratify}, why)
    return keys
