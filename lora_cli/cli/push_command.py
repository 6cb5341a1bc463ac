"""`lora push`: upload an adapter to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli import options
from lora_cli.cli.options import expand
from lora_cli.errors import counted


def push(
    adapter: Annotated[
        Path, typer.Option("--adapter", help="Output folder of `lora train`.", callback=expand)
    ],
    to: Annotated[str, typer.Option("--to", metavar="USER/NAME", help="Repository on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Only you may read the repository, if it is new.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Branch; created if it does not exist."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="USER/NAME",
            help="Hub id of the base model, if the adapter names a folder on this machine.",
        ),
    ] = None,
) -> None:
    """Upload an adapter to the Hub with its card, without paths and secrets of this machine."""
    options.quiet_libraries()
    from lora_cli.export.push import push_adapter

    pushed = push_adapter(adapter, to, private, revision, base)
    for line in pushed.notes:
        typer.echo(f"note: {line}", err=True)
    typer.echo(f"pushed {counted(len(pushed.files), 'file')} to {pushed.address}")
    named = to if revision is None else f"{to}@{revision}"
    typer.echo(f'use it: lora predict --adapter {named} "…"')
