"""The figures of the page that are computed from a run's predictions and its log.

Everything is computed from the report, the log and the lines of `predictions/*.jsonl`. A line that
lacks what a figure needs is left out of that figure.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_cli.reporting.report import part

Line = dict[str, Any]
Kind = Literal[
    "single_label", "multi_label", "regression", "text", "spans", "transcript", "retrieval",
    "boxes", "other",
]  # fmt: skip
Word = tuple[str | None, str | None]  # one that was said, and what was written for it
OF_LINES = (  # which need predictions
    "single_label", "multi_label", "regression", "spans", "transcript", "retrieval",
    "boxes",
)  # fmt: skip
SMALLER_IS_BETTER = {
    "loss", "perplexity", "mse", "rmse", "mae", "wer", "cer", "ter", "no_answer", "mel_l1",
    "length_error",
}  # fmt: skip
BINS = 10


def read_predictions(path: Path) -> list[Line]:
    """Return the lines of a file of predictions, skipping lines that are not JSON objects."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def finite(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def kind_of(report: dict[str, Any], lines: Sequence[Line]) -> Kind:
    """Return which kind of answers a run's predictions are."""
    kind: Kind | None = report.get("answers")
    if kind is not None:
        return kind if kind == "text" or (lines and kind in OF_LINES) else "other"
    # of a report that an earlier version wrote, the lines have to say it
    reference = next((r for line in lines if (r := line.get("reference")) is not None), None)
    if isinstance(reference, list):
        return "multi_label"
    if isinstance(reference, str):
        is_label = bool(part(report, "data", "train", "labels")) or "scores" in lines[0]
        return "single_label" if is_label else "text"
    return "text" if reference is None else "regression"


# --------------------------------------------------------------------------------- classification


def label_names(report: dict[str, Any], lines: Iterable[Line]) -> list[str]:
    """Return the labels in the order of the model's outputs, with any other that stands in rows."""
    names = dict.fromkeys(str(name) for name in part(report, "data", "train", "labels"))
    for line in lines:
        names |= dict.fromkeys(line.get("scores") or ())
        for key in ("reference", "prediction"):
            names |= dict.fromkeys(_as_set(line.get(key)))
    return list(names)


def _as_set(value: Any) -> dict[str, None]:
    """Return the labels of an answer, in order."""
    return dict.fromkeys(map(str, value if isinstance(value, list) else [value]))


def confusion(labels: Sequence[str], lines: Iterable[Line]) -> list[list[int]]:
    """Return the confusion matrix: [i][j] counts the rows of label i with the prediction j."""
    at = {label: i for i, label in enumerate(labels)}
    matrix = [[0] * len(labels) for _ in labels]
    for line in lines:
        i, j = at.get(str(line.get("reference"))), at.get(str(line.get("prediction")))
        if i is not None and j is not None:
            matrix[i][j] += 1
    return matrix


def confused_pairs(labels: Sequence[str], lines: Iterable[Line]) -> list[tuple[int, str, str]]:
    """Return (rows, label, predicted label), the most frequent first.

    (Counted by pairs that there are: of 50,000 labels there could be 2.5 billion.)
    """
    at = {label: i for i, label in enumerate(labels)}
    pairs = Counter((str(line.get("reference")), str(line.get("prediction"))) for line in lines)
    found = [(count, a, b) for (a, b), count in pairs.items() if a != b and a in at and b in at]
    return sorted(found, key=lambda pair: (-pair[0], at[pair[1]], at[pair[2]]))


@dataclass(frozen=True)
class LabelScore:
    """The scores of a label; None if it does not occur, or is never predicted."""

    label: str
    rows: int
    called: int
    precision: float | None
    recall: float | None
    f1: float | None


def per_label(labels: Sequence[str], lines: Iterable[Line]) -> list[LabelScore]:
    """Return precision, recall and F1 of each label; a row may have one label or several."""
    right: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    called: Counter[str] = Counter()
    for line in lines:
        wanted, said = _as_set(line.get("reference")), _as_set(line.get("prediction"))
        rows.update(list(wanted))
        called.update(list(said))
        right.update(wanted.keys() & said.keys())
    return [
        LabelScore(
            name,
            rows[name],
            called[name],
            right[name] / called[name] if called[name] else None,
            right[name] / rows[name] if rows[name] else None,
            2 * right[name] / both if (both := rows[name] + called[name]) else None,
        )
        for name in labels
    ]


@dataclass(frozen=True)
class Bin:
    """Predictions with similar probabilities."""

    rows: int
    confidence: float
    """The mean of the predicted probabilities."""
    accuracy: float
    """The share of them that are right."""


def calibration(
    kind: Kind, lines: Iterable[Line], n_labels: int = 0
) -> tuple[list[Bin], float] | None:
    """Return the bins of the reliability diagram and the expected calibration error, or None.

    None too with several labels a row of which predictions keep the best few: those alone would
    make the model seem surer than it is.

    With one label a row, the probability of the predicted label against whether it is right; with
    several, that of every label of every row against whether the row has it. Ten bins of equal
    width; the error is the mean distance of a bin from the diagonal, weighted by its rows.
    """
    pairs: list[tuple[float, bool]] = []
    for line in lines:
        scores, wanted = line.get("scores") or {}, _as_set(line.get("reference"))
        if kind == "multi_label" and len(scores) < n_labels:
            return None
        if kind == "single_label":
            scores = {k: p for k, p in scores.items() if k == line.get("prediction")}
        pairs += [(p, k in wanted) for k, v in scores.items() if (p := finite(v)) is not None]
    if not pairs:
        return None
    groups: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for pair in pairs:
        groups[min(max(int(pair[0] * BINS), 0), BINS - 1)].append(pair)
    bins = [
        Bin(len(g), sum(p for p, _ in g) / len(g), sum(hit for _, hit in g) / len(g))
        for g in groups
        if g
    ]
    error = sum(b.rows * abs(b.accuracy - b.confidence) for b in bins) / len(pairs)
    return bins, error


def worst(kind: Kind, lines: Iterable[Line], count: int = 20) -> list[Line]:
    """Return the rows with the largest errors, the worst first.

    Of labels, wrong rows by their loss; of numbers, by the distance; of transcripts, by how many of
    their words are wrong. Of texts, rows by their loss
    per token, the windows of a long row taken together.
    """
    if kind in ("single_label", "multi_label"):
        wrong = [
            line
            for line in lines
            if _as_set(line.get("reference")).keys() != _as_set(line.get("prediction")).keys()
        ]
        return sorted(wrong, key=lambda line: -(finite(line.get("loss")) or 0.0))[:count]
    if kind == "regression":
        apart = [(distance, line) for line in lines if (distance := _distance(line)) is not None]
        return [line for _, line in sorted(apart, key=lambda pair: -pair[0])[:count]]
    if kind == "transcript":
        return sorted(lines, key=lambda line: -word_errors(line))[:count]
    rows: dict[Any, Line] = {}
    for line in lines:
        loss, items = finite(line.get("loss")), finite(line.get("n_items"))
        if loss is not None and items:
            row = rows.setdefault(line.get("row"), {**line, "loss": 0.0, "n_items": 0.0})
            row["loss"] += loss
            row["n_items"] += items
    return sorted(rows.values(), key=lambda row: -row["loss"] / row["n_items"])[:count]


def words_of(line: Line) -> list[Word]:
    """Return the words of a transcript, reference and prediction side by side."""
    found = line.get("words")
    pairs = [pair for pair in found if len(pair) == 2] if isinstance(found, list) else []
    return [(pair[0], pair[1]) for pair in pairs]


def word_errors(line: Line) -> int:
    """Return how many words of a transcript are wrong."""
    return sum(wanted != said for wanted, said in words_of(line))


def _distance(line: Line) -> float | None:
    a, b = finite(line.get("reference")), finite(line.get("prediction"))
    return None if a is None or b is None else abs(a - b)


# -------------------------------------------------------------------------------------- baselines


def majority(report: dict[str, Any], split: str) -> tuple[str, float] | None:
    """Return the commonest label of the train rows, and its share of a split's rows.

    None where a row may have several labels, or has none, or nothing was counted.
    """
    train, here = (part(report, "data", name, "labels") for name in ("train", split))
    train = train or here
    counts = {str(k): n for k, v in here.items() if (n := finite(v)) is not None}
    total, rows = sum(counts.values()), finite(part(report, "data", split).get("rows"))
    several = report.get("problem") == "multi_label"
    if several or not total or (rows is not None and rows != total):
        return None
    label = str(max(train, key=lambda name: finite(train[name]) or 0.0))
    return label, counts.get(label, 0.0) / total


def constant_error(lines: Iterable[Line]) -> float | None:
    """Return the mean squared error of always predicting the mean of the references."""
    known = [y for line in lines if (y := finite(line.get("reference"))) is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    return sum((y - mean) ** 2 for y in known) / len(known)


def interval(share: float, rows: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share of so many rows (Wilson, 1927)."""
    z = 1.959964
    middle, scale = share + z * z / (2 * rows), 1 + z * z / rows
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass(frozen=True)
class Overfit:
    """From this step on, the validation loss rises while the training loss keeps falling."""

    step: int
    lowest: float
    last: float
    training_then: float
    training_last: float


def overfitting(
    training: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]]
) -> Overfit | None:
    """Return where overfitting begins, if the losses show any.

    Args:
        training: (step, loss) of training, smoothed.
        validation: (step, loss) of validation.

    Returns:
        None unless validation's loss ends at least 2 % above its least and training's at least
        2 % below what it was there.
    """
    validation = [point for point in validation if point[0] > 0]
    if len(validation) < 2 or not training:
        return None
    step, lowest = min(validation, key=lambda point: point[1])
    last, then = validation[-1][1], min(training, key=lambda point: abs(point[0] - step))[1]
    now = training[-1][1]
    grows = last - lowest > 0.02 * abs(lowest) and then - now > 0.02 * abs(then)
    return Overfit(int(step), lowest, last, then, now) if grows else None
