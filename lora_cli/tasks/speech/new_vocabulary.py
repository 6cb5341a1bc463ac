"""A vocabulary of letters for a base that was only pretrained on recordings, and has none.

wav2vec2, HuBERT and WavLM are pretrained without transcripts. Fine-tuning with CTC gives them a
tokenizer and an output layer for the letters of the transcripts, as the usual recipe with
transformers does: the letters in order, among them `|` in place of the space, then `[UNK]` and
`[PAD]`, which is the blank.
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
    in_lower_case,
    without_symbols,
)

DELIMITER, UNKNOWN, BLANK = "|", "[UNK]", "[PAD]"
FILES = ("vocab.json", "tokenizer.json", "tokenizer_config.json")


def lacks_vocabulary(recipe: Recipe) -> bool:
    """Return whether a base was pretrained on recordings alone.

    One that was fine-tuned with CTC has lost the files of its tokenizer, if there are none.
    """
    trained = load_config(recipe).architectures or []
    if any(name.endswith("ForCTC") for name in trained):
        return False
    return not has_tokenizer(recipe)


def has_tokenizer(recipe: Recipe) -> bool:
    """Return whether a base has a file of a tokenizer."""
    source = source_of(recipe)
    with explained(recipe, "tokenizer"):
        found = (
            cached_file(
                source["pretrained_model_name_or_path"], name, revision=source["revision"],
                _raise_exceptions_for_missing_entries=False,
            )
            for name in FILES
        )  # fmt: skip
        return any(file is not None for file in found)


def heard(text: str, known: Container[str] = "") -> str:
    """Return what a new vocabulary writes of a transcript.

    It is in lower case, without punctuation and symbols but for the apostrophe, the one mark of
    punctuation that is heard.

    Args:
        text: The transcript.
        known: Letters of its language, as far as they are known.
    """
    small = in_lower_case(unicodedata.normalize("NFC", text), known)
    return without_symbols(unicodedata.normalize("NFC", small), APOSTROPHE)


def letters_of(transcripts: Iterable[str]) -> str:
    """Return the letters of transcripts, in order."""
    found, dotless = set[str](), set[str]()
    for text in transcripts:
        found |= set(heard(text))
        dotless |= set(heard(text, DOTLESS))
    return "".join(sorted((dotless if has_dotless(found) else found) - {" "}))


def letters_to_continue(recipe: Recipe) -> str | None:
    """Return the letters of the adapter that `adapter.from` names, if it has such a vocabulary."""
    if recipe.adapter.from_ is None:
        return None
    folder = find_adapter_folder(recipe.adapter.from_, recipe.at("adapter.from"))
    trained = read_computation(folder) if folder.is_dir() else None
    found: str | None = None if trained is None else trained["recipe"].get("task.letters")
    return found


def tokenizer_of(letters: str) -> Wav2Vec2CTCTokenizer:
    """Return the tokenizer of a vocabulary.

    Args:
        letters: Its letters, in any order.
    """
    known = sorted({*unicodedata.normalize("NFC", letters), " "})  # as transcripts are read
    names = [DELIMITER if letter == " " else letter for letter in known]
    vocabulary = {name: i for i, name in enumerate([*names, UNKNOWN, BLANK])}
    with tempfile.TemporaryDirectory() as folder:  # it reads a file and nothing else
        file = Path(folder) / FILES[0]
        file.write_text(json.dumps(vocabulary), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(
            str(file), unk_token=UNKNOWN, pad_token=BLANK, word_delimiter_token=DELIMITER
        )
