"""From the recipe's `data` section to rows: the train, validation and test splits."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_cli.data.csv_quoting import announce_quoting
from lora_cli.data.dataset_cache import SourceChangedError, cached_dataset
from lora_cli.data.find_files import SPLITS as SPLITS
from lora_cli.data.find_files import files_of, positions, split_slice
from lora_cli.data.held_out import draw
from lora_cli.data.hub_rows import hub_rows, label_names, load_hub
from lora_cli.data.media import (
    hashed,
    is_media,
    media_error,
    media_hash,
    stored_media,
    undecoded,
    with_media,
)
from lora_cli.data.media_folder import (
    class_names,
    folder_labels,
    is_media_file,
    other_files,
    read_media_files,
    root_of,
)
from lora_cli.data.parallel_texts import parts_of
from lora_cli.data.readers import kind_of, read_rows, require_columns
from lora_cli.data.rows import Rows as Rows
from lora_cli.data.text_lines import NOT_TEXT, RawRow, encoding_hint, unreadable
from lora_cli.errors import LoraError, Problem, counted, did_you_mean, warn
from lora_cli.files import sha256_of
from lora_cli.recipe import HeldOutSpec, Recipe
from lora_cli.recipe.spec import is_file

READINGS = 3  # of a file that changes while it is read
READING = 4  # counts up when files are read in another way, so that no old cache is used


SKIP = "`--set data.on_bad_row=skip`"


def load_rows(recipe: Recipe, splits: Sequence[str] = SPLITS) -> dict[str, Rows]:
    """Return the rows of each split that the recipe names.

    Args:
        recipe: Its `data` section says where rows come from.
        splits: Which of them are wanted; held-out rows need the split that they are drawn from.

    Raises:
        LoraError: With the rows that cannot be read, unless `data.on_bad_row` is `skip`.
    """
    data = recipe.data
    specs = {name: getattr(data, name) for name in SPLITS if getattr(data, name) is not None}
    if data.streaming:
        specs.pop("train")
    parents = {spec.from_ for spec in specs.values() if isinstance(spec, HeldOutSpec)}
    whole = {
        name: _named(recipe, name, spec)
        for name, spec in specs.items()
        if isinstance(spec, str) and name in parents.union(splits)
    }
    for name in ("test", "validation"):
        held_out = specs.get(name)
        if isinstance(held_out, HeldOutSpec):
            parent = held_out.from_
            if parent not in whole:
                raise LoraError(
                    f"there is no split `{parent}` to draw rows from",
                    recipe.at(f"data.{name}.from"),
                    did_you_mean(parent, whole, "the recipe's splits are"),
                )
            whole[name], whole[parent] = _hold_out(recipe, whole[parent], name, held_out)
    for name, rows in whole.items():
        _require_rows(rows, name)
    _count_skipped_once(whole)
    return {name: whole[name] for name in SPLITS if name in whole and name in splits}


def _count_skipped_once(splits: dict[str, Rows]) -> None:
    """Leave the rows that cannot be read with the first of the splits that share their files."""
    seen: set[tuple[str, str]] = set()
    for name in SPLITS:
        rows = splits.get(name)
        if rows is not None and rows.skipped:
            files = (rows.source, rows.sha256)
            splits[name] = replace(rows, skipped=()) if files in seen else rows
            seen.add(files)


def _require_rows(rows: Rows, name: str) -> None:
    if len(rows):
        return
    what = f"the {name} split has no rows"
    hint = "the file is empty, or has a header and nothing below it"
    if rows.skipped:
        what += f" that can be read: {counted(len(rows.skipped), 'row')} skipped"
        hint = f"the first is {rows.skipped[0]}; fix it, or check `data.format`"
    elif len(rows.dataset):
        what, hint = f"the {name} split has no rows left", "is its slice, or what is drawn, right?"
    raise LoraError(what, rows.source, hint)


def stream_rows(recipe: Recipe) -> Iterator[RawRow]:
    """Yield the train rows as they come, once."""
    data = recipe.data
    if data.name:
        media = recipe.task.media_columns
        for number, row in enumerate(undecoded(load_hub(recipe, data.train, streaming=True))):
            yield with_media(RawRow(row, f"{data.name}[{number}]"), Path(), media)
    elif data.split_column and not is_file(data.train):
        yield from _stream_marked(recipe, data.split_column)
    else:
        files = files_of(recipe, "train", data.train)
        for file in files:
            if not is_media_file(file) and kind_of(file, data.format) == "csv":
                announce_quoting(file, data.format)
        for row in _read(recipe, files):
            error = row.error or media_error(row.columns or {}, recipe.task.media_columns)
            yield replace(row, error=error)


def stream_label_names(recipe: Recipe) -> dict[str, list[str]]:
    """Return the names of the labels in a streamed data set of the Hub, by column."""
    if not recipe.data.name:
        return {}
    return label_names(load_hub(recipe, recipe.data.train, streaming=True).features or {})


def _stream_marked(recipe: Recipe, column: str) -> Iterator[RawRow]:
    """Yield the rows that a column marks as train."""
    empty = True
    for row in _read(recipe, files_of(recipe, "train", "train")):
        if row.columns is None or split_mark(row.columns, column) == recipe.data.train:
            empty = False
            error = row.error or media_error(row.columns or {}, recipe.task.media_columns)
            yield replace(row, error=error)
    if empty:
        what = f"column `{column}` marks no row as `{recipe.data.train}`"
        raise LoraError(what, recipe.at("data.train"), "name what it does hold: `train: NAME`")


def _hold_out(recipe: Recipe, parent: Rows, name: str, spec: HeldOutSpec) -> tuple[Rows, Rows]:
    """Return (held-out rows, what stays)."""
    texts, by_label = recipe.task.input_columns_by_key, recipe.task.label_columns_by_key
    _require_rows(parent, spec.from_)
    wanted = {recipe.at(key): column for key, column in texts.items() if key}
    if spec.group_by:
        wanted[recipe.at(f"data.{name}.group_by")] = spec.group_by
    if spec.stratify:
        wanted |= {recipe.at(key): column for key, column in by_label.items()}
    require_columns(wanted, parent.columns, parent.source)
    rows, labels = list(parent), list(by_label.values())
    held_out_rows, kept = draw(
        [_joined_text(row, list(texts.values())) for row in rows],
        spec.fraction,
        # another seed for each, so that the two draws do not pick the same positions
        seed=(recipe.data.split_seed, SPLITS.index(name)),
        disjoint=spec.disjoint,
        strata=[_stratum(row, labels) for row in rows] if spec.stratify and labels else None,
        groups=[str(row.get(spec.group_by)) for row in rows] if spec.group_by else None,
        at=recipe.at(f"data.{name}"),
    )
    dropped = len(rows) - len(held_out_rows) - len(kept)
    return parent.select(held_out_rows), replace(
        parent.select(kept), dropped=parent.dropped + dropped
    )


def _stratum(row: dict[str, Any], labels: list[str]) -> str:
    return "\n".join(str(row.get(label)) for label in labels)


def _joined_text(row: dict[str, Any], columns: list[str]) -> str:
    return "\n".join(
        value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in hashed({name: row.get(name) for name in columns}).items()
        if value is not None
    )


def _named(recipe: Recipe, split: str, text: str) -> Rows:
    """Return the rows of a split given as a name, a slice or a file."""
    name, part = split_slice(text, recipe.at(f"data.{split}"))
    if recipe.data.name:
        rows = hub_rows(recipe, name)
    elif recipe.data.split_column and not is_file(name):
        rows = _rows_marked(recipe, split, name)
    else:
        rows = _file_rows(recipe, files_of(recipe, split, name))
    return rows.select(np.arange(len(rows))[positions(part, len(rows))]) if part else rows


def _rows_marked(recipe: Recipe, split: str, name: str) -> Rows:
    """Return the rows of `data.path` whose `data.split_column` holds a name."""
    column = recipe.data.split_column
    assert column is not None
    rows = _file_rows(recipe, files_of(recipe, "train", "train"))
    require_columns({recipe.at("data.split_column"): column}, rows.columns, rows.source)
    values = [split_mark(row, column) for row in rows]
    found = np.array([i for i, value in enumerate(values) if value == name], dtype=np.int64)
    if not len(found):
        hint = did_you_mean(name, sorted(set(values)), "it holds")
        what = f"column `{column}` marks no row as `{name}`"
        raise LoraError(what, recipe.at(f"data.{split}"), hint)
    return rows.select(found)


def split_mark(row: dict[str, Any], column: str) -> str:
    """Return the name of a row's split."""
    value = row.get(column)
    return "" if value is None else str(value).strip()


# ------------------------------------------------------------------------------------- files


def _read(recipe: Recipe, files: list[Path]) -> Iterator[RawRow]:
    """Yield the rows of files in order, with media values in the columns that hold media."""
    media = recipe.task.media_columns
    pictures = [file for file in files if media and is_media_file(file)]
    if pictures:
        yield from read_media_files(recipe, pictures)
        return
    for file in files:
        for row in read_rows(file, recipe.data.format):
            yield with_media(row, file.parent, media)


def _file_rows(recipe: Recipe, files: list[Path]) -> Rows:
    import datasets

    form = recipe.data.format
    media = tuple(recipe.task.media_columns)
    text = datasets.Value("string")
    features = {"row": text, "place": text, "fault": text}
    if media:
        binary = datasets.Value("binary")
        features["media"] = datasets.List({"column": text, "bytes": binary, "path": text})
    parts = [part for file in files for part in (parts_of(file).values() or [file])]

    in_folders = form.label_from == "folder"  # whose names are labels
    names = [f"{file.parent.name}/{file.name}" if in_folders else file.name for file in files]
    are_media = bool(media) and is_media_file(files[0])
    if media:  # paths lead on from where the files lie
        names = [str(file.absolute()) for file in files] + list(media)
    if are_media:  # and labels depend on all folders
        names += map(str, sorted(folder_labels(recipe, files).items()))

    def stored() -> Iterator[dict[str, Any]]:
        for row in _read(recipe, files):
            apart = list(stored_media(row.columns or {}, media))
            others = row.columns
            if others is not None and apart:
                others = {**others, **{value["column"]: None for value in apart}}
            columns = json.dumps(others, ensure_ascii=False, default=_stored)
            if NOT_TEXT.search(columns):  # bytes that are no text, in a parquet file
                columns = json.dumps(others, default=_stored)
            line = {"row": columns, "place": row.place, "fault": row.error}
            yield {**line, "media": apart} if media else line

    for _ in range(READINGS):
        state = [_state_of(part) for part in parts]
        hashes = [sha256 for sha256, _ in state]
        sha256 = hashes[0] if len(hashes) == 1 else _sha256("".join(hashes))

        def changed(state: list[Any] = state) -> bool:
            return state != [_state_of(part) for part in parts]

        try:
            key = [str(READING), sha256, form.model_dump_json(), *names]
            dataset = cached_dataset(stored, key, datasets.Features(features), changed)
            break
        except SourceChangedError:
            warn(f"{files[0]} changed while it was read: it is read once more")
        except LoraError:
            if not changed():
                raise
    else:
        what = "the file changes while it is read"
        hint = "wait until it is complete, or train on a copy of it"
        raise LoraError(what, str(files[0]), hint)
    for file in files:
        if not are_media and not parts_of(file) and kind_of(file, form) == "csv":
            announce_quoting(file, form)
    folder = os.path.commonpath([file.parent for file in files])
    source = str(files[0]) if len(files) == 1 else f"{folder} ({counted(len(files), 'file')})"
    labels = class_names(recipe, files) if are_media else {}
    if are_media and (others := other_files(root_of(recipe, files), recipe)):
        left = f"{counted(len(others), 'file')} in the folders of the classes"
        warn(f"{left} are left out, the first is {others[0]}: by its name it is of another kind")
    rows = Rows(dataset, source, sha256, np.arange(len(dataset)), labels, media=media)
    errors = {i: f for i, f in enumerate(dataset["fault"]) if f}
    return without(*_with_hashes(rows, errors), recipe)


def _with_hashes(rows: Rows, errors: dict[int, str]) -> tuple[Rows, dict[int, str]]:
    """Return rows whose hash depends on the bytes of their media, and errors with missing files.

    The files that a table names may change or go while the table stays as it was.
    """
    if not rows.media:
        return rows, errors
    digest, errors = hashlib.sha256(rows.sha256.encode()), dict(errors)
    for i, row in enumerate(rows):
        if i in errors:
            continue
        if error := _absent(row, rows.media):
            errors[i] = error
        for column in rows.media:
            value: Any = row.get(column)
            digest.update((media_hash(value) if is_media(value) else "-").encode())
    return replace(rows, sha256=digest.hexdigest()), errors


def _absent(row: dict[str, Any], media: Sequence[str]) -> str:
    """Return which file of a row is not there, or nothing; what is blank is left to the task."""
    return media_error(row, [column for column in media if is_media(row.get(column))])


def _stored(value: Any) -> str | None:
    """Return what JSON holds of a parquet file's dates, decimals and bytes; of no text, nothing."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _state_of(file: Path) -> tuple[str, tuple[int, ...]]:
    """Return the SHA-256 of a file, and what else differs once it was replaced or written to."""
    try:
        status = file.stat()
        times = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return sha256_of(file), times
    except OSError as error:
        raise unreadable(file, error) from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def without(rows: Rows, errors: dict[int, str], recipe: Recipe) -> Rows:
    """Return the rows without the wrong ones; unless they may be skipped, that is an error.

    Args:
        rows: A split.
        errors: What is wrong, by position.
        recipe: Its `data.on_bad_row` decides.
    """
    if not errors:
        return rows
    places = [f"{rows.place(i)}: {error}" for i, error in errors.items()]
    if recipe.data.on_bad_row == "error":
        problems = [Problem(error, rows.place(i)) for i, error in list(errors.items())[:10]]
        hint = f"fix {'them' if len(errors) > 1 else 'it'}, or skip such rows with {SKIP}"
        if advice := _advice(rows, errors, recipe):
            hint = f"{advice}; or {hint}"
        if len(errors) > 10:
            hint += f"; {counted(len(errors) - 10, 'more row')} cannot be used"
        problems[-1] = replace(problems[-1], hint=hint)
        raise LoraError(problems)
    keep = np.array([i for i in range(len(rows)) if i not in errors], dtype=np.int64)
    return rows.select(keep, places)


def _advice(rows: Rows, errors: dict[int, str], recipe: Recipe) -> str:
    """Return what fixes the commonest errors of all rows at once, or nothing."""
    of_bytes = next((i for i, error in errors.items() if error.startswith("byte 0x")), None)
    if of_bytes is not None:
        source = Path(rows.source)
        if not source.is_file():  # `FOLDER (3 files)`
            folder = Path(rows.source.rpartition(" (")[0])
            source = folder / re.sub(r":\d+$", "", rows.place(of_bytes))
        return encoding_hint(source, recipe.data.format.encoding)
    if any(re.search("fields? where there", error) for error in errors.values()):
        return "a text that holds the delimiter needs quotation marks around it"
    return ""


def without_errors(
    rows: Iterator[RawRow],
    error_of: Callable[[dict[str, Any]], str],
    recipe: Recipe,
    skip: Callable[[str, str], None],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the places and columns of streamed rows that can be used.

    A wrong row stops; unless rows may be skipped: then `skip` is told its place and its error.
    """
    for row in rows:
        error = row.error or error_of(row.columns or {})
        if not error:
            assert row.columns is not None
            yield row.place, row.columns
        elif recipe.data.on_bad_row == "error":
            raise LoraError(
                error,
                row.place,
                f"fix it, or skip such rows with {SKIP}",
            )
        else:
            skip(row.place, error)
