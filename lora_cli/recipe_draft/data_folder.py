"""A folder of data files, read as one: files of the same columns, or a folder for each label."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_cli.data.column_kinds import SPLIT_NAMES
from lora_cli.data.detect_format import (
    LABEL_REASONS,
    SAMPLE_BYTES,
    DataFile,
    bytes_of,
    read_data_file,
)
from lora_cli.data.file_formats import kind_by_name, read_rows
from lora_cli.data.find_files import SPLITS, files_of
from lora_cli.data.folder_files import files_inside
from lora_cli.data.labelled_text import class_files
from lora_cli.data.parallel_pairs import translations_of
from lora_cli.data.text_encoding import encoding_of
from lora_cli.data.text_lines import RawRow
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import TASKS, FormatSpec, Recipe
from lora_cli.recipe.spec.task_section import MediaKind
from lora_cli.recipe_draft.readme_configs import require_as_the_readme

TEXT_SUFFIXES = (".txt", ".text", "")
NO_DATA = ("readme", "license", "licence", "source", "changes", "notice")
MOST_SHOWN = 8
PART = re.compile(r"-\d{5}-of-(\d{5})(?!\d)")  # how the Hub names the parts of a split


def read_source(path: Path) -> DataFile:
    """Return what a file or a folder holds.

    Raises:
        LoraError: If it cannot be read, or its files do not belong together.
    """
    if path.is_dir():
        return read_folder(path)
    file = read_data_file(path)
    part = PART.search(path.name)
    if part is None or int(part[1]) < 2:
        return file
    more = f"one of {int(part[1]):,} parts, of which only this one is read: name the folder for all"
    return replace(file, about=f"{file.about}; {more}")


def task_reading(kind: MediaKind | None) -> dict[str, Any]:
    """Return the `task` of a recipe that reads pictures, sound or (None) neither, if there is one.

    It is to find files with, so that its other keys do not matter.
    """
    for name, spec in TASKS.items():
        if next(iter(spec.model_construct().media_columns.values()), None) == kind:
            return {"type": name}
    return {}


def recipe_of_folder(folder: Path, task: dict[str, Any], **data: Any) -> Recipe:
    """Return a recipe that reads a folder.

    Args:
        folder: The folder.
        task: Keys of `task`.
        **data: More keys of `data`.
    """
    values = {"model": {"name": "none"}, "task": task, "data": {"path": str(folder), **data}}
    return Recipe.model_validate(values)


def split_files(folder: Path, form: dict[str, Any], split: str) -> list[Path]:
    """Return the files of a split in a folder, as training finds them; there may be none."""
    recipe = recipe_of_folder(folder, task_reading(None), format=form)
    try:
        return files_of(recipe, split, split)
    except LoraError:
        return []


def read_folder(folder: Path) -> DataFile:
    """Return what the train files of a folder hold.

    Raises:
        LoraError: If there are none, or they do not belong together.
    """
    inside = [file for file in files_inside(folder) if not _is_aside(file)]
    notes = {file.with_suffix("") for file in inside if file.suffix == ".ann"}
    if any(file.suffix == ".txt" and file.with_suffix("") in notes for file in inside):
        what = "these are texts with annotations of brat (`.ann`), which are not read"
        hint = "write each text as a line of JSON with its spans: "
        raise LoraError(what, str(folder), f'{hint}{{"text": "…", "spans": [[0, 4, "PER"]]}}')
    if _has_class_folders(inside):
        return _read_class_folders(folder)
    files = [folder / file for file in inside if kind_by_name(file.name)]
    if not files:  # of unknown kinds: what they are is seen in the first of them
        files = [folder / file for file in inside if "train" in file.name.lower()][:1]
    if len(files) == 1:
        return _joined(folder, [read_data_file(files[0])], files)
    if not files:
        names = ", ".join(map(str, inside[:MOST_SHOWN])) or "nothing"
        what = "no file in this folder is a csv, tsv, json, parquet or text file"
        raise LoraError(what, str(folder), f"it holds {names}; name a data file")
    require_as_the_readme(folder, lambda split: split_files(folder, {}, split))
    train = split_files(folder, {}, "train")
    parts = [read_data_file(file) for file in train]
    if not parts:
        raise _apart("no file in this folder is called train", folder, files)
    return _joined(folder, parts, files)


def _is_aside(file: Path) -> bool:
    """Return whether a file is hidden, or about the data."""
    return any(part.startswith(".") for part in file.parts) or file.stem.lower() in NO_DATA


def _apart(what: str, folder: Path, files: Sequence[Path]) -> LoraError:
    names = [str(file.relative_to(folder)) for file in files]
    more = f", and {len(names) - MOST_SHOWN:,} more" if len(names) > MOST_SHOWN else ""
    return LoraError(what, str(folder), f"name one of {', '.join(names[:MOST_SHOWN])}{more}")


def _joined(folder: Path, parts: Sequence[DataFile], files: Sequence[Path]) -> DataFile:
    """Return files of the same columns as one."""
    first = parts[0]
    for other in parts[1:]:
        if (other.form, set(other.columns)) != (first.form, set(first.columns)):
            names = f"{first.path.name} and {other.path.name}"
            raise _apart(f"{names} do not have the same columns", folder, files)
    if others := translations_of(first):
        names = " ".join(str(first.path.with_name(file.name)) for file in (first.path, others[0]))
        what = f"{first.path.name} and {others[0].name} have as many lines: they seem to be "
        hint = f"name both, for example `lora init {names}`, or one of them"
        raise LoraError(f"{what}translations", str(folder), hint)
    if len(files) == 1:
        return first
    rows = [row for part in parts for row in part.rows]
    errors = [error for part in parts for error in part.errors]
    about = first.about
    if len(parts) > 1:
        about = f"{counted(len(parts), 'file')} in a folder, each a {about}"
    return DataFile(folder, first.form, first.why, rows, errors, first.columns, first.named, about)


# -------------------------------------------------------------------------- a folder for a label


def _has_class_folders(files: Sequence[Path]) -> bool:
    """Return whether nearly all files are texts in folders that name their classes."""
    texts = [file for file in class_files(files) if file.suffix in TEXT_SUFFIXES]
    folders = Counter(file.parent for file in texts)
    names = {folder.name for folder in folders}
    several = sum(times for times in folders.values() if times > 1)
    return len(names) > 1 and not names <= set(SPLIT_NAMES) and several >= 0.8 * len(files)


def _read_class_folders(folder: Path) -> DataFile:
    form: dict[str, Any] = {"label_from": "folder"}
    why = dict(LABEL_REASONS)
    why["label_from"] = why["folder"]
    files = split_files(folder, form, "train")
    encoding, reason = _encoding_of([*files, *split_files(folder, form, "test")])
    if encoding != "utf-8":
        form["encoding"], why["encoding"] = encoding, reason
    spec = FormatSpec.model_validate(form)
    rows: list[RawRow] = [row for file in files for row in read_rows(file, spec)]
    good = [row.columns for row in rows if row.columns is not None]
    errors = [row for row in rows if row.columns is None]
    about = f"{counted(len(files), 'text file')} in folders that name their labels, {encoding}"
    return DataFile(folder, form, why, good, errors, ["label", "text"], True, about)


def _encoding_of(files: Sequence[Path]) -> tuple[str, str]:
    """Return the encoding of many files: UTF-8 where all of them are, else that of the others."""
    others: list[bytes] = []
    for file in files:
        raw = bytes_of(file)
        try:
            raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            others.append(raw)
    return encoding_of(b"\n".join(others)[:SAMPLE_BYTES]) if others else ("utf-8", "")


def held_out_of(folder: Path, form: dict[str, Any]) -> dict[str, list[Path]]:
    """Return the files of validation and test in a folder, as far as there are any."""
    found = {split: split_files(folder, form, split) for split in SPLITS[1:]}
    return {split: files for split, files in found.items() if files}
