"""Builds a vocabulary of letters for a base that was pretrained without transcripts.

wav2vec2, HuBERT and WavLM are pretrained on recordings alone. Fine-tuning with CTC gives them a
tokenizer and an output layer for the letters of the transcripts. The vocabulary is the one of
transformers' fine-tuning examples: the sorted letters, with `|` in place of the space, then `[UNK]`
and `[PAD]`, which is the blank.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Container, Iterable
from pathlib import Path

from transformers import Wav2Vec2CTCTokenizer
from transformers.utils.hub import cached_file

from lora_cli.adapters.find_adapter import find_adapter_folder
from lora_cli.models.base_model import load_config
from lora_cli.models.find_base import source_of
from lora_cli.models.load_errors import explained
from lora_cli.recipe import Recipe, read_computation
from lora_cli.tasks.speech.letters import (
    APOSTROPHE,
    DOTLESS,
    has_dotless,
    remove_symbols,
    to_lower,
)

DELIMITER, UNKNOWN, BLANK = "|", "[UNK]", "[PAD]"
TOKENIZER_FILES = ("vocab.json", "tokenizer.json", "tokenizer_config.json")


def lacks_vocabulary(recipe: Recipe) -> bool:
    """Return whether a base was pretrained on recordings alone.

    A base that was fine-tuned with CTC has a vocabulary, even if its tokenizer's files are missing.
    """
    architectures = load_config(recipe).architectures or []
    if any(name.endswith("ForCTC") for name in architectures):
        return False
    return not has_tokenizer(recipe)


def has_tokenizer(recipe: Recipe) -> bool:
    """Return whether a base comes with tokenizer files."""
    source = source_of(recipe)
    with explained(recipe, "tokenizer"):
        files = (
            cached_file(
                source["pretrained_model_name_or_path"], name, revision=source["revision"],
                _raise_exceptions_for_missing_entries=False,
            )
            for name in TOKENIZER_FILES
        )  # fmt: skip
        return any(file is not None for file in files)


def normalise_transcript(text: str, known: Container[str] = "") -> str:
    """Normalise a transcript for a new vocabulary.

    The result is in lower case, without punctuation and symbols except the apostrophe, which can be
    part of a word.

    Args:
        text: The transcript.
        known: Letters of its language, which decide how `I` is lowered.
    """
    lowered = to_lower(unicodedata.normalize("NFC", text), known)
    return remove_symbols(unicodedata.normalize("NFC", lowered), APOSTROPHE)


def letters_of(transcripts: Iterable[str]) -> str:
    """Return the distinct letters of transcripts, sorted."""
    letters, turkish_letters = set[str](), set[str]()
    for text in transcripts:
        letters |= set(normalise_transcript(text))
        turkish_letters |= set(normalise_transcript(text, DOTLESS))
    return "".join(sorted((turkish_letters if has_dotless(letters) else letters) - {" "}))


def previous_letters(recipe: Recipe) -> str | None:
    """Return the letters of the adapter in `adapter.from`, if it has a vocabulary of its own."""
    if recipe.adapter.from_ is None:
        return None
    folder = find_adapter_folder(recipe.adapter.from_, recipe.at("adapter.from"))
    previous = read_computation(folder) if folder.is_dir() else None
    letters: str | None = None if previous is None else previous["recipe"].get("task.letters")
    return letters


def build_tokenizer(letters: str) -> Wav2Vec2CTCTokenizer:
    """Build the tokenizer of a vocabulary.

    Args:
        letters: The vocabulary's letters, in any order.
    """
    known = sorted({*unicodedata.normalize("NFC", letters), " "})  # as transcripts are
    names = [DELIMITER if letter == " " else letter for letter in known]
    vocabulary = {name: i for i, name in enumerate([*names, UNKNOWN, BLANK])}
    with tempfile.TemporaryDirectory() as folder:  # the tokenizer can only be built from a file
        file = Path(folder) / TOKENIZER_FILES[0]
        file.write_text(json.dumps(vocabulary), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(
            str(file), unk_token=UNKNOWN, pad_token=BLANK, word_delimiter_token=DELIMITER
        )
