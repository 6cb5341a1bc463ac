"""Transcripts as a model with CTC writes them: with the letters of its vocabulary alone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Mapping

PUNCTUATION = "PS"  # punctuation and symbols, by the first letter of Unicode's categories
APOSTROPHE = "'"
TYPED_APOSTROPHES = re.compile("(?<=\\w)[\u2019\u02bc\uff07\u00b4`](?=\\w)")
# i without a dot, g with a breve, s with a cedilla: in languages that have all three, the capital I
# is that of the first, as in Turkish; in capitals, i with a dot comes first
DOTLESS, DOTTED = "\u0131\u011f\u015f", "\u0130\u011e\u015e"
# of the punctuation that is left out, what stands between two words: `yes—no`, `and/or`, `well...`
GAPS = re.compile("[\u2012-\u2015\u2212/\\\\_…]|-{2,}|\\.{2,}")


class Letters:
    """The letters that a model can write.

    `longer` are tokens of several letters, such as `CH`, with which nothing is written here.

    Args:
        vocabulary: The id of each token.
        delimiter: The token between two words; where it is none of the vocabulary, a space may be,
            or the language has no spaces.
        special: Tokens that are no letters, such as the one that fills rows.
        unknown_id: The token of letters that the vocabulary lacks; None: there may be none.
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
        small = any(letter != letter.upper() for letter in letters)
        large = any(letter != letter.lower() for letter in letters)
        marks = re.compile(r"<.*>|\[.*\]")  # `<unk>`, `[UNK]`
        self.longer = [name for name in letters if len(name) > 1 and not marks.fullmatch(name)]
        self.has_dotless = has_dotless(self.ids)
        self.only_capitals, self.only_small = large and not small, small and not large

    def written(self, text: str) -> str:
        """Return a transcript as the model can write it.

        It gets the case of the vocabulary. Punctuation and symbols that the vocabulary lacks are
        left out, as nobody says them; other characters stay, see `unknown`. Typographic apostrophes
        become the plain one, and dashes, which are no hyphens, and slashes divide words.
        """
        text = unicodedata.normalize("NFC", text)
        if self.only_capitals:
            text = in_capitals(text, self.ids)
        elif self.only_small:
            text = in_lower_case(text, self.ids)
        return without_symbols(text, self.ids)

    def unknown(self, text: str) -> str | None:
        """Return the first character of a transcript that the model cannot write, if any."""
        return next((c for c in self.written(text) if c not in self.ids), None)

    def left_out(self, text: str) -> set[str]:
        """Return the punctuation and symbols of a transcript that are left out."""
        return {c for c in plain_apostrophes(text, self.ids) if is_symbol(c) and c not in self.ids}

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of a transcript; all its characters are known, or have a token."""
        found = (self.ids.get(letter, self.unknown_id) for letter in self.written(text))
        return [token for token in found if token is not None]


def has_dotless(known: Container[str]) -> bool:
    """Return whether the capital I is that of the i without a dot, by known letters."""
    return all(letter in known for letter in DOTLESS)


def in_capitals(text: str, known: Container[str]) -> str:
    """Return a text in capital letters, as a language writes it that has the known letters."""
    is_dotted = all(letter in known for letter in DOTTED)
    return (text.replace("i", DOTTED[0]) if is_dotted else text).upper()


def in_lower_case(text: str, known: Container[str]) -> str:
    """Return a text in lower case, as a language writes it that has the known letters.

    Python's own makes two characters of İ, the second of which is a mark that no vocabulary has.
    """
    text = text.replace("İ", "i")
    return (text.replace("I", DOTLESS[0]) if has_dotless(known) else text).lower()


def without_symbols(text: str, known: Container[str]) -> str:
    """Return a text without the punctuation and symbols that are not among the known letters."""
    text = plain_apostrophes(text, known)
    text = GAPS.sub(lambda found: found[0] if found[0][0] in known else " ", text)
    kept = (c if c in known or not is_symbol(c) else "" for c in text)
    return " ".join("".join(kept).split())


def plain_apostrophes(text: str, known: Container[str]) -> str:
    """Return a text whose typographic apostrophes are the plain one, where that alone is known."""
    if APOSTROPHE not in known:
        return text
    return TYPED_APOSTROPHES.sub(lambda found: found[0] if found[0] in known else APOSTROPHE, text)


def is_symbol(character: str) -> bool:
    """Return whether a character is punctuation or a symbol."""
    return unicodedata.category(character)[0] in PUNCTUATION
