"""Write rows as csv, tsv, JSON lines or parquet, row by row and atomically.

A single column of lists of numbers can also be written as a NumPy array (`.npy`).
"""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lora_cli.data.parquet_rows import parquet_batches
from lora_cli.errors import LoraError, ResourceError
from lora_cli.files import delete_of_dead

WRITABLE = {".csv": ",", ".tsv": "\t", ".json": "", ".jsonl": "", ".ndjson": "", ".parquet": "",
            ".npy": ""}  # fmt: skip
Write = Callable[[Sequence[dict[str, Any]]], None]


@dataclass(frozen=True)
class OutputFormat:
    """How a file is written.

    Args:
        columns: The columns in order; JSON rows have their own.
        delimiter: Delimiter of a csv file.
        encoding: Encoding of a csv file; characters that it lacks are written as escape sequences.
        line_end: Line ending of a csv file.
        quoting: Quoting of a csv file: `csv`, `backslash` or `none`, as in `data.format`.
        schema: The `pyarrow.Schema` of a parquet file.
        copied: A parquet file whose unchanged columns come before the new ones.
        header: Whether the first line of a csv file names its columns.
        array: The only column to write, as a float32 array.
    """

    columns: list[str]
    delimiter: str = ","
    encoding: str = "utf-8"
    line_end: str = "\n"
    quoting: str = "csv"
    schema: Any = None
    copied: Path | None = None
    header: bool = True
    array: str | None = None


def suffix_of(path: Path) -> str:
    """Return the extension that determines the format of a file, without `.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def reject_target(source: Path, target: Path, overwrite: bool) -> None:
    """Reject an output file that cannot be written, or that must not be replaced.

    Raises:
        LoraError: If it cannot be written, is the input, or exists without `overwrite`.
    """
    suffix = suffix_of(target)
    is_binary = suffix in (".parquet", ".npy")
    if suffix not in WRITABLE or (is_binary and target.suffix == ".gz"):
        hint = "use .csv, .tsv, .jsonl (also with .gz) or .parquet"
        raise LoraError(f"cannot write {target.name}", "--output", hint)
    if not target.parent.is_dir():
        hint = f"`mkdir -p {target.parent}`, or name another"
        raise LoraError(f"there is no folder {target.parent}", "--output", hint)
    if not target.exists():
        return
    if source.exists() and source.samefile(target):
        what = "the output would overwrite the input"
        raise LoraError(what, "--output", f"name another: `--output answers{target.suffix}`")
    if target.is_dir():
        raise LoraError(f"{target} is a folder", "--output", "name a file in it")
    if not overwrite:
        raise LoraError(
            f"{target} exists already, and is not overwritten",
            "--output",
            "name another file, or allow it with `--overwrite`",
        )


@contextmanager
def writing(target: Path, form: OutputFormat, overwrite: bool = True) -> Iterator[Write]:
    """Yield a function that writes rows to a file, which appears once the block ends normally.

    Temporary files left by killed processes that were writing the same file are deleted.

    Raises:
        LoraError: If the file cannot be written, or if another process has written it meanwhile and
            `overwrite` is false. No partial file remains.
        ResourceError: If the disk is full.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    delete_of_dead(target)
    previous_handlers = _exit_on_signals()
    try:
        if form.array is not None:
            with _array(temporary, form.array) as write:
                yield write
        elif form.schema is not None:
            with _parquet(temporary, form) as write:
                yield write
        else:
            is_table = WRITABLE[suffix_of(target)] != ""
            with _text(temporary, target, form if is_table else None) as file:
                yield _table(file, form) if is_table else _json(file)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        if overwrite:
            temporary.replace(target)
        else:
            os.link(temporary, target)  # unlike a rename, this never replaces a file
    except FileExistsError as error:
        what = f"{target} was written by another process meanwhile, and is not overwritten"
        hint = "name another file, or allow it with `--overwrite`"
        raise LoraError(what, "--output", hint) from error
    except OSError as error:
        what = f"cannot write {target}: {(error.strerror or str(error)).lower()}"
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kind = ResourceError if is_full else LoraError
        raise kind(what, "--output", "name another file, or free some space") from error
    finally:
        temporary.unlink(missing_ok=True)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _exit_on_signals() -> dict[signal.Signals, Any]:
    """Make fatal signals raise `SystemExit`, and return their previous handlers.

    Otherwise the temporary file would not be deleted. Signals that are ignored (`nohup`) or already
    handled are left alone.
    """

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread can set signal handlers
    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU]
    previous_handlers = {
        n: signal.SIG_DFL for n in numbers if signal.getsignal(n) is signal.SIG_DFL
    }
    for number in previous_handlers:
        signal.signal(number, leave)
    return previous_handlers


@contextmanager
def _text(path: Path, target: Path, form: OutputFormat | None) -> Iterator[IO[str]]:
    encoding = form.encoding if form else "utf-8"
    opener: Any = gzip.open if target.suffix == ".gz" else open
    # escape characters that a legacy encoding lacks, so that no answer is lost
    with opener(path, "wt", encoding=encoding, errors="backslashreplace", newline="") as file:
        yield file


@contextmanager
def _parquet(path: Path, form: OutputFormat) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    copied = parquet_batches(form.copied) if form.copied is not None else None
    remaining: list[Any] = []  # batches with rows that are not copied yet
    texts = [field.name for field in form.schema if pa.types.is_string(field.type)]

    def write(rows: Sequence[dict[str, Any]]) -> None:
        cells = [{**row, **{n: _cell(row[n]) for n in texts if n in row}} for row in rows]
        if copied is None:
            writer.write_table(pa.Table.from_pylist(cells, schema=form.schema))
            return
        while sum(batch.num_rows for batch in remaining) < len(rows):
            remaining.append(next(copied))
        old = pa.Table.from_batches(remaining)
        remaining[:] = old.slice(len(rows)).to_batches()
        added = [
            pa.array([row[field.name] for row in cells], field.type)
            for field in list(form.schema)[old.num_columns :]
        ]
        columns = [*old.slice(0, len(rows)).columns, *added]
        writer.write_table(pa.Table.from_arrays(columns, schema=form.schema))

    with pq.ParquetWriter(path, form.schema) as writer:
        yield write


@contextmanager
def _array(path: Path, column: str) -> Iterator[Write]:
    """Write a column of lists of numbers as rows of an array; a missing list becomes NaN."""
    import numpy as np

    rows = width = 0

    def header() -> bytes:
        """Return the NumPy header, with a fixed length so that it can be overwritten at the end."""
        shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
        return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + f"{shape:<117}\n".encode()

    with path.open("wb") as file:
        file.write(header())

        def write(batch: Sequence[dict[str, Any]]) -> None:
            nonlocal rows, width
            vectors = [row[column] for row in batch]
            new_width = next((len(vector) for vector in vectors if vector is not None), width)
            if new_width > width:  # all rows before had no numbers
                file.write(np.full((rows, new_width), np.nan, "<f4").tobytes())
                width = new_width
            block = np.full((len(vectors), width), np.nan, "<f4")
            for line, vector in zip(block, vectors, strict=True):
                if vector is not None:
                    line[:] = vector
            file.write(block.tobytes())
            rows += len(vectors)

        yield write
        file.seek(0)
        file.write(header())


def _json(file: IO[str]) -> Write:
    def write(rows: Sequence[dict[str, Any]]) -> None:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    return write


def _table(file: IO[str], form: OutputFormat) -> Write:
    if form.quoting == "none":
        return _plain_table(file, form)
    escapes = form.quoting == "backslash"
    table = csv.writer(
        file,
        delimiter=form.delimiter,
        lineterminator=form.line_end,
        escapechar="\\" if escapes else None,
        doublequote=not escapes,
    )
    if form.header:
        table.writerow(form.columns)

    def write(rows: Sequence[dict[str, Any]]) -> None:
        table.writerows([_cell(row.get(name)) for name in form.columns] for row in rows)

    return write


def _plain_table(file: IO[str], form: OutputFormat) -> Write:
    """Write fields without quoting, replacing delimiters and line ends by spaces."""
    separators = re.compile(f"\r\n|[{re.escape(form.delimiter)}\r\n]")

    def line(values: Iterable[Any]) -> str:
        fields = ("" if value is None else separators.sub(" ", str(value)) for value in values)
        return form.delimiter.join(fields) + form.line_end

    def write(rows: Sequence[dict[str, Any]]) -> None:
        file.writelines(line(_cell(row.get(name)) for name in form.columns) for row in rows)

    if form.header:
        file.write(line(form.columns))
    return write


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
