"""Read the records of csv and tsv files, with their lines and errors.

A record that cannot be read is yielded with its error, and no other record is lost. How quotation
marks are read is decided from the whole file (`csv_quoting.py`), unless the recipe sets it.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_cli.data.text_lines import byte_error, encoding_hint, read_lines
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import FormatSpec

UNCLOSED = "a quotation mark is not closed, or one inside a quoted field is not doubled"
MAX_LINES = 100_000  # per record; an unclosed quotation mark would take the whole file
BACKSLASH = re.compile(r"\\(.?)", re.DOTALL)


class Record(NamedTuple):
    """One record of a table.

    Args:
        line: Number of its first line.
        fields: Its fields; empty if it cannot be read.
        error: Why it cannot be read; empty if it can.
        lines: Its lines, with their line ends.
    """

    line: int
    fields: list[str]
    error: str
    lines: Sequence[str]


def delimiter_of(path: Path, spec: FormatSpec) -> str:
    """Return the delimiter of a table: by default a tab in `.tsv` files, otherwise a comma."""
    is_tsv = path.name.removesuffix(".gz").lower().endswith(".tsv")
    return spec.delimiter or ("\t" if is_tsv else ",")


def read_records(path: Path, spec: FormatSpec, quoting: str) -> Iterator[Record]:
    """Yield the records of a table that are not blank.

    Args:
        path: The file.
        spec: Its encoding and delimiter, and the number of lines to skip.
        quoting: `csv`, `backslash` or `none`.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default cuts fields at 128 KiB
    lines = itertools.islice(read_lines(path, spec.encoding), spec.skip_lines, None)
    delimiter = delimiter_of(path, spec)
    records = (
        _plain_records(lines, delimiter)
        if quoting == "none"
        else _quoted_records(lines, delimiter, has_backslashes=quoting == "backslash")
    )
    for record in records:
        error = record.error or next(
            (f for field in record.fields if (f := byte_error(field, spec.encoding))), ""
        )
        yield record._replace(error=error) if error else record


def _plain_records(lines: Iterator[tuple[int, str]], delimiter: str) -> Iterator[Record]:
    """Yield one record per line: quotation marks are ordinary characters."""
    for number, line in lines:
        text = line.rstrip("\r\n")
        if text.strip(" "):
            yield Record(number, text.split(delimiter), "", [line])


class _Lines:
    """An iterator over lines that remembers the current record's lines and can put them back."""

    def __init__(self, lines: Iterator[tuple[int, str]], has_backslashes: bool) -> None:
        self.lines = lines
        self.has_backslashes = has_backslashes
        self.record_lines: list[tuple[int, str]] = []
        self.pending: deque[tuple[int, str]] = deque()
        self.suspect_until = 0  # before this line, a record may be the inside of a broken one

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if len(self.record_lines) == MAX_LINES:
            raise csv.Error('a record is too long: is a " not closed?')
        line = self.pending.popleft() if self.pending else next(self.lines)
        self.record_lines.append(line)
        return BACKSLASH.sub(_escaped, line[1]) if self.has_backslashes else line[1]

    def retry(self) -> None:
        """Put back all lines of the record except the first."""
        self.suspect_until = max(self.suspect_until, self.record_lines[-1][0] + 1)
        self.pending.extendleft(reversed(self.record_lines[1:]))

    def inside_broken(self) -> bool:
        """Return whether an odd number of quotes suggests the inside of a broken record."""
        last = self.record_lines[-1][0]
        odd = sum(line.count('"') for _, line in self.record_lines) % 2 == 1
        if last > self.suspect_until or not odd:
            return False
        self.suspect_until = max(self.suspect_until, last + 1)  # the broken record may go on
        return True


def _escaped(match: re.Match[str]) -> str:
    r"""Keep `\"` and `\\`, and double any other backslash, which stands for itself."""
    return match[0] if match[1] in ('"', "\\") and match[1] else f"\\\\{match[1]}"


def _quoted_records(
    lines: Iterator[tuple[int, str]], delimiter: str, has_backslashes: bool
) -> Iterator[Record]:
    """Yield records in which a quoted field may hold delimiters and line ends.

    A quotation mark that is never closed would swallow the rest of the file. So only the first line
    of a broken record is lost, and the lines after it are read again.
    """
    record = _Lines(lines, has_backslashes)

    def new_reader() -> Iterator[list[str]]:
        escape = "\\" if has_backslashes else None
        return csv.reader(record, delimiter=delimiter, strict=True, escapechar=escape)

    reader = new_reader()
    while True:
        record.record_lines = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as failure:
            error = (
                UNCLOSED if '"' in str(failure) or "end of data" in str(failure) else str(failure)
            )
            yield Record(record.record_lines[0][0], [], error, [record.record_lines[0][1]])
            record.retry()
            reader = new_reader()
            continue
        if not fields or not any(line.strip(" \r\n") for _, line in record.record_lines):
            continue
        error = "this line belongs to the broken row above it" if record.inside_broken() else ""
        yield Record(
            record.record_lines[0][0], fields, error, [line for _, line in record.record_lines]
        )


def width_error(fields: Sequence[str], width: int) -> str:
    """Return an error if a record does not have `width` fields; empty if it does."""
    if len(fields) == width:
        return ""
    return f"{counted(len(fields), 'field')} where there are {width} columns"


def column_names(path: Path, spec: FormatSpec, records: Iterator[Record]) -> list[str] | None:
    """Return the column names of a table, or None if it has none; consumes the header.

    Raises:
        LoraError: If the header cannot be read, has duplicate names, or does not match
            `data.format.columns` in length.
    """
    names = spec.columns
    if not spec.header:
        return names
    line, header, error, _ = next(records, Record(1, [], "", []))
    header = [name.strip() for name in header]
    if error:
        hint = "fix it; if the file has no header, `--set data.format.header=false`"
        hint = encoding_hint(path, spec.encoding) if error.startswith("byte 0x") else hint
        raise LoraError(f"the header: {error}", f"{path}:{line}", hint)
    if names is None:
        require_unique(header, f"{path}:{line}")
        return header
    if header and len(names) != len(header):
        raise LoraError(
            f"{counted(len(names), 'name')} in `data.format.columns` for "
            f"{counted(len(header), 'column')}",
            f"{path}:{line}",
            "its header has " + ", ".join(header),
        )
    return names


def require_unique(names: Sequence[str], place: str) -> None:
    """Check that no two columns have the same name.

    Raises:
        LoraError: If two columns do; the hint suggests unique names.
    """
    duplicates = [name for name, times in Counter(names).items() if times > 1]
    if duplicates:
        unique = [n if n not in names[:i] else f"{n}_{i + 1}" for i, n in enumerate(names)]
        listed = json.dumps(unique, ensure_ascii=False)
        raise LoraError(
            f"two columns are called `{duplicates[0]}`",
            place,
            f"give each a name: `--set 'data.format.columns={listed}'`",
        )
