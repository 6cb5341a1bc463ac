"""Precision, recall and F1 of classes, as scikit-learn defines them.

Every run of a classification measures them before its first step, and `import sklearn.metrics`
takes as long as these few lines take for ten million rows.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np


def class_scores(predicted: list[Any], wanted: list[Any], score: str, average: str) -> float:
    """Return a score, 0 where it would divide by 0.

    Args:
        predicted: A class of each row, or of each row 0 or 1 for each class.
        wanted: The same, as it should be.
        score: `precision`, `recall` or `f1`.
        average: `binary`, that of class 1; `macro`, the mean over the classes; `weighted`, by the
            rows that are of the class; `micro`, of all rows together. A class that stands in no row
            takes no part, unless rows have 0 or 1 for it.
    """
    called, true, right = _counts(np.asarray(predicted), np.asarray(wanted))
    if average == "micro":
        return _score(score, called.total(), true.total(), right.total())
    classes = [1] if average == "binary" else sorted(called.keys() | true.keys())
    scores = [_score(score, called[one], true[one], right[one]) for one in classes]
    if average == "weighted":
        weights = [true[one] for one in classes]
        return float(np.average(scores, weights=weights)) if any(weights) else 0.0
    return float(np.mean(scores))


def _counts(predicted: Any, wanted: Any) -> list[Counter[int]]:
    """Return in how many rows each class is predicted, is right to predict, and both."""
    if predicted.ndim > 1:
        found = (predicted > 0, wanted > 0, (predicted > 0) & (wanted > 0))
        return [Counter(dict(enumerate(side.sum(axis=0).tolist()))) for side in found]
    return [Counter(side.tolist()) for side in (predicted, wanted, wanted[predicted == wanted])]


def _score(score: str, called: int, true: int, right: int) -> float:
    """Return one score of one class from its counts."""
    over = {"precision": called, "recall": true, "f1": (called + true) / 2}[score]
    return right / over if over else 0.0
