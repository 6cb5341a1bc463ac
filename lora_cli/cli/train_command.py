"""`lora train`: train an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli import options
from lora_cli.cli.options import Overrides, RecipeFile, expand
from lora_cli.cli.printing import print_results


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Output folder (`output_dir`).",
            callback=expand,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint, if there is one.")
    ] = False,
) -> None:
    """Train an adapter, evaluate it, and write its folder."""
    loaded = options.load(recipe, overrides, output)
    options.quiet_libraries()
    from lora_cli.training import end_processes
    from lora_cli.training import train as run

    report = run(loaded, resume)
    end_processes()
    if os.environ.get("RANK", "0") == "0":
        print_results(loaded, report)
