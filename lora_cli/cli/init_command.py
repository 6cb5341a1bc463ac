"""`lora init`: write a recipe for a data file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli import options
from lora_cli.cli.options import expand
from lora_cli.errors import LoraError


def init(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE [FILE]",
            help="A data file (csv, json lines, parquet, text) or a folder of such files; or "
            "two text files that belong together line by line.",
            callback=expand,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Hub id or folder of the base model.",
            callback=expand,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="The recipe to write; never overwritten.", callback=expand
        ),
    ] = Path("recipe.yaml"),
    text: Annotated[
        str | None, typer.Option("--text", help="The column of the text, if it is not obvious.")
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option("--pair", help="The column of the second text, to classify pairs of texts."),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option("--label", help="The column of the label or answer; `none` for no label."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            min=1,
            help="Memory of the GPU for training, in GiB. Default: that of this machine's GPU.",
        ),
    ] = None,
) -> None:
    """Read a data file or folder and write a recipe for it, with reasons as comments."""
    from lora_cli.recipe_draft import draft_recipe, reject_existing, write_recipe

    if len(sources) > 2:
        hint = "name their folder instead: `lora init FOLDER`"
        raise LoraError("more than two files", "FILE", hint)
    reject_existing(output)
    options.quiet_libraries()
    second = sources[1] if len(sources) > 1 else None
    draft = draft_recipe(sources[0], model, output, text, label, second, pair, memory)
    write_recipe(output, draft.text(), draft.extra_files)
    _print_findings(draft.findings, output)


def _print_findings(findings: list[tuple[str, str]], output: Path) -> None:
    """Print each finding on a line, and the next command."""
    from lora_cli.characters import cells, padded

    width = max(cells(name) for name, _ in findings)
    for name, finding in findings:
        typer.echo(f"{padded(name, width)}  {finding}")
    typer.echo(f"\n{'recipe'.ljust(width)}  {output}")
    typer.echo(f"{'next'.ljust(width)}  lora train {shlex.quote(str(output))}")
