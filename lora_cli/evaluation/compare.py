"""Test whether a new adapter is worse than an old one, with a paired bootstrap over the rows.

The rows of a test split are a sample. Each resample draws rows with replacement, the same rows for
both adapters, and computes the difference of the metric. The reported interval contains the middle
95 % of these differences (Efron and Tibshirani, 1993, chapter 13).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from lora_cli.accelerator import start_accelerator
from lora_cli.data.load_rows import SPLITS
from lora_cli.errors import LoraError, counted, did_you_mean, name_neighbours
from lora_cli.evaluation.evaluate_split import best_by, evaluate
from lora_cli.evaluation.open_adapter import load_adapted, open_task
from lora_cli.metrics import (
    MetricContext,
    builtin_value,
    channel_of,
    is_exact_match,
    known_metrics,
    lacks_answer,
    metric_mode,
    metric_of_result,
    result_names,
)
from lora_cli.metrics.entity_scores import entity_sums
from lora_cli.metrics.retrieval_scores import row_score
from lora_cli.preprocessing.cached_frozen_outputs import with_cached_frozen_outputs
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import RECIPE_FILE, AdapterSpec, Recipe, load_adapter_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Encoded, Prediction

RESAMPLES = 10_000
FEWER_RESAMPLES = 1_000  # for metrics that have to be recomputed for each resample
SEED = 0
ROUNDING = 5e-7  # relative: smaller differences may come from rounding to float32
MAX_COUNTS = 4_000_000  # in memory at once
Floats = NDArray[np.float64]


@dataclass
class Comparison:
    """The result of `lora eval --against`; `difference` is always new - old."""

    split: str
    metric: str
    mode: str
    """Whether lower (`min`) or higher (`max`) values are better."""
    rows: int
    old: float
    new: float
    difference: float
    interval: tuple[float, float]
    """Contains 95 % of the differences of the resamples."""
    resamples: int
    max_drop: float
    definition: str = ""
    """What the metric measures."""

    @property
    def drop(self) -> float:
        """How much worse the new adapter is; negative if it is better."""
        return self.difference if self.mode == "min" else -self.difference

    @property
    def worse(self) -> bool:
        """Whether the drop exceeds `max_drop`; a drop of NaN counts as too large."""
        return not self.drop <= self.max_drop

    @property
    def verdict(self) -> str:
        """The result in words."""
        low, high = self.interval
        if self.drop == 0:
            return "the new adapter is equal to the old one"
        if math.isclose(self.old, self.new, rel_tol=ROUNDING):
            return "the new adapter is equal to the old one, but for rounding"
        change = f"{'worse' if not self.drop < 0 else 'better'} by {abs(self.drop):.4f}"
        allowed = "more than" if self.worse else "within"
        limit = "" if self.drop <= 0 else f", {allowed} the {self.max_drop:g} that is allowed"
        doubt = (
            f"zero is inside the 95 % interval, so on {counted(self.rows, 'row')} "
            "that may be chance"
            if low <= 0 <= high
            else "zero is outside the 95 % interval, so that is hardly chance"
        )
        return f"the new adapter is {change}{limit}; {doubt}"


def compare(
    new: Path,
    old: Path,
    recipe: Recipe,
    metric: str | None = None,
    max_drop: float = 0.005,
    split: str | None = None,
) -> Comparison:
    """Measure two adapters on the same rows.

    Args:
        new: Folder of the new adapter.
        old: Folder of the old adapter. Only its weights are used.
        recipe: The recipe of the new adapter. Defines the base, the task and the data for both.
        metric: A built-in metric or `loss`. Default: the metric that selects the best adapter.
        max_drop: How much worse the new adapter may be.
        split: The split to measure. Default: test, or validation if there is no test split.

    Raises:
        LoraError: If there is no such split or metric, or the adapters cannot be compared.
    """
    split = _split(recipe, split)
    _reject_others(old, recipe)
    accelerator = start_accelerator(recipe)
    name, mode, measured = _metric(build_task(recipe), metric)
    recipe = recipe.with_values({"evaluate.metrics": measured, "evaluate.best": None})
    task = open_task(new, recipe)
    data = load_data(task, [split])
    new_predictions = _measure(new, task, task, data, accelerator)
    old_predictions = _measure(
        old, _loader(old, task.learned.completed(recipe)), task, data, accelerator
    )
    set_name, row_metric = recipe.data.set_of_metric(name)
    if set_name is not None:
        inside = set(data[split].rows.sets.get(set_name, np.empty(0, dtype=np.int64)).tolist())
        new_predictions, old_predictions = (
            [p for p in rows if p.row in inside] for rows in (new_predictions, old_predictions)
        )
        if not new_predictions:
            what = f"the set `{set_name}` has no {split} rows to compare by `{name}`"
            raise LoraError(what, "--metric", "name another metric, or another `--split`")
    old_value, new_value, deltas = bootstrap(row_metric, task, old_predictions, new_predictions)
    # rows without a reference do not count as compared
    channel = channel_of(measured[0]) if measured else None
    finite = deltas[np.isfinite(deltas)]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
    return Comparison(
        split,
        name,
        mode,
        len({p.row for p in new_predictions if channel is None or channel in p.metric_inputs}),
        old_value,
        new_value,
        new_value - old_value,
        (float(low), float(high)),
        len(deltas),
        max_drop,
        task.metric_definitions().get(row_metric, ""),
    )


def _split(recipe: Recipe, split: str | None) -> str:
    present = [name for name in SPLITS if recipe.data.has(name)]
    candidates = [split] if split else ["test", "validation"]
    for name in candidates:
        if name in present:
            return name
    raise LoraError(
        f"the recipe has no split `{split or 'test or validation'}`",
        recipe.at("data"),
        f"it has {', '.join(present)}; or name a file with `--input FILE`",
    )


def _reject_others(old: Path, recipe: Recipe) -> None:
    """Reject an old adapter with another base or other labels: comparing them means nothing."""
    if not old.exists():
        raise LoraError(f"there is no folder {old}", "--against", name_neighbours(old))
    if not (old / RECIPE_FILE).is_file():
        return
    old_recipe = load_adapter_recipe(old)
    for key in ("labels", "problem"):
        value, old_value = (getattr(r.task, key, None) for r in (recipe, old_recipe))
        if value is not None and old_value is not None and value != old_value:
            raise LoraError(
                f"`task.{key}` {_differ(old_value, value)}",
                "--against",
                "only adapters of the same task can be compared",
            )
    base_is_overridden = recipe.is_overridden("model.name")
    if "full" in (recipe.adapter.type, old_recipe.adapter.type) or base_is_overridden:
        return
    if old_recipe.model.name != recipe.model.name:
        raise LoraError(
            f"the old adapter was trained on `{old_recipe.model.name}`, the new one on "
            f"`{recipe.model.name}`",
            "--against",
            "if these are the same model, say where it is with `--set model.name=`",
        )


def _differ(old: Any, new: Any) -> str:
    """Describe how two values differ; for two lists, name the items that only one of them has."""
    if isinstance(old, list) and isinstance(new, list) and set(old) != set(new):
        unshared = [[x for x in a if x not in b] for a, b in ((old, new), (new, old))]
        shown = (", ".join(map(str, x[:5])) + ", …" * (len(x) > 5) or "nothing" for x in unshared)
        return "is not the same: the old adapter alone has {}; the new one {}".format(*shown)
    return f"is {old} in the old adapter and {new} in the new one"


def _loader(folder: Path, recipe: Recipe) -> Task:
    """Return the task that loads a folder, which may hold an adapter or a full model."""
    if not (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        recipe = recipe.with_values({"adapter": AdapterSpec(type="full")})
    elif recipe.adapter.type == "full":
        recipe = recipe.with_values({"adapter": AdapterSpec()})
    return open_task(folder, recipe)


def _metric(task: Task, requested: str | None) -> tuple[str, str, list[str]]:
    """Return the name of the compared result, its mode, and the metrics to measure for it."""
    name, mode = best_by(task.recipe, task)
    if requested is not None and requested != name:
        name, mode = requested, metric_mode(task.recipe.data.set_of_metric(requested)[1]) or ""
    _, row_metric = task.recipe.data.set_of_metric(name)
    measured = metric_of_result(row_metric, task.metric_channel)
    if measured is None and row_metric != "loss":
        known = ["loss", *(result for m in known_metrics() for result in result_names(m))]
        raise LoraError(
            f"`{name}` is not a metric that two adapters are compared by",
            "--metric",
            did_you_mean(name, known, "these are:"),
        )
    return name, mode, [] if measured is None else [measured]


def _measure(
    folder: Path, loader: Task, task: Task, data: dict[str, Encoded], accelerator: Accelerator
) -> list[Prediction]:
    predictions: list[Prediction] = []
    model = load_adapted(folder, loader, accelerator)
    task.fit_as(loader)
    (split,) = with_cached_frozen_outputs(task, model, data, accelerator).values()
    evaluate(model, task, split, accelerator, keep=predictions, strict_loss=True)
    return predictions


# ----------------------------------------------------------------------------------- bootstrap


def bootstrap(
    metric: str, task: Task, old: list[Prediction], new: list[Prediction]
) -> tuple[float, float, Floats]:
    """Return a metric of the old and of the new predictions, and the differences of the resamples.

    If the metric is a function of sums over rows, all resamples are one matrix product. Other
    metrics (f1, correlations, bleu) are recomputed for each of `FEWER_RESAMPLES` resamples.
    """
    generator = np.random.default_rng(SEED)
    sums = [row_sums(metric, rows, task.metric_context) for rows in (old, new)]
    if sums[0] is None or sums[1] is None:
        return _recomputed(metric, task, old, new, generator)
    value = _VALUES.get(metric, _ratio)
    table = np.concatenate([sums[0], sums[1]], axis=1)
    n = len(table)
    differences = []
    per_batch = max(1, MAX_COUNTS // n)
    for start in range(0, RESAMPLES, per_batch):
        size = min(per_batch, RESAMPLES - start)
        drawn = generator.integers(0, n, (size, n)) + np.arange(size)[:, None] * n
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        resampled = counts @ table
        differences.append(value(resampled[:, 2:]) - value(resampled[:, :2]))
    totals = table.sum(0, keepdims=True)
    new_value, old_value = float(value(totals[:, 2:])[0]), float(value(totals[:, :2])[0])
    return old_value, new_value, np.concatenate(differences)


def _ratio(totals: Floats) -> Floats:
    return totals[:, 0] / np.maximum(totals[:, 1], 1e-12)


_VALUES: dict[str, Callable[[Floats], Floats]] = {
    "perplexity": lambda totals: np.exp(np.minimum(_ratio(totals), 700.0)),
    "rmse": lambda totals: np.sqrt(_ratio(totals)),
}


def row_sums(
    metric: str, predictions: list[Prediction], context: MetricContext | None = None
) -> Floats | None:
    """Return the contribution of each row to the numerator and the denominator of a metric.

    The examples of a row are resampled together. A row without a reference contributes zeros.

    Returns:
        Shape (rows, 2); None if the metric is not a function of such sums.
    """
    context = MetricContext() if context is None else context
    per_example: list[tuple[float, float]]
    if metric == "loss":
        if len(predictions[0].losses) > 1:  # a sum of means with different denominators
            return None
        per_example = [pair for p in predictions for pair in p.losses.values()]
    elif metric == "perplexity":
        per_example = [p.metric_inputs["nll"] for p in predictions]
    elif metric in result_names("seqeval") and "tags" in predictions[0].metric_inputs:
        per_example = [entity_sums(metric, *p.metric_inputs["tags"]) for p in predictions]
    elif metric in result_names("retrieval"):  # a mean over the rows with relevant documents
        ranks = (p.metric_inputs.get("ranks") for p in predictions)
        per_example = [
            (0.0, 0.0) if entry is None else (row_score(metric, *entry), 1.0) for entry in ranks
        ]
    elif metric in _SCORES:  # a mean over the rows with a reference
        channel, score = channel_of("rouge" if metric in _ROUGE else metric) or "", _SCORES[metric]
        pairs = (p.metric_inputs.get(channel) for p in predictions)
        scores = [None if pair is None else score(*pair, context) for pair in pairs]
        per_example = [(0.0, 0.0) if entry is None else (float(entry), 1.0) for entry in scores]
    else:
        return None
    rows = np.unique([p.row for p in predictions], return_inverse=True)[1]
    table = np.zeros((int(rows.max()) + 1, 2))
    np.add.at(table, rows, np.array(per_example, dtype=np.float64))
    return table


_ROUGE = result_names("rouge")


def _rouge_of(name: str) -> Callable[[Any, Any, MetricContext], float]:
    return lambda predicted, expected, context: builtin_value(
        "rouge", name, [predicted], [expected], context
    )


_SCORES: dict[str, Callable[[Any, Any, MetricContext], float | None]] = {
    "accuracy": lambda predicted, expected, _: float(predicted == expected),
    "exact_match": is_exact_match,
    "no_answer": lacks_answer,
    "mse": lambda predicted, expected, _: (predicted - expected) ** 2,
    "rmse": lambda predicted, expected, _: (predicted - expected) ** 2,
    "mae": lambda predicted, expected, _: abs(predicted - expected),
    **{name: _rouge_of(name) for name in _ROUGE},
}


def _recomputed(
    metric: str,
    task: Task,
    old: list[Prediction],
    new: list[Prediction],
    generator: np.random.Generator,
) -> tuple[float, float, Floats]:
    name = metric_of_result(metric, task.metric_channel)
    assert name is not None, metric
    channel = channel_of(name) or ""
    old_pairs, new_pairs = (
        [p.metric_inputs[channel] for p in rows if channel in p.metric_inputs]
        for rows in (old, new)
    )

    def value(pairs: list[tuple[Any, Any]], indices: Any) -> float:
        predicted, expected = zip(*(pairs[i] for i in indices), strict=True)
        return builtin_value(name, metric, list(predicted), list(expected), task.metric_context)

    n = len(new_pairs)
    every_row = range(n)
    draws = (generator.integers(0, n, n) for _ in range(FEWER_RESAMPLES))
    differences = [value(new_pairs, draw) - value(old_pairs, draw) for draw in draws]
    return value(old_pairs, every_row), value(new_pairs, every_row), np.array(differences)
