"""How a table is written, found from its text: the delimiter, a title above it, the header."""

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

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
SPARE_DELIMITERS = "\t;|^~\x1f"  # for a file of one column, whose texts contain commas
MOST_TITLE_LINES = 10
MOST_RECORDS = 2000  # that a header is compared with
CONSISTENT = 0.9  # of the records need the same number of fields
COLUMN_NAMES = re.compile(
    r"(text|sentence|label|class|category|id|index|date|title|name|score|rating|target|intent|"
    r"sentiment|prompt|completion|question|answer|instruction|input|output|url|message|comment|"
    r"review|premise|hypothesis|body|content|description|summary|source|lang(uage)?|"
    r"anchor|query|positive|negative|passage|document)s?[_ ]?\d?",
    re.IGNORECASE,
)


@dataclass
class FoundFormat:
    """What was found out about a file.

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


def find_delimiter(text: str, among: Iterable[str] = DELIMITERS) -> str | None:
    """Return the delimiter by which most records have the same number of fields; None if none does.

    Sentences have commas too, but not the same number in each line. So the number of fields has to
    be the same in nine of ten records.
    """
    scores: dict[str, tuple[float, int]] = {}
    for delimiter in among:
        readings = ("csv", "none") if '"' in text else ("none",)
        scores[delimiter] = max(_evenness(records_of(text, delimiter, way)) for way in readings)
    best = max(scores, key=lambda delimiter: scores[delimiter])
    return best if any(scores[best]) else None


def _evenness(records: list[list[str]]) -> tuple[float, int]:
    """Return the share of the records with the most common number of fields, and that number.

    Both are 0 if that number is 1, or if too few of the records have it.
    """
    counts = Counter(map(len, records))
    fields, times = max(counts.items(), key=lambda item: (item[1], item[0]), default=(0, 0))
    share = times / max(counts.total(), 1)
    # in a short file, one row other than the first may be broken
    all_but_one = len(records) > 3 and times == len(records) - 1 and len(records[0]) == fields
    is_even = fields > 1 and (share >= CONSISTENT or all_but_one)
    return (round(share, 2), fields) if is_even else (0.0, 0)


def find_table(found: FoundFormat, path: Path, text: str, for_recipe: bool = True) -> None:
    """Find the delimiter, the header and the names of the columns.

    Args:
        found: What is known of the file, which gets the rest.
        path: The file.
        text: Its beginning.
        for_recipe: A recipe is drafted of it, so that rows which do not fit the header are no
            exceptions; else each of them is an error of its own.

    Raises:
        LoraError: If so many rows do not fit that the header is not theirs.
    """
    default = "\t" if path.name.removesuffix(".gz").lower().endswith(".tsv") else ","
    said = re.match(r'"?sep=([^"\r\n])"?\r?\n', text)  # as Excel writes it
    if said:
        found.set("skip_lines", 1, f"the first line says `{said[0].strip()}`, and is no row")
        text = text[said.end() :]
    delimiter = said[1] if said else find_delimiter(text)
    lines = [[line] for line in lines_of(text) if line.strip()]
    if delimiter is None and any(default in line for (line,) in lines):
        if not has_header(lines):
            if for_recipe:
                _require_quotes(path, records_of(text, default, "csv"), default)
            found.kind, found.has_names = "text", False
            return
        delimiter = next((mark for mark in SPARE_DELIMITERS if mark not in text), None)
        if delimiter:
            why = "the file has one column; this character stands nowhere in it"
            found.set("delimiter", delimiter, why)
    elif delimiter not in (None, default):
        assert delimiter is not None
        found.set("delimiter", delimiter, f"a {DELIMITERS.get(delimiter, 'mark')} divides the rows")
    delimiter = delimiter or default
    quoting = _quoting(found, path, delimiter)
    records = records_of(text, delimiter, quoting.name)
    if delimiter in DELIMITERS and "delimiter" in found.values:
        found.why["delimiter"] = (
            f"a {DELIMITERS[delimiter]} gives every row {len(records[-1])} fields"
        )
    if for_recipe and not _begins_with_names_of_rows(records):
        _require_quotes(path, records, delimiter)
    records = _without_title(found, text, delimiter, records, quoting.name)
    quoting = _quoting(found, path, delimiter)  # again, without the lines of the title
    if quoting.why:
        found.set("quoting", quoting.name, quoting.reason(path.name))
    _find_names(found, records)


def _begins_with_names_of_rows(records: list[list[str]]) -> bool:
    """Return whether the first column has names of rows, and itself none, as R writes tables."""
    header, rest = records[0], records[1:]
    width = Counter(map(len, rest)).most_common(1)[0][0] if rest else 0
    names = [record[0] for record in rest if record]
    return (
        len(header) == width - 1
        and len(set(names)) == len(names)
        and not has_header(rest)
        and has_header([header, *(record[1:] for record in rest)])
    )


def _require_quotes(path: Path, records: list[list[str]], delimiter: str) -> None:
    """Reject a table whose header is plain, and whose texts hold delimiters without quotes.

    Raises:
        LoraError: If so many rows have more fields than the header that they are no exceptions.
    """
    header, rest = records[0], records[1:]
    if len(header) < 2 or not all(COLUMN_NAMES.fullmatch(cell.strip()) for cell in header):
        return
    longer = sum(len(record) > len(header) for record in rest)
    fitting = len(rest) - longer
    if fitting < CONSISTENT * len(rest) and all(len(r) >= len(header) for r in rest):
        what = f"the header names {len(header)} columns, and {longer:,} of {len(rest):,} rows have "
        mark = DELIMITERS.get(delimiter, "mark")
        hint = f"put texts that hold a {mark} into quotation marks, or divide the columns by a tab"
        raise LoraError(f"{what}more fields", str(path), hint)


def _quoting(found: FoundFormat, path: Path, delimiter: str) -> Quoting:
    """Return how quotation marks are read in the whole file, by what is known of it so far."""
    known = {k: v for k, v in found.values.items() if k in ("encoding", "skip_lines")}
    return quoting_of(path, FormatSpec(**known, delimiter=delimiter))


def _without_title(
    found: FoundFormat, text: str, delimiter: str, records: list[list[str]], quoting: str
) -> list[list[str]]:
    """Return the records without a title: first records with too few fields to be rows."""
    width = Counter(map(len, records)).most_common(1)[0][0]
    title = next(i for i, record in enumerate(records) if len(record) == width)
    if not 0 < title <= MOST_TITLE_LINES or any(len(r) > width for r in records[:title]):
        return records
    rest = records[title:]
    last = records[title - 1]
    if _begins_with_names_of_rows(records[title - 1 :]):
        rest = [["row", *last], *rest]
        why = f"the header lacks a name for the first of {width} columns"
        found.set("header", False, why)
        found.set("columns", [cell.strip() for cell in rest[0]], why)
    lines = found.values.get("skip_lines", 0)
    lines += _lines_above(text, delimiter, width, quoting)
    start = " ".join(records[0])[:40]
    found.set("skip_lines", lines, f"no rows, by their number of fields: `{start}`")
    return rest


def _lines_above(text: str, delimiter: str, width: int, quoting: str) -> int:
    """Return the number of lines above the first record of a number of fields."""
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


def _find_names(found: FoundFormat, records: list[list[str]]) -> None:
    """Find out whether there is a header, and name the columns if it does not."""
    if "columns" in found.values:
        return
    found.has_names = has_header(records)
    width = Counter(map(len, records)).most_common(1)[0][0]
    if not found.has_names:
        found.set("header", False, "the first line looks like the others")
        found.set("columns", [f"column_{i}" for i in range(1, width + 1)], "names given here")
        return
    names = [name.strip() for name in records[0]]
    if len(set(names)) < len(names):
        unique = [
            name if names.index(name) == i else f"{name}_{i + 1}" for i, name in enumerate(names)
        ]
        unique = [name or f"column_{i}" for i, name in enumerate(unique, 1)]
        found.set("columns", unique, "two columns of the header have the same name")


def has_header(records: Sequence[Sequence[str]]) -> bool:
    """Return whether the first record names the columns: whether it differs from the others."""
    first, rest = [cell.strip() for cell in records[0]], records[1:MOST_RECORDS]
    filled = [cell for cell in first if cell]
    if not rest or not filled:
        return bool(filled) and all(COLUMN_NAMES.fullmatch(cell) for cell in filled)
    if _counts_up(first) and any(not is_number(cell) for record in rest for cell in record if cell):
        return True
    votes = 0
    for i, cell in enumerate(first):
        below = [record[i].strip() for record in rest if len(record) > i]
        votes += _vote(cell, [value for value in below if value])
    return votes > 0


def _counts_up(header: Sequence[str]) -> bool:
    """Return whether cells are numbers from 0, as pandas writes columns that have no names.

    A cell before them is that of the rows' names, which has none.
    """
    numbers = header[1:] if header[0] == "" else header
    return len(numbers) > 1 and list(numbers) == [str(i) for i in range(len(numbers))]


def _vote(cell: str, below: list[str]) -> int:
    """Return a number above 0 if a cell names its column, below 0 if it is a value of it."""
    if not cell or not below:
        return 0
    if COLUMN_NAMES.fullmatch(cell):
        return -1 if below.count(cell) > len(below) / 20 else 3
    if is_number(cell):
        return -3
    numbers = sum(map(is_number, below)) / len(below)
    if numbers > 0.9:
        return 3
    distinct = len(set(below))
    if distinct <= len(below) / 2:  # a column of few values: is this one of them?
        return -3 if cell in set(below) else 1
    words = len(cell.split())
    if len(cell) > 60 or words > 5 or re.search(r"[.!?\u3002\uff01\uff1f]$|https?://", cell):
        return -3
    mean = sum(map(len, below)) / len(below)
    is_name = re.fullmatch(r"\w+([ _.-]\w+){0,3}", cell) is not None
    return 2 if is_name and len(cell) < mean / 3 else 0


def is_number(text: str) -> bool:
    """Return whether a text is a number, however it is written."""
    return any(read_number(text, form) is not None for form in FORMS)
