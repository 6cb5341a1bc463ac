"""The one evaluation that training and `lora eval` share."""

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

from lora_cli.accelerator import start_accelerator
from lora_cli.characters import first_characters
from lora_cli.data.detect_format import read_head
from lora_cli.data.input_files import input_form
from lora_cli.data.load_rows import SPLITS
from lora_cli.data.media_folder import media_files
from lora_cli.errors import LoraError, NumericsError, require_file, warn
from lora_cli.evaluation.open_adapter import load_adapted, open_task
from lora_cli.metrics import MetricSet, metric_mode, result_names
from lora_cli.preprocessing.batch_plan import Indices
from lora_cli.preprocessing.cached_frozen_outputs import with_frozen_outputs
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import Learned, Recipe
from lora_cli.reporting.report import strict
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task, prepared_for_evaluation
from lora_cli.tasks.examples import MAIN, Encoded, Prediction
from lora_cli.tasks.finite_scores import likely_cause
from lora_cli.unexpected_errors import phase

WINDOW = 64  # batches whose examples are sorted by length together
TEXT_LENGTH = 500  # characters of a row that stand beside its prediction


class Stop(Protocol):
    """What can break an evaluation off."""

    def is_noted(self) -> bool:
        """Return whether this process was asked to stop."""

    def check(self) -> None:
        """Raise if any process was asked to; all of them call it at the same place."""


def build_metrics(task: Task, may_lack_rows: bool = False) -> MetricSet:
    """Return the recipe's metrics, or the task's own."""
    at, context = task.recipe.at("evaluate.metrics"), task.metric_context
    metrics = MetricSet(task.metric_names, task.metric_channel, context, at, may_lack_rows)
    task.check_metrics(set(metrics.channels))
    return metrics


def best_by(recipe: Recipe, task: Task) -> tuple[str, str]:
    """Return the metric that chooses the best adapter, and whether `min` or `max` is better."""
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
    """Return the loss and the metrics of a model on a split; every process gets them.

    Only what the metrics read is kept of a batch, never its logits.

    Args:
        model: The model; it is put into eval mode, and back.
        task: What the rows mean.
        split: The encoded rows.
        accelerator: Precision and processes.
        predictions: File that gets a line for every example, in the order of the rows.
        keep: List that gets every prediction, in the same order.
        stop: Is asked after each batch whether to go on.
        strict_loss: Reject a loss that is NaN or infinity.

    Raises:
        NumericsError: With the place of the first row that has such a loss.
    """
    recipe = task.recipe
    size = recipe.evaluate.micro_batch_size or 2 * task.micro_batch
    sets, main = split.rows.sets, accelerator.is_main_process
    scores = _Scores(task)
    of_sets = {name: _Scores(task, may_lack_rows=True) for name in sets}
    task.choose_rows_to_answer([len(positions) for positions in sets.values()] or [len(split.rows)])
    with _whole_file(predictions if main else None) as file, eval_mode(model):
        joined = _Joined(task, split)
        for window, is_last in _with_last(_windows(split, size)):
            rows = _predict_window(model, task, split, window, accelerator, stop)
            if stop is not None:
                stop.check()
            if strict_loss:
                _reject_bad_loss(rows, split, model, recipe)
            rows = joined.add(rows, is_last)
            if main:
                scores.add(rows)
                for name, part in of_sets.items():
                    part.add([row for row in rows if split.rows.set_of(row.row) == name])
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
    for name, part in of_sets.items() if main else ():
        results[0] |= {f"{name}/{key}": value for key, value in part.results().items()}
    return dict(gather_object(results)[0])


class _Scores:
    """Adds up the losses and the metrics of rows."""

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
        """Return the losses and the metrics; a metric for which no row has a reference is none."""
        return {**_mean_losses(self.task, self.sums), **self.metrics.compute()}


@contextmanager
def _whole_file(path: Path | None) -> Iterator[TextIO | None]:
    """Yield a file that takes its place once the block ends well; None where none is wanted."""
    if path is None:
        yield None
        return
    part = path.with_name(f".{path.name}.tmp")
    with part.open("w", encoding="utf-8") as file:
        yield file
    part.replace(path)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _mean_losses(task: Task, sums: dict[str, list[float]]) -> dict[str, float]:
    """Return the loss: the weighted sum of its terms' means, and each term if there are several.

    A term without items, such as that of the labels where no row has one, counts nothing; the main
    one alone is the loss itself, and is not said twice.
    """
    means = {term: total / count for term, (total, count) in sums.items() if count}
    weights = task.loss_weights
    loss = sum(weights[term] * mean for term, mean in means.items()) if means else math.nan
    several = len(sums) > 1 and (len(means) > 1 or MAIN not in means)
    named = {task.result_of_term(term): mean for term, mean in means.items() if several}
    return {"loss": loss, **named}


def _no_reference(metrics: list[str], split: Encoded, recipe: Recipe) -> LoraError:
    """Return the error of a split none of whose rows has what metrics compare with."""
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


def _windows(split: Encoded, size: int) -> Iterator[list[Indices]]:
    """Yield batches of similar length, a window of rows at a time."""
    for start in range(0, len(split), size * WINDOW):
        window = np.arange(start, min(start + size * WINDOW, len(split)))
        window = window[np.argsort(-split.lengths[window], kind="stable")]
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
    mine: list[tuple[int, Prediction]] = []
    for indices in batches[accelerator.process_index :: accelerator.num_processes]:
        if stop is not None and stop.is_noted():
            break  # the other processes wait for this one, and learn of it then
        examples = split.examples.__getitems__(indices.tolist())
        prepared = [prepared_for_evaluation(task, example) for example in examples]
        batch = task.batch(prepared).to(accelerator.device)
        first = split.rows.place(batch.rows[0])
        with phase(f"evaluating {first} and the rows after it"), accelerator.autocast():
            predictions = task.predict(model, batch)
        mine += zip(indices.tolist(), predictions, strict=True)
    for _, prediction in mine:
        _add_nll(prediction)
    together: list[tuple[int, Prediction]] = gather_object(mine)
    return [prediction for _, prediction in sorted(together, key=lambda pair: pair[0])]


def _add_nll(prediction: Prediction) -> None:
    """Add what perplexity is computed of, if the loss has such a term."""
    if MAIN in prediction.losses:
        prediction.metric_inputs.setdefault("nll", prediction.losses[MAIN])


def _with_last(windows: Iterator[list[Indices]]) -> Iterator[tuple[list[Indices], bool]]:
    """Yield each window, and whether it is the last."""
    before = next(windows, None)
    for window in windows:
        assert before is not None
        yield before, False
        before = window
    if before is not None:
        yield before, True


class _Joined:
    """Joins the examples of a row to one prediction, where the task's rows have one answer.

    The examples of a row stand side by side; the last row of a window may go on in the next. Where
    the rows of a split are compared with each other, all wait for the last.
    """

    def __init__(self, task: Task, split: Encoded) -> None:
        self.task, self.split = task, split
        self.waiting: list[Prediction] = []

    def add(self, parts: list[Prediction], is_last: bool) -> list[Prediction]:
        """Return the predictions of the rows that are complete, given the next examples."""
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
        found = self.task.join(self.split.rows[parts[0].row], parts)
        for term in parts[0].losses:
            sums = [part.losses[term] for part in parts]
            found.losses[term] = (sum(loss for loss, _ in sums), sum(count for _, count in sums))
        _add_nll(found)
        return found


def _line(prediction: Prediction, split: Encoded, task: Task) -> str:
    row, reference = split.rows[prediction.row], prediction.reference
    if reference is None and (wanted := task.shown_reference(row)):
        reference = _shortened(wanted)
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
    kept = {key: value for key, value in line.items() if value is not None}
    return json.dumps(strict(kept), ensure_ascii=False) + "\n"


def _shortened(text: str) -> str:
    """Return the beginning of a text, to be read by a person."""
    if len(text) <= TEXT_LENGTH:
        return text
    return first_characters(text, TEXT_LENGTH - 1) + "…"


def measuring_file(recipe: Recipe, file: Path) -> Recipe:
    """Return a recipe whose test split is a file, and that holds out nothing else.

    Raises:
        LoraError: If there is no such file, or the labels would have to be found on the Hub.
    """
    is_folder = file.is_dir() and bool(media_files(file, recipe))
    if not is_folder:
        require_file(file, "--input")
    path, data = str(file.absolute()), recipe.data
    values: dict[str, Any] = {"data.validation": None, "data.test": path, "data.streaming": False}
    values["data.mix"] = {}
    columns = build_task(recipe)
    wanted = [*columns.input_columns().values(), *columns.target_columns().values()]
    if not is_folder:
        values["data.format"] = input_form(file, read_head(file), data.format, wanted)
    if data.mix:  # whose names the metrics of the file do not have
        values["evaluate.best"] = None
    if data.name is not None or data.mix:
        if not columns.knows_labels:
            raise LoraError(
                "the labels are not known",
                recipe.at("task.labels"),
                "name them in the order of the model's outputs: `--set 'task.labels=[no, yes]'`",
            )
        if columns.reads_train:
            hint = "name them in the recipe, or leave them out"
            at = recipe.at("task.class_weights")
            raise LoraError("the weights of the labels are not known", at, hint)
        # nothing reads the train split, as the labels are known
        values |= {"data.name": None, "data.config": None, "data.train": path}
    return recipe.with_values(values)


def definitions_of(recipe: Recipe) -> dict[str, str]:
    """Return what the loss and the metrics of a recipe measure, in a line each.

    Args:
        recipe: It names its labels, as that of an adapter does.
    """
    return build_task(recipe).metric_definitions()


def evaluate_adapter(
    folder: Path, recipe: Recipe, split: str | None = None, learned: Learned | None = None
) -> dict[str, dict[str, float]]:
    """Return the metrics of a saved adapter, by split; the data are checked before the weights.

    Args:
        folder: The adapter's folder.
        recipe: Says the task and the data.
        split: The split to measure; None measures validation and test.
        learned: Gets what the rows teach, such as the labels.

    Raises:
        NumericsError: If a row's loss is NaN or infinity.
    """
    present = [name for name in SPLITS if recipe.data.has(name)]
    wanted = [name for name in present if name == split or (not split and name != "train")]
    if not wanted:
        raise LoraError(
            f"the recipe has no split `{split or 'validation or test'}`",
            recipe.at("data"),
            f"it has {', '.join(present)}; or name a file with `--input FILE`",
        )
    if "train" in wanted and recipe.data.streaming:
        hint = "`--set data.streaming=false` reads it as a whole"
        raise LoraError("train is streamed: it has no end", recipe.at("data.streaming"), hint)
    accelerator = start_accelerator(recipe)
    task = open_task(folder, recipe, learned)
    data = load_data(task, wanted)
    said = (task.unknown_input(name, data[name].rows, data[name].examples)[1] for name in wanted)
    if warning := next(filter(None, said), None):
        warn(warning)
    model = load_adapted(folder, task, accelerator)
    splits = with_frozen_outputs(task, model, {name: data[name] for name in wanted}, accelerator)
    return {
        name: evaluate(model, task, encoded, accelerator, strict_loss=True)
        for name, encoded in splits.items()
    }
