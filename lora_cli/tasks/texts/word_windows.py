"""Which token stands for which word, and how a long row is divided into windows.

A word is learned and predicted at its first token. Words without a token of their own (characters
that the tokenizer drops, or that it joins with the word before) have none, and get their tag from
their neighbours (`complete_tags`).

A row with more tokens than the model takes is divided into windows that overlap. Each word belongs
to one of them: the one in which its first token has most tokens on its shorter side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lora_cli.tasks.texts.tokenize_long_texts import token_ids, tokens_of

OVERLAP = 0.5  # of a window: so each word has at least a quarter of a window on either side
NO_TOKEN = -1
Place = tuple[int, int]  # characters: first, and the one after the last


@dataclass(frozen=True)
class Words:
    """The tokens of a row, without those that begin and end every text, and its words.

    Args:
        ids: The tokens.
        first: Position of each word's first token in `ids`; `NO_TOKEN` for a word without one.
    """

    ids: list[int]
    first: list[int]


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens that a tokenizer adds before and after a text."""

    prefix: list[int]
    suffix: list[int]


def special_tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> SpecialTokens | None:
    """Return the special tokens around a text; None if they change how the text is read."""
    whole, inside = (token_ids(tokenizer, text, special=special) for special in (True, False))
    for start in range(len(whole)):
        if whole[start : start + len(inside)] == inside:
            return SpecialTokens(whole[:start], whole[start + len(inside) :])
    return None


def words_in(tokenizer: PreTrainedTokenizerBase, text: str, places: Sequence[Place]) -> Words:
    """Return the tokens of a text, and those with which its words begin.

    Args:
        tokenizer: A fast one, which knows the characters of its tokens.
        text: The text.
        places: The characters of each word, in order.
    """
    tokens = tokens_of(tokenizer, text, special=False)
    starts, ends = tokens.starts, tokens.ends
    # the first token that reaches into the word: offsets may include the space before it, or be
    # those of the space alone
    reaching = np.searchsorted(np.maximum.accumulate(ends), [start for start, _ in places], "right")
    first: list[int] = []
    taken = NO_TOKEN
    for (start, end), i in zip(places, reaching.tolist(), strict=True):
        i = max(int(i), taken + 1)
        while i < len(ends) and (ends[i] <= max(start, int(starts[i]))):
            i += 1  # tokens of no width
        if i < len(ends) and starts[i] < end:
            first.append(i)
            taken = i
        else:
            first.append(NO_TOKEN)
    return Words(tokens.ids, first)


def words_one_by_one(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Words:
    """Return the tokens of words that are each tokenised alone, for tokenizers without offsets."""
    ids: list[int] = []
    first = []
    for word in words:
        own = token_ids(tokenizer, word, special=False) if word.strip() else []
        first.append(len(ids) if own else NO_TOKEN)
        ids += own
    return Words(ids, first)


def places_of_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Place]:
    """Return the characters of each token of a text, without spaces around them.

    Tokens that share a character (the bytes of a letter) count as one.
    """
    tokens = tokens_of(tokenizer, text, special=False)
    found: list[Place] = []
    for start, end in zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True):
        inside = text[start:end]
        start += len(inside) - len(inside.lstrip())
        end -= len(inside) - len(inside.rstrip())
        if end <= start:
            continue
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


@dataclass(frozen=True)
class Window:
    """A part of a row: `ids[start:end]`, and the words that are predicted in it."""

    start: int
    end: int
    words: list[int]


def windows_of(words: Words, capacity: int) -> list[Window]:
    """Return the windows of a row; each word with a token belongs to exactly one.

    Args:
        words: The row.
        capacity: Tokens that fit into a window.
    """
    count = len(words.ids)
    present = [i for i, token in enumerate(words.first) if token != NO_TOKEN]
    if count <= capacity:
        return [Window(0, count, present)]
    stride = max(1, capacity - int(capacity * OVERLAP))
    starts = np.arange(0, count - capacity + stride, stride)
    starts[-1] = count - capacity
    positions = np.array([words.first[i] for i in present], dtype=np.int64)
    owner = _owners(positions, starts, capacity, count)
    return [
        Window(int(start), int(start) + capacity, [present[i] for i in np.flatnonzero(owner == k)])
        for k, start in enumerate(starts.tolist())
        if (owner == k).any()
    ]


def _owners(
    positions: NDArray[np.int64], starts: NDArray[np.int64], capacity: int, count: int
) -> NDArray[np.int64]:
    """Return the window of each token: where its shorter side is longest; at ties the earlier.

    The ends of the row are no cuts: nothing is missing beyond them.
    """
    left = positions[:, None] - starts[None, :]
    right = starts[None, :] + capacity - 1 - positions[:, None]
    inside = (left >= 0) & (right >= 0)
    left = np.where(starts[None, :] == 0, count, left)
    right = np.where(starts[None, :] + capacity == count, count, right)
    room = np.where(inside, np.minimum(left, right), -1)
    owner: NDArray[np.int64] = room.argmax(1)
    return owner


def complete_tags(tags: Sequence[str | None]) -> list[str]:
    """Return the tags of all words of a row in IOB2, given those of the words with a token.

    A word without one belongs to an entity if the words before and after it do, and the one after
    continues it; else it is outside.
    """
    found = [tag if tag is not None else "O" for tag in tags]
    for i, tag in enumerate(tags):
        if tag is not None:
            continue
        after = next((t for t in tags[i + 1 :] if t is not None), "O")
        before = found[i - 1] if i else "O"
        if after.startswith("I-") and before != "O" and before[2:] == after[2:]:
            found[i] = after
    return found


def words_without_token(examples: Any) -> tuple[NDArray[np.int64], int]:
    """Return how many words of each row have no token of their own, and how many words there are.

    Args:
        examples: Windows of rows, a data set or a list, with `row`, `n_words` (of the row) and
            `words` (at each token the word that begins there, or a negative number).
    """
    if hasattr(examples, "data"):  # without making Python's lists of them
        rows, totals = (examples.data.column(name).to_numpy() for name in ("row", "n_words"))
        found = [
            int((window.to_numpy(zero_copy_only=False) >= 0).sum())
            for chunk in examples.data.column("words").chunks
            for window in (chunk.slice(i, 1).flatten() for i in range(len(chunk)))
        ]
    else:
        rows, totals = (np.array([e[name] for e in examples]) for name in ("row", "n_words"))
        found = [sum(word >= 0 for word in example["words"]) for example in examples]
    missing = np.zeros(int(rows.max()) + 1, dtype=np.int64)
    missing[rows] = totals
    total = int(missing.sum())
    np.subtract.at(missing, rows, np.array(found))
    return missing, total
