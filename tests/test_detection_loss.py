"""The loss of found boxes, against loops over all assignments; and boxes of a changed picture."""

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


def drawn(n_queries: int, n_objects: int, seed: int = 0) -> tuple[Detections, Tensor, Tensor]:
    """Return two layers' answers to three pictures, and the objects: of four labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, n_queries, 5, generator=generator) * 2
    boxes = torch.rand(2, 3, n_queries, 4, generator=generator) * 0.5 + 0.2
    labels = torch.randint(0, 4, (3, n_objects), generator=generator)
    wanted = torch.rand(3, n_objects, 4, generator=generator) * 0.5 + 0.2
    return Detections(logits, boxes), labels, wanted


def iou_terms(a: list[float], b: list[float]) -> float:
    """Return the generalized intersection over union of two boxes (cx, cy, w, h)."""
    (ax0, ax1), (bx0, bx1) = ((c[0] - c[2] / 2, c[0] + c[2] / 2) for c in (a, b))
    (ay0, ay1), (by0, by1) = ((c[1] - c[3] / 2, c[1] + c[3] / 2) for c in (a, b))
    shared = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - shared
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return shared / union - (hull - union) / hull


def apart(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def by_trying_all(
    said: Detections, labels: Tensor, boxes: Tensor, counts: list[int]
) -> tuple[dict[str, list[float]], list[list[dict[int, int]]]]:
    """Return the sums of each picture, and of each layer and picture the query of each object."""
    sums = {name: [0.0] * len(counts) for name in ("class", "boxes", "giou")}
    chosen: list[list[dict[int, int]]] = []
    for logits, found in zip(said.logits.double(), said.boxes.double().tolist(), strict=True):
        chosen.append([])
        for i, count in enumerate(counts):
            p, mine, wanted = logits[i].softmax(-1).tolist(), found[i], boxes[i].double().tolist()
            names = labels[i].tolist()

            def cost(
                pair: tuple[int, int], p: Any = p, mine: Any = mine, wanted: Any = wanted,
                names: Any = names,
            ) -> float:  # fmt: skip
                query, of = pair
                return (
                    COSTS.box * apart(mine[query], wanted[of])
                    - COSTS.label * p[query][names[of]]
                    - COSTS.giou * iou_terms(mine[query], wanted[of])
                )

            n_queries = len(p)
            if count <= n_queries:
                ways = (
                    list(zip(some, range(count), strict=True))
                    for some in itertools.permutations(range(n_queries), count)
                )
            else:
                ways = (
                    list(zip(range(n_queries), some, strict=True))
                    for some in itertools.permutations(range(count), n_queries)
                )
            best = min(ways, key=lambda way: sum(map(cost, way)))
            chosen[-1].append({of: query for query, of in best})
            for query, row in enumerate(p):
                label = next((names[of] for q, of in best if q == query), None)
                weight = 1.0 if label is not None else COSTS.no_object
                sums["class"][i] -= weight * math.log(row[4 if label is None else label])
            for query, of in best:
                sums["boxes"][i] += apart(mine[query], wanted[of])
                sums["giou"][i] += 1 - iou_terms(mine[query], wanted[of])
    return sums, chosen


@pytest.mark.parametrize(
    ("n_queries", "counts"), [(4, [2, 0, 3]), (5, [1, 3, 2]), (2, [3, 1, 0]), (3, [3, 3, 3])]
)
def test_sums_are_those_of_the_best_of_all_assignments(n_queries: int, counts: list[int]) -> None:
    said, labels, boxes = drawn(n_queries, max(counts), seed=n_queries)
    sums, chosen = by_trying_all(said, labels, boxes, counts)
    queries = assign(said, labels, boxes, counts, COSTS)
    for layer, of_layer in enumerate(chosen):
        for i, pairs in enumerate(of_layer):
            found = {n: q for n, q in enumerate(queries[layer, i].tolist()) if q >= 0}
            assert found == pairs
    assert 0 in queries.tolist()[0][0] + queries.tolist()[1][0] + queries[:, 1:].flatten().tolist()
    found = detection_losses(said, labels, boxes, counts, COSTS)
    assert {name: value.tolist() for name, value in found.items()} == {
        name: pytest.approx(values, rel=1e-5) for name, values in sums.items()
    }


def test_a_query_that_says_no_number_is_assigned_last() -> None:
    said, labels, boxes = drawn(4, 3)
    said.boxes[0, :, 1] = torch.nan
    queries = assign(said, labels, boxes, [3, 3, 2], COSTS)[0]
    assert all(1 not in row for row in queries.tolist())
    assert queries[2, 2] < 0


def test_corners_and_overlaps_of_boxes() -> None:
    assert corners(torch.tensor([0.5, 0.25, 0.2, 0.1])).tolist() == pytest.approx(
        [0.4, 0.2, 0.6, 0.3]
    )
    a = torch.tensor([0.0, 0.0, 2.0, 3.0])
    for b, value in (
        ([0.0, 0.0, 2.0, 3.0], 1.0),  # the same
        ([1.0, 1.0, 3.0, 5.0], 2 / 12 - (15 - 12) / 15),
        ([5.0, 0.0, 6.0, 1.0], 0.0 - (18 - 7) / 18),  # apart
        ([0.5, 0.5, 1.0, 2.5], 1.0 / 6),  # inside
    ):
        other = torch.tensor(b)
        assert float(generalized_iou(a, other)) == pytest.approx(value)
        assert float(generalized_iou(other, a)) == pytest.approx(value)


# ------------------------------------------------------------------------------- augmentation


class Drawn:
    """Random numbers as a test wants them; it notes between which limits they are asked for."""

    def __init__(self, *shares: float) -> None:
        self.shares, self.asked = list(shares), []

    def uniform(self, low: float, high: float) -> float:
        self.asked.append((low, high))
        return low + self.shares.pop(0) * (high - low)

    def integers(self, low: int, high: int) -> int:
        self.asked.append((low, high))
        return high - 1

    def random(self) -> float:
        return self.shares.pop(0)


def picture(boxes: list[list[float]], width: int = 40, height: int = 30) -> AnnotatedImage:
    image = Image.new("RGB", (width, height))
    return AnnotatedImage(image, np.array(boxes, dtype=float).reshape(-1, 4), np.arange(len(boxes)))


def crop_with(
    of: AnnotatedImage, smallest: float, *shares: float
) -> tuple[AnnotatedImage, list[Any]]:
    rng: Any = Drawn(*shares)
    return random_crop(of, smallest, rng), rng.asked


def test_a_part_has_a_share_of_the_area_and_nearly_the_shape_of_the_picture() -> None:
    limit = math.log(4 / 3)
    part, asked = crop_with(picture([]), 0.2, 0.2, 1.0)  # an area of 0.36, as wide as may be
    # side 0.6, stretched by the root of 4:3: 27.7 by 15.6
    assert part.image.size == (28, 16)
    assert asked == [(0.2, 1.0), pytest.approx((-limit, limit)), (0, 13), (0, 15)]
    part, _ = crop_with(picture([]), 0.2, 0.2, 0.0)  # as high as may be
    assert part.image.size == (21, 21)
    part, _ = crop_with(picture([]), 0.2, 1.0, 1.0)  # never wider than the picture
    assert part.image.size == (40, 26)
    part, _ = crop_with(picture([]), 0.2, 1.0, 0.0)
    assert part.image.size == (35, 30)
    part, _ = crop_with(picture([]), 1e-4, 0.0, 0.5)
    assert part.image.size == (1, 1)


def test_a_part_holds_an_object_if_the_picture_has_any() -> None:
    in_the_corner = picture([[0, 0, 4, 4]])
    part, asked = crop_with(in_the_corner, 0.2, *[0.2, 0.5] * 10)  # ten parts without it
    assert part is in_the_corner
    assert len(asked) == 40
    part, asked = crop_with(picture([[0, 0, 4, 4], [30, 20, 40, 30]]), 0.2, 0.2, 0.5)
    assert part.image.size == (24, 18)
    assert part.boxes.tolist() == [[14, 8, 24, 18]]
    assert part.classes.tolist() == [1]


@pytest.mark.parametrize(
    ("flip", "draw", "flipped"), [(True, 0.49, True), (True, 0.5, False), (False, 0.1, False)]
)
def test_a_picture_is_mirrored_half_of_the_time(flip: bool, draw: float, flipped: bool) -> None:
    rng: Any = Drawn(draw)
    spec = BoxAugmentationSpec(crop=False, flip=flip)
    found = augment(picture([[2, 3, 9, 12]]), spec, rng)
    assert found.boxes.tolist() == ([[31, 3, 38, 12]] if flipped else [[2, 3, 9, 12]])


def test_an_object_belongs_to_the_part_where_its_centre_is() -> None:
    whole = picture([[6, 6, 14, 14]])
    for part, kept in (
        ((10, 10, 20, 20), [[0, 0, 4, 4]]),  # on the first corner
        ((0, 0, 10, 20), []), ((0, 0, 20, 10), []),  # on the last one
        ((0, 0, 11, 11), [[6, 6, 11, 11]]), ((11, 0, 20, 20), []), ((0, 11, 20, 20), []),
    ):  # fmt: skip
        found = crop(whole, part)
        assert found.boxes.tolist() == kept
        assert found.image.size == (part[2] - part[0], part[3] - part[1])
    long = picture([[20, 2, 30, 6]])
    assert crop(long, (0, 0, 25, 5)).boxes.tolist() == []
    assert crop(long, (0, 0, 26, 5)).boxes.tolist() == [[20, 2, 26, 5]]
    thin = picture([[5, 0, 6, 30], [0, 5, 30, 5.9], [5, 0, 5.9, 30]])
    assert crop(thin, (0, 0, 40, 30)).classes.tolist() == [0]  # a pixel is enough, less is not


def test_boxes_in_shares_of_the_picture() -> None:
    found = picture([[4, 3, 12, 18], [0, 0, 40, 30]]).relative_boxes()
    assert found.dtype == torch.float32
    wanted = [[0.2, 0.35, 0.2, 0.5], [0.5, 0.5, 1.0, 1.0]]
    assert found.tolist() == [pytest.approx(row) for row in wanted]


def test_the_costs_of_detr_are_the_default() -> None:
    assert SimpleNamespace(**vars(MatchingCosts())) == SimpleNamespace(
        label=1.0, box=5.0, giou=2.0, no_object=0.1
    )
