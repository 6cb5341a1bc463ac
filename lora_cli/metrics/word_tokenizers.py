"""What metrics of texts count as words, in every script.

Chinese, Japanese, Thai and others have no spaces between words: each of their letters counts as
one. A text's words depend on that text alone, so that rows of several languages can be measured
together.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

import regex

from lora_cli.characters import UNSPACED

LETTERS = "one word for each letter of scripts without spaces (Chinese, Japanese, Thai, …)"
BLEU_WORDS = f"words by sacrebleu's tokenizer 13a, and {LETTERS}"
ROUGE_WORDS = (
    f"lower-case words of letters and digits, those in ASCII stemmed (Porter), and {LETTERS}"
)

_SEPARATE = regex.compile(rf"([{UNSPACED}]|(?=[\uff00-\uffef])[\p{{P}}\p{{S}}])")
_WORDS = regex.compile(
    rf"(?=[\p{{L}}\p{{M}}\p{{N}}])[{UNSPACED}]|(?:(?![{UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+"
)
_IGNORABLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_ENGLISH = regex.compile(r"[a-z0-9]{4,}")


def canonical(text: str) -> str:
    """Return a text in Unicode's normal form C: an accent typed apart is the same letter."""
    return unicodedata.normalize("NFC", text)


def bleu_words(text: str) -> str:
    """Return a text with spaces between its words, as sacrebleu's tokenizer 13a leaves it."""
    return str(_tokenizer_13a()(_SEPARATE.sub(r" \1 ", canonical(text).rstrip())))


@functools.cache
def _tokenizer_13a() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()  # type: ignore[no-untyped-call]  # sacrebleu is partly untyped


def rouge_words(text: str) -> list[str]:
    """Return the words of a text; of one without letters and digits, the characters that are seen.

    Of a text in ASCII these are the words of `rouge_score` with its stemmer.
    """
    text = _IGNORABLE.sub("", canonical(text)).lower()
    words = _WORDS.findall(text)
    return [_stem(word) for word in words] or list("".join(text.split()))


def _stem(word: str) -> str:
    """Return an English word without its ending; `rouge_score` leaves short ones as they are."""
    return str(_stemmer().stem(word)) if _ENGLISH.fullmatch(word) else word


@functools.cache
def _stemmer() -> Any:
    from nltk.stem import porter

    return porter.PorterStemmer()
