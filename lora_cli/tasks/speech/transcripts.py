"""What is said, as text: how it is written for the metrics, and where two transcripts differ."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

import regex

from lora_cli.characters import UNSPACED

BASIC = "Whisper's basic normaliser (lower case, no punctuation, symbols or brackets)"
Pair = tuple[str | None, str | None]
"""A word that is wanted and the one that was written for it; None where one of them is missing."""

_MARKED = regex.compile(r"\p{L}\p{M}")
_UNSPACED = regex.compile(f"[{UNSPACED}]")


def normalised(text: str, how: Literal["basic", "none"]) -> str:
    """Return a text as the metrics read it."""
    if how == "none":
        return " ".join(text.split())
    from transformers import WhisperTokenizer

    return str(WhisperTokenizer.basic_normalize(text)).strip()


def has_vowel_marks(text: str) -> bool:
    """Return whether a text has letters with marks of their own, which the normaliser removes.

    Composed letters, such as é, are letters to it.
    """
    return bool(_MARKED.search(unicodedata.normalize("NFKC", text)))


def spoken(text: str) -> str:
    """Return a transcript as Whisper writes one: on a line, after a space if its script has any."""
    text = " ".join(text.split())
    return text if _UNSPACED.match(text) else f" {text}"


def joined(parts: Sequence[str]) -> str:
    """Return the transcripts of the parts of a recording as one."""
    whole = ""
    for part in filter(None, (part.strip() for part in parts)):
        close = bool(whole) and _UNSPACED.match(whole[-1]) and _UNSPACED.match(part)
        whole += part if not whole or close else f" {part}"
    return whole


def aligned(wanted: str, said: str) -> list[Pair]:
    """Return the words of two texts side by side, with as few differences as possible."""
    import jiwer

    found = jiwer.process_words(wanted, said)
    (left,), (right,) = found.references, found.hypotheses
    pairs: list[Pair] = []
    for chunk in found.alignments[0]:
        a = left[chunk.ref_start_idx : chunk.ref_end_idx]
        b = right[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for i in range(max(len(a), len(b))):
            pairs.append((a[i] if i < len(a) else None, b[i] if i < len(b) else None))
    return pairs
