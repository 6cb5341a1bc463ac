"""What an adapted model says of new texts, and of files of any size."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.data.files import kind_of, read_rows, require_columns
from lora_cli.errors import LoraError, Problem
from lora_cli.recipe import FormatSpec
from lora_cli.tasks import Task

CHUNK = 1000  # rows in memory at once


@torch.no_grad()
def answer(
    model: nn.Module, task: Task, rows: Sequence[dict[str, Any]], accelerator: Accelerator
) -> list[list[Any]]:
    """Return, for each row, the values of the task's `answer_columns`."""
    size = task.recipe.evaluate.micro_batch_size or 2 * task.recipe.train.micro_batch_size
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
        raise LoraError(f"there is no file {source}", "--input")
    if source.resolve() == target.resolve():
        raise LoraError("the output would overwrite the input", "--output")
    form = task.recipe.data.format.model_copy(update={"type": None})
    rows = read_rows(source, form)
    chunk = list(islice(rows, CHUNK))
    columns = list(dict.fromkeys(name for row in chunk for name in row.columns or {}))
    require_columns(task.input_columns(), columns, str(source))
    problems: list[Problem] = []
    written = 0
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        write = _writer(file, target, columns, task.answer_columns())
        while chunk:
            faults = [row.fault or task.input_fault(row.columns or {}) for row in chunk]
            problems += [Problem(f, row.place) for row, f in zip(chunk, faults, strict=True) if f]
            good = [row.columns or {} for row, f in zip(chunk, faults, strict=True) if not f]
            answers = iter(answer(model, task, good, accelerator))
            blank = [None] * len(task.answer_columns())
            for row, fault in zip(chunk, faults, strict=True):
                write(row.columns or {}, blank if fault else next(answers))
            written += len(chunk)
            chunk = list(islice(rows, CHUNK))
    temporary.replace(target)
    return written, problems


def _writer(
    file: IO[str], target: Path, columns: list[str], added: list[str]
) -> Callable[[dict[str, Any], Sequence[Any]], None]:
    """Return a function that writes a row and its answer in the target's format."""
    names = [f"{name}_2" if name in columns else name for name in added]
    kind = kind_of(target, FormatSpec())
    if kind == "json":

        def write_json(row: dict[str, Any], values: Sequence[Any]) -> None:
            line = row | dict(zip(names, values, strict=True))
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

        return write_json
    if kind != "csv":
        raise LoraError(f"cannot write {target.name}", "--output", "use .csv, .tsv or .jsonl")
    delimiter = "\t" if target.suffix == ".tsv" else ","
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
