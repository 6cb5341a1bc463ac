"""Rows of local files, cached after the first read, and hashed with the files they refer to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_cli.data import pascal_voc, yolo
from lora_cli.data.annotated_folder import annotation_file, read_annotated
from lora_cli.data.bad_rows import drop_bad_rows
from lora_cli.data.coco_rows import coco_names, image_folders, is_coco, read_coco
from lora_cli.data.csv_quoting import announce_quoting
from lora_cli.data.dataset_cache import SourceChangedError, cached_dataset
from lora_cli.data.file_formats import kind_of, read_rows
from lora_cli.data.find_files import SPLITS as SPLITS
from lora_cli.data.media import (
    folder_of_paths,
    is_media,
    media_error,
    media_hash,
    paths_of,
    stored_media,
    with_media,
)
from lora_cli.data.media_folder import (
    class_names,
    files_with_shared_text,
    folder_labels,
    is_media_file,
    other_files,
    read_media_files,
    root_of,
    texts_without_media,
    transcript_files,
)
from lora_cli.data.numbered_labels import parquet_label_names
from lora_cli.data.parallel_texts import parts_of
from lora_cli.data.renamed_columns import renamed_row
from lora_cli.data.rows import Rows as Rows
from lora_cli.data.text_lines import NOT_TEXT, RawRow, unreadable
from lora_cli.errors import LoraError, counted, warn
from lora_cli.files import sha256_of
from lora_cli.recipe import Recipe

MAX_ATTEMPTS = 3  # attempts to read a file that changes meanwhile
READER_VERSION = 7  # version of the readers; increment it to invalidate caches when they change


def read_files(recipe: Recipe, files: list[Path]) -> Iterator[RawRow]:
    """Yield the rows of files in order, with media values in the media columns."""
    media = recipe.task.media_columns
    boxes = recipe.task.boxes_column
    if boxes is not None and (tables := [file for file in files if is_coco(file)]):
        for file in tables:
            yield from read_coco(file, next(iter(media)), boxes)
        return
    images = [file for file in files if media and is_media_file(file)]
    if images and boxes is not None:
        yield from read_annotated(images, root_of(recipe, images), next(iter(media)), boxes)
        return
    if images:
        yield from read_media_files(recipe, images)
        return
    for file in files:
        folder = _folder_of(file, recipe)
        for row in read_rows(file, recipe.data.format):
            yield with_media(renamed_row(row, recipe.data.columns), folder, media)


def _folder_of(file: Path, recipe: Recipe) -> Path:
    """Return the folder that the paths in a table are relative to."""
    if not (media := recipe.task.media_columns):
        return file.parent
    rows = (renamed_row(row, recipe.data.columns) for row in read_rows(file, recipe.data.format))
    return folder_of_paths(file, paths_of(rows, media))


def _media_places(file: Path, recipe: Recipe) -> str:
    """Return the folder of the files that a table refers to, or a hash of all their folders."""
    if recipe.task.boxes_column is not None and is_coco(file):
        return _sha256("\n".join(image_folders(file)))
    return str(_folder_of(file, recipe))


def file_rows(recipe: Recipe, files: list[Path]) -> Rows:
    """Return the rows of files, from the cache unless this is the first read.

    Raises:
        LoraError: With the rows that cannot be read, unless `data.on_bad_row` is `skip`.
    """
    form, media = recipe.data.format, tuple(recipe.task.media_columns)
    are_media = bool(media) and is_media_file(files[0])
    dataset, sha256 = _read_unchanged(recipe, files, media, _cache_key(recipe, files, are_media))
    for file in files:
        if not are_media and not parts_of(file) and kind_of(file, form) == "csv":
            announce_quoting(file, form)
    folder = os.path.commonpath([file.parent for file in files])
    source = str(files[0]) if len(files) == 1 else f"{folder} ({counted(len(files), 'file')})"
    labels = class_names(recipe, files) if are_media else numbered_label_names(recipe, files)
    if (boxes := recipe.task.boxes_column) is not None:
        labels = {boxes: names} if (names := category_names(files)) else labels
    elif are_media and recipe.task.transcript_column is not None:
        _warn_of_texts_alone(root_of(recipe, files), recipe)
        _warn_of_shared_texts(files)
    elif labels and (left_out := other_files(root_of(recipe, files), recipe)):
        subject = f"{counted(len(left_out), 'file')} in the folders of the classes"
        warn(
            f"{subject} are left out, the first is {left_out[0]}: by its name it is of another kind"
        )
    rows = Rows(dataset, source, sha256, np.arange(len(dataset)), labels, media=media)
    errors = {i: f for i, f in enumerate(dataset["fault"]) if f}
    return drop_bad_rows(*_with_hashes(rows, errors), recipe)


def _warn_of_texts_alone(folder: Path, recipe: Recipe) -> None:
    """Warn of text files that are skipped because their image or recording is missing."""
    if texts := texts_without_media(folder, recipe):
        kind = {"image": "picture", "audio": "recording"}[
            next(iter(recipe.task.media_columns.values()))
        ]
        has = "has" if len(texts) == 1 else "have"
        what = f"{counted(len(texts), 'text file')} in {folder} {has} no {kind} of the same name"
        warn(f"{what} next to {'it' if len(texts) == 1 else 'them'}, the first is {texts[0]}")


def _warn_of_shared_texts(files: list[Path]) -> None:
    """Warn of files that may be the same image or recording in two formats."""
    if groups := files_with_shared_text(files):
        names = " and ".join(file.name for file in groups[0][:2])
        subject = counted(len(groups), "text file")
        verb = "belongs" if len(groups) == 1 else "belong"
        what = f"{subject} in {groups[0][0].parent} {verb} to more than one file, such as {names}"
        warn(f"{what}: if they are the same in another format, one split may have what another has")


def numbered_label_names(recipe: Recipe, files: list[Path]) -> dict[str, list[str]]:
    """Return the names of numbered labels by column, if the files store them."""
    if is_media_file(files[0]) or any(is_coco(file) for file in files):
        return {}
    if any(kind_of(file, recipe.data.format) != "parquet" for file in files):
        return {}
    return parquet_label_names(recipe, files)


def category_names(files: list[Path]) -> list[str]:
    """Return the category names of annotation files, in the order of the files."""
    if is_media_file(files[0]):
        return yolo.names_for(files[0])
    names = (name for file in files if is_coco(file) for name in coco_names(file))
    return list(dict.fromkeys(names))


def _cache_key(recipe: Recipe, files: list[Path], are_media: bool) -> list[str]:
    """Return what the rows depend on besides the contents of the files."""
    renamed = [f"{old}\n{new}" for old, new in sorted(recipe.data.columns.items())]
    if not recipe.task.media_columns:
        in_folders = recipe.data.format.label_from == "folder"  # folder names are labels
        names = [f"{file.parent.name}/{file.name}" if in_folders else file.name for file in files]
        return names + renamed
    # paths in a table are relative to its location
    names = [str(file.absolute()) for file in files] + list(recipe.task.media_columns) + renamed
    if not are_media:  # the files that a table refers to may be elsewhere
        names += [_media_places(file, recipe) for file in files]
    if recipe.task.boxes_column is not None:
        numbering = [str(yolo.labels_for(files[0])), *_first_pixels(files)] if are_media else []
        return names + category_names(files) + numbering
    if are_media:  # the label of a file may depend on all folders
        names += map(str, sorted(folder_labels(recipe, files).items()))
    return names


def _first_pixels(files: list[Path]) -> list[str]:
    """Return the coordinate of the first pixel for each folder of XML annotations."""
    folders = {
        file.parent for file in map(annotation_file, files) if file and file.suffix == ".xml"
    }
    return [f"{folder} from {pascal_voc.first_pixel(folder)}" for folder in sorted(folders)]


def _read_unchanged(
    recipe: Recipe, files: list[Path], media: tuple[str, ...], key_parts: list[str]
) -> tuple[Any, str]:
    """Read files that do not change meanwhile, and return their data set and their hash.

    Raises:
        LoraError: If the files change during every attempt.
    """
    parts = [part for file in files for part in (parts_of(file).values() or [file])]
    if recipe.task.transcript_column is not None:
        transcripts = transcript_files([file for file in files if is_media_file(file)])
        parts += dict.fromkeys(text for texts in transcripts.values() for text in texts)
    if recipe.task.boxes_column is not None:
        parts += [
            boxes for file in files if is_media_file(file) and (boxes := annotation_file(file))
        ]
    for _ in range(MAX_ATTEMPTS):
        state = [_state_of(part) for part in parts]
        hashes = [sha256 for sha256, _ in state]
        sha256 = hashes[0] if len(hashes) == 1 else _sha256("".join(hashes))

        def changed(state: list[Any] = state) -> bool:
            return state != [_state_of(part) for part in parts]

        def stored_rows() -> Iterator[dict[str, Any]]:
            return _stored_rows(recipe, files, media)

        try:
            key = [str(READER_VERSION), sha256, recipe.data.format.model_dump_json(), *key_parts]
            return cached_dataset(stored_rows, key, _features(media), changed), sha256
        except SourceChangedError:
            warn(f"{files[0]} changed while it was read: it is read once more")
        except LoraError:
            if not changed():
                raise
    what = "the file changes while it is read"
    hint = "wait until it is complete, or train on a copy of it"
    raise LoraError(what, str(files[0]), hint)


def _features(media: tuple[str, ...]) -> Any:
    """Return the `datasets.Features` of the stored rows."""
    import datasets

    text, binary = datasets.Value("string"), datasets.Value("binary")
    features = {"row": text, "place": text, "fault": text}
    if media:
        features["media"] = datasets.List({"column": text, "bytes": binary, "path": text})
    return datasets.Features(features)


def _stored_rows(
    recipe: Recipe, files: list[Path], media: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Yield rows as they are stored: the columns as JSON, and the media separately."""
    for row in read_files(recipe, files):
        separate = list(stored_media(row.columns or {}, media))
        columns = row.columns
        if columns is not None and separate:
            columns = {**columns, **{value["column"]: None for value in separate}}
        encoded = json.dumps(columns, ensure_ascii=False, default=_stored)
        if NOT_TEXT.search(encoded):  # bytes in a parquet file that are not text
            encoded = json.dumps(columns, default=_stored)
        stored = {"row": encoded, "place": row.place, "fault": row.error}
        yield {**stored, "media": separate} if media else stored


def _with_hashes(rows: Rows, errors: dict[int, str]) -> tuple[Rows, dict[int, str]]:
    """Extend the hash of rows by the contents of their media, and the errors by missing files.

    The files that a table refers to may change or disappear while the table stays the same.
    """
    if not rows.media:
        return rows, errors
    digest, errors = hashlib.sha256(rows.sha256.encode()), dict(errors)
    for i, row in enumerate(rows):
        if i in errors:
            continue
        if error := _missing_media(row, rows.media):
            errors[i] = error
        for column in rows.media:
            value: Any = row.get(column)
            digest.update((media_hash(value) if is_media(value) else "-").encode())
    return replace(rows, sha256=digest.hexdigest()), errors


def _missing_media(row: dict[str, Any], media: Sequence[str]) -> str:
    """Return an error if a file of a row is missing; blank cells are left to the task."""
    return media_error(row, [column for column in media if is_media(row.get(column))])


def _stored(value: Any) -> str | None:
    """Convert dates, decimals and bytes of parquet files to text; None for undecodable bytes."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _state_of(file: Path) -> tuple[str, tuple[int, ...]]:
    """Return the SHA-256 of a file, and the metadata that changes when it is written to."""
    try:
        status = file.stat()
        times = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return sha256_of(file), times
    except OSError as error:
        raise unreadable(file, error) from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
