"""Transcripts as text: normalisation for the metrics, joining, and word alignment."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

import regex

from lora_cli.characters import UNSPACED

BASIC = "Whisper's basic normaliser (lower case, no punctuation, symbols or brackets)"
WordPair = tuple[str | None, str | None]
"""A reference word and the predicted one; None for the missing one of an insertion or deletion."""

_LETTER_WITH_MARK = regex.compile(r"\p{L}\p{M}")
_UNSPACED = regex.compile(f"[{UNSPACED}]")


def normalise_text(text: str, how: Literal["basic", "none"]) -> str:
    """Normalise a text for the metrics."""
    if how == "none":
        return " ".join(text.split())
    from transformers import WhisperTokenizer

    return str(WhisperTokenizer.basic_normalize(text)).strip()


def has_vowel_marks(text: str) -> bool:
    """Return whether a text has combining marks, which Whisper's normaliser removes.

    It keeps composed letters, such as é.
    """
    return bool(_LETTER_WITH_MARK.search(unicodedata.normalize("NFKC", text)))


def whisper_transcript(text: str) -> str:
    """Format a transcript like Whisper: on one line, after a space unless its script has none."""
    text = " ".join(text.split())
    return text if _UNSPACED.match(text) else f" {text}"


def join_transcripts(parts: Sequence[str]) -> str:
    """Join the transcripts of the parts of a recording."""
    transcript = ""
    for part in filter(None, (part.strip() for part in parts)):
        no_space = bool(transcript) and _UNSPACED.match(transcript[-1]) and _UNSPACED.match(part)
        transcript += part if not transcript or no_space else f" {part}"
    return transcript


def align_words(reference: str, hypothesis: str) -> list[WordPair]:
    """Align the words of two texts with minimal edit distance."""
    import jiwer

    alignment = jiwer.process_words(reference, hypothesis)
    (reference_words,), (hypothesis_words,) = alignment.references, alignment.hypotheses
    pairs: list[WordPair] = []
    for chunk in alignment.alignments[0]:
        a = reference_words[chunk.ref_start_idx : chunk.ref_end_idx]
        b = hypothesis_words[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for i in range(max(len(a), len(b))):
            pairs.append((a[i] if i < len(a) else None, b[i] if i < len(b) else None))
    return pairs
