"""Image generation by diffusers' pipelines."""

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

MAX_NAME_LENGTH = 40  # characters of a prompt in its image's file name


@dataclass
class ImageGenerator:
    """Generates images from texts.

    Args:
        pipeline: A diffusers pipeline around the model.
        settings: The recipe's `evaluate.drawing`.
        side: The width and height of the images, in pixels.
        latents_of: Takes the pipeline's output and the side; returns latents (B, C, h, w).
    """

    pipeline: Any
    settings: DrawingSpec
    side: int
    latents_of: Callable[[Tensor, int], Tensor]

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], *seeds: int) -> list[Any]:
        """Generate an image for each text.

        The initial noise of each image comes from its own generator on the host, so that an image
        does not depend on the device or on the other prompts, up to rounding.

        Args:
            prompts: The texts.
            seeds: The seeds of the noise: one for all images, or one for each.

        Returns:
            The images, as Pillow images.

        Raises:
            NumericsError: If an image has values that are not finite.
        """
        pipe, settings = self.pipeline, self.settings
        image_seeds = seeds if len(seeds) == len(prompts) else seeds * len(prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in image_seeds]
        negative = None
        if settings.negative_prompt is not None:
            negative = [settings.negative_prompt] * len(prompts)
        outputs = pipe(
            list(prompts), negative_prompt=negative, height=self.side, width=self.side,
            num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale,
            generator=generators, output_type="latent",
        ).images  # fmt: skip
        latents, vae = self.latents_of(outputs, self.side), pipe.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with torch.autocast(latents.device.type, enabled=False):
            scaled = latents.to(vae.dtype) / vae.config.scaling_factor + shift
            pixels = vae.decode(scaled, return_dict=False)[0]
        if not bool(pixels.isfinite().all()):
            what = "a picture that was drawn has numbers that are not finite"
            hint = "`--set train.precision=fp32`, or bf16, where it was drawn in fp16"
            raise NumericsError(what, "train.precision", hint)
        images: list[Any] = pipe.image_processor.postprocess(pixels.float(), output_type="pil")
        return images


def picture_name(prompt: str, seed: int) -> str:
    """Return the file name of a generated image; it depends on the text and the seed alone."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:MAX_NAME_LENGTH].rstrip("-")
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:8]
    return f"{words}-{digest}.png" if words else f"{digest}.png"
