"""Families of text-to-image models: the parts of each, and how they work together.

Each family is a class: Stable Diffusion and Stable Diffusion XL here, others in their own modules.
`FAMILIES` in `diffusion_base` lists all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

VAE, UNET, SCHEDULER = "vae", "unet", "scheduler"
NOISE = ("epsilon", "v_prediction")
Config = dict[str, Any]


@dataclass(frozen=True)
class Conditions:
    """The conditioning inputs of a denoiser.

    Args:
        texts: The result of `Family.texts`, without None.
        sizes: The original size, crop and target size of each image (B, 6), if the model uses them.
        guidance: The guidance scale, if the model takes it as an input.
    """

    texts: Sequence[Tensor]
    sizes: Tensor | None = None
    guidance: float = 1.0


class Family(ABC):
    """The computation of a base of several parts.

    Args:
        text_encoders: The text encoders that the base has, out of `encoders`.
        configs: The configuration of each part of the base.
    """

    name: ClassVar[str]
    """The name for messages."""
    denoiser: ClassVar[str]
    """The U-Net or transformer, which is trained."""
    classes: ClassVar[Mapping[str, tuple[str, ...]]]
    """The supported classes of each part."""
    encoders: ClassVar[tuple[str, ...]]
    """The text encoders."""
    optional: ClassVar[tuple[str, ...]] = ()
    """The text encoders that a base may lack."""
    never_adapted: ClassVar[tuple[str, ...]] = ()
    """The text encoders that stay frozen even if text encoders are trained."""
    noise_scheduler: ClassVar[str] = "DDPMScheduler"
    """The class that adds noise in training, as in diffusers' training scripts."""
    uses_flow_matching: ClassVar[bool] = False
    """Whether the denoiser is trained by flow matching, and not to predict the noise."""
    has_sizes: ClassVar[bool] = False
    """Whether the denoiser is conditioned on the sizes of an image, as in Stable Diffusion XL."""

    def __init__(self, text_encoders: Sequence[str], configs: Mapping[str, Config]) -> None:
        self.text_encoders, self.configs = tuple(text_encoders), configs

    @abstractmethod
    def mismatches(self) -> list[str]:
        """Return reasons why the parts do not fit together, or need another way of training."""

    @property
    def pixels_per_latent(self) -> int:
        """The factor by which the autoencoder downsamples height and width."""
        return int(2 ** (len(self.configs[VAE]["block_out_channels"]) - 1))

    @property
    def divisor(self) -> int:
        """Height and width of images have to be multiples of this number, as in diffusers."""
        return math.lcm(8, self.pixels_per_latent)

    @property
    def longest_side(self) -> int | None:
        """The maximum side of an image, in pixels; None if there is no limit."""
        return None

    @property
    def usual_side(self) -> int | None:
        """The side of the images that the base was trained on, in pixels, if it is known."""
        side = self.configs[self.denoiser].get("sample_size")
        return side * self.pixels_per_latent if isinstance(side, int) else None

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """The `steps` and `guidance_scale` of diffusers' pipeline, if the recipe's defaults differ.

        Empty for Stable Diffusion 1 and 2, which the recipe's defaults are made for.
        """
        return {}

    def token_limit(self, encoder: str, tokenizer: Any) -> int:
        """Return the maximum number of tokens for a text encoder."""
        return int(tokenizer.model_max_length)

    @abstractmethod
    def texts(
        self, parts: Mapping[str, nn.Module], ids: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Encode texts with all text encoders.

        Args:
            parts: The text encoders by name.
            ids: The token ids for each text encoder (N, T).

        Returns:
            The embeddings of the tokens (N, L, D), and the pooled embeddings (N, P), or None if
            the denoiser does not use them.
        """

    @property
    def reads_guidance(self) -> bool:
        """Whether the denoiser takes the guidance scale as an input (guidance distillation)."""
        return False

    @property
    def has_negative_prompt(self) -> bool:
        """Whether a negative prompt has an effect."""
        return True

    def unpack_latents(self, output: Tensor, side: int) -> Tensor:
        """Return the output of the pipeline as latents (B, C, h, w).

        Args:
            output: The latents in the pipeline's own layout.
            side: The height and width of the images, in pixels.
        """
        return output

    def scheduler_problems(self) -> list[str]:
        """Return unsupported settings of a flow matching scheduler."""
        return [
            f"its scheduler has `{key}`, with which it draws in another way"
            for key in ("invert_sigmas", "stochastic_sampling")
            if self.configs[SCHEDULER].get(key)
        ]

    @abstractmethod
    def denoised(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, conditions: Conditions
    ) -> Tensor:
        """Return the denoiser's prediction for noisy latents, shape (B, C, h, w).

        Args:
            denoiser: The denoiser.
            noisy: The noisy latents (B, C, h, w).
            times: The timesteps, in the scheduler's unit (B,).
            conditions: The conditioning inputs.
        """

    def pipeline_options(self, index: Config) -> Config:
        """Return the arguments of diffusers' pipeline besides the parts.

        Args:
            index: The content of the base's `model_index.json`.
        """
        return {}


def tokenizer_of(encoder: str) -> str:
    """Return the name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


def latents_differ(denoiser: str, reads: int, makes: int, more: str = "") -> list[str]:
    """Return a problem if the denoiser and the autoencoder have different numbers of channels."""
    if reads == makes:
        return []
    return [f"its {denoiser} reads {reads} channels{more}, and its autoencoder makes {makes}"]


class StableDiffusion(Family):
    """Stable Diffusion 1 and 2, with a U-Net and one text encoder."""

    name = "Stable Diffusion"
    denoiser = UNET
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        UNET: ("UNet2DConditionModel",),
        VAE: ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
    }

    def mismatches(self) -> list[str]:
        """Return reasons why the parts do not fit together, or need another way of training."""
        unet, kinds = self.configs[UNET], {9: "fills in parts of pictures", 8: "changes pictures"}
        kind = kinds.get(unet["in_channels"])
        more = f" (it {kind})" if kind else ""
        channels = self.configs[VAE]["latent_channels"]
        problems = latents_differ("U-Net", unet["in_channels"], channels, more)
        widths = [self.configs[name]["hidden_size"] for name in self.text_encoders]
        if unet["cross_attention_dim"] != sum(widths):
            text_widths = " and ".join(map(str, widths))
            problems.append(
                f"its U-Net reads texts of {unet['cross_attention_dim']} numbers a token, and "
                f"its text encoders make {text_widths}"
            )
        has_sizes = unet["addition_embed_type"] == "text_time"
        if has_sizes != self.has_sizes or unet["class_embed_type"] is not None:
            problems.append(f"its U-Net is told more of a picture than that of {self.name}")
        prediction = self.configs[SCHEDULER].get("prediction_type")
        if prediction not in (None, *NOISE):
            names = " and ".join(f"`{name}`" for name in NOISE)
            problems.append(f"its scheduler has `prediction_type: {prediction}`, and {names} train")
        return problems

    def texts(
        self, parts: Mapping[str, nn.Module], ids: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the last hidden states of the text encoder."""
        return parts["text_encoder"](ids[0])[0], None

    def denoised(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, conditions: Conditions
    ) -> Tensor:
        """Return the U-Net's prediction for noisy latents."""
        options = {}
        if conditions.sizes is not None:
            added = {"text_embeds": conditions.texts[1], "time_ids": conditions.sizes}
            options = {"added_cond_kwargs": added}
        prediction: Tensor = denoiser(
            noisy, times, encoder_hidden_states=conditions.texts[0], return_dict=False, **options
        )[0]
        return prediction

    def pipeline_options(self, index: Config) -> Config:
        """Return the arguments that disable the safety checker."""
        options = {"safety_checker": None, "feature_extractor": None}
        return {**options, "requires_safety_checker": False}


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL, with two text encoders, and conditioned on the sizes of an image."""

    name = "Stable Diffusion XL"
    encoders = ("text_encoder", "text_encoder_2")
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **StableDiffusion.classes,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    }
    has_sizes = True

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """The guidance scale of diffusers' pipeline; its steps equal the recipe's default."""
        return {"guidance_scale": 5.0}

    def texts(
        self, parts: Mapping[str, nn.Module], ids: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the joined hidden states of both encoders, and the second's pooled output."""
        states, (_, pooled) = clip_texts(parts, self.encoders, ids)
        return states, pooled

    def pipeline_options(self, index: Config) -> Config:
        """Return the arguments for a pipeline that adds no watermark."""
        known = index.get("force_zeros_for_empty_prompt", True)
        return {"force_zeros_for_empty_prompt": known, "add_watermarker": False}


def clip_texts(
    parts: Mapping[str, nn.Module], names: Collection[str], ids: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Encode texts with CLIP encoders, as the pipelines of SDXL and Stable Diffusion 3 do.

    Args:
        parts: The text encoders by name.
        names: The names of the CLIP encoders to use.
        ids: The token ids for each of them (N, T).

    Returns:
        The hidden states before the last layer, concatenated over the encoders (N, T, D), and the
        first output of each encoder (its pooled embeddings, (N, P), if it has a projection).
    """
    outputs = [
        parts[name](encoder_ids, output_hidden_states=True)
        for name, encoder_ids in zip(names, ids, strict=False)
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return states, [output[0] for output in outputs]
