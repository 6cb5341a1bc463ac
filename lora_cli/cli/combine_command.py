"""`lora combine`: combine several adapters into one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.adapters.find_adapter import shown_name
from lora_cli.cli import options
from lora_cli.cli.options import expand, find_adapter
from lora_cli.errors import LoraError, counted, did_you_mean
from lora_cli.export.combine_names import BY_SVD, METHODS, PRUNING

EXACT = 1e-5  # largest relative distance from the weighted sum that rounding can cause


def offer_methods(incomplete: str) -> list[tuple[str, str]]:
    """Return the methods whose names begin with the typed text."""
    return [(name, about) for name, about in METHODS.items() if name.startswith(incomplete)]


Adapters = Annotated[
    list[Path],
    typer.Argument(
        metavar="ADAPTER",
        help="Adapters for the same base and task: folders or Hub ids.",
        callback=find_adapter,
    ),
]
Target = Annotated[
    Path, typer.Option("--to", help="Folder of the combined adapter.", callback=expand)
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help="cat (exactly the weighted sum), linear, svd, ties, dare_linear, dare_ties, "
        "magnitude_prune; the last four also with `_svd`.",
        autocompletion=offer_methods,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="W,W,…",
        help="Weight of each adapter. Default: 1 each, as if all were applied together.",
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density", metavar="SHARE", help="Share of the entries that ties, dare and prune keep."
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank", metavar="N", help="Rank of an SVD. Default: the largest of the adapters'."
    ),
]
Head = Annotated[
    Path | None,
    typer.Option(
        "--head",
        help="Adapter from which to take the head and other modules trained in full, if they "
        "differ.",
        callback=find_adapter,
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Seed of the entries that dare drops.")
]


def combine(
    adapters: Adapters,
    to: Target,
    method: MethodName = "cat",
    weights: Weights = None,
    density: Density = None,
    rank: Rank = None,
    seed: Seed = 0,
    head: Head = None,
) -> None:
    """Combine several adapters of one base into one."""
    _check(adapters, method, density, rank)
    factors = _factors(weights, len(adapters))
    options.quiet_libraries()
    from lora_cli.export.combine import combine_adapters
    from lora_cli.export.combine_methods import Method

    how = Method(method, 1.0 if density is None else density, rank, seed)
    result = combine_adapters(adapters, to, how, factors, head)
    for note in result.notes:
        typer.echo(f"note: {note}", err=True)
    what = f"{counted(len(adapters), 'adapter')} into {result.folder}/"
    typer.echo(f"combined {what} ({counted(result.modules, 'module')}, rank {result.rank})")
    if result.distance <= EXACT:
        typer.echo("the update is the weighted sum of theirs, as if all were applied together")
    else:
        typer.echo(
            f"the update is {result.distance:.1%} away from the weighted sum of theirs: compare "
            f"with `lora eval --adapter {result.folder} --against {shown_name(adapters[0])}`"
        )


def _check(folders: list[Path], method: str, density: float | None, rank: int | None) -> None:
    """Reject options that do not go together, before torch is imported."""
    at = f"--method {method}"
    if len(folders) < 2:
        raise LoraError(
            "there is only one adapter to combine",
            "the arguments of `lora combine`",
            "name two or more adapters: `lora combine A B --to C`",
        )
    if method not in METHODS:
        hint = did_you_mean(method, METHODS)
        raise LoraError(f"there is no method `{method}`", "--method", hint)
    if method in PRUNING and density is None:
        hint = "choose how much is kept, for example `--density 0.5`"
        raise LoraError(f"`{method}` keeps a share of the entries", at, hint)
    if density is not None and method not in PRUNING:
        hint = f"leave it out, or choose one of {', '.join(PRUNING)}"
        raise LoraError(f"`{method}` keeps all entries", "--density", hint)
    if density is not None and not 0 < density <= 1:
        what = f"the share of entries cannot be {density:g}"
        raise LoraError(what, "--density", "choose a number above 0 and up to 1")
    if rank is not None and method not in BY_SVD:
        hint = f"leave it out, or choose one of {', '.join(BY_SVD)}"
        raise LoraError(f"the rank of `{method}` follows from the adapters", "--rank", hint)
    if rank is not None and rank < 1:
        raise LoraError(f"a rank cannot be {rank}", "--rank", "choose 1 or more")


def _factors(weights: str | None, count: int) -> list[float] | None:
    """Return the numbers of `--weights`, or None without it."""
    if weights is None:
        return None
    try:
        numbers = [float(part) for part in weights.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(math.isfinite(number) for number in numbers):
        what, hint = f"`{weights}` is not a list of numbers", "write it as `--weights 0.7,0.3`"
        raise LoraError(what, "--weights", hint)
    if len(numbers) != count:
        what = f"--weights has {counted(len(numbers), 'number')} for {counted(count, 'adapter')}"
        raise LoraError(what, "--weights", "give one for each adapter, in their order")
    return numbers
