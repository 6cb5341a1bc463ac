"""Tokenise texts of any length in bounded memory.

While a tokenizer works it needs some 300 bytes for each character of a text, and more for what it
cuts off. So a long text is tokenised in pieces that overlap. Two pieces are joined inside their
overlap, where both have the same tokens at the same characters, so that the result is that of the
whole text; where no such place is found, the text is tokenised whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

LONG = 1 << 17  # characters from which on a text is tokenised in pieces
PIECE = 1 << 15  # characters; a power of two, so that runs of one letter are divided alike
OVERLAP = 1 << 11  # characters that a piece shares with the next
SURE = 32  # tokens that have to agree in two pieces
AT_ONCE = 1 << 18  # characters that are tokenised together


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text.

    Args:
        ids: Their ids (T,).
        starts: The first character of each (T,), empty if it was not wanted.
        ends: The character after its last (T,), likewise.
    """

    ids: list[int]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


def is_long(text: str) -> bool:
    """Return whether a text is tokenised in pieces."""
    return len(text) > LONG


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """Return the tokens of a text.

    Args:
        tokenizer: It reads the text.
        text: A text of any length.
        special: Whether the tokens that begin and end every text are added.
    """
    return tokens_of(tokenizer, text, special, offsets=False).ids


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True, offsets: bool = True
) -> Tokens:
    """Return the tokens of a text, and at which characters they stand.

    Args:
        tokenizer: It reads the text.
        text: A text of any length.
        special: Whether the tokens that begin and end every text are added.
        offsets: Whether their characters are wanted; slow tokenizers do not know them.
    """
    if is_long(text) and tokenizer.is_fast:
        in_pieces = _in_pieces(tokenizer, text, special, offsets)
        if in_pieces is not None:
            return in_pieces
    encoding: Any = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=offsets, verbose=False
    )
    where = np.array(encoding["offset_mapping"] if offsets else [], dtype=np.int64).reshape(-1, 2)
    return Tokens(list(encoding["input_ids"]), where[:, 0], where[:, 1])


def in_batches(lengths: Sequence[int]) -> Iterator[slice]:
    """Yield slices of rows of which each has at most `AT_ONCE` characters, or is one row.

    Args:
        lengths: How many characters each row has.
    """
    start = size = 0
    for i, length in enumerate(lengths):
        if i > start and size + length > AT_ONCE:
            yield slice(start, i)
            start, size = i, 0
        size += length
    if start < len(lengths):
        yield slice(start, len(lengths))


def end_of_text(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, last: bool = False
) -> str:
    """Return as much of a long text as surely decides its first tokens, or its last.

    Args:
        tokenizer: It reads the text.
        text: A text of any length; a short one is returned as it is.
        tokens: How many tokens are wanted.
        last: Whether they are the last ones.
    """
    size = 2 * OVERLAP + 8 * tokens
    while size < len(text):
        part = text[-size:] if last else text[:size]
        # what is next to the cut may be divided in another way than in the whole text
        inner = part[OVERLAP:] if last else part[:-OVERLAP]
        if len(token_ids(tokenizer, inner, special=False)) >= tokens:
            return part
        size *= 2
    return text


# ------------------------------------------------------------------------------------ in pieces


def _in_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool, offsets: bool
) -> Tokens | None:
    """Return the tokens of a long text, or None if its pieces cannot be joined."""
    shared: dict[int, int] = {}  # one number for each id, however often it stands in the text
    ids: list[int] = []
    places = [np.empty((0, 2), dtype=np.int64)]
    before: _Piece | None = None
    first = 0  # of the tokens of the piece before
    starts = range(0, len(text) - OVERLAP, PIECE)

    def add(piece: _Piece, start: int, tokens: slice) -> None:
        own_ids = piece.ids[tokens]
        ids.extend(map(shared.setdefault, own_ids, own_ids))
        if offsets:
            own = np.array(piece.encoding.offsets[tokens], dtype=np.int64).reshape(-1, 2)
            own[np.array(piece.encoding.special_tokens_mask[tokens]) == 0] += start
            places.append(own)

    for start, piece in zip(starts, _pieces(tokenizer, text, starts, special), strict=True):
        if before is not None:
            joint = _joint(before, piece)
            if joint is None:
                return None
            add(before, start - PIECE, slice(first, joint[0]))
            first = joint[1]
        before = piece
    assert before is not None
    add(before, starts[-1], slice(first, None))
    where = np.concatenate(places)
    return Tokens(ids, where[:, 0], where[:, 1])


def _pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, starts: range, special: bool
) -> Iterator[_Piece]:
    """Yield the tokens of each piece; a few pieces are read at the same time."""
    count = max(AT_ONCE // PIECE, 1)
    for i in range(0, len(starts), count):
        pieces = [text[start : start + PIECE + OVERLAP] for start in starts[i : i + count]]
        read: Any = tokenizer(
            pieces,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        yield from map(_Piece, read.encodings, read["input_ids"])


@dataclass(frozen=True)
class _Piece:
    """A piece of a text: what the tokenizer says of it, and the ids of its tokens."""

    encoding: Encoding
    ids: list[int]

    def tokens(self, first: int, shift: int) -> list[tuple[int, int, int]]:
        """Return the id, and the characters less `shift`, of `SURE` tokens; fewer at the end."""
        found = []
        for i in range(first, min(first + SURE, len(self.ids))):
            where = self.encoding.token_to_chars(i)
            if where is None:  # a token that ends the text
                break
            found.append((self.ids[i], where[0] - shift, where[1] - shift))
        return found

    def reaches(self, token: int) -> int:
        """Return the character after the last of a token; of one that is not of the text, 0."""
        where = self.encoding.token_to_chars(token) if token >= 0 else None
        return 0 if where is None else int(where[1])


def _joint(before: _Piece, after: _Piece) -> tuple[int, int] | None:
    """Return the first tokens of two pieces from which on both are equal, inside their overlap."""
    for character in range(OVERLAP // 2, OVERLAP - SURE):
        mine = before.encoding.char_to_token(PIECE + character)
        other = after.encoding.char_to_token(character)
        if mine is None or other is None:
            continue
        # in both pieces a token begins here, and none reaches across
        if before.reaches(mine - 1) > PIECE + character or after.reaches(other - 1) > character:
            continue
        tokens = before.tokens(mine, PIECE)
        begins = bool(tokens) and tokens[0][1] == character
        if begins and len(tokens) == SURE and tokens == after.tokens(other, 0):
            return mine, other
    return None
