"""Evaluate a model on a split: its loss, its metrics, and a prediction for each row.

Training, `lora eval` and `lora eval --against` all use `evaluate`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from lora_cli.characters import first_characters
from lora_cli.errors import LoraError, NumericsError, warn
from lora_cli.metrics import MetricSet, metric_mode, result_names
from lora_cli.preprocessing.batch_plan import Indices
from lora_cli.recipe import Recipe
from lora_cli.reporting.report import strict
from lora_cli.tasks.contract import Task, prepared_for_evaluation
from lora_cli.tasks.examples import MAIN, Encoded, Prediction
from lora_cli.tasks.finite_scores import likely_cause
from lora_cli.unexpected_errors import phase

WINDOW = 64  # batches whose examples are sorted by length together
TEXT_LENGTH = 500  # characters of a row that are saved next to its prediction


class Stop(Protocol):
    """Something that can interrupt an evaluation, such as a signal."""

    def is_noted(self) -> bool:
        """Return whether this process was asked to stop."""

    def check(self) -> None:
        """Raise an exception if any process was asked to stop. All processes call it together."""


def build_metrics(task: Task, may_lack_rows: bool = False) -> MetricSet:
    """Return the recipe's metrics, or the task's default metrics."""
    place, context = task.recipe.at("evaluate.metrics"), task.metric_context
    metrics = MetricSet(task.metric_names, task.metric_channel, context, place, may_lack_rows)
    task.check_metrics(set(metrics.channels))
    return metrics


def best_by(recipe: Recipe, task: Task) -> tuple[str, str]:
    """Return the metric that selects the best adapter, and whether `min` or `max` is better."""
    best = recipe.evaluate.best
    if best is not None:
        _, measured = recipe.data.set_of_metric(best.metric)
        return best.metric, best.mode or metric_mode(measured) or "max"
    name = result_names(task.metric_names[0])[0] if task.metric_names else "loss"
    mode = metric_mode(name)
    return (name, mode) if mode else ("loss", "min")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    split: Encoded,
    accelerator: Accelerator,
    predictions: Path | None = None,
    keep: list[Prediction] | None = None,
    stop: Stop | None = None,
    strict_loss: bool = False,
) -> dict[str, float]:
    """Return the loss and the metrics of a model on a split, the same in every process.

    Only the inputs of the metrics are kept in memory, never the logits.

    Args:
        model: The model; it is put into eval mode during the evaluation.
        task: Computes the predictions.
        split: The encoded rows.
        accelerator: The device, the precision and the processes.
        predictions: A file to write, with one line per prediction, in the order of the rows.
        keep: A list that gets every prediction, in the same order.
        stop: Checked after each batch; may interrupt the evaluation.
        strict_loss: Raise an error if a row's loss is NaN or infinite.

    Raises:
        LoraError: If no row has a reference for one of the metrics.
        NumericsError: If `strict_loss` is set and a row's loss is NaN or infinite.
    """
    recipe = task.recipe
    size = recipe.evaluate.micro_batch_size or 2 * task.micro_batch
    sets, main = split.rows.sets, accelerator.is_main_process
    scores = _Scores(task)
    set_scores = {name: _Scores(task, may_lack_rows=True) for name in sets}
    task.choose_rows_to_answer([len(positions) for positions in sets.values()] or [len(split.rows)])
    with _whole_file(predictions if main else None) as file, eval_mode(model):
        joiner = _RowJoiner(task, split)
        for window, is_last in _with_last(_windows(task, split, size)):
            rows = _predict_window(model, task, split, window, accelerator, stop)
            if stop is not None:
                stop.check()
            if strict_loss:
                _reject_bad_loss(rows, split, model, recipe)
            rows = joiner.add(rows, is_last)
            if main:
                scores.add(rows)
                for name, of_set in set_scores.items():
                    of_set.add([row for row in rows if split.rows.set_of(row.row) == name])
            if keep is not None:
                keep += rows
            if file is not None:
                file.writelines(_line(row, split, task) for row in rows)
    if warnings := task.take_warnings():
        for line in warnings if main else ():
            warn(f"while answering: {line}")
    if main and (missing := scores.metrics.without_rows):
        raise _no_reference(missing, split, recipe)
    results: list[dict[str, float]] = [scores.results() if main else {}]
    for name, of_set in set_scores.items() if main else ():
        results[0] |= {f"{name}/{key}": value for key, value in of_set.results().items()}
    return dict(gather_object(results)[0])


class _Scores:
    """Sums the losses of rows, and collects the inputs of their metrics."""

    def __init__(self, task: Task, may_lack_rows: bool = False) -> None:
        self.task, self.metrics = task, build_metrics(task, may_lack_rows)
        self.sums = {term: [0.0, 0.0] for term in task.loss_weights}

    def add(self, rows: list[Prediction]) -> None:
        """Add the predictions for some rows."""
        for term, total in self.sums.items():
            total[0] += sum(row.losses[term][0] for row in rows)
            total[1] += sum(row.losses[term][1] for row in rows)
        for channel in self.metrics.channels:
            pairs = [r.metric_inputs[channel] for r in rows if channel in r.metric_inputs]
            if pairs:
                self.metrics.add_batch(channel, [p for p, _ in pairs], [r for _, r in pairs])

    def results(self) -> dict[str, float]:
        """Return the losses and the metrics, except metrics for which no row has a reference."""
        return {**_mean_losses(self.task, self.sums), **self.metrics.compute()}


@contextmanager
def _whole_file(path: Path | None) -> Iterator[TextIO | None]:
    """Yield a file that appears at `path` if the block ends without an error; None for None."""
    if path is None:
        yield None
        return
    part = path.with_name(f".{path.name}.tmp")
    with part.open("w", encoding="utf-8") as file:
        yield file
    part.replace(path)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode within the context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _mean_losses(task: Task, sums: dict[str, list[float]]) -> dict[str, float]:
    """Return the loss, which is the weighted sum of its terms' means, and the mean of each term.

    Terms without items are omitted, such as the term for labels if no row has a label. A main term
    without other terms is omitted too, since it is the loss itself.
    """
    means = {term: total / count for term, (total, count) in sums.items() if count}
    weights = task.loss_weights
    loss = sum(weights[term] * mean for term, mean in means.items()) if means else math.nan
    several = len(sums) > 1 and (len(means) > 1 or MAIN not in means)
    result = {task.result_of_term(term): mean for term, mean in means.items() if several}
    return {"loss": loss, **result}


def _no_reference(metrics: list[str], split: Encoded, recipe: Recipe) -> LoraError:
    """Return the error for a split in which no row has a reference for these metrics."""
    named = " and ".join(f"`{name}`" for name in metrics)
    need = f"metric {named} compares" if len(metrics) == 1 else f"the metrics {named} compare"
    what = f"no row of {split.rows.source} has a label or an answer, which {need} with"
    hint = "name rows that have one, for example `--set data.test=FILE`; or measure the loss alone"
    return LoraError(what, recipe.at("evaluate.metrics"), f"{hint}: `--set 'evaluate.metrics=[]'`")


def _reject_bad_loss(
    rows: list[Prediction], split: Encoded, model: nn.Module, recipe: Recipe
) -> None:
    for row in rows:
        for loss, _ in row.losses.values():
            if not math.isfinite(loss):
                what = f"the model's loss on this row is {loss}"
                place = split.rows.place(row.row)
                raise NumericsError(what, place, likely_cause(model, recipe))


def _windows(task: Task, split: Encoded, size: int) -> Iterator[list[Indices]]:
    """Yield windows of rows, each split into batches of examples of similar length.

    Rows for which an answer is generated come first in a window: generation is token by token,
    which takes as long for a few rows as for a full batch.
    """
    is_last = np.array([not task.is_answered(row) for row in split.examples["row"][:]], dtype=bool)
    for start in range(0, len(split), size * WINDOW):
        window = np.arange(start, min(start + size * WINDOW, len(split)))
        window = window[np.lexsort((-split.lengths[window], is_last[window]))]
        yield [window[i : i + size] for i in range(0, len(window), size)]


def _predict_window(
    model: nn.Module,
    task: Task,
    split: Encoded,
    batches: list[Indices],
    accelerator: Accelerator,
    stop: Stop | None,
) -> list[Prediction]:
    """Return the predictions of a window in the order of its examples, on every process."""
    own: list[tuple[int, Prediction]] = []
    for indices in batches[accelerator.process_index :: accelerator.num_processes]:
        if stop is not None and stop.is_noted():
            break  # the other processes learn of it when the predictions are gathered
        examples = split.examples.__getitems__(indices.tolist())
        prepared = [prepared_for_evaluation(task, example) for example in examples]
        batch = task.batch(prepared).to(accelerator.device)
        first = split.rows.place(batch.rows[0])
        with phase(f"evaluating {first} and the rows after it"), accelerator.autocast():
            predictions = task.predict(model, batch)
        own += zip(indices.tolist(), predictions, strict=True)
    for _, prediction in own:
        _add_nll(prediction)
    gathered: list[tuple[int, Prediction]] = gather_object(own)
    return [prediction for _, prediction in sorted(gathered, key=lambda pair: pair[0])]


def _add_nll(prediction: Prediction) -> None:
    """Add the input of perplexity, if the loss has a main term."""
    if MAIN in prediction.losses:
        prediction.metric_inputs.setdefault("nll", prediction.losses[MAIN])


def _with_last(windows: Iterator[list[Indices]]) -> Iterator[tuple[list[Indices], bool]]:
    """Yield each window, and whether it is the last."""
    previous = next(windows, None)
    for window in windows:
        assert previous is not None
        yield previous, False
        previous = window
    if previous is not None:
        yield previous, True


class _RowJoiner:
    """Joins the predictions for the parts of a row, such as chunks of a long text, into one.

    The parts of a row are consecutive, and may continue in the next window. Tasks that compare
    the rows of a split with each other get the predictions of all rows after the last window.
    """

    def __init__(self, task: Task, split: Encoded) -> None:
        self.task, self.split = task, split
        self.waiting: list[Prediction] = []

    def add(self, parts: list[Prediction], is_last: bool) -> list[Prediction]:
        """Add the predictions for the next examples; return one for each row that is complete."""
        if self.task.compares_rows:
            self.waiting += parts
            return self.task.compared(self.waiting, self.split) if is_last else []
        if not self.task.joins_examples:
            return parts
        parts = self.waiting + parts
        rows = [list(group) for _, group in groupby(parts, key=lambda part: part.row)]
        self.waiting = [] if is_last or not rows else rows.pop()
        return [self._join(row) for row in rows]

    def _join(self, parts: list[Prediction]) -> Prediction:
        joined = self.task.join(self.split.rows[parts[0].row], parts)
        for term in parts[0].losses:
            sums = [part.losses[term] for part in parts]
            joined.losses[term] = (sum(loss for loss, _ in sums), sum(count for _, count in sums))
        _add_nll(joined)
        return joined


def _line(prediction: Prediction, split: Encoded, task: Task) -> str:
    row, reference = split.rows[prediction.row], prediction.reference
    if reference is None and (text := task.shown_reference(row)):
        reference = _shortened(text)
    loss, n_items = prediction.weighted_loss(task.loss_weights)
    line: dict[str, Any] = {
        "row": prediction.row,
        "place": split.rows.place(prediction.row),
        "text": _shortened(task.shown_input(row)),
        "reference": reference,
        "prediction": prediction.prediction,
        "loss": loss,
        "n_items": n_items,
    }
    line["set"] = split.rows.set_of(prediction.row)
    if prediction.scores is not None:
        line["scores"] = {name: round(score, 6) for name, score in prediction.scores.items()}
    line |= prediction.details
    present = {key: value for key, value in line.items() if value is not None}
    return json.dumps(strict(present), ensure_ascii=False) + "\n"


def _shortened(text: str) -> str:
    """Return the beginning of a text, for people to read."""
    if len(text) <= TEXT_LENGTH:
        return text
    return first_characters(text, TEXT_LENGTH - 1) + "…"
