"""Read rows from parquet files.

A value that Python cannot represent, such as undecodable bytes or a date before year 1, does not
make its row or file unreadable. The task reports it if it reads that column.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_cli.data.csv_rows import require_unique
from lora_cli.data.text_lines import RawRow
from lora_cli.data.unreadable_files import HEAD, reject_binary
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import FormatSpec

BATCH = 1000  # rows in memory at once


def parquet_schema(path: Path) -> Any:
    """Return the `pyarrow.Schema` of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def parquet_names(path: Path, spec: FormatSpec) -> list[str]:
    """Return the column names: the recipe's if it sets any, otherwise the file's.

    Raises:
        LoraError: If names are not unique, or `data.format.columns` has too many or too few.
    """
    names = list(parquet_schema(path).names)
    if spec.columns is None:
        require_unique(names, str(path))
        return names
    if len(spec.columns) != len(names):
        raise LoraError(
            f"{counted(len(spec.columns), 'name')} in `data.format.columns` for "
            f"{counted(len(names), 'column')}",
            str(path),
            "the file has " + ", ".join(names),
        )
    return spec.columns


def parquet_batches(path: Path) -> Iterator[Any]:
    """Yield the `pyarrow.RecordBatch`es of a file.

    Raises:
        LoraError: If the file is damaged or not a parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as raw:
            head = raw.read(HEAD)
            if not head.startswith(b"PAR1"):
                reject_binary(head, path)
                hint = "`--set data.format.type=csv` (or json, text) says what it is"
                raise LoraError("this is not a parquet file, by its first bytes", str(path), hint)
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=BATCH)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def read_parquet(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    """Yield the rows of a parquet file."""
    number = 0
    names: list[str] | None = None
    for batch in parquet_batches(path):
        names = names or parquet_names(path, spec)
        columns = [_values(column) for column in batch.columns]
        for values in zip(*columns, strict=True):
            row = dict(zip(names, values, strict=True))
            yield RawRow(row, f"{path.name}[{number}]")
            number += 1


def _values(column: Any) -> list[Any]:
    """Convert the values of a column to Python objects."""
    import pyarrow as pa

    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):  # UnicodeDecodeError is a ValueError
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    """Convert a value that Python may not represent.

    Dates become text, and undecodable bytes surrogates, which `byte_error` finds. Such values
    inside a list or an object become None.
    """
    import pyarrow as pa

    try:
        return scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException):
        pass
    if pa.types.is_dictionary(scalar.type):
        return _value(scalar.value)
    if pa.types.is_temporal(scalar.type):
        try:
            return str(scalar.cast(pa.string()).as_py())
        except (ValueError, pa.ArrowException):
            return str(scalar.value)
    if hasattr(scalar, "as_buffer"):
        return scalar.as_buffer().to_pybytes().decode("utf-8", errors="surrogateescape")
    return None


def _damaged(path: Path, error: Exception) -> LoraError:
    what = f"the parquet file is cut off or damaged: {str(error).strip().splitlines()[0]}"
    return LoraError(what, str(path), "copy or download it again")
