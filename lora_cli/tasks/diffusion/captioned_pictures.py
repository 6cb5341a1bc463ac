"""Batches of a diffusion model: images, their captions, and noise.

An example has n images: one, or two if class images are trained along with the subject's. Each
has its own noise and timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_cli.data.captions import shuffle_tags
from lora_cli.data.media import media_name
from lora_cli.data.picture_sizes import (
    apply_crop,
    crop_to,
)
from lora_cli.data.pictures import PictureError, open_picture, picture_facts
from lora_cli.errors import LoraError
from lora_cli.tasks.diffusion.caption_rows import CaptionRows
from lora_cli.tasks.examples import MAIN, Batch, Example

LATENTS, TEXTS, POOLED = "latents", "texts", "pooled"  # cached outputs of frozen parts
PRIOR = "prior"  # the loss term of the class images


@dataclass
class _PreparedImage:
    """An image that was resized and cropped for the model.

    Args:
        pixels: Values from -1 to 1 (3, H, W).
        sizes: Height and width of the original, top and left of the crop, height and width of the
            crop, in pixels: the size conditioning of SDXL.
    """

    pixels: Tensor
    sizes: list[int]


class CaptionedPictures(CaptionRows):
    """The part of a text-to-image task that prepares examples and collates batches."""

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example with random noise and timesteps, and decoded images if needed.

        Random numbers do not depend on what is cached, so that a run is the same without a cache.
        """
        index, n_draws = int(example["draw"]), self.spec.validation_draws
        # in evaluation, each draw of a row has its own noise and its own range of timesteps
        image_rng = rng if training else rng.spawn(index + 1)[index]
        values = [example["image"]]
        captions = [[list(example[f"ids_{i}"]) for i in range(len(self.tokenizers))]]
        if training and self.spec.shuffle_tags:
            caption = shuffle_tags(str(example["caption"]), self.spec.keep_tags, image_rng)
            captions = [self.ids_of(caption)]
        if "prior_image" in example:
            assert self.prior is not None
            values.append(example["prior_image"])
            captions.append(self.ids_of(self.prior.spec.caption))
        may_drop = training and self.spec.caption_dropout > 0
        dropped = [
            bool(may_drop and image_rng.random() < self.spec.caption_dropout) for _ in values
        ]
        side = self.base.family.pixels_per_latent
        size = (int(example["width"]), int(example["height"]))
        shape = (self.base.latent_channels, size[1] // side, size[0] // side)
        steps = [
            self.noise.sample_step(rng)
            if training
            else self.noise.validation_step(rng, index, n_draws)
            for _ in values
        ]
        prepared = {
            **example,
            "ids": captions,
            "dropped": dropped,
            "steps": steps,
            "noise": torch.stack([self._noise(image_rng, shape) for _ in values]),
        }
        if self.spec.latents == "sample":
            prepared["sampled"] = torch.stack([_normal(image_rng, shape) for _ in values])
        self._add_images(prepared, values, size, image_rng if training else None)
        return prepared

    def _noise(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> Tensor:
        noise = _normal(rng, shape)
        if self.spec.noise_offset:
            noise += self.spec.noise_offset * _normal(rng, (shape[0], 1, 1))
        return noise

    def _add_images(
        self,
        prepared: Example,
        values: Sequence[dict[str, Any]],
        size: tuple[int, int],
        rng: np.random.Generator | None,
    ) -> None:
        """Add the pixels of an example's images unless latents are cached, and their sizes."""
        has_sizes = self.base.family.has_sizes
        if LATENTS in prepared and not has_sizes:
            return
        images = [self._prepare_image(value, size, rng, LATENTS in prepared) for value in values]
        if LATENTS not in prepared:
            prepared["pixels"] = torch.stack([image.pixels for image in images])
        if has_sizes:
            prepared["sizes"] = torch.tensor([image.sizes for image in images])

    def _prepare_image(
        self,
        value: dict[str, Any],
        size: tuple[int, int],
        rng: np.random.Generator | None,
        only_sizes: bool,
    ) -> _PreparedImage:
        """Resize and crop an image; with `rng`, augment it."""
        facts = picture_facts(value)
        width, height = facts.width, facts.height
        anchor = (0.5, 0.5)
        if rng is not None and self.spec.crop == "random":
            anchor = (rng.random(), rng.random())
        crop = crop_to(width, height, size, anchor)
        left, pixels = crop.left, torch.empty(0)
        if not only_sizes:
            image = self._load_image(value)
            values = np.asarray(apply_crop(image, crop), dtype=np.float32) / 127.5 - 1.0
            if rng is not None and self.spec.flip and rng.random() < 0.5:
                values = values[:, ::-1]
                left = crop.resized[0] - crop.left - crop.width  # in the mirrored image
            pixels = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
        return _PreparedImage(pixels, [height, width, crop.top, left, size[1], size[0]])

    def _load_image(self, value: dict[str, Any]) -> Any:
        try:
            return open_picture(value)
        except PictureError as error:  # the file was intact when the rows were checked
            what = f"`{media_name(value)}` {error}; it was whole when the run began"
            hint = "put the file back; a run that was interrupted goes on with `--resume`"
            raise LoraError(what, str(value["path"] or ""), hint) from error

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Collate examples into a batch, with images grouped by size."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(tuple(example["noise"].shape), []).append(i)
        inputs: dict[str, Tensor] = {
            "steps": torch.tensor([example["steps"] for example in examples])
        }
        for number, members in enumerate(groups.values()):
            inputs[f"rows.{number}"] = torch.tensor(members)
            for key in ("noise", "sampled", "pixels", LATENTS):
                if key in examples[0]:
                    values = [examples[i][key] for i in members]
                    inputs[f"{key}.{number}"] = torch.stack(values)
        for key in (TEXTS, POOLED, "sizes"):
            if key in examples[0]:
                inputs[key] = torch.stack([example[key] for example in examples])
        self._add_captions(inputs, examples)
        n_images = inputs["steps"].shape[1]
        ones = torch.ones(len(examples))
        items = {MAIN: ones}
        if self.spec.prior is not None:
            items[PRIOR] = ones if n_images > 1 else torch.zeros(len(examples))
        rows = [example["row"] for example in examples]
        return Batch(inputs, {}, items, len(examples) * n_images, rows)

    def _add_captions(self, inputs: dict[str, Tensor], examples: Sequence[Example]) -> None:
        """Add the captions' token ids unless they are cached, and those of the empty caption."""
        dropped = torch.tensor([example["dropped"] for example in examples])
        has_dropped = bool(dropped.any())
        if has_dropped:
            inputs["dropped"] = dropped
        empty = self.ids_of("") if has_dropped else []
        for i in range(len(self.tokenizers)):
            if TEXTS not in inputs:
                ids = [[per_encoder[i] for per_encoder in example["ids"]] for example in examples]
                inputs[f"ids.{i}"] = torch.tensor(ids)
            if has_dropped:
                inputs[f"empty.{i}"] = torch.tensor([empty[i]])


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
