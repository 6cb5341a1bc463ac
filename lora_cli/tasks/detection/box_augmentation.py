"""Pictures that are changed in training together with their boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.recipe.spec.augmentation import BoxAugmentationSpec

RATIO = 4 / 3  # a part is at most so much wider than high, or higher than wide
TRIALS = 10
SMALLEST = 1.0  # pixels: what is left of a box after a cut


@dataclass(frozen=True)
class Picture:
    """A picture with its objects.

    Args:
        image: An image of Pillow.
        boxes: Corners (x0, y0, x1, y1) in pixels (N, 4).
        classes: Of the objects (N,).
    """

    image: Any
    boxes: NDArray[np.float64]
    classes: NDArray[np.int64]

    def relative_boxes(self) -> Tensor:
        """Return the boxes as (cx, cy, w, h) in shares of the picture (N, 4), float32."""
        scale = np.array(self.image.size * 2, dtype=np.float64)
        boxes = self.boxes / scale
        first, last = boxes[:, :2], boxes[:, 2:]
        return torch.from_numpy(np.hstack([(first + last) / 2, last - first])).float()


def augmented(picture: Picture, spec: BoxAugmentationSpec, rng: np.random.Generator) -> Picture:
    """Return a picture as it is trained in one step; `rng` alone decides what is random."""
    if spec.crop:
        picture = cropped(picture, spec.smallest_crop, rng)
    if spec.flip and rng.random() < 0.5:
        picture = mirrored(picture)
    return picture


def mirrored(picture: Picture) -> Picture:
    """Return a picture with left and right exchanged."""
    from PIL import Image

    width, boxes = picture.image.width, picture.boxes.copy()
    boxes[:, [0, 2]] = width - picture.boxes[:, [2, 0]]
    image = picture.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return replace(picture, image=image, boxes=boxes)


def cropped(picture: Picture, smallest: float, rng: np.random.Generator) -> Picture:
    """Return a random part of a picture that holds an object, if the picture has any.

    Its area is uniform between `smallest` and 1 of the picture's; it is as wide by high as the
    picture, but for a factor of up to 4:3. Where no part is found, it is the picture as it is.
    """
    width, height = picture.image.size
    for _ in range(TRIALS):
        side = math.sqrt(rng.uniform(smallest, 1.0))
        stretch = math.exp(rng.uniform(-math.log(RATIO), math.log(RATIO)) / 2)
        w = min(width, max(1, round(width * side * stretch)))
        h = min(height, max(1, round(height * side / stretch)))
        x, y = (int(rng.integers(0, n + 1)) for n in (width - w, height - h))
        part = cut(picture, (x, y, x + w, y + h))
        if len(part.boxes) or not len(picture.boxes):
            return part
    return picture


def cut(picture: Picture, part: tuple[int, int, int, int]) -> Picture:
    """Return a part (x0, y0, x1, y1) of a picture, with the objects whose centre lies in it."""
    x0, y0, x1, y1 = part
    centre = (picture.boxes[:, :2] + picture.boxes[:, 2:]) / 2
    lies_in = ((centre >= (x0, y0)) & (centre < (x1, y1))).all(1)
    corner = (x0, y0, x0, y0)
    boxes = np.minimum(np.maximum(picture.boxes, corner), (x1, y1, x1, y1)) - corner
    kept = lies_in & ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(1)
    return Picture(picture.image.crop(part), boxes[kept], picture.classes[kept])
