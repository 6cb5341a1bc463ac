"""Stable Diffusion 3 and 3.5: a transformer that learns flow matching (Esser et al. 2024).

Texts are read by two CLIP encoders and by T5:

    CLIP, CLIP 2    of each token, side by side, filled up with zeros to T5's width      (77, D)
    T5              of each token, after those of CLIP                                   (256, D)
    CLIP, CLIP 2    of the whole text, side by side

T5 is large, and a base may lack it: zeros stand in its place, as in diffusers' pipeline.
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
T5_TOKENS = 256  # diffusers' pipeline gives T5 so many tokens, whose padding the model reads too


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
        """The steps and the guidance of diffusers' pipeline."""
        return {"steps": 28, "guidance_scale": 7.0}

    def mismatches(self) -> list[str]:
        """Return why the parts do not fit together, or are trained in another way."""
        transformer, channels = self.configs[TRANSFORMER], self.configs[VAE]["latent_channels"]
        problems = latents_differ("transformer", transformer["in_channels"], channels)
        if (transformer["out_channels"] or transformer["in_channels"]) != channels:
            problems.append(f"its transformer returns {transformer['out_channels']} channels")
        width = sum(self.configs[name]["hidden_size"] for name in CLIPS)
        wanted = transformer["joint_attention_dim"]
        if width > wanted:
            problems.append(
                f"its transformer reads {wanted} numbers a token, and its CLIP encoders make "
                f"{width}"
            )
        if T5 in self.text_encoders and self.configs[T5]["d_model"] != wanted:
            problems.append(
                f"its transformer reads {wanted} numbers a token, and its T5 encoder makes "
                f"{self.configs[T5]['d_model']}"
            )
        whole = sum(self.configs[name]["projection_dim"] for name in CLIPS)
        if transformer["pooled_projection_dim"] != whole:
            problems.append(
                f"its transformer reads {transformer['pooled_projection_dim']} numbers of a whole "
                f"text, and its CLIP encoders make {whole}"
            )
        return problems + self.scheduler_problems()

    @property
    def divisor(self) -> int:
        """What the sides of pictures have to be multiples of: a patch of latents."""
        return self.pixels_per_latent * int(self.configs[TRANSFORMER]["patch_size"])

    @property
    def longest_side(self) -> int | None:
        """The longest side of a picture for which the model has positions, in pixels."""
        return int(self.configs[TRANSFORMER]["pos_embed_max_size"]) * self.divisor

    def token_limit(self, encoder: str, tokenizer: Any) -> int:
        """Return how many tokens of a text a text encoder reads."""
        return T5_TOKENS if encoder == T5 else super().token_limit(encoder, tokenizer)

    def texts(
        self, parts: Mapping[str, nn.Module], ids: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the text encoders make of texts; where there is no T5, without its zeros."""
        states, whole = clip_texts(parts, CLIPS, ids)
        if T5 in parts:
            of_t5 = parts[T5](ids[len(CLIPS)])[0]
            states = _widened(states, of_t5.shape[-1])
            states = torch.cat([states, of_t5.to(states.dtype)], 1)
        return states, torch.cat(whole, 1)

    def denoised(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, given: Conditions
    ) -> Tensor:
        """Return what the transformer says of noisy latents: noise minus picture."""
        states, whole = given.texts
        if T5 not in self.text_encoders:  # the zeros are not kept with the texts
            states = _widened(states, int(self.configs[TRANSFORMER]["joint_attention_dim"]))
            states = pad(states, (0, 0, 0, T5_TOKENS))
        found: Tensor = denoiser(
            hidden_states=noisy, timestep=times, encoder_hidden_states=states,
            pooled_projections=whole, return_dict=False,
        )[0]  # fmt: skip
        return found


def _widened(states: Tensor, width: int) -> Tensor:
    """Return embeddings (N, T, d) with zeros after each (N, T, D)."""
    return pad(states, (0, width - states.shape[-1]))
