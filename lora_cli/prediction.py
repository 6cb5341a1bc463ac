"""What an adapted model says of new texts, and of files of any size."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.data.files import (
    columns_of,
    form_of,
    kind_of,
    parquet_schema,
    read_rows,
    require_columns,
)
from lora_cli.data.sniffing import DELIMITERS, SPARE_DELIMITERS, Head, read_head
from lora_cli.data.writing import WRITABLE, OutputForm, refuse_target, suffix_of, writing
from lora_cli.errors import LoraError, Problem, beside, counted
from lora_cli.recipe import FormatSpec
from lora_cli.tasks import Task

CHUNK = 1000  # rows in memory at once
COLUMN = re.compile(r"[^\W\d]\w*([ _.-]\w+)?")  # the name of a column, and hardly a text
NO_ANSWER = "it has no prediction"


@torch.no_grad()
def answer(
    model: nn.Module, task: Task, rows: Sequence[dict[str, Any]], accelerator: Accelerator
) -> list[list[Any]]:
    """Return, for each row, the values of the task's `answer_columns`."""
    size = task.recipe.evaluate.micro_batch_size or 2 * task.recipe.train.micro_batch
    answers = []
    model.eval()
    task.note_control_tokens(rows)
    for start in range(0, len(rows), size):
        with accelerator.autocast():
            answers += task.answer(model, rows[start : start + size])
    return answers


def answer_file(
    model: nn.Module,
    task: Task,
    source: Path,
    target: Path,
    accelerator: Accelerator,
    overwrite: bool = False,
    tell: Callable[[int], object] = lambda _: None,
) -> tuple[int, list[Problem]]:
    """Write the rows of a file with the answers added; rows, order and columns are kept.

    Args:
        model: The adapted model.
        task: What the columns mean.
        source: A csv, tsv, json lines, parquet or text file.
        target: A csv, tsv, json lines or parquet file, written whole or not at all.
        accelerator: Precision and device.
        overwrite: Replace the target, if it exists.
        tell: Is given the number of rows that are written, every now and then.

    Returns:
        How many rows were written, and the problems of those that could not be answered, whose
        new columns are blank, or whose answer the output's encoding cannot hold.
    """
    if not source.is_file():
        raise LoraError(f"there is no file {source}", "--input", beside(source))
    refuse_target(source, target, overwrite)
    head = read_head(source)
    form = input_form(source, head, task)
    columns = columns_of(source, form)
    require_columns(task.input_columns(), columns, str(source))
    added = _free_names(task.answer_columns(), columns)
    output = _output_form(source, target, head, form, [*columns, *added], task)
    problems: list[Problem] = []
    written = 0
    blank = [None] * len(added)
    rows = read_rows(source, form)
    with writing(target, output, overwrite) as write:
        while chunk := list(islice(rows, CHUNK)):
            faults = [row.fault or task.answer_fault(row.columns or {}) for row in chunk]
            good = [row.columns or {} for row, f in zip(chunk, faults, strict=True) if not f]
            answers = iter(answer(model, task, good, accelerator))
            lines = []
            for row, fault in zip(chunk, faults, strict=True):
                values = blank if fault else next(answers)
                lines.append({**(row.columns or {}), **dict(zip(added, values, strict=True))})
                if fault:
                    problems.append(Problem(fault, row.place, NO_ANSWER))
                elif lost := _lost(values, output):
                    problems.append(Problem(lost, row.place, "use .jsonl to keep them"))
            write(lines)
            written += len(chunk)
            tell(written)
        unanswered = [problem for problem in problems if problem.hint == NO_ANSWER]
        if written and len(unanswered) == written:
            raise _nothing_answered(unanswered)
    return written, problems


def _nothing_answered(problems: list[Problem]) -> LoraError:
    """Return what to say of a file of which no row has an answer: the first rows, and why."""
    shown = [Problem(problem.what, problem.at) for problem in problems[:3]]
    what = f"none of {counted(len(problems), 'row')} can be answered, so nothing is written"
    hint = "does the file have the columns and the kind of values that the model was trained on?"
    return LoraError([*shown, Problem(what, "--input", hint)])


def _free_names(wanted: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return names for the new columns that no other column has."""
    names: list[str] = []
    for name in wanted:
        taken = {*columns, *names}
        free = (n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)
        names.append(next(free))
    return names


# --------------------------------------------------------------------------------------- the input


def input_form(source: Path, head: Head, task: Task) -> FormatSpec:
    """Return how a file is read: as the recipe says, if that fits, else as its first lines say.

    The rows to predict are often written in another way than those that were trained on: another
    delimiter, no label, one text a line.
    """
    given = form_of(source, task.recipe.data.format)
    wanted = list(task.input_columns().values())
    encoding = {"encoding": _encoding(head, given)}
    found, given = (form.model_copy(update=encoding) for form in (head.form, given))
    if head.kind in ("json", "parquet"):
        return found
    if given.header and kind_of(source, given) == "csv" and _fits(source, given, wanted):
        return given
    if (named := _by_header(head, found, wanted, given.header)) is not None:
        return named
    if head.kind == "csv":
        names = columns_of(source, found)
        if head.named and set(wanted) <= set(names):
            return found
        if not given.header and given.columns and len(names) == len(given.columns):
            if head.named:
                raise LoraError(
                    f"the first line of {source.name} names its columns: {', '.join(names)}",
                    "--input",
                    f"call the one that is to be read `{wanted[0]}`, as the recipe does",
                )
            return found.model_copy(update={"columns": given.columns})
        if head.named or len(names) > 1:
            return given
    if len(wanted) > 1:
        return given
    if head.kind == "text" and kind_of(source, given) == "text":
        found = found.model_copy(update={"sample_by": given.sample_by})
    return found.model_copy(update={"columns": wanted})  # a file of one column without a name


def _by_header(
    head: Head, found: FormatSpec, wanted: Sequence[str], guess: bool
) -> FormatSpec | None:
    """Return how a table is read whose first line holds the names that are wanted, or any names.

    A few broken rows must not make one text a line of a table. Without `guess`, other names are
    taken for values.
    """
    text = head.raw.decode(found.encoding, errors="replace").removeprefix("\ufeff")
    lines = text.splitlines()[found.skip_lines :]
    table = {"type": "csv", "header": True, "columns": None}
    for delimiter in DELIMITERS:
        names = [name.strip() for name in next(csv.reader(lines[:1], delimiter=delimiter), [])]
        if set(wanted) < set(names) or (
            guess and len(names) > 1 and all(map(COLUMN.fullmatch, names))
        ):
            return found.model_copy(update={**table, "delimiter": delimiter})
    if len(wanted) == 1 and lines and lines[0].strip().strip('"') == wanted[0]:
        spare = next((mark for mark in SPARE_DELIMITERS if mark not in text), ",")
        return found.model_copy(update={**table, "delimiter": spare})
    return None


def _fits(source: Path, form: FormatSpec, wanted: Sequence[str]) -> bool:
    """Return whether a header, read so, names the columns that are wanted, and others too."""
    try:
        names = columns_of(source, form)
    except LoraError:
        return False
    return set(wanted) < set(names)


def _encoding(head: Head, given: FormatSpec) -> str:
    """Return the encoding of a file: the recipe's, unless its bytes are UTF-8 or not in it."""
    if head.raw.isascii() or (head.form.encoding != "utf-8" and given.encoding != "utf-8"):
        try:
            head.raw.decode(given.encoding)
        except (UnicodeError, LookupError):
            return head.form.encoding
        return given.encoding
    return head.form.encoding


# -------------------------------------------------------------------------------------- the output


def _lost(values: Sequence[Any], form: OutputForm) -> str:
    """Return which letters of an answer its encoding lacks, or nothing."""
    if form.encoding.lower().startswith("utf"):
        return ""
    text = "".join(str(value) for value in values[:1])
    kept = text.encode(form.encoding, errors="ignore").decode(form.encoding)
    lost = sorted(set(text) - set(kept))
    shown = " ".join(lost[:5])
    return f"the answer holds letters that {form.encoding} lacks: `{shown}`" if lost else ""


def _output_form(
    source: Path, target: Path, head: Head, form: FormatSpec, columns: list[str], task: Task
) -> OutputForm:
    """Return how the output is written: a table as the table that it is made from."""
    if suffix_of(target) == ".parquet":
        return OutputForm(columns, schema=_schema(source, head, columns, task))
    if kind_of(source, form) != "csv":
        return OutputForm(columns, WRITABLE[suffix_of(target)])
    delimiter = WRITABLE[suffix_of(target)]
    if suffix_of(target) == suffix_of(source):
        delimiter = form.delimiter or delimiter
    encoding = "utf-8-sig" if head.has_mark and form.encoding == "utf-8" else form.encoding
    return OutputForm(columns, delimiter, encoding, head.line_end)


def _schema(source: Path, head: Head, columns: list[str], task: Task) -> Any:
    """Return the types of the columns of a parquet file: those of the input, and of the answers."""
    import pyarrow as pa

    if head.kind == "json":
        what = "the values of JSON have no fixed types, as parquet needs"
        raise LoraError(what, "--output", "use .jsonl")
    _, *probabilities = task.answer_columns()
    problem = getattr(task.recipe.task, "problem", "")
    by_problem = {"regression": pa.float64(), "multi_label": pa.list_(pa.string())}
    types = [
        by_problem.get(problem, pa.string()),
        # the best of many labels are a mapping, which parquet has as JSON
        *(pa.string() if name == "best" else pa.float64() for name in probabilities),
    ]
    old = len(columns) - len(types)
    schema = pa.schema([(name, pa.string()) for name in columns[:old]])
    if head.kind == "parquet":
        schema = parquet_schema(source)
    for name, kind in zip(columns[old:], types, strict=True):
        schema = schema.append(pa.field(name, kind))
    return schema
