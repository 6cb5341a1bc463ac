"""Normalisation of transcripts to the letters of a CTC model's vocabulary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Mapping

REMOVED_CATEGORIES = "PS"  # Unicode's major categories of punctuation and symbols
APOSTROPHE = "'"
CURLY_APOSTROPHES = re.compile("(?<=\\w)[\u2019\u02bc\uff07\u00b4`](?=\\w)")
# dotless i, g with breve, s with cedilla: a vocabulary with all three is taken for a language, such
# as Turkish, in which I is the capital of the dotless i; upper-case ones have the dotted I instead
DOTLESS, DOTTED = "\u0131\u011f\u015f", "\u0130\u011e\u015e"
# punctuation that separates words, and becomes a space: `yes—no`, `and/or`, `well...`
WORD_SEPARATORS = re.compile("[\u2012-\u2015\u2212/\\\\_…]|-{2,}|\\.{2,}")


class Letters:
    """The letters of a model's vocabulary.

    `multi_letter_tokens` lists tokens of several letters, such as `CH`, which are never used here.

    Args:
        vocabulary: The id of each token.
        delimiter: The token between words. If the vocabulary lacks it, words are separated by a
            space in the vocabulary, or the language has no spaces.
        special: Tokens that are not letters, such as the padding token.
        unknown_id: The id for letters that are not in the vocabulary; None if there must be none.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        delimiter: str,
        special: set[str],
        unknown_id: int | None = None,
    ) -> None:
        self.unknown_id = unknown_id
        letters = {t: i for t, i in vocabulary.items() if t not in special and t != delimiter}
        self.ids = letters | ({" ": vocabulary[delimiter]} if delimiter in vocabulary else {})
        has_lower = any(letter != letter.upper() for letter in letters)
        has_upper = any(letter != letter.lower() for letter in letters)
        special_pattern = re.compile(r"<.*>|\[.*\]")  # `<unk>`, `[UNK]`
        self.multi_letter_tokens = [
            name for name in letters if len(name) > 1 and not special_pattern.fullmatch(name)
        ]
        self.has_dotless = has_dotless(self.ids)
        self.is_upper_case = has_upper and not has_lower
        self.is_lower_case = has_lower and not has_upper

    def normalise(self, text: str) -> str:
        """Normalise a transcript to the vocabulary.

        The transcript gets the vocabulary's case. Punctuation and symbols that the vocabulary lacks
        are removed, as they are not spoken; other unknown characters are kept, see `first_unknown`.
        Typographic apostrophes become `'`, and dashes and slashes become spaces.
        """
        text = unicodedata.normalize("NFC", text)
        if self.is_upper_case:
            text = to_upper(text, self.ids)
        elif self.is_lower_case:
            text = to_lower(text, self.ids)
        return remove_symbols(text, self.ids)

    def first_unknown(self, text: str) -> str | None:
        """Return the first character of a transcript that the vocabulary lacks, or None."""
        return next((c for c in self.normalise(text) if c not in self.ids), None)

    def removed_symbols(self, text: str) -> set[str]:
        """Return the punctuation and symbols that normalisation removes from a transcript."""
        return {
            c for c in normalise_apostrophes(text, self.ids) if is_symbol(c) and c not in self.ids
        }

    def tokens_of(self, text: str) -> list[int]:
        """Return the token ids of a transcript.

        Unknown characters become `unknown_id`. Without one they are skipped, but rows that have
        such characters are rejected beforehand.
        """
        ids = (self.ids.get(character, self.unknown_id) for character in self.normalise(text))
        return [token for token in ids if token is not None]


def has_dotless(known: Container[str]) -> bool:
    """Return whether letters are those of a language with a dotless i, such as Turkish."""
    return all(letter in known for letter in DOTLESS)


def to_upper(text: str, known: Container[str]) -> str:
    """Return a text in upper case, by the rules of the language with the known letters."""
    is_dotted = all(letter in known for letter in DOTTED)
    return (text.replace("i", DOTTED[0]) if is_dotted else text).upper()


def to_lower(text: str, known: Container[str]) -> str:
    """Return a text in lower case, by the rules of the language with the known letters.

    `str.lower` turns İ into two characters, of which the second, a combining dot, is in no
    vocabulary.
    """
    text = text.replace("İ", "i")
    return (text.replace("I", DOTLESS[0]) if has_dotless(known) else text).lower()


def remove_symbols(text: str, known: Container[str]) -> str:
    """Remove the punctuation and symbols that are not among the known letters."""
    text = normalise_apostrophes(text, known)
    text = WORD_SEPARATORS.sub(lambda match: match[0] if match[0][0] in known else " ", text)
    characters = (c if c in known or not is_symbol(c) else "" for c in text)
    return " ".join("".join(characters).split())


def normalise_apostrophes(text: str, known: Container[str]) -> str:
    """Replace typographic apostrophes by `'`, unless they are known letters or `'` is not."""
    if APOSTROPHE not in known:
        return text
    return CURLY_APOSTROPHES.sub(lambda match: match[0] if match[0] in known else APOSTROPHE, text)


def is_symbol(character: str) -> bool:
    """Return whether a character is punctuation or a symbol."""
    return unicodedata.category(character)[0] in REMOVED_CATEGORIES
