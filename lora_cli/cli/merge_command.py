"""`lora merge`: write a stand-alone model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cli.cli import options
from lora_cli.cli.options import BaseOption, Overrides, RecipeOption, expand, find_adapter
from lora_cli.errors import LoraError, counted


def split_weight(value: str) -> tuple[str, float]:
    """Split `DIR:0.5` into the folder and its weight, which is 1 by default.

    Raises:
        LoraError: If the weight is not a finite number.
    """
    folder, colon, text = value.rpartition(":")
    if not colon or Path(value).expanduser().exists() or not folder:
        return value, 1.0
    try:
        weight = float(text)
    except ValueError:
        return value, 1.0  # the colon belongs to the name, as in `hf://user/name`
    if not math.isfinite(weight):
        what = f"the weight of an adapter cannot be {text}"
        raise LoraError(what, f"--adapter {value}", "write a number after the colon: `DIR:0.5`")
    return folder, weight


def find_weighted(context: typer.Context, parameter: typer.CallbackParam, values: Any) -> Any:
    """Find the folder of each adapter, and return it with its weight as `DIR:WEIGHT`."""
    if not values or context.resilient_parsing:
        return values
    found = []
    for value in values:
        folder, weight = split_weight(str(value))
        found.append(f"{find_adapter(context, parameter, folder)}:{weight!r}")
    return found


Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="DIR[:WEIGHT]",
        help="Output folder of `lora train`, a PEFT folder, or a Hub id. Repeatable: the updates "
        "of several adapters are added, each times its weight.",
        callback=find_weighted,
    ),
]
Target = Annotated[Path, typer.Option("--to", help="Folder of the merged model.", callback=expand)]
Head = Annotated[
    Path | None,
    typer.Option(
        "--head",
        help="With several adapters, the one from which to take the head and other modules trained "
        "in full.",
        callback=find_adapter,
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Merge one tensor at a time, as for a base larger than memory, without comparing "
        "outputs.",
    ),
]


def merge(
    adapter: Adapters,
    to: Target,
    base: BaseOption = None,
    head: Head = None,
    low_memory: LowMemory = False,
    recipe: RecipeOption = None,
    overrides: Overrides = None,
) -> None:
    """Merge an adapter, or several, into their base: a stand-alone model folder."""
    options.quiet_libraries()
    from lora_cli.export.merge import merge_adapter

    given = [split_weight(one) for one in adapter]
    folders, weights = [Path(folder) for folder, _ in given], [weight for _, weight in given]
    if head is not None and len(folders) == 1:
        raise LoraError("there is only one adapter", "--head", "leave `--head` out")
    result = merge_adapter(
        base, folders, to, recipe, overrides, weights=weights, head=head, low_memory=low_memory
    )
    dtype = str(result.dtype).removeprefix("torch.")
    of_several = f" of {len(folders)} adapters" if len(folders) > 1 else ""
    modules = counted(result.merged_modules, "module") + of_several
    typer.echo(f"merged {modules} into {result.folder}/ ({dtype})")
    if result.difference is None:
        typer.echo(f"outputs: not compared, as {result.reason}")
    else:
        typer.echo(
            f"outputs differ from base + adapter by {result.difference:.1e} in float32, "
            f"and by {result.rounding:.1e} more as {dtype}"
        )
    typer.echo(result.weights.in_words)
    if result.memory is not None:
        typer.echo(result.memory.in_words)
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
