"""COCO's measures of objects that are found in pictures, computed by faster-coco-eval.

A box that is found is right if it overlaps one of the same label by at least a share of their
union, and that one is not taken by a box with a higher score. Average precision is the area under
the curve of precision over recall, of each label; `map` is its mean over labels and over the shares
0.50, 0.55, … 0.95, as COCO ranks models by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BOXES = ("map", "map_50", "map_75", "mar_100")
MOST_LABELS = 20  # each has a figure of its own among the metrics
MOST_FOUND = 100  # boxes of a picture that COCO looks at, those of the highest scores
OVERLAP = "of boxes that overlap by"
DEFINITIONS = {
    "map": "mean average precision, 0 to 1: the mean over labels and over the overlaps 0.50, 0.55, "
    "… 0.95 that a box has to have (intersection over union), as COCO computes it",
    "map_50": f"mean average precision {OVERLAP} at least 0.50",
    "map_75": f"mean average precision {OVERLAP} at least 0.75",
    "mar_100": "mean recall of the 100 boxes with the highest scores of each picture, over the "
    "same labels and overlaps as `map`",
}
OF_LABEL = "average precision of this label alone, over the same overlaps as `map`"
Found = Sequence[float]  # x0, y0, x1, y1, score, label
Wanted = Sequence[float]  # x0, y0, x1, y1, label, whether it is a crowd


def box_scores(
    found: Sequence[Sequence[Found]],
    wanted: Sequence[Sequence[Wanted]],
    labels: Sequence[str] = (),
) -> dict[str, float]:
    """Return the measures of all pictures together.

    Args:
        found: The boxes that the model found in each picture.
        wanted: The boxes that there are.
        labels: Names of the labels, in the order of their numbers.

    Returns:
        `map`, `map_50`, `map_75`, `mar_100`, and the average precision of each label as `ap_NAME`,
        if there are not too many; NaN where no picture has such an object.
    """
    evaluation = _evaluated(found, wanted, len(labels))
    names = label_results(labels)
    if evaluation is None:
        return dict.fromkeys([*BOXES, *names], math.nan)
    precision = evaluation.eval["precision"]  # overlaps, recalls, labels, 1, 1
    scores = {
        "map": _mean(precision),
        "map_50": _mean(precision[0]),
        "map_75": _mean(precision[5]),
        "mar_100": _mean(evaluation.eval["recall"]),
    }
    return scores | {name: _mean(precision[:, :, i]) for i, name in enumerate(names)}


def label_results(labels: Sequence[str]) -> list[str]:
    """Return the names of the figures of single labels; none where there are many labels."""
    return [f"ap_{label}" for label in labels] if len(labels) <= MOST_LABELS else []


def _mean(values: Any) -> float:
    """Return the mean of values, of which -1 stands for none."""
    known = values[values > -1]
    return float(np.mean(known)) if known.size else math.nan


def _evaluated(
    found: Sequence[Sequence[Found]], wanted: Sequence[Sequence[Wanted]], n_labels: int
) -> Any:
    """Return the evaluation by faster-coco-eval, or None where nothing is to be found."""
    from faster_coco_eval import COCO, COCOeval_faster

    if not any(not one[5] for picture in wanted for one in picture):
        return None
    known = {int(one[4]) for picture in wanted for one in picture}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(len(wanted))],
        "categories": [{"id": i, "name": str(i)} for i in sorted({*range(n_labels), *known})],
        "annotations": _annotations(wanted),
    }
    truth.createIndex()
    said = truth.loadRes(_detections(found))
    evaluation = COCOeval_faster(truth, said, "bbox", print_function=lambda *_: None)
    evaluation.params.maxDets = [MOST_FOUND]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0.0, math.inf]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _annotations(wanted: Sequence[Sequence[Wanted]]) -> list[dict[str, Any]]:
    boxes = [(i, one) for i, picture in enumerate(wanted) for one in picture]
    return [
        {
            "id": n, "image_id": i, "category_id": int(label), "iscrowd": int(crowd),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": 1.0,  # which is not asked for: boxes of every size count
        }
        for n, (i, (x0, y0, x1, y1, label, crowd)) in enumerate(boxes, 1)
    ]  # fmt: skip


def _detections(found: Sequence[Sequence[Found]]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": i, "category_id": int(label), "score": score,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        for i, picture in enumerate(found)
        for x0, y0, x1, y1, score, label in picture
    ]  # fmt: skip
