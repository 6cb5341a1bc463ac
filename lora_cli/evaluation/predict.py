"""Predict answers for new inputs, or for the rows of a file of any size."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.data.csv_quoting import announce_quoting, quoting_of
from lora_cli.data.csv_rows import delimiter_of
from lora_cli.data.detect_format import Head, read_head
from lora_cli.data.file_formats import columns_of, kind_of, read_rows, require_columns
from lora_cli.data.input_files import input_form
from lora_cli.data.media import (
    FILE_NAME,
    N_INSPECTED_PATHS,
    folder_of_paths,
    paths_of,
    with_media,
)
from lora_cli.data.media_folder import media_files
from lora_cli.data.parquet_rows import parquet_schema
from lora_cli.data.text_lines import RawRow
from lora_cli.data.write_rows import WRITABLE, OutputFormat, reject_target, suffix_of, writing
from lora_cli.errors import LoraError, Problem, counted, require_file
from lora_cli.recipe import FormatSpec
from lora_cli.tasks.contract import Task

CHUNK = 1000  # rows in memory at once
NO_ANSWER = "it has no prediction"


@torch.no_grad()
def answer(
    model: nn.Module, task: Task, rows: Sequence[dict[str, Any]], accelerator: Accelerator
) -> list[list[Any]]:
    """Return, for each row, the values of the task's `answer_columns`."""
    size = task.recipe.evaluate.micro_batch_size or 2 * task.micro_batch
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
    report_progress: Callable[[int], object] = lambda _: None,
) -> tuple[int, list[Problem]]:
    """Write the rows of a file with the answers added; rows, order and columns are kept.

    Args:
        model: The adapted model.
        task: The task of the model.
        source: A csv, tsv, json lines, parquet or text file, or a folder of images.
        target: A csv, tsv, json lines, parquet or (for embeddings) .npy file, written atomically.
        accelerator: The precision and the device.
        overwrite: Whether to replace the target if it exists.
        report_progress: Called after each chunk with the number of rows written so far.

    Returns:
        The number of rows written, and the problems of rows that could not be answered (their new
        columns are blank) or whose answer cannot be encoded in the output.

    Raises:
        LoraError: If a file cannot be used, or no row can be answered.
    """
    reject_target(source, target, overwrite)
    media = task.recipe.task.media_columns
    rows, output, added = _open_source(source, target, task)
    rows, folder = _with_folder(source, rows, media)
    # for answers that are files: images, or recordings
    task.answer_folder = target.with_name(f"{target.stem}_{task.answer_files}")
    problems: list[Problem] = []
    written = 0
    blank = [None] * len(added)
    with writing(target, output, overwrite) as write:
        while chunk := list(islice(rows, CHUNK)):
            inputs = [with_media(row, folder, media).columns or {} for row in chunk]
            errors = [
                row.error or task.answer_error(columns)
                for row, columns in zip(chunk, inputs, strict=True)
            ]
            good = [columns for columns, error in zip(inputs, errors, strict=True) if not error]
            answers = iter(answer(model, task, good, accelerator))
            lines = []
            for row, error in zip(chunk, errors, strict=True):
                values = blank if error else next(answers)
                lines.append({**(row.columns or {}), **dict(zip(added, values, strict=True))})
                if error:
                    problems.append(Problem(error, row.place, NO_ANSWER))
                elif error_text := _unwritable(values, output):
                    problems.append(Problem(error_text, row.place, "use .jsonl to keep them"))
            write(lines)
            written += len(chunk)
            report_progress(written)
        unanswered = [problem for problem in problems if problem.hint == NO_ANSWER]
        if written and len(unanswered) == written:
            raise _nothing_answered(unanswered)
    return written, problems


def _with_folder(
    source: Path, rows: Iterator[RawRow], media: Collection[str]
) -> tuple[Iterator[RawRow], Path]:
    """Return the rows, and the folder that the paths in them are relative to."""
    if source.is_dir():
        return rows, source
    first = list(islice(rows, N_INSPECTED_PATHS))
    return chain(first, rows), folder_of_paths(source, paths_of(first, media))


def _open_source(
    source: Path, target: Path, task: Task
) -> tuple[Iterator[RawRow], OutputFormat, list[str]]:
    """Return the rows of a file or a folder, the form of the output, and the new columns' names."""
    recipe, input_columns = task.recipe, task.input_columns()
    (column,) = input_columns.values() if len(input_columns) == 1 else [""]
    if (
        source.is_dir()
        and column in recipe.task.media_columns
        and (files := media_files(source, recipe))
    ):
        added = _free_names(list(task.answer_columns()), [column])
        rows = (RawRow({column: file.as_posix()}, file.as_posix()) for file in files)
        return rows, _form_of_table(target, [column], added, task), added
    require_file(source, "--input")
    head = read_head(source)
    labels = getattr(task, "labels", ())
    form = input_form(source, head, recipe.data.format, list(input_columns.values()), labels)
    if kind_of(source, form) == "csv":
        announce_quoting(source, form)
    columns = columns_of(source, form)
    if not (recipe.task.media_columns and FILE_NAME in columns):
        require_columns(input_columns, columns, str(source))
    added = _free_names(list(task.answer_columns()), columns)
    if suffix_of(target) == ".npy":
        return read_rows(source, form), OutputFormat(added, array=_array_column(added, task)), added
    output = _output_form(source, target, head, form, [*columns, *added], task)
    return read_rows(source, form), output, added


def _array_column(added: list[str], task: Task) -> str:
    """Return the column that is saved as a numpy array.

    Raises:
        LoraError: If the answers are not lists of numbers.
    """
    if list(task.answer_columns().values()) != ["list<float>"]:
        what = "an array of numbers has no room for answers in words"
        raise LoraError(what, "--output", "use .csv, .tsv, .jsonl or .parquet")
    return added[0]


def _form_of_table(target: Path, columns: list[str], added: list[str], task: Task) -> OutputFormat:
    """Return the form of the output for inputs that do not come from a table."""
    if suffix_of(target) == ".npy":
        return OutputFormat(added, array=_array_column(added, task))
    if suffix_of(target) != ".parquet":
        return OutputFormat([*columns, *added], WRITABLE[suffix_of(target)])
    return OutputFormat([*columns, *added], schema=_with_answers(None, columns, added, task))


def _nothing_answered(problems: list[Problem]) -> LoraError:
    """Return the error for a file of which no row can be answered, with the first few reasons."""
    shown = [Problem(problem.what, problem.at) for problem in problems[:3]]
    what = f"none of {counted(len(problems), 'row')} can be answered, so nothing is written"
    hint = "does the file have the columns and the kind of values that the model was trained on?"
    return LoraError([*shown, Problem(what, "--input", hint)])


def _free_names(wanted: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return names for the new columns that no other column has."""
    free_names: list[str] = []
    for name in wanted:
        used = {*columns, *free_names}
        free = (n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in used)
        free_names.append(next(free))
    return free_names


# -------------------------------------------------------------------------------------- the output


def _unwritable(values: Sequence[Any], form: OutputFormat) -> str:
    """Return an error message if the output's format cannot represent an answer, or ""."""
    if form.quoting == "none" and re.search(f"[{re.escape(form.delimiter)}\r\n]", str(values[0])):
        return "the answer holds a tab or a line end, which an output without quoting cannot"
    if form.encoding.lower().startswith("utf"):
        return ""
    text = "".join(str(value) for value in values[:1])
    encodable = text.encode(form.encoding, errors="ignore").decode(form.encoding)
    missing = sorted(set(text) - set(encodable))
    shown = " ".join(missing[:5])
    return f"the answer holds letters that {form.encoding} lacks: `{shown}`" if missing else ""


def _output_form(
    source: Path, target: Path, head: Head, form: FormatSpec, columns: list[str], task: Task
) -> OutputFormat:
    """Return the form of the output; a table is written in the format of the input table."""
    if suffix_of(target) == ".parquet":
        copied = source if head.kind == "parquet" else None
        return OutputFormat(columns, schema=_schema(source, head, columns, task), copied=copied)
    if kind_of(source, form) != "csv":
        return OutputFormat(columns, WRITABLE[suffix_of(target)])
    delimiter = WRITABLE[suffix_of(target)]
    # the delimiter of a single-column file is arbitrary: it just does not occur in the texts
    is_single = len(columns) == 1 + len(task.answer_columns())
    if suffix_of(target) == suffix_of(source) and not is_single:
        delimiter = form.delimiter or delimiter
    encoding = "utf-8-sig" if head.has_mark and form.encoding == "utf-8" else form.encoding
    same = delimiter == delimiter_of(source, form)
    quoting = quoting_of(source, form).name if same else "csv"
    return OutputFormat(columns, delimiter, encoding, head.line_end, quoting, header=form.header)


def _schema(source: Path, head: Head, columns: list[str], task: Task) -> Any:
    """Return the schema of the output parquet file: the columns of the input and the answers."""
    if head.kind == "json":
        what = "the values of JSON have no fixed types, as parquet needs"
        raise LoraError(what, "--output", "use .jsonl")
    old = len(columns) - len(task.answer_columns())
    schema = parquet_schema(source) if head.kind == "parquet" else None
    return _with_answers(schema, columns[:old], columns[old:], task)


def _with_answers(schema: Any, columns: list[str], added: list[str], task: Task) -> Any:
    """Add the columns of the answers to a schema; None stands for text columns."""
    import pyarrow as pa

    by_name = {"string": pa.string(), "double": pa.float64(), "list<string>": pa.list_(pa.string()),
               "list<float>": pa.list_(pa.float32())}  # fmt: skip
    if schema is None:
        schema = pa.schema([(name, pa.string()) for name in columns])
    for name, kind in zip(added, task.answer_columns().values(), strict=True):
        schema = schema.append(pa.field(name, by_name[kind]))
    return schema
