"""Tests of the detection loss, against brute force over all assignments, and of augmentation."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_cli.recipe.spec.augmentation import BoxAugmentationSpec
from lora_cli.tasks.detection.box_augmentation import AnnotatedImage, augment, crop, random_crop
from lora_cli.tasks.detection.detection_loss import (
    Detections,
    MatchingCosts,
    assign,
    corners,
    detection_losses,
    generalized_iou,
)

COSTS = MatchingCosts(label=1.5, box=3.0, giou=0.7, no_object=0.3)


def random_detections(
    n_queries: int, n_objects: int, seed: int = 0
) -> tuple[Detections, Tensor, Tensor]:
    """Return outputs of two layers for three images, and labels (of four) and boxes of objects."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, n_queries, 5, generator=generator) * 2
    boxes = torch.rand(2, 3, n_queries, 4, generator=generator) * 0.5 + 0.2
    labels = torch.randint(0, 4, (3, n_objects), generator=generator)
    boxes_of_objects = torch.rand(3, n_objects, 4, generator=generator) * 0.5 + 0.2
    return Detections(logits, boxes), labels, boxes_of_objects


def iou_terms(a: list[float], b: list[float]) -> float:
    """Return the generalized intersection over union of two boxes (cx, cy, w, h)."""
    (ax0, ax1), (bx0, bx1) = ((c[0] - c[2] / 2, c[0] + c[2] / 2) for c in (a, b))
    (ay0, ay1), (by0, by1) = ((c[1] - c[3] / 2, c[1] + c[3] / 2) for c in (a, b))
    shared = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - shared
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return shared / union - (hull - union) / hull


def l1_distance(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def brute_force(
    outputs: Detections, labels: Tensor, boxes: Tensor, counts: list[int]
) -> tuple[dict[str, list[float]], list[list[dict[int, int]]]]:
    """Return the loss sums of each image, and the query of each object by layer and image."""
    sums = {name: [0.0] * len(counts) for name in ("class", "boxes", "giou")}
    matches: list[list[dict[int, int]]] = []
    for logits, layer_boxes in zip(
        outputs.logits.double(), outputs.boxes.double().tolist(), strict=True
    ):
        matches.append([])
        for i, count in enumerate(counts):
            p, predicted, targets = (
                logits[i].softmax(-1).tolist(),
                layer_boxes[i],
                boxes[i].double().tolist(),
            )
            names = labels[i].tolist()

            def cost(
                pair: tuple[int, int], p: Any = p, predicted: Any = predicted,
                targets: Any = targets, names: Any = names,
            ) -> float:  # fmt: skip
                query, obj = pair
                return (
                    COSTS.box * l1_distance(predicted[query], targets[obj])
                    - COSTS.label * p[query][names[obj]]
                    - COSTS.giou * iou_terms(predicted[query], targets[obj])
                )

            n_queries = len(p)
            if count <= n_queries:
                assignments = (
                    list(zip(indices, range(count), strict=True))
                    for indices in itertools.permutations(range(n_queries), count)
                )
            else:
                assignments = (
                    list(zip(range(n_queries), indices, strict=True))
                    for indices in itertools.permutations(range(count), n_queries)
                )
            best = min(assignments, key=lambda assignment: sum(map(cost, assignment)))
            matches[-1].append({obj: query for query, obj in best})
            for query, row in enumerate(p):
                label = next((names[obj] for q, obj in best if q == query), None)
                weight = 1.0 if label is not None else COSTS.no_object
                sums["class"][i] -= weight * math.log(row[4 if label is None else label])
            for query, obj in best:
                sums["boxes"][i] += l1_distance(predicted[query], targets[obj])
                sums["giou"][i] += 1 - iou_terms(predicted[query], targets[obj])
    return sums, matches


@pytest.mark.parametrize(
    ("n_queries", "counts"), [(4, [2, 0, 3]), (5, [1, 3, 2]), (2, [3, 1, 0]), (3, [3, 3, 3])]
)
def test_losses_equal_brute_force_over_all_assignments(n_queries: int, counts: list[int]) -> None:
    outputs, labels, boxes = random_detections(n_queries, max(counts), seed=n_queries)
    sums, expected_assignments = brute_force(outputs, labels, boxes, counts)
    queries = assign(outputs, labels, boxes, counts, COSTS)
    for layer, layer_assignments in enumerate(expected_assignments):
        for i, pairs in enumerate(layer_assignments):
            result = {n: q for n, q in enumerate(queries[layer, i].tolist()) if q >= 0}
            assert result == pairs
    assert 0 in queries.tolist()[0][0] + queries.tolist()[1][0] + queries[:, 1:].flatten().tolist()
    result = detection_losses(outputs, labels, boxes, counts, COSTS)
    assert {name: value.tolist() for name, value in result.items()} == {
        name: pytest.approx(values, rel=1e-5) for name, values in sums.items()
    }


def test_queries_with_nan_boxes_are_matched_last() -> None:
    outputs, labels, boxes = random_detections(4, 3)
    outputs.boxes[0, :, 1] = torch.nan
    queries = assign(outputs, labels, boxes, [3, 3, 2], COSTS)[0]
    assert all(1 not in row for row in queries.tolist())
    assert queries[2, 2] < 0


def test_corners_and_generalized_iou() -> None:
    assert corners(torch.tensor([0.5, 0.25, 0.2, 0.1])).tolist() == pytest.approx(
        [0.4, 0.2, 0.6, 0.3]
    )
    a = torch.tensor([0.0, 0.0, 2.0, 3.0])
    for b, value in (
        ([0.0, 0.0, 2.0, 3.0], 1.0),  # the same
        ([1.0, 1.0, 3.0, 5.0], 2 / 12 - (15 - 12) / 15),
        ([5.0, 0.0, 6.0, 1.0], 0.0 - (18 - 7) / 18),  # disjoint
        ([0.5, 0.5, 1.0, 2.5], 1.0 / 6),  # inside
    ):
        other = torch.tensor(b)
        assert float(generalized_iou(a, other)) == pytest.approx(value)
        assert float(generalized_iou(other, a)) == pytest.approx(value)


# ------------------------------------------------------------------------------- augmentation


class FakeRandom:
    """A random generator that returns given shares of each range, and records the ranges."""

    def __init__(self, *shares: float) -> None:
        self.shares, self.requests = list(shares), []

    def uniform(self, low: float, high: float) -> float:
        self.requests.append((low, high))
        return low + self.shares.pop(0) * (high - low)

    def integers(self, low: int, high: int) -> int:
        self.requests.append((low, high))
        return high - 1

    def random(self) -> float:
        return self.shares.pop(0)


def annotated_image(boxes: list[list[float]], width: int = 40, height: int = 30) -> AnnotatedImage:
    image = Image.new("RGB", (width, height))
    return AnnotatedImage(image, np.array(boxes, dtype=float).reshape(-1, 4), np.arange(len(boxes)))


def crop_with(
    annotated: AnnotatedImage, min_area: float, *shares: float
) -> tuple[AnnotatedImage, list[Any]]:
    rng: Any = FakeRandom(*shares)
    return random_crop(annotated, min_area, rng), rng.requests


def test_the_area_and_aspect_ratio_of_crops() -> None:
    limit = math.log(4 / 3)
    cropped, requests = crop_with(annotated_image([]), 0.2, 0.2, 1.0)  # area 0.36, maximum width
    # side 0.6, stretched by the root of 4:3: 27.7 by 15.6
    assert cropped.image.size == (28, 16)
    assert requests == [(0.2, 1.0), pytest.approx((-limit, limit)), (0, 13), (0, 15)]
    cropped, _ = crop_with(annotated_image([]), 0.2, 0.2, 0.0)  # maximum height
    assert cropped.image.size == (21, 21)
    cropped, _ = crop_with(annotated_image([]), 0.2, 1.0, 1.0)  # never wider than the image
    assert cropped.image.size == (40, 26)
    cropped, _ = crop_with(annotated_image([]), 0.2, 1.0, 0.0)
    assert cropped.image.size == (35, 30)
    cropped, _ = crop_with(annotated_image([]), 1e-4, 0.0, 0.5)
    assert cropped.image.size == (1, 1)


def test_a_crop_keeps_an_object_if_there_is_one() -> None:
    object_in_corner = annotated_image([[0, 0, 4, 4]])
    cropped, requests = crop_with(object_in_corner, 0.2, *[0.2, 0.5] * 10)  # ten crops miss it
    assert cropped is object_in_corner
    assert len(requests) == 40
    cropped, requests = crop_with(annotated_image([[0, 0, 4, 4], [30, 20, 40, 30]]), 0.2, 0.2, 0.5)
    assert cropped.image.size == (24, 18)
    assert cropped.boxes.tolist() == [[14, 8, 24, 18]]
    assert cropped.classes.tolist() == [1]


@pytest.mark.parametrize(
    ("flip", "random_number", "flipped"),
    [(True, 0.49, True), (True, 0.5, False), (False, 0.1, False)],
)
def test_images_are_flipped_half_of_the_time(
    flip: bool, random_number: float, flipped: bool
) -> None:
    rng: Any = FakeRandom(random_number)
    spec = BoxAugmentationSpec(crop=False, flip=flip)
    result = augment(annotated_image([[2, 3, 9, 12]]), spec, rng)
    assert result.boxes.tolist() == ([[31, 3, 38, 12]] if flipped else [[2, 3, 9, 12]])


def test_a_crop_keeps_objects_whose_centre_is_inside() -> None:
    image = annotated_image([[6, 6, 14, 14]])
    for region, expected in (
        ((10, 10, 20, 20), [[0, 0, 4, 4]]),  # the centre is the region's top left corner: inside
        ((0, 0, 10, 20), []), ((0, 0, 20, 10), []),  # on the right or bottom edge: outside
        ((0, 0, 11, 11), [[6, 6, 11, 11]]), ((11, 0, 20, 20), []), ((0, 11, 20, 20), []),
    ):  # fmt: skip
        cropped = crop(image, region)
        assert cropped.boxes.tolist() == expected
        assert cropped.image.size == (region[2] - region[0], region[3] - region[1])
    long = annotated_image([[20, 2, 30, 6]])
    assert crop(long, (0, 0, 25, 5)).boxes.tolist() == []
    assert crop(long, (0, 0, 26, 5)).boxes.tolist() == [[20, 2, 26, 5]]
    thin = annotated_image([[5, 0, 6, 30], [0, 5, 30, 5.9], [5, 0, 5.9, 30]])
    assert crop(thin, (0, 0, 40, 30)).classes.tolist() == [0]  # a side of 1 pixel is enough


def test_relative_boxes() -> None:
    boxes = annotated_image([[4, 3, 12, 18], [0, 0, 40, 30]]).relative_boxes()
    assert boxes.dtype == torch.float32
    expected = [[0.2, 0.35, 0.2, 0.5], [0.5, 0.5, 1.0, 1.0]]
    assert boxes.tolist() == [pytest.approx(row) for row in expected]


def test_default_costs_are_those_of_detr() -> None:
    assert SimpleNamespace(**vars(MatchingCosts())) == SimpleNamespace(
        label=1.0, box=5.0, giou=2.0, no_object=0.1
    )
