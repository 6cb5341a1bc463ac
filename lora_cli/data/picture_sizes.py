"""In which size a picture is seen, and which part of it: a square, or one of nearly its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

COARSE = 64  # pixels between two sizes, of resolutions that have room for that
LEAST_COARSE = 256


@dataclass(frozen=True)
class Cut:
    """How a picture becomes one of a given size: it is resized, and then cut.

    Args:
        width: Of what is left, in pixels.
        height: Likewise.
        resized: Width and height before it is cut.
        left: What is cut on the left.
        top: What is cut at the top.
    """

    width: int
    height: int
    resized: tuple[int, int]
    left: int
    top: int


def sizes_for(resolution: int, step: int, most: float) -> list[tuple[int, int]]:
    """Return sizes (width, height) of many shapes whose area is at most that of a square.

    Args:
        resolution: Side of the square.
        step: What all sides are multiples of.
        most: How many times longer than the other a side can be.
    """
    found = []
    for width in range(step, int(resolution * math.sqrt(most)) + step, step):
        height = resolution * resolution // width // step * step
        if height and max(width / height, height / width) <= most:
            found.append((width, height))
    square = resolution // step * step
    return sorted({*found, (square, square)})


def nearest_size(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size whose shape is nearest to that of a picture; of equal ones the largest."""

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        ratio = math.log(size[0] / size[1]) - math.log(width / height)
        return round(abs(ratio), 9), -size[0] * size[1]

    return min(sizes, key=distance)


def cut_to(
    width: int, height: int, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> Cut:
    """Return how a picture fills a size: its shorter side fits, and the longer one is cut.

    Args:
        width: Of the picture, in pixels.
        height: Likewise.
        size: The size that it fills.
        place: Where it is cut, from 0 (what is left and above stays) to 1.
    """
    scale = max(size[0] / width, size[1] / height)
    resized = (max(round(width * scale), size[0]), max(round(height * scale), size[1]))
    left, top = ((resized[i] - size[i]) * place[i] for i in (0, 1))
    return Cut(*size, resized, round(left), round(top))


def apply_cut(image: Image, cut: Cut) -> Image:
    """Return a picture in its size."""
    from PIL import Image as PillowImage

    if image.size != cut.resized:
        image = image.resize(cut.resized, PillowImage.Resampling.LANCZOS)
    return image.crop((cut.left, cut.top, cut.left + cut.width, cut.top + cut.height))
