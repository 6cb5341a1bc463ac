"""COCO's metrics for object detection, computed by faster-coco-eval.

A predicted box is correct if its intersection over union with a true box of the same label reaches
a threshold, and no prediction with a higher score matches that true box. A label's average
precision is the area under its precision-recall curve; `map`, by which COCO ranks models, is the
mean over labels and over the thresholds 0.50, 0.55, … 0.95.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BOX_METRICS = ("map", "map_50", "map_75", "mar_100")
MAX_LABELS = 20  # with more, the average precision of single labels is not reported
MAX_DETECTIONS = 100  # per image; COCO ignores predictions with lower scores
OVERLAP = "of boxes that overlap by"
DEFINITIONS = {
    "map": "mean average precision, 0 to 1: the mean over labels and over the required overlaps "
    "(intersection over union) 0.50, 0.55, … 0.95, as COCO computes it",
    "map_50": f"mean average precision {OVERLAP} at least 0.50",
    "map_75": f"mean average precision {OVERLAP} at least 0.75",
    "mar_100": "mean recall of the 100 boxes with the highest scores of each picture, over the "
    "same labels and overlaps as `map`",
}
PER_LABEL_DEFINITION = "average precision of this label alone, over the same overlaps as `map`"
DetectedBox = Sequence[float]  # x0, y0, x1, y1, score, label
TrueBox = Sequence[float]  # x0, y0, x1, y1, label, whether it is a crowd


def box_scores(
    predictions: Sequence[Sequence[DetectedBox]],
    references: Sequence[Sequence[TrueBox]],
    labels: Sequence[str] = (),
) -> dict[str, float]:
    """Compute the metrics over all images.

    Args:
        predictions: The predicted boxes of each image.
        references: The true boxes of each image.
        labels: The label names, in the order of their indices.

    Returns:
        `map`, `map_50`, `map_75`, `mar_100`, and, for at most `MAX_LABELS` labels, the average
        precision of each as `ap_NAME`; NaN where no image has an object of the label.
    """
    evaluation = _evaluate(predictions, references, len(labels))
    names = label_result_names(labels)
    if evaluation is None:
        return dict.fromkeys([*BOX_METRICS, *names], math.nan)
    precision = evaluation.eval["precision"]  # overlaps, recalls, labels, 1, 1
    scores = {
        "map": _mean(precision),
        "map_50": _mean(precision[0]),
        "map_75": _mean(precision[5]),
        "mar_100": _mean(evaluation.eval["recall"]),
    }
    return scores | {name: _mean(precision[:, :, i]) for i, name in enumerate(names)}


def label_result_names(labels: Sequence[str]) -> list[str]:
    """Return the metric name of each label, or nothing if there are too many labels."""
    return [f"ap_{label}" for label in labels] if len(labels) <= MAX_LABELS else []


def _mean(values: Any) -> float:
    """Return the mean of the values that are defined; COCO marks undefined ones with -1."""
    known = values[values > -1]
    return float(np.mean(known)) if known.size else math.nan


def _evaluate(
    predictions: Sequence[Sequence[DetectedBox]],
    references: Sequence[Sequence[TrueBox]],
    n_labels: int,
) -> Any:
    """Run faster-coco-eval; return None if there is no true box other than crowds."""
    from faster_coco_eval import COCO, COCOeval_faster

    if not any(not box[5] for boxes in references for box in boxes):
        return None
    known = {int(box[4]) for boxes in references for box in boxes}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(len(references))],
        "categories": [{"id": i, "name": str(i)} for i in sorted({*range(n_labels), *known})],
        "annotations": _annotations(references),
    }
    truth.createIndex()
    detections = truth.loadRes(_detections(predictions))
    evaluation = COCOeval_faster(truth, detections, "bbox", print_function=lambda *_: None)
    evaluation.params.maxDets = [MAX_DETECTIONS]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0.0, math.inf]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _annotations(references: Sequence[Sequence[TrueBox]]) -> list[dict[str, Any]]:
    numbered = [(i, box) for i, boxes in enumerate(references) for box in boxes]
    return [
        {
            "id": n, "image_id": i, "category_id": int(label), "iscrowd": int(crowd),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": 1.0,  # required, but unused: `areaRng` includes every size
        }
        for n, (i, (x0, y0, x1, y1, label, crowd)) in enumerate(numbered, 1)
    ]  # fmt: skip


def _detections(predictions: Sequence[Sequence[DetectedBox]]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": i, "category_id": int(label), "score": score,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        for i, boxes in enumerate(predictions)
        for x0, y0, x1, y1, score, label in boxes
    ]  # fmt: skip
