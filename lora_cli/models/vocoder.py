"""Load a vocoder, which turns spectrograms into audio: transformers' HiFi-GAN for SpeechT5."""

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
        recipe: Names the vocoder.
        name: The vocoder's folder, or its id on the Hub.
        n_bands: The number of mel bands of the model's spectrograms.
        rate: The sampling rate of the recordings, in Hz.

    Raises:
        LoraError: If it cannot be loaded, or needs other spectrograms.
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
        IntegrityError: If one of its files is damaged.
    """
    with _of_vocoder(recipe, name) as source, explained(source, "weights"):
        for file in checkpoint_files(source):
            read_header(file)
        model: Any = SpeechT5HifiGan.from_pretrained(
            **source_of(source), use_safetensors=True, dtype=torch.float32
        )
    vocoder: SpeechT5HifiGan = model.to(device).eval().requires_grad_(False)
    return vocoder


@contextmanager
def _of_vocoder(recipe: Recipe, name: str) -> Iterator[Recipe]:
    """Yield a recipe whose base is the vocoder; errors are attributed to `task.vocoder`."""
    values = {"model.name": name, "model.revision": "main", "model.trust_remote_code": False}
    try:
        yield recipe.with_values(values)
    except LoraError as error:
        at, vocoder_key = recipe.at("model.name"), recipe.at("task.vocoder")
        problems = [
            replace(problem, at=vocoder_key) if problem.at == at else problem
            for problem in error.problems
        ]
        raise type(error)(problems) from error
