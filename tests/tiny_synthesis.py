"""Tiny random SpeechT5 models, vocoders, and recordings of several speakers.

base = tiny_synthesis.save(tmp_path / "base")
tiny_synthesis.save_vocoder(tmp_path / "vocoder")
row = {"text": "...", "audio": "...", "speaker": tiny_synthesis.speaker(1)}
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tiny_speech
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import Fuse
from transformers import (
    PreTrainedTokenizerFast,
    SpeechT5Config,
    SpeechT5FeatureExtractor,
    SpeechT5ForTextToSpeech,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

BANDS, SPEAKER = 16, 6  # mel bands, and the length of a speaker embedding
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # with SpeechT5's own ids
LETTERS = [*SPECIAL, " ", *string.ascii_lowercase, *string.digits, *",.'"]
TEXT_POSITIONS, SPEECH_POSITIONS = 80, 60


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters; SpeechT5's own needs the package sentencepiece."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = Fuse()
    backend.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 2)])
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=TEXT_POSITIONS,
        model_input_names=["input_ids", "attention_mask"], **names,
    )  # fmt: skip


def extractor() -> SpeechT5FeatureExtractor:
    """Return a feature extractor like SpeechT5's, with fewer mel bands."""
    return SpeechT5FeatureExtractor(num_mel_bins=BANDS)


def model(seed: int = 0, **config: Any) -> SpeechT5ForTextToSpeech:
    """Return a model without dropout, except for the pre-net's, which is always on."""
    values: dict[str, Any] = {
        "vocab_size": len(LETTERS), "hidden_size": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "encoder_layerdrop": 0.1, "decoder_layerdrop": 0.1,
        "positional_dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "activation_dropout": 0.0, "speech_decoder_postnet_dropout": 0.0, "num_mel_bins": BANDS,
        "speech_decoder_prenet_units": 24, "speech_decoder_postnet_units": 12,
        "speech_decoder_postnet_layers": 3, "speaker_embedding_dim": SPEAKER,
        "max_text_positions": TEXT_POSITIONS, "max_speech_positions": SPEECH_POSITIONS,
        "conv_dim": [8], "conv_stride": [4], "conv_kernel": [4],
    }  # fmt: skip
    return tiny.enliven(SpeechT5ForTextToSpeech(SpeechT5Config(**{**values, **config})), seed)


def save(folder: Path, **config: Any) -> Path:
    """Save a model, its tokenizer and its feature extractor, and return the folder."""

    def write_all(place: Path) -> None:
        model(**config).save_pretrained(place)
        tokenizer().save_pretrained(place)
        extractor().save_pretrained(place)

    return tiny.saved_once(folder, ("synthesis", tuple(config.items())), write_all)


def vocoder(seed: int = 0, **config: Any) -> SpeechT5HifiGan:
    """Return a vocoder for the model's spectrograms."""
    values: dict[str, Any] = {
        "model_in_dim": BANDS, "upsample_initial_channel": 8, "upsample_rates": [16, 16],
        "upsample_kernel_sizes": [32, 32], "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
    }  # fmt: skip
    return tiny.enliven(SpeechT5HifiGan(SpeechT5HifiGanConfig(**{**values, **config})), seed)


def save_vocoder(folder: Path, **config: Any) -> Path:
    """Save a vocoder in a folder, and return the folder."""
    vocoder(**config).save_pretrained(folder)
    return folder


def speaker(number: int) -> list[float]:
    """Return a speaker embedding."""
    return [round(float(x), 4) for x in np.random.default_rng(number).normal(size=SPEAKER)]


def row(i: int, folder: Path, seconds: float | None = None) -> dict[str, Any]:
    """Return a row with one of three speakers; write its recording to a folder."""
    file = folder / f"said{i}.wav"
    if not file.exists():
        length = 0.13 + 0.037 * (i % 7) if seconds is None else seconds
        tiny_speech.write(file, tiny_speech.sound(i, length))
    return {"text": f"{tiny_speech.text(i)}", "audio": str(file), "speaker": speaker(i % 3)}
