"""Detect the format of a data file from its bytes: csv, JSON, parquet, text or CoNLL.

The result becomes `data.format` of the recipe. The rows are then read with it as in training, so
that `lora init` and training interpret a file in the same way.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.data.conll import is_conll
from lora_cli.data.detect_table import DELIMITERS, DetectedFormat, find_delimiter, find_table
from lora_cli.data.file_formats import KINDS, read_rows
from lora_cli.data.json_layouts import reject_whole_file
from lora_cli.data.labelled_text import FASTTEXT, label_source
from lora_cli.data.other_tables import reject_other_tables
from lora_cli.data.text_encoding import BOM, LINE_END, encoding_of, lines_of
from lora_cli.data.text_lines import RawRow, unreadable
from lora_cli.data.unreadable_files import reject_binary, reject_control_characters
from lora_cli.errors import LoraError, counted, name_neighbours
from lora_cli.recipe import FormatSpec

SAMPLE_BYTES = 1 << 20
HEAD_BYTES = 1 << 17
CHECK_FILE = "check the file: is it what its name says, and complete?"
EMPTY = "was it copied completely?"
PARQUET = b"PAR1"
LABEL_REASONS = {
    "first_word": "each line begins with one of a few words",
    "fasttext": f"each line begins with `{FASTTEXT}`",
    "folder": "each folder holds the texts of one label",
}


@dataclass(frozen=True)
class DataFile:
    """The rows of a file, and its format.

    Args:
        path: The file.
        form: The keys of `data.format` that differ from their defaults.
        why: The reason for each of these values.
        rows: The rows that can be read.
        errors: The rows that cannot be read.
        columns: The names of the columns, in order.
        named: Whether the file itself names its columns.
        summary: The format in words: `table, semicolon between the columns, cp1252`.
    """

    path: Path
    form: dict[str, Any]
    why: dict[str, str]
    rows: list[dict[str, Any]]
    errors: list[RawRow]
    columns: list[str]
    named: bool
    summary: str


@dataclass(frozen=True)
class Head:
    """The format of a file, detected from its beginning.

    Args:
        kind: csv, json, parquet, text or conll.
        form: The settings to read the file with.
        named: Whether its first line names the columns.
        line_end: Its line ending.
        has_mark: Whether it begins with a UTF-8 byte order mark.
        raw: The beginning of the file, in whole lines.
    """

    kind: str
    form: FormatSpec
    named: bool
    line_end: str
    has_mark: bool
    raw: bytes


def read_data_file(path: Path) -> DataFile:
    """Detect the format of a file, and read its rows.

    Raises:
        LoraError: If the file does not exist or is empty, or if no row or less than half of its
            rows can be read.
    """
    raw = bytes_of(path)
    if not raw.strip():
        raise LoraError("the file is empty", str(path), EMPTY)
    reject_binary(raw, path)
    if not raw.startswith(PARQUET):
        encoding = encoding_of(raw)[0]
        reject_control_characters(raw, encoding, path)
        sample = _sample(raw, encoding)
        reject_other_tables(sample, path, find_delimiter(sample) is not None)
    detected = _detect(raw, path)
    spec = FormatSpec.model_validate(detected.values)
    rows = list(read_rows(path, spec))
    readable = [row.columns for row in rows if row.columns is not None and not row.error]
    errors = [row for row in rows if row.columns is None or row.error]
    if not readable:
        what = f"no row can be read: {errors[0].error}" if errors else "the file has no rows"
        raise LoraError(what, errors[0].place if errors else str(path), CHECK_FILE)
    if len(errors) > len(readable):
        what = f"{len(errors)} of {counted(len(rows), 'row')} cannot be read: {errors[0].error}"
        raise LoraError(what, errors[0].place, CHECK_FILE)
    if detected.kind == "json" and len(rows) == 1:
        reject_whole_file(readable[0], path)
    columns = list(dict.fromkeys(name for row in readable for name in row))
    return DataFile(
        path,
        detected.values,
        detected.why,
        readable,
        errors,
        columns,
        detected.has_names,
        _in_words(detected, path),
    )


def read_head(path: Path) -> Head:
    """Detect the format of a file from its first lines only, as the file may be large.

    Raises:
        LoraError: If the file does not exist or is empty.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(HEAD_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error
    if not raw.strip():
        raise LoraError("the file is empty", str(path), EMPTY)
    reject_binary(raw, path)
    is_parquet = raw.startswith(PARQUET)
    whole_lines = raw[: raw.rfind(b"\n") + 1] if len(raw) == HEAD_BYTES and not is_parquet else raw
    detected = _detect(whole_lines or raw, path, for_recipe=False)
    form = FormatSpec.model_validate(detected.values)
    end = None if is_parquet else LINE_END.search(_sample(whole_lines or raw, form.encoding))
    ends = end[0] if end else "\n"
    return Head(detected.kind, form, detected.has_names, ends, raw.startswith(BOM), whole_lines)


def _detect(raw: bytes, path: Path, for_recipe: bool = True) -> DetectedFormat:
    """Return the kind of a file and its values of `data.format`; see `find_table`."""
    by_name = KINDS.get(Path(path.name.removesuffix(".gz")).suffix.lower())
    if raw.startswith(PARQUET):
        detected = DetectedFormat("parquet")
    else:
        encoding, why = encoding_of(raw)
        text = _sample(raw, encoding)
        lines = text.splitlines()
        is_tagged = by_name == "conll" or (by_name in (None, "text", "csv") and is_conll(lines))
        if is_tagged and by_name == "csv" and find_delimiter(text, ",;|") is not None:
            is_tagged = False  # a table of texts and their tags
        label_from = None if is_tagged or by_name in ("csv", "json") else label_source(lines)
        detected = DetectedFormat(
            "text" if label_from else "conll" if is_tagged else _kind(text, by_name)
        )
        if encoding != "utf-8":
            detected.set("encoding", encoding, why)
        if detected.kind == "csv":
            find_table(detected, path, text, for_recipe)
        elif label_from:
            detected.set("label_from", label_from, LABEL_REASONS[label_from])
        elif detected.kind == "text" and _has_paragraphs(text):
            detected.set("sample_by", "paragraph", "blank lines divide the text")
    if detected.kind != by_name and "label_from" not in detected.values:
        detected.set("type", detected.kind, "by its content; the name does not say so")
    return detected


def _sample(raw: bytes, encoding: str) -> str:
    """Return the first whole lines of a text, without a byte order mark."""
    raw = raw.removeprefix(BOM)
    text = raw[:SAMPLE_BYTES].decode(encoding, errors="replace").removeprefix("\ufeff")
    cut = text.rfind("\n") if len(raw) > SAMPLE_BYTES else -1
    return text[: cut + 1] if cut > 0 else text


def bytes_of(path: Path) -> bytes:
    """Return the content of a file, decompressed if it is gzipped.

    Raises:
        LoraError: If the file cannot be read.
    """
    if path.is_dir():
        raise LoraError("this is a folder", str(path), "name one file in it")
    if path.exists() and not path.is_file():
        hint = "write its content into a file, and name that"
        raise LoraError("this is a pipe or a device, and not a file", str(path), hint)
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise LoraError("there is no such file", str(path), name_neighbours(path)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def _in_words(detected: DetectedFormat, path: Path) -> str:
    if detected.kind == "parquet":
        return "parquet"
    kinds = {"csv": "table", "json": "JSON", "text": "plain text", "conll": "a word a line"}
    words = [kinds[detected.kind]]
    if detected.kind == "csv":
        is_tsv = path.name.removesuffix(".gz").lower().endswith(".tsv")
        delimiter = detected.values.get("delimiter") or ("\t" if is_tsv else ",")
        is_one_column = "delimiter" in detected.values and delimiter not in DELIMITERS
        words.append(
            "one column" if is_one_column else f"{DELIMITERS[delimiter]} between the columns"
        )
        words.append("with a header" if detected.has_names else "without a header")
    return ", ".join([*words, detected.values.get("encoding", "utf-8")])


def _kind(text: str, by_name: str | None) -> str:
    """Return csv, json or text, by the content if that is clear, otherwise by the name."""
    lines = [line for line in lines_of(text) if line.strip()]
    if lines and _is_json(text, lines[0]):
        return "json"
    if by_name == "json" and lines and lines[0].lstrip().startswith(("{", "[", '"')):
        return "json"  # although it is broken
    if by_name == "text":
        has_two_columns = any({line.count(mark) for line in lines} == {1} for mark in ";|")
        return "csv" if has_two_columns or find_delimiter(text, "\t\x01") else "text"
    if by_name == "csv":
        return "csv"
    return "csv" if find_delimiter(text) else "text"


def _is_json(text: str, line: str) -> bool:
    if text.lstrip().startswith(("[{", "[\n", "[\r")) or re.match(r"\s*\[\s*\{", text):
        return True
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return re.match(r'\s*\{\s*("|$)', line) is not None


def _has_paragraphs(text: str) -> bool:
    lines = lines_of(text)
    return sum(not line.strip() for line in lines) > len(lines) / 20
