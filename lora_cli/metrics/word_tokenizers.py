"""How text metrics split texts into words, in every script.

Scripts such as Chinese, Japanese and Thai have no spaces between words, so each of their characters
counts as a word. The split depends on the text alone, so rows in different languages can be
evaluated together.
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

_UNSPACED_OR_WIDE = regex.compile(rf"([{UNSPACED}]|(?=[\uff00-\uffef])[\p{{P}}\p{{S}}])")
_WORDS = regex.compile(
    rf"(?=[\p{{L}}\p{{M}}\p{{N}}])[{UNSPACED}]|(?:(?![{UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+"
)
_IGNORABLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_STEMMABLE = regex.compile(r"[a-z0-9]{4,}")


def canonical(text: str) -> str:
    """Return a text in Unicode's normal form C, which composes letters and combining accents."""
    return unicodedata.normalize("NFC", text)


def bleu_words(text: str) -> str:
    """Return a text with spaces between its words, tokenized by sacrebleu's tokenizer 13a."""
    return str(_tokenizer_13a()(_UNSPACED_OR_WIDE.sub(r" \1 ", canonical(text).rstrip())))


@functools.cache
def _tokenizer_13a() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()  # type: ignore[no-untyped-call]  # sacrebleu is partly untyped


def rouge_words(text: str) -> list[str]:
    """Return the words of a text, or its visible characters if it has no letters or digits.

    For ASCII texts these are the words that `rouge_score` yields with its stemmer.
    """
    text = _IGNORABLE.sub("", canonical(text)).lower()
    words = _WORDS.findall(text)
    return [_stem(word) for word in words] or list("".join(text.split()))


def _stem(word: str) -> str:
    """Stem an English word; like `rouge_score`, leave short words unchanged."""
    return str(_stemmer().stem(word)) if _STEMMABLE.fullmatch(word) else word


@functools.cache
def _stemmer() -> Any:
    from nltk.stem import porter

    return porter.PorterStemmer()
