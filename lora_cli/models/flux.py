"""Flux (FLUX.1 dev and schnell): a transformer that learns flow matching on patches of latents.

T5 reads a text token by token, and CLIP the whole of it. Two by two latents are one patch, which
the transformer reads as a token with its row and column. FLUX.1-dev also reads a guidance: how far
it is to draw away from an empty text, which it learnt to do in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.models.diffusion_family import SCHEDULER, VAE, Conditions, Family, latents_differ

TRANSFORMER, CLIP, T5 = "transformer", "text_encoder", "text_encoder_2"
T5_TOKENS = 512  # diffusers' pipeline gives T5 so many tokens, whose padding the model reads too
PATCH = 2  # latents of a side
USUAL_LATENTS = 128  # of a side, as in diffusers' pipeline: the configuration does not say


class Flux(Family):
    """FLUX.1."""

    name = "Flux"
    denoiser = TRANSFORMER
    encoders = (CLIP, T5)
    never_adapted = (T5,)
    noise_scheduler = "FlowMatchEulerDiscreteScheduler"
    learns_flow = True
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        TRANSFORMER: ("FluxTransformer2DModel",),
        VAE: ("AutoencoderKL",),
        CLIP: ("CLIPTextModel",),
        T5: ("T5EncoderModel",),
        "tokenizer_2": ("T5TokenizerFast", "T5Tokenizer"),
        SCHEDULER: ("FlowMatchEulerDiscreteScheduler",),
    }

    @property
    def usual_drawing(self) -> dict[str, float]:
        """The steps and the guidance of diffusers' pipeline, and of FLUX.1-schnell's card."""
        if self.reads_guidance:
            return {"steps": 28, "guidance_scale": 3.5}
        return {"steps": 4, "guidance_scale": 0.0}

    def mismatches(self) -> list[str]:
        """Return why the parts do not fit together, or are trained in another way."""
        transformer, reads = self.configs[TRANSFORMER], self.configs[TRANSFORMER]["in_channels"]
        channels = PATCH * PATCH * self.configs[VAE]["latent_channels"]
        problems = latents_differ("transformer", reads, channels, " a patch")
        if (transformer["out_channels"] or reads) != channels or transformer["patch_size"] != 1:
            problems.append("its transformer returns other patches than it reads")
        for what, key, part, width in (
            ("numbers a token", "joint_attention_dim", T5, "d_model"),
            ("numbers of a whole text", "pooled_projection_dim", CLIP, "hidden_size"),
        ):
            if transformer[key] != self.configs[part][width]:
                problems.append(
                    f"its transformer reads {transformer[key]} {what}, and its `{part}` makes "
                    f"{self.configs[part][width]}"
                )
        return problems + self.odd_scheduler()

    @property
    def reads_guidance(self) -> bool:
        """Whether the transformer reads a guidance, as that of FLUX.1-dev."""
        return bool(self.configs[TRANSFORMER]["guidance_embeds"])

    @property
    def divisor(self) -> int:
        """What the sides of pictures have to be multiples of: a patch of latents."""
        return self.pixels_per_latent * PATCH

    @property
    def usual_side(self) -> int | None:
        """The side of the pictures that it draws if it is not asked for another, in pixels."""
        return USUAL_LATENTS * self.pixels_per_latent

    @property
    def has_negative_prompt(self) -> bool:
        """Whether a negative prompt changes what is drawn: not in one pass a step."""
        return False

    def token_limit(self, encoder: str, tokenizer: Any) -> int:
        """Return how many tokens of a text a text encoder reads."""
        return T5_TOKENS if encoder == T5 else super().token_limit(encoder, tokenizer)

    def texts(
        self, parts: Mapping[str, nn.Module], ids: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return what T5 makes of each token, and CLIP of a whole text."""
        return parts[T5](ids[1])[0], parts[CLIP](ids[0]).pooler_output

    def denoised(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, given: Conditions
    ) -> Tensor:
        """Return what the transformer says of noisy latents: noise minus picture."""
        states, whole = given.texts
        rows, columns = (side // PATCH for side in noisy.shape[2:])
        places = torch.zeros(rows, columns, 3, device=noisy.device, dtype=noisy.dtype)
        places[..., 1] += torch.arange(rows, device=noisy.device)[:, None]
        places[..., 2] += torch.arange(columns, device=noisy.device)
        guidance = torch.full_like(times, given.guidance) if self.reads_guidance else None
        found: Tensor = denoiser(
            hidden_states=patches_of(noisy), timestep=times / 1000, guidance=guidance,
            pooled_projections=whole, encoder_hidden_states=states,
            txt_ids=places.new_zeros(states.shape[1], 3), img_ids=places.flatten(0, 1),
            return_dict=False,
        )[0]  # fmt: skip
        return latents_of(found, rows, columns)

    def drawn_latents(self, drawn: Tensor, side: int) -> Tensor:
        """Return the latents that the pipeline has drawn as patches (B, N, 4C)."""
        count = side // self.divisor
        return latents_of(drawn, count, count)


def patches_of(latents: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as patches of two by two, row by row (B, hw / 4, 4C)."""
    return nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def latents_of(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Return patches (B, rows * columns, 4C) as latents (B, C, 2 rows, 2 columns)."""
    in_place = patches.transpose(1, 2).reshape(len(patches), -1, rows, columns)
    return nn.functional.pixel_shuffle(in_place, PATCH)
