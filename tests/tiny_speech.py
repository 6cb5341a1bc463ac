"""Tiny Whisper models, which hear one second at a time, and recordings, built in code.

folder = tiny_speech.save(tmp_path / "base")                    English-only
folder = tiny_speech.save(tmp_path / "base", languages=True)    multilingual
tiny_speech.write(tmp_path / "1.wav", tiny_speech.sound(1))
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import tiny
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

RATE = 16_000
SECONDS = 1  # per forward pass
POSITIONS = 40  # of the decoder
END = "<|endoftext|>"
SPECIAL = [
    END, "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|translate|>",
    "<|transcribe|>", "<|notimestamps|>",
]  # fmt: skip
TEXTS = ["a warm film", "great", "the plot is dull", "what a story"]
LOUD, QUIET = 0.3, 0.001


@functools.cache
def tokenizer() -> WhisperTokenizer:
    """Return a tokenizer like Whisper's."""
    backend = Tokenizer.from_str(tiny._bpe(()))
    model = json.loads(backend.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for name in SPECIAL:
        vocabulary[name] = len(vocabulary)
    merges = [tuple(pair) for pair in model["merges"]]
    return WhisperTokenizer(
        vocab=vocabulary, merges=merges, pad_token=END, extra_special_tokens=SPECIAL,
        model_max_length=POSITIONS,
    )  # fmt: skip


def extractor() -> WhisperFeatureExtractor:
    """Return a feature extractor for one second."""
    return WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, chunk_length=SECONDS)


def model(seed: int = 0, languages: bool = False, **config: Any) -> WhisperForConditionalGeneration:
    """Return a model."""
    ids = tokenizer().get_vocab()
    end, start = ids[END], ids["<|startoftranscript|>"]
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer()), "num_mel_bins": 16, "d_model": 32, "encoder_layers": 1,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 50 * SECONDS,
        "max_target_positions": POSITIONS, "dropout": 0.0, "pad_token_id": end,
        "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    built = WhisperForConditionalGeneration(WhisperConfig(**{**values, **config}))
    tiny.enliven(built, seed)
    built.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=end, bos_token_id=end, decoder_start_token_id=start,
        max_length=POSITIONS, is_multilingual=languages, no_timestamps_token_id=ids[SPECIAL[-1]],
        lang_to_id={name: ids[name] for name in SPECIAL[2:5]},
        task_to_id={name[2:-2]: ids[name] for name in SPECIAL[5:7]},
    )  # fmt: skip
    return built


def save(folder: Path, languages: bool = False, **config: Any) -> Path:
    """Save a model, its tokenizer and its feature extractor, and return the folder."""

    def write_all(place: Path) -> None:
        model(0, languages, **config).save_pretrained(place)
        tokenizer().save_pretrained(place)
        extractor().save_pretrained(place)

    return tiny.saved_once(folder, ("speech", languages, tuple(config.items())), write_all)


def sound(seed: int, seconds: float = 0.4, rate: int = RATE, channels: int = 1) -> Any:
    """Return a tone with noise that is unique to the seed: (N,), or (N, channels)."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * (200 + 40 * seed) * time)
    shape = (len(time), channels) if channels > 1 else len(time)
    tone = tone[:, None] if channels > 1 else tone
    return (LOUD * tone + 0.05 * rng.standard_normal(shape)).astype(np.float32)


def encoded(
    samples: Any, rate: int = RATE, format: str = "WAV", subtype: str | None = None
) -> bytes:
    """Return a recording as the bytes of a file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def write(path: Path, samples: Any, rate: int = RATE) -> Path:
    """Write a recording in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


def text(i: int) -> str:
    """Return a text that is unique to the number."""
    return f"{TEXTS[i % len(TEXTS)]} {i}"


def write_folder(root: Path, splits: dict[str, int], seconds: float = 0.3) -> Path:
    """Write recordings with a text file next to each, in a folder for each split."""
    number = 0
    for split, count in splits.items():
        for i in range(count):
            number += 1
            write(root / split / f"{i}.wav", sound(number, seconds + 0.05 * (i % 3)))
            (root / split / f"{i}.txt").write_text(f"{text(number)}\n", encoding="utf-8")
    return root
