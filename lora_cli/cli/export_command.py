"""`lora export`: write an adapter for another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.adapters.find_adapter import shown_name
from lora_cli.cli import options
from lora_cli.cli.options import AdapterDir, BaseOption, Overrides, RecipeOption, expand
from lora_cli.errors import LoraError, did_you_mean
from lora_cli.export.reader_names import READERS


def offer_readers(incomplete: str) -> list[tuple[str, str]]:
    """Return the readers whose names begin with the typed text."""
    return [(name, about) for name, about in READERS.items() if name.startswith(incomplete)]


def export(
    adapter: AdapterDir,
    reader: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="READER",
            help="peft, vllm, gguf (llama.cpp), mlx (mlx-lm), diffusers, kohya (web interfaces "
            "for image generation), or plain (PEFT's format for any other reader).",
            autocompletion=offer_readers,
        ),
    ],
    to: Annotated[
        Path, typer.Option("--to", help="Folder of the exported adapter.", callback=expand)
    ],
    base: BaseOption = None,
    recipe: RecipeOption = None,
    overrides: Overrides = None,
) -> None:
    """Write an adapter for another program, and check it by reading it as that program does."""
    if reader not in READERS:
        what = f"there is no reader `{reader}`"
        raise LoraError(what, "--for", did_you_mean(reader, READERS))
    options.quiet_libraries()
    from lora_cli.export.export_adapter import export_adapter

    compared = export_adapter(
        adapter, to, reader, base, recipe, overrides, lambda line: typer.echo(f"note: {line}")
    )
    typer.echo(f"exported {shown_name(adapter)} for {reader} into {to}/")
    for line in compared:
        typer.echo(f"checked: {line}")
