"""How long the inputs are, by the model's tokenizer or by a guess."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from lora_cli.data.column_kinds import is_blank
from lora_cli.recipe import TASKS
from lora_cli.recipe_draft.base_model_info import SAMPLE, Base
from lora_cli.recipe_draft.chat_lengths import TurnCounter, conversations_of
from lora_cli.recipe_draft.choose_splits import Rows
from lora_cli.tasks.proposal import Proposal

FITTING = 0.99  # share of the rows that should not be cut


def length_of(
    splits: Sequence[Rows], base: Base, chosen: Proposal, turns: TurnCounter | None = None
) -> tuple[int, str]:
    """Return the longest input in tokens, and what it was measured by.

    Args:
        splits: The rows of train, and of other files; a sample of them is measured.
        base: Its tokenizer counts.
        chosen: The task.
        turns: Counts conversations with the chat template, where the tokenizer is known.
    """
    usual = TASKS[chosen.keys["type"]].usual_training
    wanted, unit, most_rows = 0, "", 0
    for rows in filter(None, splits):  # the held-out rows may be longer
        lengths, unit = _tokens(rows[:: max(1, len(rows) // SAMPLE)], base, chosen, turns)
        most_rows = max(most_rows, len(lengths))
        wanted = max(wanted, sorted(lengths)[math.ceil(FITTING * len(lengths)) - 1])
    most = min(usual.longest, base.positions or 1 << 30)
    if chosen.is_chat and turns is None:
        wanted += 16  # what a template adds, at the least
    running = usual.writes and "text_column" in chosen.keys
    if running and wanted > min(512, most):
        length, why = min(512, most), "longer texts are divided into several examples"
    else:
        length = max(32, -(-wanted // 32) * 32)
        share = "99 of 100 rows have" if most_rows >= 100 else "no row has"
        why = f"{share} {'at most' if most_rows >= 100 else 'more than'} {wanted:,}, by {unit}"
    if length > most:
        length, why = most, why if running else f"{why}; longer ones are cut"
    return length, why


def unknown_share(splits: Sequence[Rows], base: Base, chosen: Proposal) -> str | None:
    """Return what to say where the model's tokenizer does not know many of the texts' letters.

    Args:
        splits: The rows of train, and of other files; a sample of them is encoded.
        base: Its tokenizer encodes, where it is at hand.
        chosen: The task.
    """
    if base.tokenizer is None:
        return None
    import numpy as np

    from lora_cli.tasks.texts.tokenize_long_texts import token_ids
    from lora_cli.tasks.texts.unknown_tokens import MOST_UNKNOWN, count_unknown, unknown_warning

    for rows in filter(None, splits):
        sample = [(i, rows[i]) for i in range(0, len(rows), max(1, len(rows) // SAMPLE))]
        texts = [[_as_text(row.get(name)) for name in chosen.inputs] for _, row in sample]
        # bytes that are not text stop the tokenizer
        read = [[text.encode("utf-8", "replace").decode() for text in some] for some in texts]
        encoded = [[i for text in some for i in token_ids(base.tokenizer, text)] for some in read]
        ids = np.array([i for row in encoded for i in row], dtype=np.int64)
        found = count_unknown(base.tokenizer, ids, np.cumsum([len(row) for row in encoded]))
        if found.first is not None and found.share > MOST_UNKNOWN:
            place = f"row {sample[found.first][0] + 1}"
            return unknown_warning(
                base.tokenizer, "the texts", found.share, place, texts[found.first]
            )
    return None


def _tokens(
    rows: Rows, base: Base, chosen: Proposal, turns: TurnCounter | None
) -> tuple[list[int], str]:
    """Return the lengths of rows, and what they were measured by."""
    if chosen.is_chat and turns is not None:
        written = [turns.whole(one) for row in rows for one in conversations_of(row, chosen)]
        if lengths := [length for length in written if length is not None]:
            return lengths, "the model's tokens"
    texts = [[_read_by(chosen, name, row.get(name)) for name in chosen.inputs] for row in rows]
    if base.tokenizer is not None:
        return base.tokens(texts), "the model's tokens"
    lengths = [sum(guessed_tokens(text) + 2 for text in row) for row in texts]
    return lengths, "a guess on the long side: the model's tokenizer could not be fetched"


def guessed_tokens(text: str) -> int:
    """Return how many tokens a text has at the most, as tokenizers usually divide it.

    English text has about 4 characters a token, other languages fewer, Chinese and Japanese one.
    """
    wide = sum(letter > "\u2e7f" for letter in text)
    other = sum("\x7f" < letter <= "\u2e7f" for letter in text)
    plain = len(text) - wide - other
    return math.ceil(max(plain / 3 + other / 1.5 + wide * 1.2, len(text.split()) * 1.4))


def _read_by(chosen: Proposal, column: str, value: Any) -> str:
    """Return the text of a column as the task reads it: with its prefix, or the longest of some."""
    keys = chosen.keys
    if column == keys.get("source_column"):
        return f"{keys.get('prefix', '')}{_as_text(value)}"
    if column == keys.get("target_column") and isinstance(value, list):
        return max(map(_as_text, value), key=len, default="")
    return _as_text(value)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    return "" if is_blank(value) else json.dumps(value, ensure_ascii=False, default=str)
