"""Tiny encoder-decoders as they are published, each with a tokenizer of its own kind, as folders.

`marian` ends a text and begins it with nothing; `nllb` begins each text with the code of its
language; `mbart` ends it with that; `bart` and `t5` are those of `tiny`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

KINDS = ("bart", "t5", "marian", "nllb", "mbart", "pegasus", "led")
ENGLISH, GERMAN = {"nllb": "eng_Latn", "mbart": "en_XX"}, {"nllb": "deu_Latn", "mbart": "de_DE"}


def languages(kind: str) -> dict[str, str]:
    """Return the keys of a recipe's task that name the languages, where a kind has some."""
    if kind not in ENGLISH:
        return {}
    return {"source_language": ENGLISH[kind], "target_language": GERMAN[kind]}


@functools.cache
def _trained() -> Any:
    """Return a byte-pair tokenizer that marks spaces."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=tiny.SPECIAL, show_progress=False, initial_alphabet=letters
    )
    backend.train_from_iterator(tiny.CORPUS, trainer)
    return backend


def tokenizer(kind: str) -> Any:
    """Return the tokenizer of a kind of model."""
    if kind in ("bart", "t5", "led"):
        return tiny.tokenizer()
    backend = Tokenizer.from_str(_trained().to_str())
    if kind == "nllb":
        codes = [ENGLISH[kind], GERMAN[kind], "fra_Latn"]
        merges = [tuple(pair) for pair in _merges(backend)]
        return NllbTokenizer(
            vocab=backend.get_vocab(), merges=merges, extra_special_tokens=codes,
            model_max_length=tiny.POSITIONS,
        )  # fmt: skip
    if kind == "mbart":
        words = sorted(backend.get_vocab().items(), key=lambda item: item[1])
        pieces = [(word, -float(i > 3) * len(words) / (i + 1)) for word, i in words]
        return MBartTokenizer(vocab=pieces, model_max_length=tiny.POSITIONS)
    ends = [("</s>", tiny.EOS)]
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=tiny.POSITIONS, eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip


def _merges(backend: Any) -> list[list[str]]:
    import json

    return list(json.loads(backend.to_str())["model"]["merges"])


def model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Return a model of a kind."""
    if kind in ("bart", "t5"):
        return tiny.encoder_decoder(kind, seed)
    sizes = {
        "vocab_size": len(tokenizer(kind)), "d_model": 32, "encoder_layers": 1,
        "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": tiny.POSITIONS,
        "dropout": 0.0, "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS,
        "bos_token_id": tiny.BOS,
    }  # fmt: skip
    match kind:
        case "marian":
            config = MarianConfig(**sizes, decoder_start_token_id=tiny.PAD)
            return tiny.enliven(MarianMTModel(config), seed)
        case "pegasus":
            config = PegasusConfig(**sizes, decoder_start_token_id=tiny.PAD)
            return tiny.enliven(PegasusForConditionalGeneration(config), seed)
        case "nllb":
            drop = {"encoder_layerdrop": 0.05, "decoder_layerdrop": 0.05}
            config = M2M100Config(**{**sizes, **drop}, decoder_start_token_id=tiny.EOS)
            return tiny.enliven(M2M100ForConditionalGeneration(config), seed)
        case "mbart":
            return tiny.enliven(MBartForConditionalGeneration(MBartConfig(**sizes)), seed)
        case "fsmt":  # its output layer is the embedding of the target's tokens itself
            words = sizes.pop("vocab_size")
            config = FSMTConfig(
                **sizes, langs=["en", "de"], src_vocab_size=words, tgt_vocab_size=words,
                decoder_start_token_id=tiny.EOS,
            )  # fmt: skip
            return tiny.enliven(FSMTForConditionalGeneration(config), seed)
        case "led":
            del sizes["max_position_embeddings"]
            config = LEDConfig(
                **sizes, max_encoder_position_embeddings=tiny.POSITIONS,
                max_decoder_position_embeddings=64, attention_window=8,
                decoder_start_token_id=tiny.EOS,
            )  # fmt: skip
            return tiny.enliven(LEDForConditionalGeneration(config), seed)
    raise AssertionError(kind)


def save(folder: Path | str, kind: str, seed: int = 0) -> Path:
    """Save a model and its tokenizer, and return the folder."""

    def write(place: Path) -> None:
        model(kind, seed).save_pretrained(place)
        tokenizer(kind).save_pretrained(place)

    return tiny.saved_once(folder, ("translator", kind, seed), write)


__all__ = ["KINDS", "languages", "model", "save", "tokenizer"]
