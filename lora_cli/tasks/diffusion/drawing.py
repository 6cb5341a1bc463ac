"""Pictures that a model draws, by diffusers' own pipelines."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_cli.errors import NumericsError
from lora_cli.recipe.spec import DrawingSpec

NAME_LENGTH = 40  # characters of a text in the name of its picture


@dataclass
class Drawing:
    """How pictures are drawn.

    Args:
        pipeline: Of diffusers, around the model.
        settings: Of the recipe.
        side: Of the pictures, in pixels.
        latents_of: Returns what the pipeline has drawn as latents (B, C, h, w), of a side.
    """

    pipeline: Any
    settings: DrawingSpec
    side: int
    latents_of: Callable[[Tensor, int], Tensor]

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], *seeds: int) -> list[Any]:
        """Return a picture for each text, as Pillow has it.

        Args:
            prompts: The texts.
            seeds: Decide the noise: one for all, or one for each.

        Each starts from noise of its own generator, on the host: a text's picture is the same on
        every device, and whatever else is drawn with it, but for rounding.

        Raises:
            NumericsError: If one is not finite.
        """
        pipe, settings = self.pipeline, self.settings
        each = seeds if len(seeds) == len(prompts) else seeds * len(prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in each]
        negative = None
        if settings.negative_prompt is not None:
            negative = [settings.negative_prompt] * len(prompts)
        drawn = pipe(
            list(prompts), negative_prompt=negative, height=self.side, width=self.side,
            num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale,
            generator=generators, output_type="latent",
        ).images  # fmt: skip
        latents, vae = self.latents_of(drawn, self.side), pipe.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with torch.autocast(latents.device.type, enabled=False):
            scaled = latents.to(vae.dtype) / vae.config.scaling_factor + shift
            pixels = vae.decode(scaled, return_dict=False)[0]
        if not bool(pixels.isfinite().all()):
            what = "a picture that was drawn has numbers that are not finite"
            hint = "`--set train.precision=fp32`, or bf16, where it was drawn in fp16"
            raise NumericsError(what, "train.precision", hint)
        found: list[Any] = pipe.image_processor.postprocess(pixels.float(), output_type="pil")
        return found


def picture_name(prompt: str, seed: int) -> str:
    """Return the name of a text's picture: of equal texts and seeds the same."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:NAME_LENGTH].rstrip("-")
    number = hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:8]
    return f"{words}-{number}.png" if words else f"{number}.png"
