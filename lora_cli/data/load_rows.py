"""Load the rows of the train, validation and test splits, as the recipe's `data` section says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_cli.data.csv_quoting import announce_quoting
from lora_cli.data.file_formats import is_blank, kind_of, require_columns
from lora_cli.data.file_rows import file_rows, numbered_label_names, read_files
from lora_cli.data.find_files import SPLITS as SPLITS
from lora_cli.data.find_files import files_of, parse_slice, split_slice
from lora_cli.data.hub_rows import hub_rows, load_hub
from lora_cli.data.media import media_error, with_media, without_decoding
from lora_cli.data.media_folder import (
    is_media_file,
)
from lora_cli.data.mixed_rows import mix_rows
from lora_cli.data.numbered_labels import holds_numbers, label_names, require_one_numbering
from lora_cli.data.renamed_columns import renamed_row, require_renamed
from lora_cli.data.row_texts import text_of
from lora_cli.data.rows import Rows as Rows
from lora_cli.data.split_rows import draw
from lora_cli.data.text_lines import RawRow
from lora_cli.errors import LoraError, counted, did_you_mean
from lora_cli.recipe import HeldOutSpec, Recipe
from lora_cli.recipe.spec import is_file

N_INSPECTED = 100  # number of rows to inspect for numbered labels


def load_rows(recipe: Recipe, splits: Sequence[str] = SPLITS) -> dict[str, Rows]:
    """Return the rows of each split that the recipe names.

    Args:
        recipe: The recipe, whose `data` section names the files or the data set.
        splits: The splits to load. A held-out split also loads the split that it is drawn from.

    Raises:
        LoraError: With the rows that cannot be read, unless `data.on_bad_row` is `skip`.
    """
    data = recipe.data
    if data.mix:
        return _load_mixed(recipe, splits)
    specs = {name: getattr(data, name) for name in SPLITS if getattr(data, name) is not None}
    if data.streaming:
        specs.pop("train")
    parents = {spec.from_ for spec in specs.values() if isinstance(spec, HeldOutSpec)}
    loaded = {
        name: _rows_of_split(recipe, name, spec)
        for name, spec in specs.items()
        if isinstance(spec, str) and name in parents.union(splits)
    }
    for name in ("test", "validation"):
        held_out = specs.get(name)
        if isinstance(held_out, HeldOutSpec):
            parent = held_out.from_
            if parent not in loaded:
                raise LoraError(
                    f"there is no split `{parent}` to draw rows from",
                    recipe.at(f"data.{name}.from"),
                    did_you_mean(parent, loaded, "the recipe's splits are"),
                )
            loaded[name], loaded[parent] = _hold_out(recipe, loaded[parent], name, held_out)
    for name, rows in loaded.items():
        _require_rows(rows, name)
    _require_one_numbering(loaded)
    _count_skipped_once(loaded)
    return {name: loaded[name] for name in SPLITS if name in loaded and name in splits}


def _load_mixed(recipe: Recipe, splits: Sequence[str]) -> dict[str, Rows]:
    """Return the rows of all data sets in `data.mix`, by split.

    Raises:
        LoraError: With the problems of all data sets.
    """
    by_split: dict[str, dict[str, Rows]] = {}
    problems = []
    for name in recipe.data.mix:
        try:
            for split, rows in load_rows(recipe.for_set(name), splits).items():
                by_split.setdefault(split, {})[name] = rows
        except LoraError as error:
            key = f"data.mix.{name}"
            problems += [
                problem
                if key in (problem.at or "")
                else replace(problem, at=f"{problem.at} (set {name})")
                for problem in error.problems
            ]
    if problems:
        raise LoraError(problems)
    return {split: mix_rows(recipe, by_split[split]) for split in SPLITS if split in by_split}


def _require_one_numbering(splits: dict[str, Rows]) -> None:
    """Check that numbered labels mean the same in each split.

    Raises:
        LoraError: If a number stands for different labels.
    """
    columns = {column for rows in splits.values() for column in rows.label_names}
    names_by_source: dict[str, dict[str, list[str]]] = {}
    for rows in splits.values():
        first = [rows[i] for i in range(min(N_INSPECTED, len(rows)))]
        numbered = [c for c in columns if any(holds_numbers(row.get(c)) for row in first)]
        names = {c: rows.label_names[c] for c in numbered if c in rows.label_names}
        names_by_source[rows.source] = names
    require_one_numbering(names_by_source)


def _count_skipped_once(splits: dict[str, Rows]) -> None:
    """Count unreadable rows only once if several splits share the same files."""
    counted_files: set[tuple[str, str]] = set()
    for name in SPLITS:
        rows = splits.get(name)
        if rows is not None and rows.skipped:
            files = (rows.source, rows.sha256)
            splits[name] = replace(rows, skipped=()) if files in counted_files else rows
            counted_files.add(files)


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
    """Yield the train rows once, as they are read."""
    data = recipe.data
    if data.name:
        media = recipe.task.media_columns
        for number, row in enumerate(
            without_decoding(load_hub(recipe, data.train, streaming=True))
        ):
            raw = renamed_row(RawRow(row, f"{data.name}[{number}]"), data.columns)
            yield with_media(raw, Path(), media)
    elif data.split_column and not is_file(data.train):
        yield from _stream_marked(recipe, data.split_column)
    else:
        files = files_of(recipe, "train", data.train)
        for file in files:
            if not is_media_file(file) and kind_of(file, data.format) == "csv":
                announce_quoting(file, data.format)
        for row in read_files(recipe, files):
            if recipe.task.media_columns and not row.error:
                row = replace(row, error=media_error(row.columns or {}, recipe.task.media_columns))
            yield row


def stream_label_names(recipe: Recipe) -> dict[str, list[str]]:
    """Return the names of numbered labels in a streamed data set, by column."""
    if not recipe.data.name:
        return numbered_label_names(recipe, files_of(recipe, "train", recipe.data.train))
    return label_names(load_hub(recipe, recipe.data.train, streaming=True).features or {})


def _stream_marked(recipe: Recipe, column: str) -> Iterator[RawRow]:
    """Yield the rows that the split column marks as train rows."""
    empty = True
    for row in read_files(recipe, files_of(recipe, "train", "train")):
        if row.columns is None or split_mark(row.columns, column) == recipe.data.train:
            empty = False
            error = row.error or media_error(row.columns or {}, recipe.task.media_columns)
            yield replace(row, error=error)
    if empty:
        what = f"column `{column}` marks no row as `{recipe.data.train}`"
        raise LoraError(what, recipe.at("data.train"), "name what it does hold: `train: NAME`")


def _hold_out(recipe: Recipe, parent: Rows, name: str, spec: HeldOutSpec) -> tuple[Rows, Rows]:
    """Return the held-out rows, and the remaining rows of the parent split."""
    text_columns, label_columns = recipe.task.input_columns_by_key, recipe.task.label_columns_by_key
    _require_rows(parent, spec.from_)
    required = {recipe.at(key): column for key, column in text_columns.items() if key}
    if spec.group_by:
        required[recipe.at(f"data.{name}.group_by")] = spec.group_by
    if spec.stratify:
        required |= {recipe.at(key): column for key, column in label_columns.items()}
    require_columns(required, parent.columns, parent.source)
    rows, labels = list(parent), list(label_columns.values())
    has_label = None
    if recipe.train.distill is not None and labels:  # a teacher labels the others
        has_label = [any(not is_blank(row.get(label)) for label in labels) for row in rows]
        if not any(has_label):
            what = f"no row of {spec.from_} has a label, by which {name} is measured"
            raise LoraError(what, recipe.at(f"data.{name}"), "name a file whose rows have labels")
    held_out_rows, remaining = draw(
        [text_of(row, list(text_columns.values())) for row in rows],
        spec.fraction,
        # different seeds, so that the two draws do not pick the same positions
        seed=(recipe.data.split_seed, SPLITS.index(name)),
        disjoint=spec.disjoint,
        strata=[_stratum(row, labels) for row in rows] if spec.stratify and labels else None,
        groups=[str(row.get(spec.group_by)) for row in rows] if spec.group_by else None,
        location=recipe.at(f"data.{name}"),
        answered=has_label,
    )
    dropped = len(rows) - len(held_out_rows) - len(remaining)
    return parent.select(held_out_rows), replace(
        parent.select(remaining), dropped=parent.dropped + dropped
    )


def _stratum(row: dict[str, Any], labels: list[str]) -> str:
    return "\n".join(str(row.get(label)) for label in labels)


def _rows_of_split(recipe: Recipe, split: str, text: str) -> Rows:
    """Return the rows of a split that the recipe gives as a name, a slice or a file."""
    name, part = split_slice(text, recipe.at(f"data.{split}"))
    if recipe.data.name:
        rows = hub_rows(recipe, name)
    elif recipe.data.split_column and not is_file(name):
        rows = _rows_marked(recipe, split, name)
    else:
        rows = file_rows(recipe, files_of(recipe, split, name))
    require_renamed(recipe, rows)
    return rows.select(np.arange(len(rows))[parse_slice(part, len(rows))]) if part else rows


def _rows_marked(recipe: Recipe, split: str, name: str) -> Rows:
    """Return the rows of `data.path` whose `data.split_column` has the given value."""
    column = recipe.data.split_column
    assert column is not None
    rows = file_rows(recipe, files_of(recipe, "train", "train"))
    require_columns({recipe.at("data.split_column"): column}, rows.columns, rows.source)
    values = [split_mark(row, column) for row in rows]
    matching = np.array([i for i, value in enumerate(values) if value == name], dtype=np.int64)
    if not len(matching):
        hint = did_you_mean(name, sorted(set(values)), "it holds")
        what = f"column `{column}` marks no row as `{name}`"
        raise LoraError(what, recipe.at(f"data.{split}"), hint)
    return rows.select(matching)


def split_mark(row: dict[str, Any], column: str) -> str:
    """Return the value of a row's split column as text."""
    value = row.get(column)
    return "" if value is None else str(value).strip()
