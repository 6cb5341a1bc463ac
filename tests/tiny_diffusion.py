"""Tiny diffusion models in diffusers' layout, and captioned images, built in code.

folder = tiny_diffusion.save(tmp_path / "base")                       Stable Diffusion 1.5
folder = tiny_diffusion.save(tmp_path / "base", "xl")                 Stable Diffusion XL
folder = tiny_diffusion.save(tmp_path / "base", "sd3")                Stable Diffusion 3
folder = tiny_diffusion.save(tmp_path / "base", "sd3 without t5")     likewise, without T5
folder = tiny_diffusion.save(tmp_path / "base", "flux")               FLUX.1-dev
tiny_diffusion.write_folder(tmp_path / "pictures", {"train": 4})      a caption next to each
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import tiny
import tiny_pictures
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIDE = 16  # of the images, in pixels
LENGTH = 24  # tokens of a caption
WIDTH = 8  # of a text encoder
START, END = "<|startoftext|>", "<|endoftext|>"
SUBJECTS = ("dark", "light")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.!'"
T5_WIDTH = 24  # wider than both CLIP encoders together, as in Stable Diffusion 3


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """Return a tokenizer like CLIP's, of single letters."""
    names = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), START, END]
    vocabulary = {name: i for i, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def text_encoder(projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return a text encoder."""
    ids = tokenizer().get_vocab()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()), hidden_size=WIDTH, intermediate_size=16, projection_dim=WIDTH,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH,
        bos_token_id=ids[START], eos_token_id=ids[END], pad_token_id=ids[END],
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


@functools.cache
def t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer like T5's, of single letters."""
    names = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    return T5Tokenizer(vocab=[(name, -float(i)) for i, name in enumerate(names)], extra_ids=0)


def t5_encoder() -> T5EncoderModel:
    """Return a text encoder."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=T5_WIDTH, d_kv=4, d_ff=16, num_layers=1,
        num_heads=2, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def transformer(**config: Any) -> SD3Transformer2DModel:
    """Return a transformer of two blocks; the first has dual attention, as in version 3.5."""
    values: dict[str, Any] = {
        "sample_size": SIDE // 2, "patch_size": 2, "in_channels": 4, "out_channels": 4,
        "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": T5_WIDTH, "caption_projection_dim": 16,
        "pooled_projection_dim": 2 * WIDTH, "pos_embed_max_size": 16,
        "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    return SD3Transformer2DModel(**{**values, **config})


def unet(xl: bool = False, **config: Any) -> UNet2DConditionModel:
    """Return a U-Net of two levels, one of which has cross-attention to the text."""
    values: dict[str, Any] = {
        "sample_size": SIDE // 2, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 4,
        "cross_attention_dim": 2 * WIDTH if xl else WIDTH, "attention_head_dim": 2,
    }  # fmt: skip
    if xl:
        values |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + WIDTH, "use_linear_projection": True,
        }  # fmt: skip
    return UNet2DConditionModel(**{**values, **config})


def vae(**config: Any) -> AutoencoderKL:
    """Return an autoencoder that encodes 2 x 2 pixels as one latent."""
    values: dict[str, Any] = {
        "block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": SIDE,
    }  # fmt: skip
    return AutoencoderKL(**{**values, **config})


def scheduler(**config: Any) -> DDIMScheduler:
    """Return the scheduler of Stable Diffusion."""
    values: dict[str, Any] = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    }  # fmt: skip
    return DDIMScheduler(**{**values, **config})


def _flow_pipeline(kind: str, noise: dict[str, Any], **config: Any) -> Any:
    """Return a pipeline of Stable Diffusion 3."""
    has_t5 = kind == "sd3"
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer(**config), scheduler=FlowMatchEulerDiscreteScheduler(
            **{"shift": 3.0, **noise}
        ),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False,
                use_post_quant_conv=False),
        text_encoder=text_encoder(True), tokenizer=tokenizer(),
        text_encoder_2=text_encoder(True), tokenizer_2=tokenizer(),
        text_encoder_3=t5_encoder() if has_t5 else None,
        tokenizer_3=t5_tokenizer() if has_t5 else None,
    )  # fmt: skip


def _flux_pipeline(noise: dict[str, Any], **config: Any) -> Any:
    """Return a pipeline of Flux, with one block of each kind."""
    values: dict[str, Any] = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": T5_WIDTH, "pooled_projection_dim": WIDTH,
        "guidance_embeds": True, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=FluxTransformer2DModel(**{**values, **config}),
        scheduler=FlowMatchEulerDiscreteScheduler(
            **{"shift": 3.0, "use_dynamic_shifting": True, **noise}
        ),
        vae=vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False,
                use_post_quant_conv=False),
        text_encoder=text_encoder(), tokenizer=tokenizer(),
        text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def pipeline(kind: str = "sd", noise: dict[str, Any] | None = None, **config: Any) -> Any:
    """Return a random pipeline; `noise` configures its scheduler, `config` its denoiser."""
    if kind.startswith("sd3"):
        return _randomise(_flow_pipeline(kind, noise or {}, **config))
    if kind == "flux":
        return _randomise(_flux_pipeline(noise or {}, **config))
    xl = kind == "xl"
    parts: dict[str, Any] = {
        "unet": unet(xl, **config), "vae": vae(), "text_encoder": text_encoder(),
        "tokenizer": tokenizer(), "scheduler": scheduler(**(noise or {})),
    }  # fmt: skip
    if xl:
        parts |= {"text_encoder_2": text_encoder(True), "tokenizer_2": tokenizer()}
        built = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        built = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return _randomise(built)


@torch.no_grad()
def _randomise(built: Any) -> Any:
    """Add noise to all parameters, so that no bias is 0 and no scale of a norm is 1."""
    for name, part in built.components.items():
        if isinstance(part, torch.nn.Module):
            for parameter in getattr(built, name).parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return built


def save(
    folder: Path, kind: str = "sd", noise: dict[str, Any] | None = None, **config: Any
) -> Path:
    """Save a pipeline to a folder, and return the folder."""
    key = ("diffusion", kind, repr(noise), repr(config))

    def write(target: Path) -> None:
        pipeline(kind, noise, **config).save_pretrained(target)

    return tiny.saved_once(folder, key, write)


def caption(i: int) -> str:
    """Return a caption that is unique to the number."""
    return f"a {SUBJECTS[i % 2]} one, no {i}"


def write_folder(root: Path, splits: dict[str, int], width: int = 20, height: int = 18) -> Path:
    """Write images with a text file next to each, in a folder for each split."""
    number = 0
    for split, count in splits.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            number += 1
            image = tiny_pictures.picture(number, SUBJECTS[number % 2], width, height)
            image.save(root / split / f"{i}.png")
            (root / split / f"{i}.txt").write_text(f"{caption(number)}\n", encoding="utf-8")
    return root
