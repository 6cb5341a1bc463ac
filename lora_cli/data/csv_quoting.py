r"""Decide from the whole file how the quotation marks of a table are meant.

Some tables use quoting (csv: `"a, b"` is one field, and `""` a quotation mark inside it), others do
not (the tsv files of many corpora, where a quotation mark is an ordinary character). Reading a file
in the wrong way loses or joins rows. Both readings are tried on every line:

1. The reading in which more lines have as many fields as the header wins. But if quoting is obvious
   (the header is quoted, or at least half of the values of a column, or there are more fields with
   doubled marks than broken rows), the file is csv with broken rows. It is also csv if it is not
   tab-separated, and `none` leaves at least a tenth as many lines that do not fit.
2. If both readings fit equally well but differ, the file is csv if quoting is obvious, or if only
   the fields that need quoting are quoted, as csv writers do. Otherwise tab-separated files are
   read as `none`, and all others as csv.
3. In a file with one column, every line has the right number of fields. It is csv if more rows are
   properly quoted than broken.
4. If the file contains `\"`, and reading the backslash as an escape character makes more lines fit
   than csv does, and no fewer than `none`, it is read as `backslash`.
"""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.data.csv_rows import Record, delimiter_of, read_records
from lora_cli.errors import counted
from lora_cli.recipe import FormatSpec

CHUNK_BYTES = 1 << 17


@dataclass(frozen=True)
class Quoting:
    """How the quotation marks of a file are read.

    Args:
        name: `csv`, `backslash` or `none`.
        why: The reason; empty for csv without multi-line rows whose lines could each be a row.
        joined: Number of multi-line rows whose lines could each be a row.
        first_joined: Line number at which the first of these rows begins.
    """

    name: str
    why: str = ""
    joined: int = 0
    first_joined: int = 0

    def reason(self, name: str) -> str:
        """Return the reason, and where lines are joined that may be separate rows."""
        if not self.joined:
            return self.why
        return (
            f"{self.why}; {counted(self.joined, 'row')} of several lines, the first at {name}:"
            f"{self.first_joined}: if each line is a row, `--set data.format.quoting=none`"
        )


@dataclass
class _Reading:
    """The outcome of reading a file in one way.

    Args:
        width: Number of fields of the header.
        lost: Number of lines in records that are broken or do not have `width` fields.
        joined: Number of multi-line records whose lines each have `width` fields.
        first_joined: Line number of the first of these records.
        enclosed: Number of readable records that differ from splitting their lines at delimiters.
        differs: Whether any record, readable or not, differs from splitting its lines.
    """

    width: int = 0
    lost: int = 0
    joined: int = 0
    first_joined: int = 0
    enclosed: int = 0
    differs: bool = False


@dataclass
class _Marks:
    """How quotation marks are used in the fields of lines.

    Args:
        wrapped: Number of fields in quotation marks, by column.
        filled: Number of non-empty fields, by column.
        doubled: Number of quoted fields with doubled marks inside.
        needless: Number of quoted fields that need no quoting.
        stray: Number of fields with marks that do not enclose them.
        header: Whether every field of the header is enclosed.
    """

    wrapped: Counter[int] = field(default_factory=Counter)
    filled: Counter[int] = field(default_factory=Counter)
    doubled: int = 0
    needless: int = 0
    stray: int = 0
    header: bool = False

    @property
    def are_plain(self) -> bool:
        """Whether it is plain to see that the file quotes."""
        return self.header or any(
            times > 1 and 2 * times >= self.filled[column] for column, times in self.wrapped.items()
        )


_decided: dict[tuple[Any, ...], Quoting] = {}
_announced: set[tuple[str, Quoting]] = set()


def quoting_of(path: Path, spec: FormatSpec) -> Quoting:
    """Return how the quotation marks of a table are read.

    This reads the whole file once or twice, line by line, unless it has no quotation marks.

    Args:
        path: The file.
        spec: How the file is read; with `quoting: auto`, the file decides.
    """
    if spec.quoting != "auto":
        return Quoting(spec.quoting)
    status = path.stat() if path.exists() else None
    key = (
        str(path.absolute()), status and (status.st_mtime_ns, status.st_size, status.st_ino),
        spec.encoding, delimiter_of(path, spec), spec.skip_lines, spec.header,
        len(spec.columns or ()),
    )  # fmt: skip
    if key not in _decided:
        _decided[key] = _decide(path, spec) if _has_marks(path, spec.encoding) else Quoting("csv")
    return _decided[key]


def announce_quoting(path: Path, spec: FormatSpec) -> None:
    """Print on stderr how the quotation marks of a table are read, if that was not obvious."""
    quoting = quoting_of(path, spec)
    key = (str(path), quoting)
    if not quoting.why or spec.quoting != "auto" or key in _announced:
        return
    _announced.add(key)
    if os.environ.get("RANK", "0") == "0":
        print(f"{path.name}: {describe_quoting(quoting, path.name)}", file=sys.stderr)  # noqa: T201


def describe_quoting(quoting: Quoting, name: str) -> str:
    """Return a sentence on how quotation marks are read, and why."""
    description = {
        "csv": "quotation marks enclose fields",
        "backslash": 'quotation marks enclose fields, with `\\"` for a mark inside',
        "none": "quotation marks are part of the text",
    }[quoting.name]
    return f"{description} (`data.format.quoting: {quoting.name}`): {quoting.reason(name)}"


def _has_marks(path: Path, encoding: str) -> bool:
    """Return whether a file may contain a quotation mark, by a fast search of its bytes."""
    try:
        if b'"' not in '"'.encode(encoding):
            return True
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                if b'"' in chunk:
                    return True
    except (OSError, EOFError, zlib.error, UnicodeError):
        return True  # reading the file reports what is wrong with it
    return False


def _decide(path: Path, spec: FormatSpec) -> Quoting:
    delimiter = delimiter_of(path, spec)
    marks = _Marks()
    quoted, escapes = _read_quoted(path, spec, "csv")
    if not quoted.differs:
        # both readings are the same; this one decides how `write_rows` writes the file
        return Quoting("none" if delimiter == "\t" else "csv")
    plain = _read_plain(path, spec, marks)
    if escapes:
        escaped, _ = _read_quoted(path, spec, "backslash")
        if escaped.lost < quoted.lost and escaped.lost <= plain.lost:
            return Quoting("backslash", f"read so, {_fitting(escaped)}")
    if why := _why_none(quoted, plain, marks, delimiter == "\t" and plain.width > 1):
        return Quoting("none", why)
    if not quoted.joined or plain.width == 1:
        return Quoting("csv")  # as most tables are: its broken rows are reported one by one
    return Quoting("csv", "usual for csv", quoted.joined, quoted.first_joined)


def _why_none(quoted: _Reading, plain: _Reading, marks: _Marks, is_tabbed: bool) -> str:
    """Return the reason to read a file without quoting; empty if it is csv."""
    if plain.width == 1:
        return f"as csv {_not_fitting(quoted)}" if quoted.lost > quoted.enclosed else ""
    if quoted.lost < plain.lost or marks.are_plain or marks.doubled > quoted.lost:
        return ""
    limit = quoted.lost if is_tabbed else quoted.lost / 10
    if plain.lost < limit:
        return f"read so, {_fitting(plain)}; as csv {_not_fitting(quoted)}"
    if is_tabbed and (marks.stray or marks.needless):
        joined = f", and csv would join lines into {counted(quoted.joined, 'row')}"
        return f"tabs divide the columns{joined if quoted.joined else ''}"
    return ""


def _fitting(reading: _Reading) -> str:
    if not reading.lost:
        return f"every row has {counted(reading.width, 'field')}"
    return f"all but {counted(reading.lost, 'line')} have {counted(reading.width, 'field')}"


def _not_fitting(reading: _Reading) -> str:
    lines = counted(reading.lost, "line")
    return f"{lines} {'does' if reading.lost == 1 else 'do'} not fit"


def _read_quoted(path: Path, spec: FormatSpec, quoting: str) -> tuple[_Reading, bool]:
    """Read a file as csv, and return whether it contains a backslash before a quotation mark."""
    delimiter = delimiter_of(path, spec)
    reading = _Reading(_known_width(spec))
    escapes = False
    for record in read_records(path, spec, quoting):
        reading.width = reading.width or len(record.fields)
        reading.lost += _lost_lines(record, reading.width)
        if len(record.lines) == 1 and '"' not in record.lines[0]:
            continue
        escapes = escapes or any('\\"' in line for line in record.lines)
        split_lines = [line.rstrip("\r\n").split(delimiter) for line in record.lines]
        reading.enclosed += split_lines != [record.fields] and not record.error
        reading.differs = reading.differs or split_lines != [record.fields]
        if len(split_lines) > 1 and all(len(fields) == reading.width for fields in split_lines):
            reading.first_joined = reading.first_joined or record.line
            reading.joined += 1
    return reading, escapes


def _read_plain(path: Path, spec: FormatSpec, marks: _Marks) -> _Reading:
    """Read a file without quoting, and record how its quotation marks are used."""
    reading = _Reading(_known_width(spec))
    is_header = spec.header
    for record in read_records(path, spec, "none"):
        reading.width = reading.width or len(record.fields)
        reading.lost += _lost_lines(record, reading.width)
        if is_header:
            marks.header = all(map(is_wrapped, record.fields))
            is_header = False
            continue
        if len(record.fields) == reading.width:
            _count_marks(marks, record.fields)
    return reading


def _count_marks(marks: _Marks, fields: Sequence[str]) -> None:
    for column, value in enumerate(fields):
        if not value:
            continue
        marks.filled[column] += 1
        if '"' not in value:
            continue
        if is_wrapped(value):
            marks.wrapped[column] += 1
            inside = value[1:-1]
            marks.doubled += '"' in inside
            marks.needless += '"' not in inside and bool(inside.strip())
        else:
            marks.stray += 1


def is_wrapped(value: str) -> bool:
    """Return whether quotation marks enclose a field, with those inside it doubled."""
    value = value.strip()
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return False
    return '"' not in value[1:-1].replace('""', "")


def _known_width(spec: FormatSpec) -> int:
    return len(spec.columns) if spec.columns and not spec.header else 0


def _lost_lines(record: Record, width: int) -> int:
    fits = not record.error and len(record.fields) == width
    return 0 if fits else len(record.lines)
