"""The model that makes a spectrogram heard: HiFi-GAN, as transformers has it for SpeechT5."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, SpeechT5HifiGan

from lora_cli.errors import LoraError
from lora_cli.models.find_base import checkpoint_files, source_of
from lora_cli.models.load_errors import explained
from lora_cli.recipe import Recipe
from lora_cli.tensorfile import read_header

KIND = "speecht5_hifigan"
SUITABLE = "take one with transformers' HiFi-GAN for SpeechT5, such as microsoft/speecht5_hifigan"


def vocoder_config(recipe: Recipe, name: str, n_bands: int, rate: int) -> PretrainedConfig:
    """Return the configuration of the recipe's vocoder.

    Args:
        recipe: Names it.
        name: Its folder, or its id on the Hub.
        n_bands: Bands of the spectrograms that it is to read.
        rate: Samples a second of the recordings.

    Raises:
        LoraError: If it cannot be read, or makes other spectrograms heard.
    """
    at = recipe.at("task.vocoder")
    with _of_vocoder(recipe, name) as source, explained(source, "configuration"):
        config: PretrainedConfig = AutoConfig.from_pretrained(**source_of(source))
    if config.model_type != KIND:
        raise LoraError(f"`{name}` is a {config.model_type} model, not a vocoder", at, SUITABLE)
    reads = int(config.model_in_dim), int(config.sampling_rate)
    if reads != (n_bands, rate):
        what = f"`{name}` reads spectrograms of {reads[0]} bands, of sound at {reads[1]:,} Hz, and "
        what += f"the model writes {n_bands} bands at {rate:,} Hz"
        raise LoraError(what, at, "take the vocoder that belongs to the model")
    return config


def load_vocoder(recipe: Recipe, name: str, device: torch.device) -> SpeechT5HifiGan:
    """Return the recipe's vocoder, in float32 and eval mode.

    Raises:
        LoraError: If it cannot be loaded.
        IntegrityError: If a file of it is damaged.
    """
    with _of_vocoder(recipe, name) as source, explained(source, "weights"):
        for file in checkpoint_files(source):
            read_header(file)
        model: Any = SpeechT5HifiGan.from_pretrained(
            **source_of(source), use_safetensors=True, dtype=torch.float32
        )
    found: SpeechT5HifiGan = model.to(device).eval().requires_grad_(False)
    return found


@contextmanager
def _of_vocoder(recipe: Recipe, name: str) -> Iterator[Recipe]:
    """Yield a recipe whose base is the vocoder; what is wrong with it is said of the vocoder."""
    values = {"model.name": name, "model.revision": "main", "model.trust_remote_code": False}
    try:
        yield recipe.with_values(values)
    except LoraError as error:
        at, whose = recipe.at("model.name"), recipe.at("task.vocoder")
        own = [replace(one, at=whose) if one.at == at else one for one in error.problems]
        raise type(error)(own) from error
