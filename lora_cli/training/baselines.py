"""Baselines for an adapter: the most common answer, training the head alone, the untrained base.

The adapter is trained first, and its report is complete before any baseline is measured; `--resume`
measures the missing ones. The head alone is trained by the same loop, in `baselines/none/`.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState, PartialState

from lora_cli.errors import counted
from lora_cli.evaluation.evaluate_split import best_by, build_metrics
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import AdapterSpec, Learned, Recipe
from lora_cli.reporting import write_model_card, write_page, write_report
from lora_cli.reporting.page_analysis import finite, read_predictions
from lora_cli.reporting.report import part, shown_number
from lora_cli.reporting.verdict import MANY_ROWS, is_clear, measured_rows
from lora_cli.tasks import build_task, build_training_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import IGNORED, Encoded
from lora_cli.training import run as training_run
from lora_cli.training.mirror import mirror_result

HELD_OUT = ("validation", "test")
NAMES = {"majority": "the commonest answer", "none": "the head alone", "base": "the base"}
Metrics = dict[str, dict[str, float]]


def train(recipe: Recipe, resume: bool = False) -> dict[str, Any]:
    """Train as `training_run.train` does, then measure the baselines of the recipe.

    Returns:
        The report, with `baselines` (metrics by name and split) and `verdict`.
    """
    learned = Learned()
    report = training_run.train(recipe, resume, learned)
    recipe = learned.completed(recipe)
    names = recipe.evaluate.baselines
    if not set(names) <= set(part(report, "baselines")):
        _measure_all(names, recipe, report)
    if PartialState().is_main_process:
        mirror_result(recipe)
    return report


def _measure_all(names: Sequence[str], recipe: Recipe, report: dict[str, Any]) -> None:
    """Add the missing baselines and the verdict to the report."""
    known = part(report, "baselines")
    report["baselines"] = {
        name: known[name] if name in known else _measure(name, recipe, report) for name in names
    }
    report["verdict"] = verdict(
        report, *best_by(recipe, build_task(recipe)), folder=recipe.output_path
    )
    if PartialState().is_main_process:
        write_model_card(recipe.output_path, recipe, report)
        write_page(recipe.output_path, report)
        write_report(recipe.output_path, report)


def _measure(name: str, recipe: Recipe, report: dict[str, Any]) -> Metrics:
    match name:
        case "majority":
            task = build_training_task(recipe)
            task.load_processor()
            return majority(task, load_data(task))
        case "none":
            return _head_alone(recipe)
    return dict(part(report, "metrics", "before"))


def majority(task: Task, data: dict[str, Encoded]) -> Metrics:
    """Return the metrics of a constant answer: the train split's most common label, or its mean.

    With several labels per row, the answer has each label that more than half of the rows have.
    """
    train = [label for label in data["train"].examples["labels"][:] if not _is_missing(label)]
    answer: Any
    if task.metric_channel == "value":
        answer = float(np.mean(train))
    elif isinstance(train[0], list):
        answer = [int(share > 0.5) for share in np.mean(train, axis=0)]
    else:
        answer = Counter(train).most_common(1)[0][0]
    metrics_by_split = {}
    for name in HELD_OUT:
        if name in data:
            metrics = build_metrics(task)
            references = data[name].examples["labels"][:]
            metrics.add_batch(task.metric_channel, [answer] * len(references), references)
            metrics_by_split[name] = metrics.compute()
    return metrics_by_split


def _is_missing(label: Any) -> bool:
    """Return whether a train row has no label, which is allowed with a teacher."""
    first = label[0] if isinstance(label, list) and label else label
    return bool(first == IGNORED)


def _head_alone(recipe: Recipe) -> Metrics:
    """Train only the head with the same recipe, and return its metrics."""
    folder = recipe.output_path / "baselines" / "none"
    head = recipe.with_values(
        {
            "adapter": AdapterSpec(type="none", train_modules=recipe.adapter.train_modules),
            "evaluate.baselines": [],
            "evaluate.baseline": False,
            "train.trackers": [],
            "checkpoint.mirror": None,
            "output_dir": str(folder),
        }
    )
    started = (folder / "recipe.yaml").exists()
    state = PartialState()
    if not started and state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    if state.is_main_process:
        sys.stderr.write("\nbaseline `none`: the same recipe with the head alone\n")
    state.wait_for_everyone()
    # full fine-tuning may use autocast where training the head alone does not
    AcceleratorState._reset_state()
    return dict(training_run.train(head, resume=started)["metrics"]["after"])


def verdict(
    report: dict[str, Any], metric: str, mode: str, folder: Path | None = None
) -> dict[str, Any]:
    """Return whether the adapter beats the best of its baselines, also in words.

    `passed` is None if there are no held-out rows, or if the difference may be due to chance.

    Args:
        report: The report, with `metrics` and `baselines`.
        metric: The metric to compare, on validation, or on test if there is no validation split.
        mode: Whether lower (`min`) or higher (`max`) values are better.
        folder: Contains the predictions, whose losses give the uncertainty of the mean loss.
    """
    after = part(report, "metrics", "after")
    split = next((name for name in HELD_OUT if name in after), None)
    if split is None:
        return {"passed": None, "words": "nothing is held out to judge the adapter by"}
    lines = [] if folder is None else read_predictions(folder / "predictions" / f"{split}.jsonl")
    sign = 1 if mode == "max" else -1

    def score(value: Any) -> float:
        is_number = isinstance(value, int | float) and math.isfinite(value)
        return sign * value if is_number else -math.inf

    values = {
        name: part(report, "baselines", name, split).get(metric) for name in report["baselines"]
    }
    own_value = after[split].get(metric)
    best = max(values, key=lambda name: score(values[name]))
    passed: bool | None = score(own_value) > score(values[best])
    opponent = f"{NAMES[best]} (`{best}`, {shown_number(values[best])}) in {metric} on {split}"
    shown = f"the adapter ({shown_number(own_value)})"
    words = f"{shown} {'beats' if passed else 'FAILS to beat'} {opponent}"
    rows = measured_rows(report, split, metric)
    if not is_clear(
        metric.rpartition("/")[2], finite(values[best]), finite(own_value), rows, lines
    ):
        passed = None
        words = f"no clear difference on {counted(rows, 'row')} between {shown} and {opponent}"
        if rows < MANY_ROWS:
            too_few = f"{counted(rows, 'row')} {'is' if rows == 1 else 'are'} too few"
            words = f"{too_few} to tell whether {shown} beats {opponent}"
    facts = {"metric": metric, "split": split, "adapter": own_value}
    return {"passed": passed, "words": words, **facts, "baseline": best, "value": values[best]}
