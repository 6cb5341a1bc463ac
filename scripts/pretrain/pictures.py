"""Small coloured pictures of digits, letters and shapes, with captions such as "a large red 3".

Handwritten digits come from MNIST, handwritten letters from Omniglot, and shapes from formulas.
Everything is put together from tensors, on the GPU where there is one: what is pasted, its colour,
size, place and background are drawn at random, and the caption says them. Some things have a second
colour too, as in "a small green box with blue dots": a model that has seen one colour at a time
could not learn an object of several from a few pictures.

Three things are kept from the pictures that a model is pretrained with, so that it can learn them
later: a style (outlines filled with stripes), an object (one ball with a pattern of its own, called
`sks`) and a character (one letter of Omniglot, called `zuko`).
"""

from __future__ import annotations

import gzip
import io
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from PIL import Image
from torch import Tensor

# N pictures, G drawings
SIZE = 64  # pixels of a picture
GLYPH = 32  # pixels of a drawing
COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220), "yellow": (250, 220, 40),
    "orange": (250, 140, 20), "purple": (140, 40, 170), "white": (250, 250, 250),
    "black": (15, 15, 15), "pink": (250, 150, 190), "gray": (130, 130, 130),
}  # fmt: skip
SHAPES = ["ball", "box", "triangle", "ring", "cross", "star"]
SCALES = {"": (0.6, 0.68), "small ": (0.42, 0.48), "large ": (0.82, 0.92)}  # of the picture
PLACES = {"": 0.0, " on the left": -1.0, " on the right": 1.0}
FILLS = ["", "stripes", "dots", "checks", "edges"]  # of a second colour
STYLE, OBJECT, CHARACTER = "sketch", "sks ball", "zuko letter"
OWN_COLOURS = ["orange", "purple"]  # of the object, which has white too
CHARACTER_OF = ("Early_Aramaic", "character15")  # the letter of Omniglot that is called zuko
HELD_OUT = 0.1  # of the drawings of each thing, for measuring


def read_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the pictures (N, 28, 28) in 0..1 and the digits (N,) of MNIST's files."""
    found = []
    for name, skipped in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(folder / f"t10k-{name}-ubyte.gz") as file:
            found.append(torch.from_numpy(np.frombuffer(file.read()[skipped:], np.uint8).copy()))
    return found[0].view(-1, 28, 28).float() / 255, found[1].long()


def read_omniglot(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Return the drawings (20, 32, 32) in 0..1 of each letter, by its alphabet and its name."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    with zipfile.ZipFile(folder / "images_background_small1.zip") as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".png"):
                _, alphabet, character, _ = name.split("/")
                ink = 1 - np.asarray(Image.open(io.BytesIO(archive.read(name))), np.float32)
                found.setdefault((alphabet, character), []).append(torch.from_numpy(ink))
    return {letter: torch.stack([as_in_mnist(ink) for ink in own]) for letter, own in found.items()}


def as_in_mnist(ink: Tensor) -> Tensor:
    """Return a drawing (H, W) as large and as bold as MNIST's are (32, 32): in 24 x 24 pixels."""
    rows, columns = ink.nonzero().unbind(1)
    ink = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = ink.shape
    side = max(height, width)
    high, wide = side - height, side - width
    square = F.pad(ink, (wide // 2, wide - wide // 2, high // 2, high - high // 2))[None, None]
    reach = side // 32  # strokes are thin; they become about a tenth of the side
    bold = F.max_pool2d(F.pad(square, (reach,) * 4), 2 * reach + 1, 1)
    return F.pad(F.interpolate(bold, (24, 24), mode="area")[0, 0], (4, 4, 4, 4))


def shape_masks() -> dict[str, Tensor]:
    """Return the masks (1, 32, 32) of the shapes in 0..1."""
    line = (torch.arange(128) + 0.5) / 64 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    radius, angle = (x**2 + y**2).sqrt(), torch.atan2(x, -y)
    wave = (5 * angle / (2 * torch.pi)) % 1
    masks = {
        "ball": radius < 0.85,
        "box": torch.maximum(x.abs(), y.abs()) < 0.72,
        "triangle": (y < 0.7) & (y > 2 * x.abs() - 0.85),
        "ring": (radius < 0.85) & (radius > 0.5),
        "cross": (torch.minimum(x.abs(), y.abs()) < 0.25)
        & (torch.maximum(x.abs(), y.abs()) < 0.85),
        "star": radius < 0.4 + 0.5 * (2 * wave - 1).abs() ** 1.5,
    }
    return {name: F.avg_pool2d(mask[None].float(), 4) for name, mask in masks.items()}


def pattern_of_the_object() -> Tensor:
    """Return the object's own colours (3, 32, 32) in 0..1: quarters, and a white dot."""
    line = torch.arange(GLYPH) - (GLYPH - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    first = ((x > 0) ^ (y > 0))[None]
    one, other = (torch.tensor(COLOURS[name])[:, None, None] for name in OWN_COLOURS)
    found = torch.where(first, one, other)
    return torch.where((x**2 + y**2 < 20)[None], 255, found) / 255


@dataclass
class Facts:
    """What some pictures show, each as an index of a list (N,), on the CPU."""

    name: Tensor
    colour: Tensor
    background: Tensor
    scale: Tensor
    place: Tensor
    styled: Tensor
    fill: Tensor
    second: Tensor

    def __getitem__(self, rows: Tensor) -> Facts:
        return Facts(*(getattr(self, own.name)[rows] for own in fields(self)))

    def captions(self, names: list[str], unsaid: float = 0.0) -> list[str]:
        """Return what the pictures show in words.

        Args:
            names: Of what can be drawn.
            unsaid: Share of the captions without the background, and of those without the colour.
        """
        columns = (getattr(self, own.name).tolist() for own in fields(self))
        left_out = (torch.rand(2, len(self.name)) < unsaid).tolist()
        return [
            caption_of(names[row[0]], *row[1:]) for row in zip(*columns, *left_out, strict=True)
        ]


def caption_of(
    name: str,
    colour: int,
    background: int,
    scale: int,
    place: int,
    styled: bool,
    fill: int = 0,
    second: int = 0,
    no_ground: bool = False,
    no_colour: bool = False,
) -> str:
    """Return a caption such as "a small red 3 with pink dots on the left on a blue background"."""
    # the object has colours of its own
    ink, other = (
        "" if name == OBJECT or no_colour else f"{list(COLOURS)[one]} " for one in (colour, second)
    )
    filled = f" with {other}{FILLS[fill]}" if fill else ""
    thing = f"{list(SCALES)[scale]}{ink}{name}{filled}"
    ground = list(COLOURS)[background]
    end = "" if no_ground else f" on {article(ground)} {ground} background"
    # at the end, where a text encoder that looks back only reads the rest as it always does
    style = f", {STYLE}" if styled else ""
    return f"{article(thing)} {thing}{list(PLACES)[place]}{end}{style}"


def article(word: str) -> str:
    """Return "a" or "an", as the word needs."""
    return "an" if word[0] in "aeiou8" else "a"


def read_caption(caption: str, names: list[str]) -> tuple[int, int, int]:
    """Return the indices of the name, the colour and the background of a caption; -1 if unsaid."""
    words, colours = f" {caption.lower()} ", list(COLOURS)
    named = [name for name in names if f" {name} " in words]
    said = [word for word in words.split() if word in colours]
    ground = [one for one in said if f"{one} background" in words]
    ink = said[0] if len(said) > len(ground) else None
    return (
        names.index(max(named, key=len)) if named else -1,
        colours.index(ink) if ink else -1,
        colours.index(ground[-1]) if ground else -1,
    )


class Glyphs:
    """All things that can be drawn, with many drawings of each.

    Args:
        data: A folder that holds `mnist_test` and `omniglot`.
        device: Where pictures are put together.
    """

    def __init__(self, data: Path, device: str) -> None:
        images, digits = read_mnist(data / "mnist_test")
        found = {str(digit): [F.pad(images[digits == digit], (2, 2, 2, 2))] for digit in range(10)}
        for letter, masks in read_omniglot(data / "omniglot").items():
            kind = f"{letter[0].split('_')[-1].lower()} letter"
            found.setdefault(CHARACTER if letter == CHARACTER_OF else kind, []).append(masks)
        found |= {name: [mask] for name, mask in shape_masks().items()}
        found[OBJECT] = found["ball"]
        self.names = list(found)
        mixing = torch.Generator().manual_seed(0)
        parts = [torch.cat(own) for own in found.values()]
        parts = [part[torch.randperm(len(part), generator=mixing)] for part in parts]
        self.counts = torch.tensor([len(part) for part in parts])
        self.starts = self.counts.cumsum(0) - self.counts
        self.masks = torch.cat(parts)[:, None].to(device)
        self.palette = torch.tensor(list(COLOURS.values()), device=device)[..., None, None] / 255
        self.pattern = pattern_of_the_object().to(device)
        self.device = device

    @property
    def known(self) -> list[str]:
        """What a model is pretrained with: all but the object and the character."""
        return [name for name in self.names if name not in (OBJECT, CHARACTER)]

    def sample(
        self, count: int, names: list[str], styled: float = 0.0, filled: float = 0.0
    ) -> Facts:
        """Return random facts of pictures: half of them show digits, if all names are drawn.

        Args:
            count: Of the pictures.
            names: What they may show.
            styled: The share of pictures in the style that is kept out.
            filled: The share of the others with a second colour.
        """
        kinds = ["digit" if name.isdigit() else name.split()[-1] for name in self.names]
        used = [kind for name, kind in zip(self.names, kinds, strict=True) if name in names]
        weights = [
            {"digit": 0.5, "letter": 0.2}.get(kind, 0.3 / len(SHAPES)) / used.count(kind)
            if name in names
            else 0.0
            for name, kind in zip(self.names, kinds, strict=True)
        ]
        colour = torch.randint(len(COLOURS), (count,))
        background = (colour + torch.randint(1, len(COLOURS), (count,))) % len(COLOURS)
        scale, place = torch.randint(len(SCALES), (count,)), torch.randint(len(PLACES), (count,))
        place[scale == list(SCALES).index("large ")] = 0  # it fills the picture
        name = torch.multinomial(torch.tensor(weights), count, replacement=True)
        in_style = torch.rand(count) < styled
        fill = torch.randint(1, len(FILLS), (count,)) * (torch.rand(count) < filled) * ~in_style
        fill[name == self.names.index(OBJECT)] = 0
        second = (colour + torch.randint(1, len(COLOURS), (count,))) % len(COLOURS)
        return Facts(name, colour, background, scale, place, in_style, fill, second)

    def paint(self, facts: Facts, *, held_out: bool = False, varied: bool = False) -> Tensor:
        """Return pictures (N, 3, 64, 64) in -1..1.

        Args:
            facts: What they show.
            held_out: Whether to use the drawings that are kept for measuring, which are a tenth of
                those of each thing, or the others.
            varied: Whether half of the pictures are filled with random patterns, of which captions
                say nothing: an autoencoder has to know more than the pictures of one model.
        """
        grid = self._grid(facts)
        mask = F.grid_sample(self.masks[self._drawings(facts, held_out)], grid, align_corners=False)
        mask = torch.where(self._there(facts.styled), sketched(mask), mask)
        if varied:
            mask = torch.where(self._there(torch.rand(len(mask)) < 0.5), patterned(mask), mask)
        ink, second = (self.palette[own.to(self.device)] for own in (facts.colour, facts.second))
        ink = ink.lerp(second, filling(facts.fill.to(self.device), mask))
        own = self.pattern.expand(len(mask), -1, -1, -1)
        own = F.grid_sample(own, grid, padding_mode="border", align_corners=False)
        ink = torch.where(self._there(facts.name == self.names.index(OBJECT)), own, ink)
        ground = self.palette[facts.background.to(self.device)]
        return (ink * mask + ground * (1 - mask)).clamp(0, 1) * 2 - 1

    def _there(self, flags: Tensor) -> Tensor:
        return flags.to(self.device)[:, None, None, None]

    def _drawings(self, facts: Facts, held_out: bool) -> Tensor:
        counts = self.counts[facts.name]
        kept = (counts * HELD_OUT).ceil().long() * (counts > 1)
        first, number = (0 * kept, kept.clamp(min=1)) if held_out else (kept, counts - kept)
        drawn = first + (torch.rand(len(counts)) * number).long()
        return (self.starts[facts.name] + drawn).to(self.device)

    def _grid(self, facts: Facts) -> Tensor:
        """Return where each pixel of the pictures lies in their drawings (N, 64, 64, 2)."""
        count = len(facts.name)
        low, high = torch.tensor(list(SCALES.values()))[facts.scale].unbind(1)
        scale = low + (high - low) * torch.rand(count)
        free = 1 - scale
        side = torch.tensor(list(PLACES.values()))[facts.place]
        x = free * (0.75 * side + 0.2 * (2 * torch.rand(count) - 1))
        y = free * 0.3 * (2 * torch.rand(count) - 1)
        angle = 0.2 * (2 * torch.rand(count) - 1)
        cos, sin = angle.cos() / scale, angle.sin() / scale
        rows = [cos, -sin, sin * y - cos * x, sin, cos, -sin * x - cos * y]
        affine = torch.stack(rows, dim=1).view(count, 2, 3).to(self.device)
        return F.affine_grid(affine, [count, 1, SIZE, SIZE], align_corners=False)


def sketched(mask: Tensor) -> Tensor:
    """Return masks (N, 1, 64, 64) in the style that is kept out: outlines filled with stripes."""
    outer = F.max_pool2d(mask, 3, 1, 1)
    outline = outer + F.max_pool2d(-mask, 3, 1, 1)
    line = torch.arange(SIZE, device=mask.device)
    stripes = ((line[:, None] + line) % 8 < 3).float()
    return torch.maximum(outline, outer * stripes).clamp(0, 1)


def filling(fill: Tensor, mask: Tensor) -> Tensor:
    """Return where masks (N, 1, 64, 64) have the second colour, for the numbers of FILLS (N,)."""
    line = torch.arange(SIZE, device=mask.device)
    turn, size, *phases = torch.rand(4, len(mask), 1, 1, 1, device=mask.device)
    cos, sin = (torch.pi * turn).cos(), (torch.pi * turn).sin()
    period = (7 + 7 * size) * (1 + (fill == FILLS.index("checks"))[:, None, None, None])
    along, across = line * cos + line[:, None] * sin, line[:, None] * cos - line * sin
    one, other = (
        torch.sin(2 * torch.pi * (where / period + phase))
        for where, phase in zip((along, across), phases, strict=True)
    )
    waves = {"stripes": one, "dots": one + other - 0.6, "checks": one * other}
    soft = {name: (3 * wave + 0.5).clamp(0, 1) for name, wave in waves.items()}
    edges = (1.6 * (mask + F.max_pool2d(-mask, 3, 1, 1))).clamp(0, 1)
    kinds = torch.stack([torch.zeros_like(mask), *soft.values(), edges])
    return kinds[fill, torch.arange(len(mask), device=mask.device)]


def patterned(mask: Tensor) -> Tensor:
    """Return masks (N, 1, 64, 64) with random stripes, of drawings or of their outlines."""
    count, device = len(mask), mask.device
    line = torch.arange(SIZE, device=device)
    angle, period, phase, outlined = torch.rand(4, count, 1, 1, 1, device=device)
    turned = line[:, None] * (torch.pi * angle).cos() + line * (torch.pi * angle).sin()
    waves = torch.sin(turned * 2 * torch.pi / (3.5 + 12 * period) + 2 * torch.pi * phase)
    outline = F.max_pool2d(mask, 3, 1, 1) + F.max_pool2d(-mask, 3, 1, 1)
    filled = (F.max_pool2d(mask, 3, 1, 1) * (4 * waves).clamp(0, 1)).clamp(0, 1)
    return torch.where(outlined < 0.4, torch.maximum(outline, filled), filled).clamp(0, 1)


def save_pictures(folder: Path, pixels: Tensor, captions: list[str]) -> None:
    """Write pictures (N, 3, H, W) in -1..1 as png files, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    levels = ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    for i, (picture, caption) in enumerate(zip(levels, captions, strict=True)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"{caption}\n", encoding="utf-8")


def save_grid(path: Path, pixels: Tensor, columns: int) -> None:
    """Write pictures (N, 3, H, W) in -1..1 as one png file of several columns."""
    rows = [torch.cat(list(row), dim=2) for row in pixels.float().cpu().split(columns)]
    width = rows[0].shape[2]
    whole = torch.cat([F.pad(row, (0, width - row.shape[2]), value=1.0) for row in rows], dim=1)
    levels = ((whole + 1) * 127.5).round().clamp(0, 255).byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(path)
