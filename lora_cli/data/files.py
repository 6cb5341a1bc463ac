"""Read rows from csv, json, parquet and text files, with the place of each and what is wrong.

Every value of a csv file is text, as it stands: `NA`, `null` and `nan` are words, `007` keeps its
zeros. A row that cannot be read is yielded with its fault, so that all can be reported together.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lora_cli.data.parallel import parts_of, read_parallel
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.recipe import FormatSpec

KINDS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".parquet": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
NOT_TEXT = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes
JSON_NAMES: dict[type, str] = {
    str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list",
    type(None): "null",
}  # fmt: skip


@dataclass(frozen=True)
class RawRow:
    """A row as it was read: its columns, or why it could not be read."""

    columns: dict[str, Any] | None
    place: str
    fault: str = ""


def kind_of(path: Path, spec: FormatSpec) -> str:
    """Return how a file is read: csv, json, parquet or text."""
    if parts_of(path):
        return "text"
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    kind = spec.type or KINDS.get(suffix)
    if kind is None:
        raise LoraError(
            f"what kind of file is {path.name}?",
            "data.format.type",
            "set it to csv, json, parquet or text",
        )
    return kind


def form_of(source: Path, given: FormatSpec) -> FormatSpec:
    """Return how the file is read: of the kind that its name says, else as the recipe says."""
    by_name = given.model_copy(update={"type": None})
    try:
        kind_of(source, by_name)
    except LoraError:
        return given
    return by_name


def read_rows(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    """Yield the rows of a file in order.

    Args:
        path: The file; `.gz` is unpacked on the way.
        spec: How it is read, where its name does not say.

    Raises:
        LoraError: If the file as a whole cannot be read.
    """
    if parts := parts_of(path):
        lines = {name: _lines(part, spec.encoding) for name, part in parts.items()}
        for number, texts in read_parallel(parts, lines):
            fault = next(
                (f for text in texts.values() if (f := _text_fault(text, spec.encoding))), ""
            )
            yield RawRow(None if fault else texts, f"{path.name}:{number}", fault)
        return
    match kind_of(path, spec):
        case "csv":
            yield from _read_csv(path, spec)
        case "json":
            yield from _read_json(path, spec)
        case "parquet":
            yield from _read_parquet(path)
        case _:
            yield from _read_text(path, spec)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its line end); bytes that are no text become surrogates."""
    codec = encoding.lower().replace("_", "-")
    try:
        with _open(path) as raw:
            head = raw.read(4)
            # a mark before text that is no UTF-8 is left over from a program that joined two files
            raw.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
            if codec in ("utf-8", "utf8", "utf-8-sig"):
                codec = "utf-8"
                if head.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise LoraError(
                        "this is not UTF-8 text but, by its first bytes, UTF-16",
                        str(path),
                        "`--set data.format.encoding=utf-16`",
                    )
            text = io.TextIOWrapper(raw, encoding=codec, errors="surrogateescape", newline="")
            yield from enumerate(text, 1)
    except LookupError:
        hint = "for example utf-8, latin-1, cp1252, cp932, utf-16"
        raise LoraError(f"`{encoding}` is not an encoding", "data.format.encoding", hint) from None
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise LoraError(f"cannot be read: {error}", str(path)) from error


def _text_fault(text: str, encoding: str) -> str:
    """Return which byte of a text could not be decoded, or nothing."""
    found = None if text.isascii() else NOT_TEXT.search(text)
    return f"byte 0x{ord(found[0]) - 0xDC00:02x} is not {encoding} text" if found else ""


# ----------------------------------------------------------------------------------------- csv


class _Record:
    """An iterator over lines that remembers those of one record, and can put them back."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self.lines = lines
        self.taken: list[tuple[int, str]] = []
        self.again: deque[tuple[int, str]] = deque()
        self.doubtful = 0  # until this line, a record may be the inside of a broken one

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.lines)
        self.taken.append(line)
        return line[1]

    def retry(self) -> None:
        """Put back all lines of the record but the first."""
        self.doubtful = max(self.doubtful, self.taken[-1][0] + 1)
        self.again.extendleft(reversed(self.taken[1:]))

    def inside_broken(self) -> bool:
        """Return whether the record seems to be the inside of a broken one: by an odd quote."""
        last = self.taken[-1][0]
        odd = sum(line.count('"') for _, line in self.taken) % 2 == 1
        if last > self.doubtful or not odd:
            return False
        self.doubtful = max(self.doubtful, last + 1)  # which may go on
        return True


def _records(path: Path, spec: FormatSpec) -> Iterator[tuple[int, list[str], str]]:
    """Yield (first line, fields, fault) of the records of a csv file that are not blank.

    A quotation mark that is never closed would swallow the rest of the file: a broken record costs
    its first line, and what followed is read again.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default cuts fields at 128 KiB
    is_tsv = path.name.removesuffix(".gz").lower().endswith(".tsv")
    delimiter = spec.delimiter or ("\t" if is_tsv else ",")
    lines = _lines(path, spec.encoding)
    record = _Record(itertools.islice(lines, spec.skip_lines, None))
    reader = csv.reader(record, delimiter=delimiter, strict=True)
    while True:
        record.taken = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = "a quotation mark is not closed, or one inside a quoted field is not doubled"
            fault = what if '"' in str(error) or "end of data" in str(error) else str(error)
            yield record.taken[0][0], [], fault
            record.retry()
            reader = csv.reader(record, delimiter=delimiter, strict=True)
            continue
        if not fields or not any(line.strip(" \r\n") for _, line in record.taken):
            continue
        fault = next((f for field in fields if (f := _text_fault(field, spec.encoding))), "")
        if record.inside_broken():
            fault = "this line belongs to the broken row above it"
        yield record.taken[0][0], fields, fault


def _read_csv(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    records = _records(path, spec)
    names = _column_names(path, spec, records)
    for line, fields, fault in records:
        if names is None:
            names = [str(number) for number in range(len(fields))]
        if not fault and len(fields) != len(names):
            fault = f"{len(fields)} fields where there are {len(names)} columns"
        columns = None if fault else dict(zip(names, fields, strict=True))
        yield RawRow(columns, f"{path.name}:{line}", fault)


def _column_names(
    path: Path, spec: FormatSpec, records: Iterator[tuple[int, list[str], str]]
) -> list[str] | None:
    """Return the names of the columns of a csv file, if there are any; its header is taken."""
    names = spec.columns
    if not spec.header:
        return names
    line, header, fault = next(records, (1, [], ""))
    header = [name.strip() for name in header]
    if fault:
        raise LoraError(f"the header: {fault}", f"{path}:{line}")
    if names is None:
        twice = [name for name, times in Counter(header).items() if times > 1]
        if twice:
            raise LoraError(
                f"two columns are called `{twice[0]}`",
                f"{path}:{line}",
                "name them in `data.format.columns`",
            )
        return header
    if header and len(names) != len(header):
        raise LoraError(
            f"{len(names)} names for the {len(header)} columns of {path.name}",
            "data.format.columns",
            "its header has " + ", ".join(header),
        )
    return names


def columns_of(path: Path, spec: FormatSpec) -> list[str]:
    """Return the names of all columns of a file; only the rows of JSON have columns of their own.

    Raises:
        LoraError: If the file as a whole cannot be read, or no row of it.
    """
    names: list[str] | None = None
    match kind_of(path, spec):
        case "csv":
            names = _column_names(path, spec, _records(path, spec))
        case "parquet":
            names = list(parquet_schema(path).names)
        case "text":
            names = list(parts_of(path)) or [text_column(spec)]
    if names is None:
        enough = None if kind_of(path, spec) == "json" else 1
        rows = (row.columns for row in read_rows(path, spec) if row.columns is not None)
        names = list(dict.fromkeys(name for row in itertools.islice(rows, enough) for name in row))
    if not names:
        raise LoraError("no row can be read", str(path))
    return names


# ----------------------------------------------------------------------------------------- json


def _read_json(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    lines = ((n, line) for n, line in _lines(path, spec.encoding) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        yield from _read_json_list(path, spec)
        return
    for number, line in itertools.chain([first], lines):
        row = _json_row(line, f"{path.name}:{number}", spec)
        if row.fault and number == first[0]:
            _refuse_one_object(path, spec)
        yield row


def _json_row(line: str, place: str, spec: FormatSpec) -> RawRow:
    if fault := _text_fault(line, spec.encoding):
        return RawRow(None, place, fault)
    try:
        value = json.loads(line)
    except ValueError as error:
        return RawRow(None, place, f"not valid JSON: {error}")
    except RecursionError:
        return RawRow(None, place, "the JSON is too deep")
    return _json_object(value, place)


def _json_object(value: Any, place: str) -> RawRow:
    if not isinstance(value, dict):
        return RawRow(None, place, f"a row is a JSON object, not {JSON_NAMES[type(value)]}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return RawRow(None, place, f"{half} is half of a character")
    return RawRow(value, place)


def _read_json_list(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    text = "".join(line for _, line in _lines(path, spec.encoding))
    if fault := _text_fault(text, spec.encoding):
        raise LoraError(fault, str(path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise LoraError(f"not valid JSON: {error.msg}", f"{path}:{error.lineno}") from error
    except (ValueError, RecursionError) as error:
        raise LoraError(f"not valid JSON: {error}", str(path)) from error
    for number, value in enumerate(values):
        yield _json_object(value, f"{path.name}[{number}]")


def _refuse_one_object(path: Path, spec: FormatSpec) -> None:
    """Say so if a file whose first line is no row is, as a whole, a single object."""
    first = next(line for _, line in _lines(path, spec.encoding) if line.strip())
    if not first.lstrip().startswith("{") or first.rstrip().endswith("}"):
        return
    try:
        value = json.loads("".join(line for _, line in _lines(path, spec.encoding)))
    except (ValueError, RecursionError):
        return
    lists = [key for key, item in value.items() if isinstance(item, list)]
    raise LoraError(
        "the file is one JSON object, and not a list of rows",
        str(path),
        f"take the rows out: `jq -c '.{lists[0] if lists else 'rows'}[]' {path.name} > rows.jsonl`",
    )


# ------------------------------------------------------------------------------ parquet and text


def parquet_schema(path: Path) -> Any:
    """Return the columns of a parquet file with their types, a `pyarrow.Schema`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LoraError(f"not a whole parquet file: {reason}", str(path)) from error


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield RawRow(row, f"{path.name}[{number}]")
                    number += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LoraError(f"not a whole parquet file: {reason}", str(path)) from error


def _read_text(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    name = text_column(spec)
    for number, text in _text_units(path, spec):
        fault = _text_fault(text, spec.encoding)
        yield RawRow(None if fault else {name: text}, f"{path.name}:{number}", fault)


def text_column(spec: FormatSpec) -> str:
    """Return the name of the one column of a text file."""
    return spec.columns[0] if spec.columns and len(spec.columns) == 1 else "text"


def _text_units(path: Path, spec: FormatSpec) -> Iterator[tuple[int, str]]:
    """Yield (first line, text) of the lines, the paragraphs, or the whole of a text file."""
    pending: list[str] = []
    first = 1
    for number, line in _lines(path, spec.encoding):
        blank = not line.strip()
        if spec.sample_by == "line":
            if not blank:
                yield number, line.rstrip("\r\n")
        elif blank and (spec.sample_by == "paragraph" or not pending):
            if pending:
                yield first, "".join(pending).rstrip("\r\n")
            pending = []
        else:
            first = first if pending else number
            pending.append(line)
    if pending:
        text = "".join(pending)
        yield first, text.rstrip("\r\n") if spec.sample_by == "paragraph" else text


def require_columns(wanted: dict[str, str], present: list[str], source: str) -> None:
    """Check that the columns named in the recipe are there.

    Args:
        wanted: Column by the place in the recipe that names it.
        present: The columns of the data.
        source: Name of the data, for the error.
    """
    problems = []
    for at, column in wanted.items():
        if column not in present:
            hint = did_you_mean(column, present, "its columns are")
            between = next((mark for mark in ";\t|," if mark in "".join(present)), None)
            if len(present) == 1 and between:
                hint = f"if its columns are divided by {between!r}, set `data.format.delimiter`"
            problems.append(Problem(f"{source} has no column `{column}`", at, hint))
    if problems:
        raise LoraError(problems)
