"""Stable Diffusion 3 and 3.5: a transformer trained by flow matching (Esser et al. 2024).

Two CLIP encoders and T5 encode the texts:

    CLIP, CLIP 2    embeddings of the tokens, concatenated, zero-padded to T5's width    (77, D)
    T5              embeddings of the tokens, appended to those of CLIP                  (256, D)
    CLIP, CLIP 2    pooled embeddings, concatenated

T5 is large, and a base may lack it. Its embeddings are then zeros, as in diffusers' pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lora_cli.models.diffusion_family import (
    SCHEDULER,
    VAE,
    Conditions,
    Family,
    clip_texts,
    latents_differ,
)

TRANSFORMER, T5 = "transformer", "text_encoder_3"
CLIPS = ("text_encoder", "text_encoder_2")
T5_TOKENS = 256  # as in diffusers' pipeline; padding tokens are not masked


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5."""

    name = "Stable Diffusion 3"
    denoiser = TRANSFORMER
    encoders = (*CLIPS, T5)
    optional = (T5,)
    never_adapted = (T5,)
    noise_scheduler = "FlowMatchEulerDiscreteScheduler"
    uses_flow_matching = True
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        TRANSFORMER: ("SD3Transformer2DModel",),
        VAE: ("AutoencoderKL",),
        **dict.fromkeys(CLIPS, ("CLIPTextModelWithProjection",)),
        T5: ("T5EncoderModel",),
        "tokenizer_3": ("T5TokenizerFast", "T5Tokenizer"),
        SCHEDULER: ("FlowMatchEulerDiscreteScheduler",),
    }

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """The steps and guidance scale of diffusers' pipeline."""
        return {"steps": 28, "guidance_scale": 7.0}

    def mismatches(self) -> list[str]:
        """Return reasons why the parts do not fit together, or need another way of training."""
        transformer, channels = self.configs[TRANSFORMER], self.configs[VAE]["latent_channels"]
        problems = latents_differ("transformer", transformer["in_channels"], channels)
        if (transformer["out_channels"] or transformer["in_channels"]) != channels:
            problems.append(f"its transformer returns {transformer['out_channels']} channels")
        width = sum(self.configs[name]["hidden_size"] for name in CLIPS)
        width_needed = transformer["joint_attention_dim"]
        if width > width_needed:
            problems.append(
                f"its transformer reads {width_needed} numbers a token, and its CLIP encoders make "
                f"{width}"
            )
        if T5 in self.text_encoders and self.configs[T5]["d_model"] != width_needed:
            problems.append(
                f"its transformer reads {width_needed} numbers a token, and its T5 encoder makes "
                f"{self.configs[T5]['d_model']}"
            )
        pooled_width = sum(self.configs[name]["projection_dim"] for name in CLIPS)
        if transformer["pooled_projection_dim"] != pooled_width:
            problems.append(
                f"its transformer reads {transformer['pooled_projection_dim']} numbers of a whole "
                f"text, and its CLIP encoders make {pooled_width}"
            )
        return problems + self.scheduler_problems()

    @property
    def divisor(self) -> int:
        """Height and width of images have to be multiples of a patch of latents."""
        return self.pixels_per_latent * int(self.configs[TRANSFORMER]["patch_size"])

    @property
    def longest_side(self) -> int | None:
        """The maximum side of an image, in pixels, by the number of position embeddings."""
        return int(self.configs[TRANSFORMER]["pos_embed_max_size"]) * self.divisor

    def token_limit(self, encoder: str, tokenizer: Any) -> int:
        """Return the maximum number of tokens for a text encoder."""
        return T5_TOKENS if encoder == T5 else super().token_limit(encoder, tokenizer)

    def texts(
        self, parts: Mapping[str, nn.Module], ids: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings of the tokens (without zeros for a missing T5), and pooled ones."""
        states, pooled = clip_texts(parts, CLIPS, ids)
        if T5 in parts:
            t5_states = parts[T5](ids[len(CLIPS)])[0]
            states = _widened(states, t5_states.shape[-1])
            states = torch.cat([states, t5_states.to(states.dtype)], 1)
        return states, torch.cat(pooled, 1)

    def denoised(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, conditions: Conditions
    ) -> Tensor:
        """Return the transformer's prediction for noisy latents: the velocity, noise - image."""
        states, pooled = conditions.texts
        if T5 not in self.text_encoders:  # zeros are not cached with the texts
            states = _widened(states, int(self.configs[TRANSFORMER]["joint_attention_dim"]))
            states = pad(states, (0, 0, 0, T5_TOKENS))
        prediction: Tensor = denoiser(
            hidden_states=noisy, timestep=times, encoder_hidden_states=states,
            pooled_projections=pooled, return_dict=False,
        )[0]  # fmt: skip
        return prediction


def _widened(states: Tensor, width: int) -> Tensor:
    """Pad embeddings (N, T, d) with zeros to (N, T, D)."""
    return pad(states, (0, width - states.shape[-1]))
