"""Write rows as csv, tsv, json lines or parquet: row after row, and whole or not at all.

A column of lists of numbers can be written alone, as an array of numpy (`.npy`).
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
class OutputForm:
    """How a file is written.

    Args:
        columns: Its columns in order; rows of JSON have their own.
        delimiter: What stands between the columns of a csv file.
        encoding: Of a csv file; letters that it lacks are written by their numbers.
        line_end: Of a csv file.
        quoting: Of a csv file: `csv`, `backslash` or `none`, as in `data.format`.
        schema: Columns of a parquet file with their types, a `pyarrow.Schema`.
        copied: A parquet file whose columns, exactly as they are, come before the new ones.
        header: Whether the first line of a csv file names its columns.
        array: The column that is written alone, as an array of float32.
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
    """Return the suffix that says how a file is written, without `.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def reject_target(source: Path, target: Path, overwrite: bool) -> None:
    """Reject an output that cannot be written, or that would replace something.

    Raises:
        LoraError: If it cannot be written, is the input, or exists and is not to be replaced.
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
def writing(target: Path, form: OutputForm, overwrite: bool = True) -> Iterator[Write]:
    """Yield a function that writes rows; the file appears if the block ends well.

    What processes left that were killed while they wrote the same file is deleted.

    Raises:
        LoraError: If it cannot be written, or, without `overwrite`, another process wrote such a
            file meanwhile; then nothing is left of it.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    delete_of_dead(target)
    before = _exit_on_signals()
    try:
        if form.array is not None:
            with _array(temporary, form.array) as write:
                yield write
        elif form.schema is not None:
            with _parquet(temporary, form) as write:
                yield write
        else:
            table = WRITABLE[suffix_of(target)] != ""
            with _text(temporary, target, form if table else None) as file:
                yield _table(file, form) if table else _json(file)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        if overwrite:
            temporary.replace(target)
        else:
            os.link(temporary, target)  # which replaces nothing
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
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_on_signals() -> dict[signal.Signals, Any]:
    """Let signals that would end the process at once raise `SystemExit`, and return what they did.

    Otherwise nothing would delete the temporary file. A signal that is ignored stays so (`nohup`),
    and one that is handled already.
    """

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        return {}  # which Python does not let handle signals
    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU]
    before = {n: signal.SIG_DFL for n in numbers if signal.getsignal(n) is signal.SIG_DFL}
    for number in before:
        signal.signal(number, leave)
    return before


@contextmanager
def _text(path: Path, target: Path, form: OutputForm | None) -> Iterator[IO[str]]:
    encoding = form.encoding if form else "utf-8"
    opener: Any = gzip.open if target.suffix == ".gz" else open
    # a letter that an old encoding lacks is written as Python writes it, and no answer is lost
    with opener(path, "wt", encoding=encoding, errors="backslashreplace", newline="") as file:
        yield file


@contextmanager
def _parquet(path: Path, form: OutputForm) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    copied = parquet_batches(form.copied) if form.copied is not None else None
    rest: list[Any] = []  # batches of which rows are to be copied yet
    texts = [field.name for field in form.schema if pa.types.is_string(field.type)]

    def write(rows: Sequence[dict[str, Any]]) -> None:
        cells = [{**row, **{n: _cell(row[n]) for n in texts if n in row}} for row in rows]
        if copied is None:
            writer.write_table(pa.Table.from_pylist(cells, schema=form.schema))
            return
        while sum(batch.num_rows for batch in rest) < len(rows):
            rest.append(next(copied))
        old = pa.Table.from_batches(rest)
        rest[:] = old.slice(len(rows)).to_batches()
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
    """Write a column of lists of numbers as rows of an array; a row without one is NaN."""
    import numpy as np

    rows = width = 0

    def header() -> bytes:
        """Return numpy's header, always as long, so that it can be written before and after."""
        shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
        return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + f"{shape:<117}\n".encode()

    with path.open("wb") as file:
        file.write(header())

        def write(some: Sequence[dict[str, Any]]) -> None:
            nonlocal rows, width
            vectors = [row[column] for row in some]
            found = next((len(vector) for vector in vectors if vector is not None), width)
            if found > width:  # of rows before, none had numbers
                file.write(np.full((rows, found), np.nan, "<f4").tobytes())
                width = found
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


def _table(file: IO[str], form: OutputForm) -> Write:
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


def _plain_table(file: IO[str], form: OutputForm) -> Write:
    """Write fields as they are; what would divide a field in two becomes a space."""
    dividers = re.compile(f"\r\n|[{re.escape(form.delimiter)}\r\n]")

    def line(values: Iterable[Any]) -> str:
        fields = ("" if value is None else dividers.sub(" ", str(value)) for value in values)
        return form.delimiter.join(fields) + form.line_end

    def write(rows: Sequence[dict[str, Any]]) -> None:
        file.writelines(line(_cell(row.get(name)) for name in form.columns) for row in rows)

    if form.header:
        file.write(line(form.columns))
    return write


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
