"""`lora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli import options
from lora_cli.cli.options import AdapterDir, BaseOption, Overrides, RecipeOption, expand
from lora_cli.errors import counted


def merge(
    adapter: AdapterDir,
    to: Annotated[
        Path,
        typer.Option(
            "--to",
            help="Folder of the merged model.",
            callback=expand,
        ),
    ],
    base: BaseOption = None,
    recipe: RecipeOption = None,
    overrides: Overrides = None,
) -> None:
    """Merge an adapter into its base: a stand-alone model folder."""
    options.quiet_libraries()
    from lora_cli.export.merge import merge_adapter

    result = merge_adapter(base, adapter, to, recipe, overrides)
    dtype = str(result.dtype).removeprefix("torch.")
    typer.echo(f"merged {counted(result.merged_modules, 'module')} into {result.folder}/ ({dtype})")
    typer.echo(
        f"outputs differ from base + adapter by {result.difference:.1e} in float32, "
        f"and by {result.rounding:.1e} more as {dtype}"
    )
    typer.echo(result.weights.in_words)
    for line in result.choice:
        typer.echo(line)
    if result.untied:
        typer.echo(
            f"untied {' and '.join(result.untied)}: the adapter changes them differently, "
            "so each has its own weight now"
        )
    if not result.verified:
        typer.echo(
            "warning: the adapter's folder has no manifest, so its integrity could not be verified",
            err=True,
        )
