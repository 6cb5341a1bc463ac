"""Tokens as text, with the trained ones marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def marked(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool], colour: bool
) -> str:
    """Return tokens as text; the trained ones are green, or between ⟦ and ⟧."""
    opening, closing = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    return "".join(
        f"{opening}{text}{closing}" if on else text for on, text in pieces(tokenizer, ids, trained)
    )


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool]
) -> Iterator[tuple[bool, str]]:
    """Yield the runs of tokens that are all trained, or all not, as text.

    A run is what it adds to the text before it: decoded alone it might lose a space.
    """
    before, end = "", 0
    for on, run in groupby(trained):
        start, end = end, end + len(list(run))
        whole = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        alone = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        yield on, whole[len(before) :] if whole.startswith(before) else alone
        before = whole
