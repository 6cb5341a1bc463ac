"""Data augmentation for object detection: crops and flips of images together with their boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.recipe.spec.augmentation import BoxAugmentationSpec

MAX_RATIO_CHANGE = 4 / 3  # a crop's aspect ratio differs from the image's by at most this factor
MAX_TRIALS = 10
MIN_SIDE = 1.0  # pixels; boxes that a crop leaves smaller are dropped


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with its annotated objects.

    Args:
        image: A Pillow image.
        boxes: The objects' corners (x0, y0, x1, y1) in pixels (N, 4).
        classes: The objects' class indices (N,).
    """

    image: Any
    boxes: NDArray[np.float64]
    classes: NDArray[np.int64]

    def relative_boxes(self) -> Tensor:
        """Return the boxes as (cx, cy, w, h) relative to the image's size (N, 4), float32."""
        scale = np.array(self.image.size * 2, dtype=np.float64)
        boxes = self.boxes / scale
        top_left, bottom_right = boxes[:, :2], boxes[:, 2:]
        return torch.from_numpy(
            np.hstack([(top_left + bottom_right) / 2, bottom_right - top_left])
        ).float()


def augment(
    annotated: AnnotatedImage, spec: BoxAugmentationSpec, rng: np.random.Generator
) -> AnnotatedImage:
    """Return a randomly cropped and flipped copy, as the recipe specifies."""
    if spec.crop:
        annotated = random_crop(annotated, spec.smallest_crop, rng)
    if spec.flip and rng.random() < 0.5:
        annotated = mirror(annotated)
    return annotated


def mirror(annotated: AnnotatedImage) -> AnnotatedImage:
    """Flip an image horizontally."""
    from PIL import Image

    width, boxes = annotated.image.width, annotated.boxes.copy()
    boxes[:, [0, 2]] = width - annotated.boxes[:, [2, 0]]
    image = annotated.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return replace(annotated, image=image, boxes=boxes)


def random_crop(
    annotated: AnnotatedImage, min_area: float, rng: np.random.Generator
) -> AnnotatedImage:
    """Return a random crop that keeps at least one object, if the image has any.

    The crop's area is a uniform share from `min_area` to 1 of the image's, and its aspect ratio is
    the image's times a factor between 3:4 and 4:3. If no trial keeps an object, return the image
    unchanged.
    """
    width, height = annotated.image.size
    for _ in range(MAX_TRIALS):
        side = math.sqrt(rng.uniform(min_area, 1.0))
        stretch = math.exp(rng.uniform(-math.log(MAX_RATIO_CHANGE), math.log(MAX_RATIO_CHANGE)) / 2)
        w = min(width, max(1, round(width * side * stretch)))
        h = min(height, max(1, round(height * side / stretch)))
        x, y = (int(rng.integers(0, n + 1)) for n in (width - w, height - h))
        cropped = crop(annotated, (x, y, x + w, y + h))
        if len(cropped.boxes) or not len(annotated.boxes):
            return cropped
    return annotated


def crop(annotated: AnnotatedImage, region: tuple[int, int, int, int]) -> AnnotatedImage:
    """Crop an image to a region (x0, y0, x1, y1); keep the objects whose centre is inside."""
    x0, y0, x1, y1 = region
    centre = (annotated.boxes[:, :2] + annotated.boxes[:, 2:]) / 2
    is_inside = ((centre >= (x0, y0)) & (centre < (x1, y1))).all(1)
    corner = (x0, y0, x0, y0)
    boxes = np.minimum(np.maximum(annotated.boxes, corner), (x1, y1, x1, y1)) - corner
    is_kept = is_inside & ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1)
    return AnnotatedImage(annotated.image.crop(region), boxes[is_kept], annotated.classes[is_kept])
