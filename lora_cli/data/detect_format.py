"""How a data file is written, found from its bytes: kind, encoding, delimiter, header, columns.

What is found is what the recipe's `data.format` would have to say; the rows are then read by the
same readers that training uses, so that nothing is understood here that is not understood there.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.data.cell_values import FORMS, read_number
from lora_cli.data.conll import is_conll
from lora_cli.data.csv_quoting import Quoting, quoting_of
from lora_cli.data.file_formats import KINDS, read_rows
from lora_cli.data.labelled_text import FASTTEXT, label_source
from lora_cli.data.text_encoding import BOM, LINE_END, encoding_of, lines_of
from lora_cli.data.text_lines import RawRow, unreadable
from lora_cli.data.unreadable_files import reject_binary, reject_other_lines
from lora_cli.errors import LoraError, counted, name_neighbours
from lora_cli.recipe import FormatSpec

SAMPLE_BYTES = 1 << 20
HEAD_BYTES = 1 << 17
WHAT_TO_DO = "check the file: is it what its name says, and complete?"
EMPTY = "was it copied completely?"
PARQUET = b"PAR1"
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
SPARE_DELIMITERS = "\t;|^~\x1f"  # for a file of one column, whose texts hold commas
MOST_TITLE_LINES = 10
LABELS_ARE = {
    "first_word": "each line begins with one of a few words",
    "fasttext": f"each line begins with `{FASTTEXT}`",
    "folder": "each folder holds the texts of one label",
}
CONSISTENT = 0.9  # share of the records with the same number of fields
COLUMN_NAMES = re.compile(
    r"(text|sentence|label|class|category|id|index|date|title|name|score|rating|target|intent|"
    r"sentiment|prompt|completion|question|answer|instruction|input|output|url|message|comment|"
    r"review|premise|hypothesis|body|content|description|summary|source|lang(uage)?)s?[_ ]?\d?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DataFile:
    """A file of rows, as it was found to be.

    Args:
        path: The file.
        form: The keys of `data.format` that are not their defaults.
        why: Of each of these keys, what says so.
        rows: The rows that can be read.
        errors: Those that cannot.
        columns: Names of the columns, in order.
        named: Whether the file itself names them.
        about: The kind of file in words: `csv, semicolon, cp1252`.
    """

    path: Path
    form: dict[str, Any]
    why: dict[str, str]
    rows: list[dict[str, Any]]
    errors: list[RawRow]
    columns: list[str]
    named: bool
    about: str


@dataclass(frozen=True)
class Head:
    """What the beginning of a file says of the whole.

    Args:
        kind: csv, json, parquet, text or conll.
        form: How it is read.
        named: Whether its first line names the columns.
        line_end: What its lines end with.
        has_mark: It begins with the byte order mark of UTF-8.
        raw: The beginning, in whole lines.
    """

    kind: str
    form: FormatSpec
    named: bool
    line_end: str
    has_mark: bool
    raw: bytes


@dataclass
class _Findings:
    kind: str
    form: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    named: bool = True

    def say(self, key: str, value: Any, why: str) -> None:
        self.form[key], self.why[key] = value, why


def read_data_file(path: Path) -> DataFile:
    """Find out how a file is written, and read it.

    Raises:
        LoraError: If the file is not there, is empty, or holds no rows that can be read.
    """
    raw = bytes_of(path)
    if not raw.strip():
        raise LoraError("the file is empty", str(path), EMPTY)
    reject_binary(raw, path)
    if not raw.startswith(PARQUET):
        reject_other_lines(raw, encoding_of(raw)[0], path)
    found = _find(raw, path)
    spec = FormatSpec.model_validate(found.form)
    rows = list(read_rows(path, spec))
    good = [row.columns for row in rows if row.columns is not None and not row.error]
    errors = [row for row in rows if row.columns is None or row.error]
    if not good:
        what = f"no row can be read: {errors[0].error}" if errors else "the file has no rows"
        raise LoraError(what, errors[0].place if errors else str(path), WHAT_TO_DO)
    if len(errors) > len(good):
        what = f"{len(errors)} of {counted(len(rows), 'row')} cannot be read: {errors[0].error}"
        raise LoraError(what, errors[0].place, WHAT_TO_DO)
    columns = list(dict.fromkeys(name for row in good for name in row))
    return DataFile(
        path, found.form, found.why, good, errors, columns, found.named, _about(found, path)
    )


def read_head(path: Path) -> Head:
    """Find out how a file is written from its first lines, whatever its size.

    Raises:
        LoraError: If the file is not there or is empty.
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
    whole = raw[: raw.rfind(b"\n") + 1] if len(raw) == HEAD_BYTES and not is_parquet else raw
    found = _find(whole or raw, path)
    form = FormatSpec.model_validate(found.form)
    end = None if is_parquet else LINE_END.search(_sample(whole or raw, form.encoding))
    ends = end[0] if end else "\n"
    return Head(found.kind, form, found.named, ends, raw.startswith(BOM), whole)


def _find(raw: bytes, path: Path) -> _Findings:
    """Return the kind of a file, and what `data.format` has to say of it."""
    by_name = KINDS.get(Path(path.name.removesuffix(".gz")).suffix.lower())
    if raw.startswith(PARQUET):
        found = _Findings("parquet")
    else:
        encoding, why = encoding_of(raw)
        text = _sample(raw, encoding)
        lines = text.splitlines()
        is_tagged = by_name == "conll" or (by_name in (None, "text", "csv") and is_conll(lines))
        label_from = None if is_tagged or by_name in ("csv", "json") else label_source(lines)
        found = _Findings("text" if label_from else "conll" if is_tagged else _kind(text, by_name))
        if encoding != "utf-8":
            found.say("encoding", encoding, why)
        if found.kind == "csv":
            _find_table(found, path, text)
        elif label_from:
            found.say("label_from", label_from, LABELS_ARE[label_from])
        elif found.kind == "text" and _has_paragraphs(text):
            found.say("sample_by", "paragraph", "blank lines divide the text")
    if found.kind != by_name and "label_from" not in found.form:
        found.say("type", found.kind, "by its content; the name does not say so")
    return found


def _sample(raw: bytes, encoding: str) -> str:
    """Return the first whole lines of a text, without a byte order mark."""
    raw = raw.removeprefix(BOM)
    text = raw[:SAMPLE_BYTES].decode(encoding, errors="replace").removeprefix("\ufeff")
    cut = text.rfind("\n") if len(raw) > SAMPLE_BYTES else -1
    return text[: cut + 1] if cut > 0 else text


def bytes_of(path: Path) -> bytes:
    """Return the content of a file, unpacked.

    Raises:
        LoraError: If it cannot be read.
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


def _about(found: _Findings, path: Path) -> str:
    if found.kind == "parquet":
        return "parquet"
    kinds = {"csv": "table", "json": "JSON", "text": "plain text", "conll": "a word a line"}
    words = [kinds[found.kind]]
    if found.kind == "csv":
        is_tsv = path.name.removesuffix(".gz").lower().endswith(".tsv")
        delimiter = found.form.get("delimiter") or ("\t" if is_tsv else ",")
        one = "delimiter" in found.form and delimiter not in DELIMITERS
        words.append("one column" if one else f"{DELIMITERS[delimiter]} between the columns")
        words.append("with a header" if found.named else "without a header")
    return ", ".join([*words, found.form.get("encoding", "utf-8")])


# ---------------------------------------------------------------------------- kind and columns


def _kind(text: str, by_name: str | None) -> str:
    """Return csv, json or text; the content decides where it is clear, else the name."""
    lines = [line for line in lines_of(text) if line.strip()]
    if lines and _is_json(text, lines[0]):
        return "json"
    if by_name == "json" and lines and lines[0].lstrip().startswith(("{", "[")):
        return "json"  # a broken one
    if by_name == "text":
        even = any({line.count(mark) for line in lines} == {1} for mark in ";|")
        return "csv" if even or find_delimiter(text, "\t") else "text"
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


def records_of(text: str, delimiter: str, quoting: str = "csv") -> list[list[str]]:
    """Return the records of a table that are not blank; one that is broken costs its line."""
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
    """Return what stands between the columns: it gives the most records the same fields.

    Prose has commas too, but not as many in every line: below nine in ten, it is no delimiter.
    """
    scores: dict[str, tuple[float, int]] = {}
    for delimiter in among:
        readings = ("csv", "none") if '"' in text else ("none",)
        scores[delimiter] = max(_evenness(records_of(text, delimiter, way)) for way in readings)
    best = max(scores, key=lambda delimiter: scores[delimiter])
    return best if scores[best][0] else None


def _evenness(records: list[list[str]]) -> tuple[float, int]:
    """Return the share of the records with the commonest number of fields, and that number.

    Both are 0 where that is one field, or too few of the records have it.
    """
    counts = Counter(map(len, records))
    fields, times = max(counts.items(), key=lambda item: (item[1], item[0]), default=(0, 0))
    share = times / max(counts.total(), 1)
    # of a short file one row may be broken, if the first is not
    all_but_one = len(records) > 3 and times == len(records) - 1 and len(records[0]) == fields
    is_even = fields > 1 and (share >= CONSISTENT or all_but_one)
    return (round(share, 2), fields) if is_even else (0.0, 0)


def _find_table(found: _Findings, path: Path, text: str) -> None:
    """Find the delimiter, the header and the names of the columns."""
    default = "\t" if path.name.removesuffix(".gz").lower().endswith(".tsv") else ","
    said = re.match(r'"?sep=([^"\r\n])"?\r?\n', text)  # by Excel, for Excel
    if said:
        found.say("skip_lines", 1, f"the first line says `{said[0].strip()}`, and is no row")
        text = text[said.end() :]
    delimiter = said[1] if said else find_delimiter(text)
    lines = [[line] for line in lines_of(text) if line.strip()]
    if delimiter is None and any(default in line for (line,) in lines):
        if not has_header(lines):
            found.kind, found.named = "text", False
            return
        delimiter = next((mark for mark in SPARE_DELIMITERS if mark not in text), None)
        if delimiter:
            why = "the file has one column; this character stands nowhere in it"
            found.say("delimiter", delimiter, why)
    elif delimiter not in (None, default):
        assert delimiter is not None
        found.say("delimiter", delimiter, f"a {DELIMITERS.get(delimiter, 'mark')} divides the rows")
    delimiter = delimiter or default
    quoting = _quoting(found, path, delimiter)
    records = records_of(text, delimiter, quoting.name)
    if delimiter in DELIMITERS and "delimiter" in found.form:
        found.why["delimiter"] = (
            f"a {DELIMITERS[delimiter]} gives every row {len(records[-1])} fields"
        )
    records = _without_title(found, text, delimiter, records, quoting.name)
    quoting = _quoting(found, path, delimiter)  # its lines are not of the title any more
    if quoting.why:
        found.say("quoting", quoting.name, quoting.reason(path.name))
    _find_names(found, records)


def _quoting(found: _Findings, path: Path, delimiter: str) -> Quoting:
    """Return how the marks of the whole file are read, with what is known of it so far."""
    known = {k: v for k, v in found.form.items() if k in ("encoding", "skip_lines")}
    return quoting_of(path, FormatSpec(**known, delimiter=delimiter))


def _without_title(
    found: _Findings, text: str, delimiter: str, records: list[list[str]], quoting: str
) -> list[list[str]]:
    """Return the records without those at the beginning that have too few fields to be rows."""
    width = Counter(map(len, records)).most_common(1)[0][0]
    title = next(i for i, record in enumerate(records) if len(record) == width)
    if not 0 < title <= MOST_TITLE_LINES or any(len(r) > width for r in records[:title]):
        return records
    rest = records[title:]
    last = records[title - 1]
    named = [last, *(record[1:] for record in rest)]
    if len(last) == width - 1 and not has_header(rest) and has_header(named):
        # as R writes them: the names of the rows have no name themselves
        rest = [["row", *last], *rest]
        why = f"the header lacks a name for the first of {width} columns"
        found.say("header", False, why)
        found.say("columns", [cell.strip() for cell in rest[0]], why)
    lines = found.form.get("skip_lines", 0)
    lines += _lines_above(text, delimiter, width, quoting)
    start = " ".join(records[0])[:40]
    found.say("skip_lines", lines, f"no rows, by their number of fields: `{start}`")
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


def _find_names(found: _Findings, records: list[list[str]]) -> None:
    """Find whether there is a header, and names for the columns where it does not do."""
    if "columns" in found.form:
        return
    found.named = has_header(records)
    width = Counter(map(len, records)).most_common(1)[0][0]
    if not found.named:
        found.say("header", False, "the first line looks like the others")
        found.say("columns", [f"column_{i}" for i in range(1, width + 1)], "names given here")
        return
    names = [name.strip() for name in records[0]]
    if len(set(names)) < len(names):
        unique = [
            name if names.index(name) == i else f"{name}_{i + 1}" for i, name in enumerate(names)
        ]
        unique = [name or f"column_{i}" for i, name in enumerate(unique, 1)]
        found.say("columns", unique, "two columns of the header have the same name")


def has_header(records: Sequence[Sequence[str]]) -> bool:
    """Return whether the first record names the columns, judged by how it differs from the rest."""
    first, rest = [cell.strip() for cell in records[0]], records[1:2000]
    filled = [cell for cell in first if cell]
    if not rest or not filled:
        return bool(filled) and all(COLUMN_NAMES.fullmatch(cell) for cell in filled)
    votes = 0
    for i, cell in enumerate(first):
        below = [record[i].strip() for record in rest if len(record) > i]
        votes += _vote(cell, [value for value in below if value])
    return votes > 0


def _vote(cell: str, below: list[str]) -> int:
    """Return above 0 if a cell names its column, below 0 if it is a value like the others."""
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
