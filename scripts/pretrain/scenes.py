"""Scenes of handwritten digits, with the box of each digit, as COCO's json has them.

The digits come from MNIST. A scene of 128 x 128 pixels has up to five of them, of different sizes
and colours, on a background with lines and noise. The boxes are those of the digits' own pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from pictures import read_mnist
from PIL import Image
from torch import Tensor

# B scenes, M boxes of a scene at most
SIZE, CELLS = 128, 3  # pixels of a scene; digits lie in cells of which there are 3 x 3
MOST = 5  # digits of a scene
HELD_OUT = 0.15  # of the drawings of each digit, for measuring


@dataclass
class Scenes:
    """Scenes and the digits in them.

    Args:
        pixels: (B, 3, 128, 128) in 0..255.
        boxes: Centre, width and height as shares of the scene (B, M, 4).
        digits: (B, M); -1 where there is no further one.
    """

    pixels: Tensor
    boxes: Tensor
    digits: Tensor


class Painter:
    """Paints scenes of some digits.

    Args:
        data: A folder that holds `mnist_test`.
        digits: That the scenes show.
        held_out: Whether to use the drawings that are kept for measuring, or the others.
        device: Where scenes are painted.
    """

    def __init__(self, data: Path, digits: Sequence[int], held_out: bool, device: str) -> None:
        images, labels = read_mnist(data / "mnist_test")
        chosen = []
        for digit in digits:
            rows = (labels == digit).nonzero()[:, 0]
            count = max(1, int(HELD_OUT * len(rows)))
            chosen.append(rows[:count] if held_out else rows[count:])
        rows = torch.cat(chosen)
        self.images, self.labels = images[rows][:, None].to(device), labels[rows].to(device)
        self.device = device

    def __call__(self, count: int) -> Scenes:
        """Return random scenes."""
        device = self.device
        drawn = torch.randint(len(self.images), (count, MOST), device=device)
        number = torch.randint(1, MOST + 1, (count, 1), device=device)
        there = torch.arange(MOST, device=device) < number
        cells = torch.rand(count, CELLS**2, device=device).argsort(dim=1)[:, :MOST]
        pixels, boxes = background(count, device), torch.zeros(count, MOST, 4, device=device)
        for place in range(MOST):
            mask = self._pasted(drawn[:, place], cells[:, place])
            mask = mask * there[:, place, None, None, None]
            ink = 0.6 + 0.4 * torch.rand(count, 3, 1, 1, device=device)
            pixels = pixels * (1 - mask) + ink * mask
            boxes[:, place] = boxes_of(mask[:, 0] > 0.3)
        dark = torch.rand(count, 1, 1, 1, device=device) < 0.5
        pixels = torch.where(dark, pixels, 1 - pixels).clamp(0, 1)
        digits = torch.where(there, self.labels[drawn], -1)
        return Scenes((pixels * 255).round().byte(), boxes, digits)

    def _pasted(self, drawn: Tensor, cells: Tensor) -> Tensor:
        """Return drawings as masks of scenes (B, 1, 128, 128), each inside its cell."""
        count, device = len(drawn), self.device
        size = 0.24 + 0.17 * torch.rand(
            count, device=device
        )  # of the scene; digits fill 0.71 of it
        free = 2 / CELLS - 2 * 0.75 * size
        row, column = cells // CELLS, cells % CELLS
        x, y = (
            (2 * cell + 1) / CELLS - 1 + free * (torch.rand(count, device=device) - 0.5)
            for cell in (column, row)
        )
        zero = torch.zeros_like(x)
        affine = torch.stack([1 / size, zero, -x / size, zero, 1 / size, -y / size], dim=1)
        grid = F.affine_grid(affine.view(-1, 2, 3), [count, 1, SIZE, SIZE], align_corners=False)
        return F.grid_sample(self.images[drawn], grid, align_corners=False)


def background(count: int, device: str) -> Tensor:
    """Return dark backgrounds (B, 3, 128, 128) in 0..1 with a slope, some lines and noise."""
    line = torch.linspace(-1, 1, SIZE, device=device)
    y, x = line[:, None], line[None, :]
    found = 0.3 * torch.rand(count, 3, 1, 1, device=device)
    slope = torch.rand(2, count, 1, 1, 1, device=device) - 0.5
    found = found + 0.15 * (slope[0] * x + slope[1] * y)
    for _ in range(4):
        angle, distance, strength = torch.rand(3, count, 1, 1, 1, device=device)
        across = x * (torch.pi * angle).cos() + y * (torch.pi * angle).sin() + 2 * distance - 1
        found = found + 0.3 * strength * (across.abs() < 0.02)
    return (found + 0.03 * torch.randn(count, 3, SIZE, SIZE, device=device)).clamp(0, 1)


def boxes_of(mask: Tensor) -> Tensor:
    """Return centre, width and height (B, 4), as shares, of what masks (B, 128, 128) show."""
    sides = []
    for seen in (mask.any(dim=1), mask.any(dim=2)):
        first, last = seen.byte().argmax(dim=1), SIZE - seen.flip(1).byte().argmax(dim=1)
        sides.append(torch.stack([first, last], dim=1) * seen.any(dim=1, keepdim=True) / SIZE)
    (left, right), (top, bottom) = (side.unbind(1) for side in sides)
    return torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=1)


def coco_of(scenes: Scenes, folder: str = "") -> dict[str, Any]:
    """Return the boxes of scenes as COCO's json; the category of a digit is its name plus one."""
    low = scenes.boxes[..., :2] - scenes.boxes[..., 2:] / 2
    edges = (torch.cat([low, scenes.boxes[..., 2:]], -1) * SIZE).tolist()
    annotations: list[dict[str, Any]] = []
    for i, row in enumerate(scenes.digits.tolist()):
        for box, digit in zip(edges[i], row, strict=True):
            if digit >= 0:
                facts = {"image_id": i, "category_id": digit + 1, "bbox": box, "iscrowd": 0}
                area = box[2] * box[3]
                annotations.append({"id": len(annotations) + 1, **facts, "area": area})
    images = [
        {"id": i, "file_name": f"{folder}{i:04}.png", "width": SIZE, "height": SIZE}
        for i in range(len(scenes.pixels))
    ]
    seen = sorted({digit for row in scenes.digits.tolist() for digit in row if digit >= 0})
    categories = [{"id": digit + 1, "name": str(digit)} for digit in seen]
    return {"images": images, "annotations": annotations, "categories": categories}


def save_scenes(folder: Path, split: str, scenes: Scenes) -> None:
    """Write `split.json`, and the pictures that it names in a folder beside it."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    truth = coco_of(scenes, f"{split}/")
    (folder / f"{split}.json").write_text(json.dumps(truth), encoding="utf-8")
    for image, pixels in zip(truth["images"], scenes.pixels.cpu(), strict=True):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / image["file_name"])
