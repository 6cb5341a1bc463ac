r"""How the quotation marks of a table are meant, decided from the whole file.

Some tables quote (csv: `"a, b"` is one field, `""` a mark inside it), some do not (the tsv files of
many corpora: a mark is a letter like others). Read in the wrong way, rows are lost or joined. Both
readings are tried on every line:

1. The reading that gives more lines the number of fields of the header is right. But where quoting
   is plain to see - the header is quoted, or at least half of the values of a column, or more
   fields with doubled marks than there are broken rows - the file is csv, and has broken rows. So
   it is where columns are not divided by tabs, and `none` too leaves a tenth as many lines over.
2. Where both fit equally and differ, it is csv if quoting is plain to see, or if only such fields
   are quoted that must be, as csv writers do it; else `none` for columns that are divided by tabs,
   and csv for all others.
3. In a file of one column every line has its one field: it is csv if more rows are quoted well than
   are broken.
4. Where `\"` stands in the file, and a reading in which the backslash escapes the mark gives more
   lines their fields than csv, and no fewer than `none`, it is that.
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
        why: What says so; nothing for csv in which no line could be taken for a row.
        joined: How many rows are made of lines that would each be a row by themselves.
        first_joined: Number of the line at which the first of them begins.
    """

    name: str
    why: str = ""
    joined: int = 0
    first_joined: int = 0

    def reason(self, name: str) -> str:
        """Return what says so, and which lines of the file are joined that may be rows."""
        if not self.joined:
            return self.why
        return (
            f"{self.why}; {counted(self.joined, 'row')} of several lines, the first at {name}:"
            f"{self.first_joined}: if each line is a row, `--set data.format.quoting=none`"
        )


@dataclass
class _Reading:
    """What a way of reading makes of a file.

    Args:
        width: Number of fields of the header.
        lost: Lines of records that are broken, or have another number of fields.
        joined: Records of several lines of which each has as many fields as the header.
        first_joined: Line of the first of them.
        enclosed: Records that can be read, and are not their line alone, divided at the delimiters.
        differs: Some record, readable or not, is not its line alone.
    """

    width: int = 0
    lost: int = 0
    joined: int = 0
    first_joined: int = 0
    enclosed: int = 0
    differs: bool = False


@dataclass
class _Marks:
    """Where quotation marks stand in the fields of lines.

    Args:
        wrapped: Fields that a pair of marks encloses, by column.
        filled: Fields that are not empty, by column.
        doubled: Enclosed fields with marks in them, which are doubled.
        needless: Enclosed fields with nothing in them that needs quoting.
        stray: Fields with marks that do not enclose them.
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
_said: set[tuple[str, Quoting]] = set()


def quoting_of(path: Path, spec: FormatSpec) -> Quoting:
    """Return how the quotation marks of a table are read.

    The file is read once or twice as a whole, line by line, unless it has none.

    Args:
        path: The file.
        spec: How it is read; `quoting` says it, or is `auto`.
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
    """Print on stderr how the quotation marks of a table are read, if that had to be decided."""
    found = quoting_of(path, spec)
    known = (str(path), found)
    if not found.why or spec.quoting != "auto" or known in _said:
        return
    _said.add(known)
    if os.environ.get("RANK", "0") == "0":
        print(f"{path.name}: {in_words(found, path.name)}", file=sys.stderr)  # noqa: T201


def in_words(found: Quoting, name: str) -> str:
    """Return how quotation marks are read, and why, for a person."""
    how = {
        "csv": "quotation marks enclose fields",
        "backslash": 'quotation marks enclose fields, with `\\"` for a mark inside',
        "none": "quotation marks are part of the text",
    }[found.name]
    return f"{how} (`data.format.quoting: {found.name}`): {found.reason(name)}"


def _has_marks(path: Path, encoding: str) -> bool:
    """Return whether a quotation mark may stand in a file, by a fast search of its bytes."""
    try:
        if b'"' not in '"'.encode(encoding):
            return True
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                if b'"' in chunk:
                    return True
    except (OSError, EOFError, zlib.error, UnicodeError):
        return True  # whoever reads the file says what is wrong with it
    return False


def _decide(path: Path, spec: FormatSpec) -> Quoting:
    delimiter = delimiter_of(path, spec)
    marks = _Marks()
    quoted, escapes = _read_quoted(path, spec, "csv")
    if not quoted.differs:
        # what a file without quoted fields is written back as
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
    """Return why a file is read without quoting, or nothing if it is csv."""
    if plain.width == 1:
        return f"as csv {_not_fitting(quoted)}" if quoted.lost > quoted.enclosed else ""
    if quoted.lost < plain.lost or marks.are_plain or marks.doubled > quoted.lost:
        return ""
    most = quoted.lost if is_tabbed else quoted.lost / 10
    if plain.lost < most:
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
    """Return what csv reading makes of a file, and whether a backslash stands before a mark."""
    delimiter = delimiter_of(path, spec)
    found = _Reading(_given_width(spec))
    escapes = False
    for record in read_records(path, spec, quoting):
        found.width = found.width or len(record.fields)
        found.lost += _lost(record, found.width)
        if len(record.lines) == 1 and '"' not in record.lines[0]:
            continue
        escapes = escapes or any('\\"' in line for line in record.lines)
        divided = [line.rstrip("\r\n").split(delimiter) for line in record.lines]
        found.enclosed += divided != [record.fields] and not record.error
        found.differs = found.differs or divided != [record.fields]
        if len(divided) > 1 and all(len(fields) == found.width for fields in divided):
            found.first_joined = found.first_joined or record.line
            found.joined += 1
    return found, escapes


def _read_plain(path: Path, spec: FormatSpec, marks: _Marks) -> _Reading:
    """Return what reading without quoting makes of a file, and note where its marks stand."""
    found = _Reading(_given_width(spec))
    is_header = spec.header
    for record in read_records(path, spec, "none"):
        found.width = found.width or len(record.fields)
        found.lost += _lost(record, found.width)
        if is_header:
            marks.header = all(map(is_wrapped, record.fields))
            is_header = False
            continue
        if len(record.fields) == found.width:
            _note(marks, record.fields)
    return found


def _note(marks: _Marks, fields: Sequence[str]) -> None:
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
    """Return whether quotation marks enclose a field, and those inside it are doubled."""
    value = value.strip()
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return False
    return '"' not in value[1:-1].replace('""', "")


def _given_width(spec: FormatSpec) -> int:
    return len(spec.columns) if spec.columns and not spec.header else 0


def _lost(record: Record, width: int) -> int:
    fits = not record.error and len(record.fields) == width
    return 0 if fits else len(record.lines)
