"""Transcripts as a model with CTC writes them: with the letters of its vocabulary alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

PUNCTUATION = "PS"  # punctuation and symbols, by the first letter of Unicode's categories


class Letters:
    """The letters that a model can write.

    Args:
        vocabulary: The id of each token.
        delimiter: The token between two words.
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
        self.ids = {**letters, " ": vocabulary[delimiter]}
        small = any(letter != letter.upper() for letter in letters)
        large = any(letter != letter.lower() for letter in letters)
        self.only_capitals, self.only_small = large and not small, small and not large

    def written(self, text: str) -> str:
        """Return a transcript as the model can write it.

        It gets the case of the vocabulary. Punctuation and symbols that the vocabulary lacks are
        left out, as nobody says them; other characters stay, see `unknown`.
        """
        text = unicodedata.normalize("NFC", text)
        if self.only_capitals:
            text = text.upper()
        elif self.only_small:
            text = text.lower()
        kept = (c if c in self.ids or not is_symbol(c) else "" for c in " ".join(text.split()))
        return " ".join("".join(kept).split())

    def unknown(self, text: str) -> str | None:
        """Return the first character of a transcript that the model cannot write, if any."""
        return next((c for c in self.written(text) if c not in self.ids), None)

    def left_out(self, text: str) -> set[str]:
        """Return the punctuation and symbols of a transcript that are left out."""
        return {c for c in text if is_symbol(c) and c not in self.ids}

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of a transcript; all its characters are known, or have a token."""
        found = (self.ids.get(letter, self.unknown_id) for letter in self.written(text))
        return [token for token in found if token is not None]


def is_symbol(character: str) -> bool:
    """Return whether a character is punctuation or a symbol."""
    return unicodedata.category(character)[0] in PUNCTUATION
