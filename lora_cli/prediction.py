"""What an adapted model says of new texts, and of files of any size."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.data.files import form_of, kind_of, read_rows, require_columns
from lora_cli.errors import LoraError, Problem, beside
from lora_cli.recipe import FormatSpec
from lora_cli.tasks import Task

CHUNK = 1000  # rows in memory at once


@torch.no_grad()
def answer(
    model: nn.Module, task: Task, rows: Sequence[dict[str, Any]], accelerator: Accelerator
) -> list[list[Any]]:
    """Return, for each row, the values of the task's `answer_columns`."""
    size = task.recipe.evaluate.micro_batch_size or 2 * task.recipe.train.micro_batch
    answers = []
    model.eval()
    for start in range(0, len(rows), size):
        with accelerator.autocast():
            answers += task.answer(model, rows[start : start + size])
    return answers


def answer_file(
    model: nn.Module, task: Task, source: Path, target: Path, accelerator: Accelerator
) -> tuple[int, list[Problem]]:
    """Write the rows of a file with the answers added; rows, order and columns are kept.

    Args:
        model: The adapted model.
        task: What the columns mean.
        source: A csv, tsv, json lines, parquet or text file.
        target: A csv, tsv or json lines file, written whole or not at all.
        accelerator: Precision and device.

    Returns:
        How many rows were written, and the problems of those that could not be answered: their
        new columns are blank.
    """
    if not source.is_file():
        raise LoraError(f"there is no file {source}", "--input", beside(source))
    if source.resolve() == target.resolve():
        what = "the output would overwrite the input"
        raise LoraError(what, "--output", f"name another: `--output answers{target.suffix}`")
    form = form_of(source, task.recipe.data.format)
    columns = _columns(source, form)
    require_columns(task.input_columns(), columns, str(source))
    delimiter = _delimiter(target)
    problems: list[Problem] = []
    written = 0
    rows = read_rows(source, form)
    with _replacing(target) as file:
        write = _writer(file, delimiter, columns, task.answer_columns())
        while chunk := list(islice(rows, CHUNK)):
            faults = [row.fault or task.answer_fault(row.columns or {}) for row in chunk]
            problems += [Problem(f, row.place) for row, f in zip(chunk, faults, strict=True) if f]
            good = [row.columns or {} for row, f in zip(chunk, faults, strict=True) if not f]
            answers = iter(answer(model, task, good, accelerator))
            blank = [None] * len(task.answer_columns())
            for row, fault in zip(chunk, faults, strict=True):
                write(row.columns or {}, blank if fault else next(answers))
            written += len(chunk)
    return written, problems


def _columns(source: Path, form: FormatSpec) -> list[str]:
    """Return the names of all columns; only the rows of JSON have columns of their own."""
    rows = (row.columns for row in read_rows(source, form) if row.columns is not None)
    enough = None if kind_of(source, form) == "json" else 1
    columns = list(dict.fromkeys(name for row in islice(rows, enough) for name in row))
    if not columns:
        raise LoraError("no row can be read", str(source), "is it empty, or `data.format` another?")
    return columns


def _delimiter(target: Path) -> str | None:
    """Return what stands between the columns of the output; None for json lines."""
    match target.suffix.lower():
        case ".csv":
            return ","
        case ".tsv":
            return "\t"
        case ".json" | ".jsonl" | ".ndjson":
            return None
    raise LoraError(f"cannot write {target.name}", "--output", "use .csv, .tsv or .jsonl")


@contextmanager
def _replacing(target: Path) -> Iterator[IO[str]]:
    """Yield a file that takes the target's place if the block ends well; else nothing is left."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
        temporary.replace(target)
    except OSError as error:
        what = f"cannot write {target}: {(error.strerror or str(error)).lower()}"
        raise LoraError(what, "--output", f"`mkdir -p {target.parent}`, or name another") from error
    finally:
        temporary.unlink(missing_ok=True)


def _writer(
    file: IO[str], delimiter: str | None, columns: list[str], added: list[str]
) -> Callable[[dict[str, Any], Sequence[Any]], None]:
    """Return a function that writes a row and its answer, as json lines or separated columns."""
    names: list[str] = []
    for name in added:
        taken = {*columns, *names}
        free = (n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)
        names.append(next(free))
    if delimiter is None:

        def write_json(row: dict[str, Any], values: Sequence[Any]) -> None:
            line = row | dict(zip(names, values, strict=True))
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

        return write_json
    table = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    table.writerow([*columns, *names])

    def write_csv(row: dict[str, Any], values: Sequence[Any]) -> None:
        cells = [row.get(column) for column in columns] + list(values)
        table.writerow(
            [
                json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell
                for cell in cells
            ]
        )

    return write_csv
