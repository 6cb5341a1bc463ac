"""What a diffusion model learns from in a step: pictures, their captions, and noise.

An example has one picture, or two where pictures of a subject's class are trained with it: n of
them, each with noise and a step of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_cli.data.captions import shuffled
from lora_cli.data.media import described
from lora_cli.data.picture_sizes import (
    apply_cut,
    cut_to,
)
from lora_cli.data.pictures import PictureError, open_picture, picture_facts
from lora_cli.errors import LoraError
from lora_cli.tasks.diffusion.caption_rows import CaptionRows
from lora_cli.tasks.examples import MAIN, Batch, Example

LATENTS, TEXTS, POOLED = "latents", "texts", "pooled"  # what frozen parts compute, where it is kept
PRIOR = "prior"  # the term of the loss of a class's pictures


@dataclass
class _Seen:
    """A picture as the model sees it.

    Args:
        pixels: (3, H, W), from -1 to 1.
        sizes: Height and width of the file, what is cut at the top and left, height and width.
    """

    pixels: Tensor
    sizes: list[int]


class CaptionedPictures(CaptionRows):
    """A task whose rows are a picture and what it shows, with the noise of each step."""

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example with its noise drawn, and its pictures decoded where that is needed.

        What is drawn does not depend on what is kept, so that a run is the same without a cache.
        """
        draw, of = int(example["draw"]), self.spec.validation_draws
        # of a row's draws each has noise of its own, and one of the steps between which they lie
        own = rng if training else rng.spawn(draw + 1)[draw]
        values = [example["image"]]
        captions = [[list(example[f"ids_{i}"]) for i in range(len(self.tokenizers))]]
        if training and self.spec.shuffle_tags:
            caption = shuffled(str(example["caption"]), self.spec.keep_tags, own)
            captions = [self.ids_of(caption)]
        if "prior_image" in example:
            assert self.prior is not None
            values.append(example["prior_image"])
            captions.append(self.ids_of(self.prior.spec.caption))
        drop = training and self.spec.caption_dropout > 0
        dropped = [bool(drop and own.random() < self.spec.caption_dropout) for _ in values]
        side = self.base.family.pixels_per_latent
        size = (int(example["width"]), int(example["height"]))
        shape = (self.base.latent_channels, size[1] // side, size[0] // side)
        steps = [
            self.noise.draw_step(rng) if training else self.noise.spread_step(rng, draw, of)
            for _ in values
        ]
        found = {
            **example,
            "ids": captions,
            "dropped": dropped,
            "steps": steps,
            "noise": torch.stack([self._noise(own, shape) for _ in values]),
        }
        if self.spec.latents == "sample":
            found["sampled"] = torch.stack([_normal(own, shape) for _ in values])
        self._add_pictures(found, values, size, own if training else None)
        return found

    def _noise(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> Tensor:
        noise = _normal(rng, shape)
        if self.spec.noise_offset:
            noise += self.spec.noise_offset * _normal(rng, (shape[0], 1, 1))
        return noise

    def _add_pictures(
        self,
        found: Example,
        values: Sequence[dict[str, Any]],
        size: tuple[int, int],
        rng: np.random.Generator | None,
    ) -> None:
        """Add the pixels of an example's pictures where the latents are not kept, and the sizes."""
        has_sizes = self.base.family.has_sizes
        if LATENTS in found and not has_sizes:
            return
        seen = [self._seen(value, size, rng, LATENTS in found) for value in values]
        if LATENTS not in found:
            found["pixels"] = torch.stack([one.pixels for one in seen])
        if has_sizes:
            found["sizes"] = torch.tensor([one.sizes for one in seen])

    def _seen(
        self,
        value: dict[str, Any],
        size: tuple[int, int],
        rng: np.random.Generator | None,
        only_sizes: bool,
    ) -> _Seen:
        """Return a picture as the model sees it; `rng` augments it."""
        facts = picture_facts(value)
        width, height = facts.width, facts.height
        place = (0.5, 0.5)
        if rng is not None and self.spec.crop == "random":
            place = (rng.random(), rng.random())
        cut = cut_to(width, height, size, place)
        left, pixels = cut.left, torch.empty(0)
        if not only_sizes:
            image = self._opened(value)
            values = np.asarray(apply_cut(image, cut), dtype=np.float32) / 127.5 - 1.0
            if rng is not None and self.spec.flip and rng.random() < 0.5:
                values = values[:, ::-1]
                left = cut.resized[0] - cut.left - cut.width  # of the mirrored picture
            pixels = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
        return _Seen(pixels, [height, width, cut.top, left, size[1], size[0]])

    def _opened(self, value: dict[str, Any]) -> Any:
        try:
            return open_picture(value)
        except PictureError as error:  # it was whole when the rows were checked
            what = f"`{described(value)}` {error}; it was whole when the run began"
            hint = "put the file back; a run that was interrupted goes on with `--resume`"
            raise LoraError(what, str(value["path"] or ""), hint) from error

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as one batch, whose pictures stand together by their size."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(tuple(example["noise"].shape), []).append(i)
        inputs: dict[str, Tensor] = {"steps": torch.tensor([one["steps"] for one in examples])}
        for number, members in enumerate(groups.values()):
            inputs[f"rows.{number}"] = torch.tensor(members)
            for key in ("noise", "sampled", "pixels", LATENTS):
                if key in examples[0]:
                    together = [examples[i][key] for i in members]
                    inputs[f"{key}.{number}"] = torch.stack(together)
        for key in (TEXTS, POOLED, "sizes"):
            if key in examples[0]:
                inputs[key] = torch.stack([example[key] for example in examples])
        self._add_captions(inputs, examples)
        n_pictures = inputs["steps"].shape[1]
        ones = torch.ones(len(examples))
        items = {MAIN: ones}
        if self.spec.prior is not None:
            items[PRIOR] = ones if n_pictures > 1 else torch.zeros(len(examples))
        rows = [example["row"] for example in examples]
        return Batch(inputs, {}, items, len(examples) * n_pictures, rows)

    def _add_captions(self, inputs: dict[str, Tensor], examples: Sequence[Example]) -> None:
        """Add the tokens of the captions, where they are read, and those of the empty caption."""
        dropped = torch.tensor([example["dropped"] for example in examples])
        has_dropped = bool(dropped.any())
        if has_dropped:
            inputs["dropped"] = dropped
        empty = self.ids_of("") if has_dropped else []
        for i in range(len(self.tokenizers)):
            if TEXTS not in inputs:
                ids = [[of_one[i] for of_one in example["ids"]] for example in examples]
                inputs[f"ids.{i}"] = torch.tensor(ids)
            if has_dropped:
                inputs[f"empty.{i}"] = torch.tensor([empty[i]])


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
