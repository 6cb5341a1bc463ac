"""Flux (FLUX.1 dev and schnell): a transformer trained by flow matching on patches of latents.

T5 supplies embeddings of the tokens of a text, and CLIP its pooled embedding. A patch of 2 x 2
latents is one token of the transformer, with its row and column as positions. FLUX.1-dev was
distilled with guidance, and takes the guidance scale as an input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.models.diffusion_family import SCHEDULER, VAE, Conditions, Family, latents_differ

TRANSFORMER, CLIP, T5 = "transformer", "text_encoder", "text_encoder_2"
T5_TOKENS = 512  # as in diffusers' pipeline; padding tokens are not masked
PATCH = 2  # latents per side
DEFAULT_LATENTS = 128  # per side, as in diffusers' pipeline; the configuration does not have it


class Flux(Family):
    """FLUX.1."""

    name = "Flux"
    denoiser = TRANSFORMER
    encoders = (CLIP, T5)
    never_adapted = (T5,)
    noise_scheduler = "FlowMatchEulerDiscreteScheduler"
    uses_flow_matching = True
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        TRANSFORMER: ("FluxTransformer2DModel",),
        VAE: ("AutoencoderKL",),
        CLIP: ("CLIPTextModel",),
        T5: ("T5EncoderModel",),
        "tokenizer_2": ("T5TokenizerFast", "T5Tokenizer"),
        SCHEDULER: ("FlowMatchEulerDiscreteScheduler",),
    }

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """The steps and guidance scale of diffusers' pipeline, or of FLUX.1-schnell's card."""
        if self.reads_guidance:
            return {"steps": 28, "guidance_scale": 3.5}
        return {"steps": 4, "guidance_scale": 0.0}

    def mismatches(self) -> list[str]:
        """Return reasons why the parts do not fit together, or need another way of training."""
        transformer, reads = self.configs[TRANSFORMER], self.configs[TRANSFORMER]["in_channels"]
        channels = PATCH * PATCH * self.configs[VAE]["latent_channels"]
        problems = latents_differ("transformer", reads, channels, " a patch")
        if (transformer["out_channels"] or reads) != channels or transformer["patch_size"] != 1:
            problems.append("its transformer returns other patches than it reads")
        for unit, key, part, width in (
            ("numbers a token", "joint_attention_dim", T5, "d_model"),
            ("numbers of a whole text", "pooled_projection_dim", CLIP, "hidden_size"),
        ):
            if transformer[key] != self.configs[part][width]:
                problems.append(
                    f"its transformer reads {transformer[key]} {unit}, and its `{part}` makes "
                    f"{self.configs[part][width]}"
                )
        return problems + self.scheduler_problems()

    @property
    def reads_guidance(self) -> bool:
        """Whether the transformer takes the guidance scale as an input, as in FLUX.1-dev."""
        return bool(self.configs[TRANSFORMER]["guidance_embeds"])

    @property
    def divisor(self) -> int:
        """Height and width of images have to be multiples of a patch of latents."""
        return self.pixels_per_latent * PATCH

    @property
    def usual_side(self) -> int | None:
        """The default side of generated images, in pixels."""
        return DEFAULT_LATENTS * self.pixels_per_latent

    @property
    def has_negative_prompt(self) -> bool:
        """Always false: there is no unconditional pass that a negative prompt could replace."""
        return False

    def token_limit(self, encoder: str, tokenizer: Any) -> int:
        """Return the maximum number of tokens for a text encoder."""
        return T5_TOKENS if encoder == T5 else super().token_limit(encoder, tokenizer)

    def texts(
        self, parts: Mapping[str, nn.Module], ids: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return T5's embeddings of the tokens, and CLIP's pooled embedding."""
        return parts[T5](ids[1])[0], parts[CLIP](ids[0]).pooler_output

    def denoised(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, conditions: Conditions
    ) -> Tensor:
        """Return the transformer's prediction for noisy latents: the velocity, noise - image."""
        states, pooled = conditions.texts
        rows, columns = (side // PATCH for side in noisy.shape[2:])
        positions = torch.zeros(rows, columns, 3, device=noisy.device, dtype=noisy.dtype)
        positions[..., 1] += torch.arange(rows, device=noisy.device)[:, None]
        positions[..., 2] += torch.arange(columns, device=noisy.device)
        guidance = torch.full_like(times, conditions.guidance) if self.reads_guidance else None
        prediction: Tensor = denoiser(
            hidden_states=patches_of(noisy), timestep=times / 1000, guidance=guidance,
            pooled_projections=pooled, encoder_hidden_states=states,
            txt_ids=positions.new_zeros(states.shape[1], 3), img_ids=positions.flatten(0, 1),
            return_dict=False,
        )[0]  # fmt: skip
        return latents_of(prediction, rows, columns)

    def unpack_latents(self, output: Tensor, side: int) -> Tensor:
        """Return the output of the pipeline, which consists of patches (B, N, 4C), as latents."""
        count = side // self.divisor
        return latents_of(output, count, count)


def patches_of(latents: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as 2 x 2 patches, row by row (B, hw / 4, 4C)."""
    return nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def latents_of(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Return patches (B, rows * columns, 4C) as latents (B, C, 2 rows, 2 columns)."""
    grid = patches.transpose(1, 2).reshape(len(patches), -1, rows, columns)
    return nn.functional.pixel_shuffle(grid, PATCH)
