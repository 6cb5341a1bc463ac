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


STARTS = {
    "pissa": "at the largest singular values of the weights; saved as LoRA of twice the rank",
    "olora": "at the QR decomposition of the weights; saved as LoRA of twice the rank",
    "eva": "at the main directions of the train rows, which also decide the rank of each module",
    "loftq": "at what quantising has taken from the weights; for this quantised base alone",
    "orthogonal": "at random, with B A = 0",
}


def print_results(recipe: Recipe, report: dict[str, Any]) -> None:
    """Print the results of a run, and where its files are."""
    from lora_cli.reporting import results_table

    rows = results_table(report)
    if len(rows) > 1:
        wide = len(rows[0]) > 5  # with baselines there are more columns than a terminal has room
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
    """Print metrics by split, and what they measure; the split of a file is called by its name."""
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    rows = [["metric", *([source.name] if source is not None else results)]]
    rows += [
        [name, *(f"{metrics[name]:.4f}" if name in metrics else "" for metrics in results.values())]
        for name in names
    ]
    typer.echo(_table(rows))
    _print_definitions(definitions)


def _print_definitions(definitions: dict[str, str]) -> None:
    """Print what each metric measures."""
    from lora_cli.errors import printable

    for name, words in definitions.items():
        typer.echo(f"{name}: {printable(words)}")


def print_comparison(found: Comparison, as_json: bool) -> None:
    """Print the comparison of a new adapter with an old one."""
    from lora_cli.reporting.report import strict

    low, high = found.interval
    if as_json:
        facts = asdict(found) | {"worse": found.worse, "verdict": found.verdict}
        typer.echo(json.dumps(strict(facts), indent=2))
    else:
        cells = (found.old, found.new)
        row = [found.metric, *(f"{value:.4f}" for value in cells), f"{found.difference:+.4f}"]
        header = [
            f"{found.split} ({counted(found.rows, 'row')})",
            "old",
            "new",
            "difference",
            "95 % interval",
        ]
        typer.echo(_table([header, [*row, f"{low:+.4f} to {high:+.4f}"]]))
        _print_definitions({found.metric: found.definition})
        typer.echo(f"interval: paired bootstrap, {found.resamples:,} resamples of the rows")
        typer.echo(f"verdict: {found.verdict}")


def print_parameters(
    table: Sequence[ParameterRow], every: bool, as_json: bool, start: str = "default"
) -> None:
    """Print which parameters are trained, and their numbers.

    Args:
        table: A row for each parameter of the model.
        every: Print them all, and not a row for each kind.
        as_json: Print JSON.
        start: The recipe's `adapter.init`.
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
                    "init": start,
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
    rows = [["parameter", "times" if not every else "shape", "trained", "count"]]
    if every:
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
    if start in STARTS or start.startswith("pissa"):
        typer.echo(f"start {start}: {STARTS.get(start, STARTS['pissa'])}")


def _table(rows: list[list[str]]) -> str:
    """Return rows as aligned columns, the first to the left, the others to the right."""
    from lora_cli.characters import aligned

    return "\n".join(aligned(rows))
