"""Choose the size to resize and crop an image to: a square, or a bucket of similar shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

COARSE = 64  # pixels between bucket sizes, for resolutions that are large enough
LEAST_COARSE = 256


@dataclass(frozen=True)
class Crop:
    """How an image is resized and cropped to a given size.

    Args:
        width: Width of the crop in pixels.
        height: Height of the crop in pixels.
        resized: Width and height before cropping.
        left: Pixels cropped on the left.
        top: Pixels cropped at the top.
    """

    width: int
    height: int
    resized: tuple[int, int]
    left: int
    top: int


def sizes_for(resolution: int, step: int, max_ratio: float) -> list[tuple[int, int]]:
    """Return buckets (width, height) of many aspect ratios with at most the area of a square.

    Args:
        resolution: Side of the square in pixels.
        step: All sides are multiples of this number of pixels.
        max_ratio: Maximum ratio of the longer side to the shorter one.
    """
    sizes = []
    for width in range(step, int(resolution * math.sqrt(max_ratio)) + step, step):
        height = resolution * resolution // width // step * step
        if height and max(width / height, height / width) <= max_ratio:
            sizes.append((width, height))
    square = resolution // step * step
    return sorted({*sizes, (square, square)})


def nearest_size(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket with the aspect ratio nearest to an image; the largest of equal ones."""

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        ratio = math.log(size[0] / size[1]) - math.log(width / height)
        return round(abs(ratio), 9), -size[0] * size[1]

    return min(sizes, key=distance)


def crop_to(
    width: int, height: int, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> Crop:
    """Return how to fill a size with an image: resize it to cover the size, then crop it.

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        size: Width and height to fill.
        place: Position of the crop (horizontal, vertical), from 0 (left, top) to 1.
    """
    scale = max(size[0] / width, size[1] / height)
    resized = (max(round(width * scale), size[0]), max(round(height * scale), size[1]))
    left, top = ((resized[i] - size[i]) * place[i] for i in (0, 1))
    return Crop(*size, resized, round(left), round(top))


def apply_crop(image: Image, crop: Crop) -> Image:
    """Resize and crop an image."""
    from PIL import Image as PillowImage

    if image.size != crop.resized:
        image = image.resize(crop.resized, PillowImage.Resampling.LANCZOS)
    return image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
