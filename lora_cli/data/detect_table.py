"""Detect how a table is written: its delimiter, a title above it, and its header."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.data.cell_values import FORMS, read_number
from lora_cli.data.csv_quoting import Quoting, quoting_of
from lora_cli.data.text_encoding import lines_of
from lora_cli.errors import LoraError
from lora_cli.recipe import FormatSpec

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar", "\x01": "Ctrl-A"}
SPARE_DELIMITERS = "\t;|^~\x1f"  # for a single-column file whose texts contain commas
MAX_TITLE_LINES = 10
MAX_RECORDS = 2000  # compared with the header
CONSISTENT = 0.9  # share of records that must have the same number of fields
COLUMN_NAMES = re.compile(
    r"(text|sentence|label|class|category|id|index|date|title|name|score|rating|target|intent|"
    r"sentiment|prompt|completion|question|answer|instruction|input|output|url|message|comment|"
    r"review|premise|hypothesis|body|content|description|summary|source|lang(uage)?|"
    r"anchor|query|positive|negative|passage|document)s?[_ ]?\d?",
    re.IGNORECASE,
)


@dataclass
class DetectedFormat:
    """The detected format of a file.

    Args:
        kind: csv, json, parquet, text or conll.
        values: The keys of `data.format` that differ from their defaults.
        why: The reason for each of these values.
        has_names: Whether the file itself names its columns.
    """

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    has_names: bool = True

    def set(self, key: str, value: Any, why: str) -> None:
        """Set a key of `data.format`, with the reason."""
        self.values[key], self.why[key] = value, why


def records_of(text: str, delimiter: str, quoting: str = "csv") -> list[list[str]]:
    """Return the records of a table that are neither blank nor broken."""
    if quoting == "none":
        return [line.split(delimiter) for line in lines_of(text) if line.strip()]
    records: list[list[str]] = []
    escape = "\\" if quoting == "backslash" else None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, escapechar=escape)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return records
        except csv.Error:
            continue
        if any(cell.strip() for cell in fields):
            records.append(fields)


def find_delimiter(text: str, candidates: Iterable[str] = DELIMITERS) -> str | None:
    """Return the delimiter that best splits a text into columns; None if no delimiter does.

    Sentences have commas too, but not the same number in each line. So nine of ten records must
    have the same number of fields.
    """
    scores: dict[str, tuple[float, int]] = {}
    for delimiter in candidates:
        readings = ("csv", "none") if '"' in text else ("none",)
        scores[delimiter] = max(
            _evenness(records_of(text, delimiter, quoting)) for quoting in readings
        )
    best = max(scores, key=lambda delimiter: scores[delimiter])
    return best if any(scores[best]) else None


def _evenness(records: list[list[str]]) -> tuple[float, int]:
    """Return the share of records with the most common number of fields, and that number.

    Both are 0 if that number is 1, or if too few records have it.
    """
    counts = Counter(map(len, records))
    fields, times = max(counts.items(), key=lambda item: (item[1], item[0]), default=(0, 0))
    share = times / max(counts.total(), 1)
    # in a short file, one row other than the first may be broken
    all_but_one = len(records) > 3 and times == len(records) - 1 and len(records[0]) == fields
    is_even = fields > 1 and (share >= CONSISTENT or all_but_one)
    return (round(share, 2), fields) if is_even else (0.0, 0)


def find_table(detected: DetectedFormat, path: Path, text: str, for_recipe: bool = True) -> None:
    """Detect the delimiter, the header and the column names of a table.

    Args:
        detected: The format detected so far, which is completed in place.
        path: The file.
        text: The beginning of the file.
        for_recipe: Whether to draft a recipe from the file. If so, many rows that do not fit the
            header are one error; otherwise, each is reported when it is read.

    Raises:
        LoraError: If so many rows do not fit the header that texts must contain delimiters.
    """
    default = "\t" if path.name.removesuffix(".gz").lower().endswith(".tsv") else ","
    sep_line = re.match(r'"?sep=([^"\r\n])"?\r?\n', text)  # written by Excel
    if sep_line:
        detected.set("skip_lines", 1, f"the first line says `{sep_line[0].strip()}`, and is no row")
        text = text[sep_line.end() :]
    delimiter = sep_line[1] if sep_line else find_delimiter(text)
    lines = [[line] for line in lines_of(text) if line.strip()]
    if delimiter is None and any(default in line for (line,) in lines):
        if not has_header(lines):
            if for_recipe:
                _require_quotes(path, records_of(text, default, "csv"), default)
            detected.kind, detected.has_names = "text", False
            return
        delimiter = next((mark for mark in SPARE_DELIMITERS if mark not in text), None)
        if delimiter:
            why = "the file has one column; this character stands nowhere in it"
            detected.set("delimiter", delimiter, why)
    elif delimiter not in (None, default):
        assert delimiter is not None
        detected.set(
            "delimiter", delimiter, f"a {DELIMITERS.get(delimiter, 'mark')} divides the rows"
        )
    delimiter = delimiter or default
    quoting = _quoting(detected, path, delimiter)
    records = records_of(text, delimiter, quoting.name)
    if delimiter in DELIMITERS and "delimiter" in detected.values:
        detected.why["delimiter"] = (
            f"a {DELIMITERS[delimiter]} gives every row {len(records[-1])} fields"
        )
    if for_recipe and not _has_row_names(records):
        _require_quotes(path, records, delimiter)
    records = _without_title(detected, text, delimiter, records, quoting.name)
    quoting = _quoting(detected, path, delimiter)  # again, now without the title lines
    if quoting.why:
        detected.set("quoting", quoting.name, quoting.reason(path.name))
    _find_names(detected, records)


def _has_row_names(records: list[list[str]]) -> bool:
    """Return whether the first column has row names and no header, as in tables written by R."""
    header, rows = records[0], records[1:]
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    names = [record[0] for record in rows if record]
    return (
        len(header) == width - 1
        and len(set(names)) == len(names)
        and not has_header(rows)
        and has_header([header, *(record[1:] for record in rows)])
    )


def _require_quotes(path: Path, records: list[list[str]], delimiter: str) -> None:
    """Reject a table with a clear header whose texts contain unquoted delimiters.

    Raises:
        LoraError: If too many rows have more fields than the header.
    """
    header, rows = records[0], records[1:]
    if len(header) < 2 or not all(COLUMN_NAMES.fullmatch(cell.strip()) for cell in header):
        return
    longer = sum(len(record) > len(header) for record in rows)
    fitting = len(rows) - longer
    if fitting < CONSISTENT * len(rows) and all(len(r) >= len(header) for r in rows):
        what = f"the header names {len(header)} columns, and {longer:,} of {len(rows):,} rows have "
        mark = DELIMITERS.get(delimiter, "mark")
        hint = f"put texts that hold a {mark} into quotation marks, or divide the columns by a tab"
        raise LoraError(f"{what}more fields", str(path), hint)


def _quoting(detected: DetectedFormat, path: Path, delimiter: str) -> Quoting:
    """Return how quotation marks are read in the whole file, given the format so far."""
    settings = {k: v for k, v in detected.values.items() if k in ("encoding", "skip_lines")}
    return quoting_of(path, FormatSpec(**settings, delimiter=delimiter))


def _without_title(
    detected: DetectedFormat, text: str, delimiter: str, records: list[list[str]], quoting: str
) -> list[list[str]]:
    """Return the records without a title: leading records with too few fields to be rows."""
    width = Counter(map(len, records)).most_common(1)[0][0]
    title = next(i for i, record in enumerate(records) if len(record) == width)
    if not 0 < title <= MAX_TITLE_LINES or any(len(r) > width for r in records[:title]):
        return records
    remaining = records[title:]
    row_header = records[title - 1]
    if _has_row_names(records[title - 1 :]):
        remaining = [["row", *row_header], *remaining]
        why = f"the header lacks a name for the first of {width} columns"
        detected.set("header", False, why)
        detected.set("columns", [cell.strip() for cell in remaining[0]], why)
    lines = detected.values.get("skip_lines", 0)
    lines += _title_lines(text, delimiter, width, quoting)
    title_start = " ".join(records[0])[:40]
    detected.set("skip_lines", lines, f"no rows, by their number of fields: `{title_start}`")
    return remaining


def _title_lines(text: str, delimiter: str, width: int, quoting: str) -> int:
    """Return the number of lines above the first record with `width` fields."""
    if quoting == "none":
        counts = [len(line.split(delimiter)) for line in lines_of(text)]
        return counts.index(width)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    lines = 0
    for record in reader:
        if len(record) == width:
            break
        lines = reader.line_num
    return lines


def _find_names(detected: DetectedFormat, records: list[list[str]]) -> None:
    """Detect whether there is a header, and name the columns if there is none."""
    if "columns" in detected.values:
        return
    detected.has_names = has_header(records)
    width = Counter(map(len, records)).most_common(1)[0][0]
    if not detected.has_names:
        detected.set("header", False, "the first line looks like the others")
        detected.set("columns", [f"column_{i}" for i in range(1, width + 1)], "names given here")
        return
    names = [name.strip() for name in records[0]]
    if len(set(names)) < len(names):
        unique = [
            name if names.index(name) == i else f"{name}_{i + 1}" for i, name in enumerate(names)
        ]
        unique = [name or f"column_{i}" for i, name in enumerate(unique, 1)]
        detected.set("columns", unique, "two columns of the header have the same name")


def has_header(records: Sequence[Sequence[str]]) -> bool:
    """Return whether the first record is a header, which differs from the other records."""
    first, rows = [cell.strip() for cell in records[0]], records[1:MAX_RECORDS]
    filled = [cell for cell in first if cell]
    if not rows or not filled:
        return bool(filled) and all(COLUMN_NAMES.fullmatch(cell) for cell in filled)
    if _is_numbered_from_0(first) and any(
        not is_number(cell) for record in rows for cell in record if cell
    ):
        return True
    votes = 0
    for i, cell in enumerate(first):
        values = [record[i].strip() for record in rows if len(record) > i]
        votes += _header_score(cell, [value for value in values if value])
    return votes > 0


def _is_numbered_from_0(header: Sequence[str]) -> bool:
    """Return whether cells are numbered from 0, as pandas writes columns without names.

    The first cell may be empty: it is above the row index.
    """
    numbers = header[1:] if header[0] == "" else header
    return len(numbers) > 1 and list(numbers) == [str(i) for i in range(len(numbers))]


def _header_score(cell: str, values: list[str]) -> int:
    """Return a positive score if a cell is likely the name of its column, negative if a value."""
    if not cell or not values:
        return 0
    if COLUMN_NAMES.fullmatch(cell):
        return -1 if values.count(cell) > len(values) / 20 else 3
    if is_number(cell):
        return -3
    numbers = sum(map(is_number, values)) / len(values)
    if numbers > 0.9:
        return 3
    distinct = len(set(values))
    if distinct <= len(values) / 2:  # a column with few distinct values: is the cell one of them?
        return -3 if cell in set(values) else 1
    words = len(cell.split())
    if len(cell) > 60 or words > 5 or re.search(r"[.!?\u3002\uff01\uff1f]$|https?://", cell):
        return -3
    mean = sum(map(len, values)) / len(values)
    is_name = re.fullmatch(r"\w+([ _.-]\w+){0,3}", cell) is not None
    return 2 if is_name and len(cell) < mean / 3 else 0


def is_number(text: str) -> bool:
    """Return whether a text is a number, however it is written."""
    return any(read_number(text, form) is not None for form in FORMS)
