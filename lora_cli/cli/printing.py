"""The tables and results that commands print to stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lora_cli.errors import counted

if TYPE_CHECKING:
    from lora_cli.adapters.count_parameters import ParameterRow
    from lora_cli.evaluation.compare import Comparison
    from lora_cli.recipe import Recipe


INITIALISATIONS = {
    "pissa": "from the largest singular values of the weights; saved as LoRA of twice the rank",
    "olora": "from the QR decomposition of the weights; saved as LoRA of twice the rank",
    "eva": "from the principal directions of the train rows, which also set each module's rank",
    "loftq": "from the error of quantising the weights; only for this quantised base",
    "orthogonal": "at random, with B A = 0",
}


def print_results(recipe: Recipe, report: dict[str, Any]) -> None:
    """Print the results of a run, and where its files are."""
    from lora_cli.reporting import results_table

    rows = results_table(report)
    if len(rows) > 1:
        wide = len(rows[0]) > 5  # baselines add more columns than fit into a terminal
        typer.echo(_table([list(line) for line in zip(*rows, strict=True)] if wide else rows))
        _print_definitions(report.get("metric_definitions") or {})
    if verdict := report.get("verdict"):
        typer.echo(f"verdict  {verdict['words']}")
    folder = recipe.output_path
    typer.echo(f"report   {folder / 'report.html'}")
    typer.echo(f"numbers  {folder / 'report.json'}")
    typer.echo(f"adapter  {folder}/")
    typer.echo(f"plot     {folder / 'learning_curve.png'}")


def print_measured(
    results: dict[str, dict[str, float]], source: Path | None, definitions: dict[str, str]
) -> None:
    """Print metrics by split, and their definitions; the name of a file stands for its split."""
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    rows = [["metric", *([source.name] if source is not None else results)]]
    rows += [
        [name, *(f"{metrics[name]:.4f}" if name in metrics else "" for metrics in results.values())]
        for name in names
    ]
    typer.echo(_table(rows))
    _print_definitions(definitions)


def _print_definitions(definitions: dict[str, str]) -> None:
    """Print the definition of each metric."""
    from lora_cli.errors import printable

    for name, words in definitions.items():
        typer.echo(f"{name}: {printable(words)}")


def print_comparison(comparison: Comparison, as_json: bool) -> None:
    """Print the comparison of a new adapter with an old one."""
    from lora_cli.reporting.report import strict

    low, high = comparison.interval
    if as_json:
        facts = asdict(comparison) | {"worse": comparison.worse, "verdict": comparison.verdict}
        typer.echo(json.dumps(strict(facts), indent=2))
    else:
        cells = (comparison.old, comparison.new)
        row = [
            comparison.metric,
            *(f"{value:.4f}" for value in cells),
            f"{comparison.difference:+.4f}",
        ]
        header = [
            f"{comparison.split} ({counted(comparison.rows, 'row')})",
            "old",
            "new",
            "difference",
            "95 % interval",
        ]
        typer.echo(_table([header, [*row, f"{low:+.4f} to {high:+.4f}"]]))
        _print_definitions({comparison.metric: comparison.definition})
        typer.echo(f"interval: paired bootstrap, {comparison.resamples:,} resamples of the rows")
        typer.echo(f"verdict: {comparison.verdict}")


def print_parameters(
    table: Sequence[ParameterRow], show_all: bool, as_json: bool, init: str = "default"
) -> None:
    """Print which parameters are trained, and their numbers.

    Args:
        table: A row for each parameter of the model.
        show_all: Print every parameter, instead of a row for each kind.
        as_json: Print JSON.
        init: The recipe's `adapter.init`.
    """
    from lora_cli.adapters.count_parameters import group_rows

    total = sum(row.count for row in table)
    trainable = sum(row.count for row in table if row.trainable)
    percent = 100 * trainable / total
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "total": total,
                    "trainable": trainable,
                    "trainable_percent": round(percent, 4),
                    "init": init,
                    "parameters": [
                        {
                            "name": r.name,
                            "shape": r.shape,
                            "trainable": r.trainable,
                            "count": r.count,
                        }
                        for r in table
                    ],
                },
                indent=2,
            )
        )
        return
    rows = [["parameter", "times" if not show_all else "shape", "trained", "count"]]
    if show_all:
        rows += [
            [r.name, " x ".join(map(str, r.shape)), "yes" if r.trainable else "", f"{r.count:,}"]
            for r in table
        ]
    else:
        rows += [
            [name, str(times), "yes" if trained else "", f"{count:,}"]
            for name, times, trained, count in group_rows(table)
        ]
    typer.echo(_table(rows))
    typer.echo(f"\ntotal {total:,}  trainable {trainable:,}  ({percent:.4f} %)")
    if init in INITIALISATIONS or init.startswith("pissa"):
        typer.echo(f"init {init}: {INITIALISATIONS.get(init, INITIALISATIONS['pissa'])}")


def _table(rows: list[list[str]]) -> str:
    """Return rows as aligned columns: the first column left-aligned, the others right-aligned."""
    from lora_cli.characters import aligned

    return "\n".join(aligned(rows))
