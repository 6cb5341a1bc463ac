"""`lora predict`: predict for texts, for the rows of a file, or in a conversation."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli import options
from lora_cli.cli.options import AdapterDir, AsJson, Overrides, RecipeOption, expand
from lora_cli.errors import LoraError, Problem, counted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from lora_cli.recipe import Recipe
    from lora_cli.tasks.contract import Task


def predict(
    adapter: AdapterDir,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT…")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="File with rows (csv, tsv, json lines, parquet, or one text per line), or a "
            "folder of images or recordings.",
            callback=expand,
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="File to write: the same rows with predictions.",
            callback=expand,
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive", help="Answer line by line; a chat model remembers earlier lines."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file, if it exists.")
    ] = False,
    recipe: RecipeOption = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Predict for texts (or images), for the rows of a file, or in a conversation."""
    if interactive:
        if texts or source or target or as_json:
            other = "texts, files or `--json`"
            at, hint = "the arguments of `lora predict`", "leave one or the other out"
            raise LoraError(f"`--interactive` excludes {other}", at, hint)
        _converse(adapter, options.recipe_for(adapter, recipe, overrides))
        return
    _require_either(bool(texts), bool(source), bool(target))
    if target is not None and as_json:
        what, hint = "`--json` prints answers to texts", "for a JSON file: `--output FILE.jsonl`"
        raise LoraError(what, "--json", hint)
    if source is not None and target is not None:
        from lora_cli.data.write_rows import reject_target

        reject_target(source, target, overwrite)  # before the model is loaded
    loaded = options.recipe_for(adapter, recipe, overrides)
    options.quiet_libraries()
    from lora_cli.evaluation.open_adapter import open_adapter

    task, model, accelerator = open_adapter(adapter, loaded)
    if source is not None and target is not None:
        _predict_file(model, task, source, target, accelerator, overwrite)
    else:
        _predict_texts(model, task, texts or [], accelerator, as_json)


def _require_either(has_texts: bool, has_source: bool, has_target: bool) -> None:
    """Reject arguments that are neither texts alone nor an input file with an output file."""
    if has_texts == has_source:
        what = "expected either texts or an input file"
    elif has_source != has_target:
        what = "`--input` and `--output` go together"
    else:
        return
    hint = "give texts, or a file with `--input FILE --output FILE`"
    raise LoraError(what, "the arguments of `lora predict`", hint)


def _predict_texts(
    model: nn.Module, task: Task, texts: list[str], accelerator: Accelerator, as_json: bool
) -> None:
    """Print the answer for each text."""
    from lora_cli.evaluation.predict import answer

    rows = [task.parse_input(text) for text in texts]
    problems = [
        Problem(found.what, f"{task.input_name} {i} of {len(rows)}", found.hint)
        for i, row in enumerate(rows, 1)
        if (found := task.answer_problem(row)) is not None
    ]
    if problems:
        raise LoraError(problems)
    for values in answer(model, task, rows, accelerator):
        named = dict(zip(task.answer_columns(), values, strict=True))
        if as_json:
            typer.echo(json.dumps(named, ensure_ascii=False))
            continue
        typer.echo(task.answer_line(values))
    for line in task.take_warnings():
        typer.echo(f"warning: {line}", err=True)


def _predict_file(
    model: nn.Module,
    task: Task,
    source: Path,
    target: Path,
    accelerator: Accelerator,
    overwrite: bool,
) -> None:
    from lora_cli.evaluation.predict import NO_ANSWER, answer_file

    def report_progress(count: int) -> None:
        if sys.stderr.isatty():
            typer.echo(f"\r{counted(count, 'row')}", nl=False, err=True)

    written, problems = answer_file(
        model, task, source, target, accelerator, overwrite, report_progress
    )
    if sys.stderr.isatty():
        typer.echo("\r", nl=False, err=True)
    for line in task.take_warnings():
        typer.echo(f"warning: {line}", err=True)
    for problem in problems[:10]:
        typer.echo(f"warning: {problem.at}: {problem.what}; {problem.hint}", err=True)
    if len(problems) > 10:
        typer.echo(f"warning: {len(problems) - 10:,} more rows are like these", err=True)
    blank = sum(problem.hint == NO_ANSWER for problem in problems)
    typer.echo(
        f"wrote {counted(written, 'row')} to {target}"
        + (f", {blank:,} of them without prediction" if blank else "")
    )


def _converse(adapter: Path, recipe: Recipe) -> None:
    options.quiet_libraries()
    from lora_cli.evaluation.converse import HELP, converse, read_line
    from lora_cli.evaluation.open_adapter import open_adapter

    def lines() -> Iterator[str]:
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            typer.echo(HELP, err=True)
        while True:
            if is_terminal:
                typer.echo("> ", nl=False, err=True)
            line = read_line(sys.stdin, note)
            if not line:
                return
            yield line

    def write(text: str) -> None:
        typer.echo(text, nl=False)  # which flushes

    def note(text: str) -> None:
        typer.echo(text, nl=False, err=True)

    task, model, accelerator = open_adapter(adapter, recipe)
    converse(model, task, accelerator, lines(), write, note)
