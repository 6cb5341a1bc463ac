"""Tiny CTC models, built in code.

folder = tiny_ctc.save(tmp_path / "base")                     supports padding, with a mask
folder = tiny_ctc.save(tmp_path / "base", norm="group")       padding changes its output
folder = tiny_ctc.save_pretrained(tmp_path / "base")          without a tokenizer or an output layer
folder = tiny_ctc.save_spectrograms(tmp_path / "base")        likewise, a wav2vec2-bert
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from transformers import (
    AutoModel,
    AutoModelForCTC,
    AutoModelForPreTraining,
    HubertConfig,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

CONFIGS = {"wav2vec2": Wav2Vec2Config, "hubert": HubertConfig, "wavlm": WavLMConfig}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "|"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'0123456789"


def tokenizer(folder: Path, letters: str = LETTERS) -> Wav2Vec2CTCTokenizer:
    """Return a tokenizer of letters; write its vocabulary to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    file = folder / "vocab.json"
    file.write_text(json.dumps(vocabulary), encoding="utf-8")
    return Wav2Vec2CTCTokenizer(str(file))


def config(kind: str = "wav2vec2", norm: str = "layer", **changes: Any) -> Any:
    """Return a configuration with 50 output steps per second at 16 kHz."""
    values: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(LETTERS), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 48, "conv_dim": (8, 8),
        "conv_kernel": (20, 20), "conv_stride": (16, 20), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "pad_token_id": 0,
        "feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer", "layerdrop": 0.1,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0,
        "activation_dropout": 0.0, "final_dropout": 0.0, "num_buckets": 16,
    }  # fmt: skip
    return CONFIGS[kind](**{**values, **changes})


def save(
    folder: Path,
    kind: str = "wav2vec2",
    norm: str = "layer",
    letters: str = LETTERS,
    **changes: Any,
) -> Path:
    """Save a model, its tokenizer and its feature extractor, and return the folder."""

    def write_all(target: Path) -> None:
        tokenizer(target, letters).save_pretrained(target)
        size = len(SPECIAL) + len(letters)
        model = AutoModelForCTC.from_config(config(kind, norm, **{"vocab_size": size, **changes}))
        tiny.enliven(model, 0)
        model.save_pretrained(target)
        Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer").save_pretrained(target)

    return tiny.saved_once(folder, ("ctc", kind, norm, letters, tuple(changes.items())), write_all)


def save_pretrained(folder: Path, kind: str = "wav2vec2", **changes: Any) -> Path:
    """Save a model as pretrained on recordings alone, like those on the Hub."""

    def write_all(target: Path) -> None:
        values = {"vocab_size": 32, "codevector_dim": 16, "proj_codevector_dim": 16, **changes}
        auto = AutoModelForPreTraining if kind == "wav2vec2" else AutoModel
        model = auto.from_config(config(kind, **values))
        tiny.enliven(model, 0)
        model.save_pretrained(target)
        Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(target)

    return tiny.saved_once(folder, ("pretrained", kind, tuple(changes.items())), write_all)


def save_spectrograms(folder: Path, **changes: Any) -> Path:
    """Save a model as pretrained on recordings alone that reads spectrograms."""

    def write_all(target: Path) -> None:
        values = {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "layerdrop": 0.1, "conv_depthwise_kernel_size": 7,
            "output_hidden_size": 32, "hidden_dropout": 0.0, "attention_dropout": 0.0,
            "feat_proj_dropout": 0.0, "activation_dropout": 0.0, "final_dropout": 0.0,
            "conformer_conv_dropout": 0.0,
        }  # fmt: skip
        model = AutoModel.from_config(Wav2Vec2BertConfig(**{**values, **changes}))
        tiny.enliven(model, 0)
        model.save_pretrained(target)
        SeamlessM4TFeatureExtractor().save_pretrained(target)

    return tiny.saved_once(folder, ("spectrograms", tuple(changes.items())), write_all)
