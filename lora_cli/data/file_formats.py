"""Read rows from files in any supported format: csv, JSON, parquet, text and CoNLL.

To add a format, add its file extensions to `KINDS` and its reader to `read_rows` and `columns_of`.
For `lora init`, `detect_format.py` must recognise it too.

Every value of a csv file stays text as written: `NA`, `null` and `nan` are words, and `007` keeps
its zeros. A row that cannot be read is yielded with its error, so that all errors can be reported
together.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_cli.data.conll import read_conll
from lora_cli.data.csv_quoting import quoting_of
from lora_cli.data.csv_rows import column_names, read_records, width_error
from lora_cli.data.json_rows import JSON_NAMES, read_json
from lora_cli.data.labelled_text import LABEL_COLUMN, split_label
from lora_cli.data.parallel_texts import parts_of, read_parallel
from lora_cli.data.parquet_rows import parquet_names, read_parquet
from lora_cli.data.text_lines import RawRow, byte_error, read_lines
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.recipe import FormatSpec

KINDS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".parquet": "parquet", ".txt": "text", ".text": "text",
    ".conll": "conll", ".conllu": "conll", ".bio": "conll", ".iob": "conll", ".iob2": "conll",
}  # fmt: skip


def kind_of(path: Path, spec: FormatSpec) -> str:
    """Return the format of a file: csv, json, parquet, text or conll."""
    if parts_of(path) or spec.label_from:
        return "text"
    kind = spec.type or kind_by_name(path.name)
    if kind is None:
        hint = "set it with `--set data.format.type=csv` (or json, parquet, text, conll)"
        if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
            hint = "save the spreadsheet as csv"
        raise LoraError(f"`{path.name}` is not a known kind of file", str(path), hint)
    return kind


def kind_by_name(name: str) -> str | None:
    """Return the format that a file extension stands for; None if it is unknown."""
    return KINDS.get(Path(name.lower().removesuffix(".gz")).suffix)


def form_of(source: Path, recipe_form: FormatSpec) -> FormatSpec:
    """Return the settings to read a file with: its extension decides, otherwise the recipe."""
    is_text = kind_by_name(source.name) in (None, "text")
    label_from = recipe_form.label_from if is_text else None
    by_name = recipe_form.model_copy(update={"type": None, "label_from": label_from})
    try:
        kind_of(source, by_name)
    except LoraError:
        return recipe_form
    return by_name


def read_rows(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    """Yield the rows of a file in order.

    Args:
        path: The file; `.gz` is decompressed while reading.
        spec: The recipe's `data.format`.

    Raises:
        LoraError: If the file as a whole cannot be read.
    """
    if parts := parts_of(path):
        yield from _read_parallel_files(path, parts, spec)
        return
    match kind_of(path, spec):
        case "csv":
            yield from _read_csv(path, spec)
        case "json":
            yield from read_json(path, spec)
        case "parquet":
            yield from read_parquet(path, spec)
        case "conll":
            yield from read_conll(path, spec)
        case _:
            yield from _read_text(path, spec)


# ----------------------------------------------------------------------------------------- csv


def _read_csv(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    records = read_records(path, spec, quoting_of(path, spec).name)
    names = column_names(path, spec, records)
    for line, fields, error, _ in records:
        if names is None:
            names = [str(number) for number in range(len(fields))]
        error = error or width_error(fields, len(names)) or _repeated_header(fields, names, spec)
        columns = None if error else dict(zip(names, fields, strict=True))
        yield RawRow(columns, f"{path.name}:{line}", error)


def _repeated_header(fields: list[str], names: list[str], spec: FormatSpec) -> str:
    """Return an error if a row repeats the header; empty if it does not.

    Tables with one column or with names from the recipe are exempt, as their names may also be
    ordinary values.
    """
    if not spec.header or len(names) < 2 or len(fields) != len(names):
        return ""
    is_header = all(f.strip("\ufeff ") == n for f, n in zip(fields, names, strict=True))
    return "it is the header again, as where files were joined" if is_header else ""


def columns_of(path: Path, spec: FormatSpec) -> list[str]:
    """Return the names of all columns of a file.

    Raises:
        LoraError: If the file cannot be read, or none of its rows can.
    """
    names: list[str] | None = None
    match kind_of(path, spec):
        case "csv":
            records = read_records(path, spec, quoting_of(path, spec).name)
            names = column_names(path, spec, records)
        case "parquet":
            names = parquet_names(path, spec)
        case "text":
            names = list(parts_of(path)) or [text_column(spec)]
            names = [LABEL_COLUMN, *names] if spec.label_from else names
    if names is None:
        max_rows = None if kind_of(path, spec) == "json" else 1
        rows = (row.columns for row in read_rows(path, spec) if row.columns is not None)
        names = list(
            dict.fromkeys(name for row in itertools.islice(rows, max_rows) for name in row)
        )
    if not names:
        hint = "is it empty, or `data.format` another?"
        raise LoraError("no row can be read", str(path), hint)
    return names


# ---------------------------------------------------------------------------------------- text


def _read_text(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    name = text_column(spec)
    place = f"{path.parent.name}/{path.name}" if spec.label_from == "folder" else path.name
    for number, text in _text_units(path, spec):
        columns = {name: text}
        if spec.label_from == "folder":
            columns = {LABEL_COLUMN: path.parent.name, name: text}
        elif spec.label_from:
            label, rest = split_label(text, spec.label_from)
            columns = {LABEL_COLUMN: label, name: rest}
        error = byte_error(text, spec.encoding)
        yield RawRow(None if error else columns, f"{place}:{number}", error)


def text_column(spec: FormatSpec) -> str:
    """Return the name of the only column of a text file."""
    return spec.columns[0] if spec.columns and len(spec.columns) == 1 else "text"


def _read_parallel_files(path: Path, parts: dict[str, Path], spec: FormatSpec) -> Iterator[RawRow]:
    lines = {name: read_lines(part, spec.encoding) for name, part in parts.items()}
    for number, texts in read_parallel(parts, lines):
        error = next((f for text in texts.values() if (f := byte_error(text, spec.encoding))), "")
        yield RawRow(None if error else texts, f"{path.name}:{number}", error)


def _text_units(path: Path, spec: FormatSpec) -> Iterator[tuple[int, str]]:
    """Yield (first line number, text) per line or paragraph, or once for the whole file."""
    sample_by = "document" if spec.label_from == "folder" else spec.sample_by
    pending: list[str] = []
    first = 1
    for number, line in read_lines(path, spec.encoding):
        blank = not line.strip()
        if sample_by == "line":
            if not blank:
                yield number, line.rstrip("\r\n")
        elif blank and (sample_by == "paragraph" or not pending):
            if pending:
                yield first, "".join(pending).rstrip("\r\n")
            pending = []
        else:
            first = first if pending else number
            pending.append(line)
    if pending:
        text = "".join(pending)
        yield first, text.rstrip("\r\n") if sample_by == "paragraph" else text


def text_error(row: dict[str, Any], columns: Iterable[str]) -> str:
    """Return an error for the first column without text; empty if all have text."""
    for column in columns:
        value = row.get(column)
        if is_blank(value):
            return f"column `{column}` is blank"
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            kind = JSON_NAMES.get(type(value), f"a {type(value).__name__}")
            return f"column `{column}` holds {kind}, not text"
        if isinstance(value, str) and (error := byte_error(value, "UTF-8")):
            return f"column `{column}`: {error}"
    return ""


def is_blank(value: Any) -> bool:
    """Return whether a value is blank: null, NaN, whitespace, or zero-width characters."""
    if isinstance(value, str):
        if value[:1].isalnum():  # most texts; checking each character would take long
            return False
        return all(
            character.isspace() or unicodedata.category(character) == "Cf" for character in value
        )
    return value is None or value != value


def require_columns(required: dict[str, str], present: list[str], source: str) -> None:
    """Check that the data has the columns that the recipe names.

    Args:
        required: The columns, by the location in the recipe that names them.
        present: The columns of the data.
        source: The name of the data, for the error message.

    Raises:
        LoraError: With every missing column.
    """
    problems = []
    for location, column in required.items():
        if column not in present:
            hint = did_you_mean(column, present, "its columns are")
            delimiter = next((mark for mark in ";\t|," if mark in "".join(present)), None)
            if len(present) == 1 and delimiter:
                option = f"--set 'data.format.delimiter={json.dumps(delimiter)}'"
                hint = f"if its columns are divided by {json.dumps(delimiter)}: `{option}`"
            problems.append(Problem(f"{source} has no column `{column}`", location, hint))
    if problems:
        raise LoraError(problems)
