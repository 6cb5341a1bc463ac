"""`lora eval`: measure a saved adapter, or compare it with an older one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.adapters.find_adapter import shown_name
from lora_cli.cli import options
from lora_cli.cli.options import AdapterDir, AsJson, Overrides, RecipeOption, expand, find_adapter
from lora_cli.cli.printing import print_comparison, print_measured
from lora_cli.cli.shell_completion import offer_splits
from lora_cli.errors import LoraError, RegressionError

if TYPE_CHECKING:
    from lora_cli.evaluation.compare import Comparison
    from lora_cli.recipe import Recipe

MAX_DROP = 0.005  # how much worse than an older adapter a new one may be, in the metric

OldAdapter = Annotated[
    Path | None,
    typer.Option(
        "--against",
        help="An older adapter to compare with: a folder or a Hub id.",
        callback=find_adapter,
    ),
]

MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        min=0,
        help="How much worse than the older adapter it may be.",
        show_default=str(MAX_DROP),
    ),
]


def evaluate(
    adapter: AdapterDir,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="train, validation or test. Default: all but train.",
            autocompletion=offer_splits,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", help="Measure on this file, which has the recipe's columns.", callback=expand
        ),
    ] = None,
    against: OldAdapter = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="Metric to compare by. Default: the recipe's main metric."),
    ] = None,
    max_drop: MaxDrop = None,
    recipe: RecipeOption = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure a saved adapter on the data it was trained for, alone or against an older one."""
    if source is not None and split not in (None, "test"):
        hint = "leave `--split` out: a file is measured as `test`"
        raise LoraError("`--input` and `--split` exclude each other", "--split", hint)
    for option, value in (("--metric", metric), ("--max-drop", max_drop)):
        if value is not None and against is None:
            hint = "add `--against DIR`; alone, an adapter is measured by `evaluate.metrics`"
            raise LoraError(f"`{option}` needs `--against`", option, hint)
    loaded = options.recipe_for(adapter, recipe, overrides)
    options.quiet_libraries()
    if source is not None:
        from lora_cli.evaluation.evaluate_adapter import with_test_file

        loaded, split = with_test_file(loaded, source), "test"
    if against is None:
        _measure(adapter, loaded, split, source, as_json)
        return
    from lora_cli.evaluation.compare import compare

    max_drop = MAX_DROP if max_drop is None else max_drop
    comparison = compare(adapter, against, loaded, metric, max_drop, split)
    comparison.split = source.name if source is not None else comparison.split
    if not as_json:
        typer.echo(f"old  {shown_name(against)}\nnew  {shown_name(adapter)}")
    print_comparison(comparison, as_json)
    if comparison.worse:
        raise _regression(comparison)


def _regression(comparison: Comparison) -> RegressionError:
    """Return the error that ends a command whose new adapter is worse than the old one."""
    return RegressionError(
        f"{comparison.metric} on {comparison.split} is worse by {comparison.drop:.4f}, "
        f"and {comparison.max_drop:g} is allowed",
        "--max-drop",
        "keep the old adapter, or allow it with "
        f"`--max-drop {math.ceil(comparison.drop * 1e4) / 1e4:g}`",
    )


def _measure(
    adapter: Path, loaded: Recipe, split: str | None, source: Path | None, as_json: bool
) -> None:
    """Measure one adapter, and print its metrics."""
    from lora_cli.evaluation.evaluate_adapter import definitions_of, evaluate_adapter
    from lora_cli.recipe import Learned

    learned = Learned()
    results = evaluate_adapter(adapter, loaded, split, learned)
    definitions = definitions_of(learned.completed(loaded))
    if as_json:
        facts = {**results, "metric_definitions": definitions}
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    print_measured(results, source, definitions)
