"""Kinds of models that draw: which parts each has, and how these compute together.

A family of models is one class: Stable Diffusion and Stable Diffusion XL here, others in modules of
their own. `FAMILIES` of `diffusion_base` lists all of them.
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
    """What a denoiser reads besides noisy latents.

    Args:
        texts: What `Family.texts` returns, without None.
        sizes: Of the pictures (B, 6), if the model reads them.
        guidance: How far away from an empty text it is to draw, if it reads that.
    """

    texts: Sequence[Tensor]
    sizes: Tensor | None = None
    guidance: float = 1.0


class Family(ABC):
    """How the parts of one base compute together.

    Args:
        text_encoders: Those of the class's text encoders that the base has.
        configs: The configuration of each of its parts.
    """

    name: ClassVar[str]
    """As people call it."""
    denoiser: ClassVar[str]
    """The part that takes noise away, which is trained."""
    classes: ClassVar[Mapping[str, tuple[str, ...]]]
    """Of each part, the classes that are known to compute as this tool computes."""
    encoders: ClassVar[tuple[str, ...]]
    """The parts that read a text."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Those of them that a base may lack."""
    never_adapted: ClassVar[tuple[str, ...]] = ()
    """Those of them that stay as they are when text encoders are trained."""
    noise_scheduler: ClassVar[str] = "DDPMScheduler"
    """Adds noise in training, as in diffusers' training scripts."""
    learns_flow: ClassVar[bool] = False
    """It learns the way from a picture to noise (flow matching), and not the noise."""
    has_sizes: ClassVar[bool] = False
    """It reads the sizes of a picture, as Stable Diffusion XL."""

    def __init__(self, text_encoders: Sequence[str], configs: Mapping[str, Config]) -> None:
        self.text_encoders, self.configs = tuple(text_encoders), configs

    @abstractmethod
    def mismatches(self) -> list[str]:
        """Return why the parts do not fit together, or are trained in another way."""

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of a side that become one of the latents' side."""
        return int(2 ** (len(self.configs[VAE]["block_out_channels"]) - 1))

    @property
    def divisor(self) -> int:
        """What the sides of pictures have to be multiples of, as diffusers draws them."""
        return math.lcm(8, self.pixels_per_latent)

    @property
    def longest_side(self) -> int | None:
        """The longest side of a picture that the model can read, in pixels; None: any."""
        return None

    @property
    def usual_side(self) -> int | None:
        """The side of the pictures that it was trained for, in pixels, if it says so."""
        side = self.configs[self.denoiser].get("sample_size")
        return side * self.pixels_per_latent if isinstance(side, int) else None

    @property
    def usual_drawing(self) -> dict[str, float]:
        """The `steps` and the `guidance_scale` of diffusers' pipeline, where others are better.

        Empty: those that a recipe has by default, which are usual for Stable Diffusion 1 and 2.
        """
        return {}

    def token_limit(self, encoder: str, tokenizer: Any) -> int:
        """Return how many tokens of a text a text encoder reads."""
        return int(tokenizer.model_max_length)

    @abstractmethod
    def texts(
        self, parts: Mapping[str, nn.Module], ids: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the text encoders make of texts.

        Args:
            parts: The text encoders by name.
            ids: The tokens for each of them (N, T).

        Returns:
            An embedding of each token (N, L, D), and of a whole text (N, P) if the model reads it.
        """

    @property
    def reads_guidance(self) -> bool:
        """Whether the denoiser reads how far away from an empty text it is to draw."""
        return False

    @property
    def has_negative_prompt(self) -> bool:
        """Whether a negative prompt changes what is drawn."""
        return True

    def drawn_latents(self, drawn: Tensor, side: int) -> Tensor:
        """Return what the pipeline has drawn as latents (B, C, h, w).

        Args:
            drawn: As the pipeline returns it.
            side: Of the pictures, in pixels.
        """
        return drawn

    def odd_scheduler(self) -> list[str]:
        """Return with what a scheduler of flow matching would draw in another way."""
        return [
            f"its scheduler has `{key}`, with which it draws in another way"
            for key in ("invert_sigmas", "stochastic_sampling")
            if self.configs[SCHEDULER].get(key)
        ]

    @abstractmethod
    def denoised(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, given: Conditions
    ) -> Tensor:
        """Return what the denoiser says of noisy latents (B, C, h, w).

        Args:
            denoiser: The part.
            noisy: (B, C, h, w).
            times: How much noise there is in each, in the scheduler's unit (B,).
            given: What it reads besides.
        """

    def pipeline_options(self, index: Config) -> Config:
        """Return what diffusers' pipeline is made of besides the parts.

        Args:
            index: The content of the base's `model_index.json`.
        """
        return {}


def tokenizer_of(encoder: str) -> str:
    """Return the part that turns texts into what a text encoder reads."""
    return encoder.replace("text_encoder", "tokenizer")


def latents_differ(denoiser: str, reads: int, makes: int, more: str = "") -> list[str]:
    """Return that a denoiser reads other latents than the autoencoder makes, if it does."""
    if reads == makes:
        return []
    return [f"its {denoiser} reads {reads} channels{more}, and its autoencoder makes {makes}"]


class StableDiffusion(Family):
    """Stable Diffusion 1 and 2: a U-Net, and one text encoder."""

    name = "Stable Diffusion"
    denoiser = UNET
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        UNET: ("UNet2DConditionModel",),
        VAE: ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
    }

    def mismatches(self) -> list[str]:
        """Return why the parts do not fit together, or are trained in another way."""
        unet, kinds = self.configs[UNET], {9: "fills in parts of pictures", 8: "changes pictures"}
        kind = kinds.get(unet["in_channels"])
        more = f" (it {kind})" if kind else ""
        channels = self.configs[VAE]["latent_channels"]
        problems = latents_differ("U-Net", unet["in_channels"], channels, more)
        widths = [self.configs[name]["hidden_size"] for name in self.text_encoders]
        if unet["cross_attention_dim"] != sum(widths):
            found = " and ".join(map(str, widths))
            problems.append(
                f"its U-Net reads texts of {unet['cross_attention_dim']} numbers a token, and "
                f"its text encoders make {found}"
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
        """Return what the text encoder makes of texts."""
        return parts["text_encoder"](ids[0])[0], None

    def denoised(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, given: Conditions
    ) -> Tensor:
        """Return what the U-Net says of noisy latents."""
        more = {}
        if given.sizes is not None:
            asked = {"text_embeds": given.texts[1], "time_ids": given.sizes}
            more = {"added_cond_kwargs": asked}
        found: Tensor = denoiser(
            noisy, times, encoder_hidden_states=given.texts[0], return_dict=False, **more
        )[0]
        return found

    def pipeline_options(self, index: Config) -> Config:
        """Leave out the filter of what is drawn."""
        options = {"safety_checker": None, "feature_extractor": None}
        return {**options, "requires_safety_checker": False}


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, and the sizes of a picture."""

    name = "Stable Diffusion XL"
    encoders = ("text_encoder", "text_encoder_2")
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **StableDiffusion.classes,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    }
    has_sizes = True

    @property
    def usual_drawing(self) -> dict[str, float]:
        """The guidance of diffusers' pipeline; in so many steps a recipe draws by default."""
        return {"guidance_scale": 5.0}

    def texts(
        self, parts: Mapping[str, nn.Module], ids: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the text encoders make of texts, side by side, and of a whole one."""
        states, (_, whole) = clip_texts(parts, self.encoders, ids)
        return states, whole

    def pipeline_options(self, index: Config) -> Config:
        """Draw without a watermark, which is not a part of the model."""
        known = index.get("force_zeros_for_empty_prompt", True)
        return {"force_zeros_for_empty_prompt": known, "add_watermarker": False}


def clip_texts(
    parts: Mapping[str, nn.Module], names: Collection[str], ids: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return what text encoders make of texts before their last layer, and each of a whole text.

    Args:
        parts: The text encoders by name.
        names: Those that are asked.
        ids: The tokens for each of them (N, T).

    Returns:
        Their embeddings of each token side by side (N, T, D), and each one's first output (N, P).
    """
    outputs = [
        parts[name](own, output_hidden_states=True) for name, own in zip(names, ids, strict=False)
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return states, [output[0] for output in outputs]
