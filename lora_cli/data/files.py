"""Read rows from csv, json, parquet and text files, with the place of each and what is wrong.

Every value of a csv file is text, as it stands: `NA`, `null` and `nan` are words, `007` keeps its
zeros. A row that cannot be read is yielded with its fault, so that all can be reported together.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lora_cli.errors import LoraError, did_you_mean
from lora_cli.recipe import FormatSpec

KINDS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".parquet": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip


@dataclass(frozen=True)
class RawRow:
    """A row as it was read: its columns, or why it could not be read."""

    columns: dict[str, Any] | None
    place: str
    fault: str = ""


def kind_of(path: Path, spec: FormatSpec) -> str:
    """Return how a file is read: csv, json, parquet or text."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    kind = spec.type or KINDS.get(suffix)
    if kind is None:
        raise LoraError(
            f"what kind of file is {path.name}?",
            "data.format.type",
            "set it to csv, json, parquet or text",
        )
    return kind


def read_rows(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    """Yield the rows of a file in order.

    Args:
        path: The file; `.gz` is unpacked on the way.
        spec: How it is read, where its name does not say.

    Raises:
        LoraError: If the file as a whole cannot be read.
    """
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


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, text with its line end, fault); lines are decoded one by one."""
    codec = encoding.lower().replace("_", "-")
    codec = "utf-8-sig" if codec in ("utf-8", "utf8") else codec
    try:
        if codec.startswith(("utf-16", "utf-32")):  # a line end is more than one byte here
            with _open(path) as raw, io.TextIOWrapper(raw, encoding=codec, newline="") as text:
                yield from ((number, line, "") for number, line in enumerate(text, 1))
            return
        with _open(path) as raw:
            for number, line in enumerate(raw, 1):
                try:
                    yield (
                        number,
                        line.decode(codec if number == 1 else codec.removesuffix("-sig")),
                        "",
                    )
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    yield number, "", f"byte 0x{byte:02x} is not {encoding} text"
    except LookupError:
        raise LoraError(
            f"`{encoding}` is not an encoding",
            "data.format.encoding",
            "for example utf-8, latin-1, cp1252, cp932, utf-16",
        ) from None
    except (UnicodeError, EOFError, gzip.BadGzipFile) as error:
        raise LoraError(f"cannot be read: {error}", str(path)) from error


def _read_csv(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default cuts fields at 128 KiB
    is_tsv = path.name.removesuffix(".gz").lower().endswith(".tsv")
    delimiter = spec.delimiter or ("\t" if is_tsv else ",")
    faults: list[tuple[int, str]] = []
    position = 0

    def decoded() -> Iterator[str]:
        nonlocal position
        for number, line, fault in _lines(path, spec.encoding):
            position = number
            if fault:
                faults.append((number, fault))
            else:
                yield line

    lines = decoded()
    names = spec.columns
    if spec.header:
        header = next(csv.reader(lines, delimiter=delimiter), [])
        header = [name.strip() for name in header]
        if names is None:
            names = header
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise LoraError(
                    f"two columns are called `{twice.pop()}`",
                    f"{path.name}:1",
                    "name them in `data.format.columns`",
                )
        elif len(names) != len(header):
            raise LoraError(f"{len(names)} names for {len(header)} columns", "data.format.columns")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    offset = position
    while True:
        first = offset + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            # What follows a broken quote cannot be told apart: start again on the next line.
            fault = f"{error}: a quotation mark is open, or stands inside a field"
            yield RawRow(None, f"{path.name}:{first}", fault)
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            offset = position
            continue
        offset = position
        while faults:
            number, fault = faults.pop(0)
            yield RawRow(None, f"{path.name}:{number}", fault)
        if not fields or (len(fields) == 1 and not fields[0].strip() and len(names or ()) != 1):
            continue
        if names is None:
            names = [str(number) for number in range(len(fields))]
        if len(fields) != len(names):
            fault = f"{len(fields)} fields where there are {len(names)} columns"
            yield RawRow(None, f"{path.name}:{first}", fault)
            continue
        yield RawRow(dict(zip(names, fields, strict=True)), f"{path.name}:{first}")
    for number, fault in faults:
        yield RawRow(None, f"{path.name}:{number}", fault)


def _read_json(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    with _open(path) as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")
    if head.startswith(b"["):
        yield from _read_json_list(path, spec)
        return
    for number, line, fault in _lines(path, spec.encoding):
        if fault:
            yield RawRow(None, f"{path.name}:{number}", fault)
        elif line.strip():
            yield _json_row(line, f"{path.name}:{number}")


def _json_row(line: str, place: str) -> RawRow:
    try:
        value = json.loads(line)
    except ValueError as error:
        return RawRow(None, place, f"not valid JSON: {error}")
    except RecursionError:
        return RawRow(None, place, "the JSON is too deep")
    if not isinstance(value, dict):
        return RawRow(None, place, f"a row is a JSON object, not a {type(value).__name__}")
    return RawRow(value, place)


def _read_json_list(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    text = "".join(line for _, line, _ in _lines(path, spec.encoding))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraError(f"not valid JSON: {error}", str(path)) from error
    for number, value in enumerate(values):
        place = f"{path.name}[{number}]"
        if isinstance(value, dict):
            yield RawRow(value, place)
        else:
            yield RawRow(None, place, f"a row is a JSON object, not a {type(value).__name__}")


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                yield RawRow(row, f"{path.name}[{number}]")
                number += 1
    except pa.ArrowInvalid as error:
        raise LoraError(f"not a whole parquet file: {error}", str(path)) from error


def _read_text(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    def row(lines: Iterable[str], number: int) -> RawRow:
        return RawRow({"text": "".join(lines)}, f"{path.name}:{number}")

    pending: list[str] = []
    first = 1
    for number, line, fault in _lines(path, spec.encoding):
        if fault:
            yield RawRow(None, f"{path.name}:{number}", fault)
        elif spec.sample_by == "line":
            if line.strip():
                yield row([line.rstrip("\r\n")], number)
        elif spec.sample_by == "paragraph" and not line.strip():
            if pending:
                yield row(pending, first)
            pending = []
        else:
            first = first if pending else number
            pending.append(line)
    if pending:
        yield row(pending, first)


def require_columns(wanted: dict[str, str], present: list[str], source: str) -> None:
    """Check that the columns named in the recipe are there.

    Args:
        wanted: Column by the place in the recipe that names it.
        present: The columns of the data.
        source: Name of the data, for the error.
    """
    from lora_cli.errors import Problem

    problems = [
        Problem(
            f"{source} has no column `{column}`",
            at,
            did_you_mean(column, present, "its columns are"),
        )
        for at, column in wanted.items()
        if column not in present
    ]
    if problems:
        raise LoraError(problems)
