"""Texts in letters that the tokenizer does not know: each becomes the same token, and is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

MOST_UNKNOWN = 0.02
"""Share of unknown tokens up to which nothing is said: rare letters and emoji are in most data."""
SHOWN = 5  # pieces of a text that are unknown


@dataclass(frozen=True)
class Unknown:
    """How much of a split the tokenizer does not know.

    Args:
        share: Unknown tokens among all that are not special ones.
        first: Position of the first example that has one, or None.
    """

    share: float
    first: int | None = None


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the unknown token, or None if the tokenizer reads every text.

    Byte-level tokenizers know every letter. Some name an unknown token all the same, which then is
    the one that ends a text.
    """
    unknown = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if unknown is None or unknown in others else int(unknown)


def count_unknown(
    tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64], ends: NDArray[np.int64]
) -> Unknown:
    """Return how many tokens are unknown.

    Args:
        tokenizer: It made the ids.
        ids: Tokens of all examples, one behind the other (T,).
        ends: Where each example ends (N,).
    """
    unknown = unknown_id(tokenizer)
    if unknown is None:
        return Unknown(0.0)
    found = np.flatnonzero(ids == unknown)
    special = set(tokenizer.all_special_ids) - {unknown}
    total = len(ids) - int(np.isin(ids, list(special)).sum())
    if not len(found):
        return Unknown(0.0)
    return Unknown(len(found) / total, int(np.searchsorted(ends, found[0], side="right")))


def unknown_pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Return what of some texts is unknown, as it stands there; nothing where that is not known."""
    unknown, found = unknown_id(tokenizer), dict[str, None]()
    if not tokenizer.is_fast:
        return []
    for text in texts:
        encoding: Any = tokenizer(text[:10_000], return_offsets_mapping=True, verbose=False)
        pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        found |= {text[start:end]: None for token, (start, end) in pairs if token == unknown}
    return [piece for piece in found if piece.strip()]


def unknown_warning(
    tokenizer: PreTrainedTokenizerBase, split: str, share: float, place: str, texts: Sequence[str]
) -> str:
    """Return what to say of a split with many unknown tokens, in one line.

    Args:
        tokenizer: It does not know them.
        split: Name of the split.
        share: Unknown tokens among all.
        place: Where a row stands that has one.
        texts: What that row says.
    """
    pieces = unknown_pieces(tokenizer, texts)
    shown = ", ".join(f"`{piece[:20]}`" for piece in pieces[:SHOWN])
    shown += ", …" if len(pieces) > SHOWN else ""
    example = f"{place}: {shown}" if shown else place
    return (
        f"{100 * share:.1f} % of the tokens of {split} are `{tokenizer.unk_token}`, the token for "
        f"what the tokenizer does not know ({example}): the model cannot tell such words apart; "
        "use a base model that was trained on the language of these texts"
    )
