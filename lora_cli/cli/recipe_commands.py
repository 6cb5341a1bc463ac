"""Commands that inspect a recipe: `lora params`, `lora validate`, `lora schema`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from lora_cli.cli import options
from lora_cli.cli.options import AsJson, Overrides, RecipeFile
from lora_cli.cli.printing import print_parameters
from lora_cli.errors import LoraError


def params(
    recipe: RecipeFile,
    overrides: Overrides = None,
    show_all: Annotated[bool, typer.Option("--all", help="Print every parameter.")] = False,
    as_json: AsJson = False,
) -> None:
    """List and count the parameters that a recipe trains, without loading weights."""
    loaded = options.load(recipe, overrides)
    options.quiet_libraries()
    from lora_cli.adapters.count_parameters import parameter_table
    from lora_cli.preprocessing.check_recipe import empty_adapted_model

    table = parameter_table(empty_adapted_model(loaded))
    init = loaded.adapter.init if loaded.adapter.low_rank else "default"
    print_parameters(table, show_all, as_json, init)


def validate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    data: Annotated[
        bool, typer.Option("--data", help="Inspect all rows too: lengths, duplicates, overlap.")
    ] = False,
    show: Annotated[
        int,
        typer.Option(
            "--show", min=0, help="With --data: print this many encoded rows per split instead."
        ),
    ] = 0,
) -> None:
    """Check a recipe, its data and its targets without loading weights; print it in full."""
    loaded = options.load(recipe, overrides)
    if show and not data:
        what, at = "`--show` needs `--data`", "the arguments of `lora validate`"
        raise LoraError(what, at, f"write `--data --show {show}`")
    options.quiet_libraries()
    from lora_cli.preprocessing.check_recipe import check_recipe
    from lora_cli.recipe import dump_recipe

    notes: list[str] = []
    checked = check_recipe(loaded, data, notes)
    if data:
        from lora_cli.preprocessing.data_gate import inspect_data
        from lora_cli.preprocessing.show_examples import shown_rows

        task, encoded = inspect_data(checked)
        if show:
            for text in shown_rows(task, encoded, show, sys.stdout.isatty()):
                typer.echo(text)
            return
    typer.echo(dump_recipe(checked), nl=False)
    for line in notes:
        typer.echo(line, err=True)


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from lora_cli.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
