"""Read a folder of data files as one: files with the same columns, or one folder per label."""

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
from lora_cli.recipe_draft.readme_configs import require_splits_of_readme

TEXT_SUFFIXES = (".txt", ".text", "")
NOT_DATA = ("readme", "license", "licence", "source", "changes", "notice")
MAX_SHOWN = 8
PART = re.compile(r"-\d{5}-of-(\d{5})(?!\d)")  # Hub naming of the parts of a split


def read_source(path: Path) -> DataFile:
    """Read a data file, or a folder of data files.

    Raises:
        LoraError: If it cannot be read, or the files of the folder do not fit together.
    """
    if path.is_dir():
        return read_folder(path)
    file = read_data_file(path)
    part = PART.search(path.name)
    if part is None or int(part[1]) < 2:
        return file
    note = f"one of {int(part[1]):,} parts, of which only this one is read: name the folder for all"
    return replace(file, summary=f"{file.summary}; {note}")


def task_reading(kind: MediaKind | None) -> dict[str, Any]:
    """Return the `task` section for a kind of media (None: no media); empty without such a task.

    It is used only to find files, so its other keys do not matter.
    """
    for name, spec in TASKS.items():
        if next(iter(spec.model_construct().media_columns.values()), None) == kind:
            return {"type": name}
    return {}


def recipe_of_folder(folder: Path, task: dict[str, Any], **data: Any) -> Recipe:
    """Return a minimal recipe for a data folder.

    Args:
        folder: The folder.
        task: The `task` section.
        **data: Additional keys of `data`.
    """
    values = {"model": {"name": "none"}, "task": task, "data": {"path": str(folder), **data}}
    return Recipe.model_validate(values)


def split_files(folder: Path, form: dict[str, Any], split: str) -> list[Path]:
    """Return the files of a split in a folder as training finds them; empty without any."""
    recipe = recipe_of_folder(folder, task_reading(None), format=form)
    try:
        return files_of(recipe, split, split)
    except LoraError:
        return []


def read_folder(folder: Path) -> DataFile:
    """Read the train files of a folder.

    Raises:
        LoraError: If there are no train files, or they do not fit together.
    """
    listed = [file for file in files_inside(folder) if not _is_not_data(file)]
    annotated = {file.with_suffix("") for file in listed if file.suffix == ".ann"}
    if any(file.suffix == ".txt" and file.with_suffix("") in annotated for file in listed):
        what = "these are texts with annotations of brat (`.ann`), which are not read"
        hint = "write each text as a line of JSON with its spans: "
        raise LoraError(what, str(folder), f'{hint}{{"text": "…", "spans": [[0, 4, "PER"]]}}')
    if _has_class_folders(listed):
        return _read_class_folders(folder)
    files = [folder / file for file in listed if kind_by_name(file.name)]
    if not files:  # unknown extensions: detect the format of the first train file
        files = [folder / file for file in listed if "train" in file.name.lower()][:1]
    if len(files) == 1:
        return _concatenated(folder, [read_data_file(files[0])], files)
    if not files:
        names = ", ".join(map(str, listed[:MAX_SHOWN])) or "nothing"
        what = "no file in this folder is a csv, tsv, json, parquet or text file"
        raise LoraError(what, str(folder), f"it holds {names}; name a data file")
    require_splits_of_readme(folder, lambda split: split_files(folder, {}, split))
    train = split_files(folder, {}, "train")
    parts = [read_data_file(file) for file in train]
    if not parts:
        raise _not_one_data_set("no file in this folder is called train", folder, files)
    return _concatenated(folder, parts, files)


def _is_not_data(file: Path) -> bool:
    """Return whether a file is hidden, or documentation."""
    return any(part.startswith(".") for part in file.parts) or file.stem.lower() in NOT_DATA


def _not_one_data_set(what: str, folder: Path, files: Sequence[Path]) -> LoraError:
    names = [str(file.relative_to(folder)) for file in files]
    rest = f", and {len(names) - MAX_SHOWN:,} more" if len(names) > MAX_SHOWN else ""
    return LoraError(what, str(folder), f"name one of {', '.join(names[:MAX_SHOWN])}{rest}")


def _concatenated(folder: Path, parts: Sequence[DataFile], files: Sequence[Path]) -> DataFile:
    """Concatenate files with the same columns."""
    first = parts[0]
    for other in parts[1:]:
        if (other.form, set(other.columns)) != (first.form, set(first.columns)):
            names = f"{first.path.name} and {other.path.name}"
            raise _not_one_data_set(f"{names} do not have the same columns", folder, files)
    if translations := translations_of(first):
        names = " ".join(
            str(first.path.with_name(file.name)) for file in (first.path, translations[0])
        )
        what = f"{first.path.name} and {translations[0].name} have as many lines: they seem to be "
        hint = f"name both, for example `lora init {names}`, or one of them"
        raise LoraError(f"{what}translations", str(folder), hint)
    if len(files) == 1:
        return first
    rows = [row for part in parts for row in part.rows]
    errors = [error for part in parts for error in part.errors]
    summary = first.summary
    if len(parts) > 1:
        summary = f"{counted(len(parts), 'file')} in a folder, each a {summary}"
    return DataFile(
        folder, first.form, first.why, rows, errors, first.columns, first.named, summary
    )


# -------------------------------------------------------------------------- one folder per label


def _has_class_folders(files: Sequence[Path]) -> bool:
    """Return whether nearly all files are texts in class folders."""
    texts = [file for file in class_files(files) if file.suffix in TEXT_SUFFIXES]
    folders = Counter(file.parent for file in texts)
    names = {folder.name for folder in folders}
    n_in_shared_folders = sum(times for times in folders.values() if times > 1)
    return (
        len(names) > 1 and not names <= set(SPLIT_NAMES) and n_in_shared_folders >= 0.8 * len(files)
    )


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
    readable = [row.columns for row in rows if row.columns is not None]
    errors = [row for row in rows if row.columns is None]
    summary = f"{counted(len(files), 'text file')} in folders that name their labels, {encoding}"
    return DataFile(folder, form, why, readable, errors, ["label", "text"], True, summary)


def _encoding_of(files: Sequence[Path]) -> tuple[str, str]:
    """Return the encoding of many files: UTF-8 if all are valid, otherwise that of the rest."""
    not_utf_8: list[bytes] = []
    for file in files:
        raw = bytes_of(file)
        try:
            raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            not_utf_8.append(raw)
    return encoding_of(b"\n".join(not_utf_8)[:SAMPLE_BYTES]) if not_utf_8 else ("utf-8", "")


def held_out_of(folder: Path, form: dict[str, Any]) -> dict[str, list[Path]]:
    """Return the files of validation and test in a folder, without missing splits."""
    by_split = {split: split_files(folder, form, split) for split in SPLITS[1:]}
    return {split: files for split, files in by_split.items() if files}
