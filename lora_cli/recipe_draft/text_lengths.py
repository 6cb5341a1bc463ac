"""Choose the maximum length from the lengths of the inputs, measured or estimated."""

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

FITTING_SHARE = 0.99  # share of the rows that should not be truncated


def length_of(
    splits: Sequence[Rows], base: Base, chosen: Proposal, turns: TurnCounter | None = None
) -> tuple[int, str]:
    """Choose the maximum input length in tokens, and return it with the reason.

    Args:
        splits: The rows of train, and of other files, of which a sample is measured.
        base: The base model, whose tokenizer counts.
        chosen: The task.
        turns: Counts conversations with the chat template, if there is a tokenizer.
    """
    defaults = TASKS[chosen.keys["type"]].usual_training
    needed, unit, max_rows = 0, "", 0
    for rows in filter(None, splits):  # the held-out rows may be longer
        lengths, unit = _tokens(rows[:: max(1, len(rows) // SAMPLE)], base, chosen, turns)
        max_rows = max(max_rows, len(lengths))
        needed = max(needed, sorted(lengths)[math.ceil(FITTING_SHARE * len(lengths)) - 1])
    limit = min(defaults.longest, base.positions or 1 << 30)
    if chosen.is_chat and turns is None:
        needed += 16  # added by a template at least
    is_running_text = defaults.writes and "text_column" in chosen.keys
    if is_running_text and needed > min(512, limit):
        length, why = min(512, limit), "longer texts are divided into several examples"
    else:
        length = max(32, -(-needed // 32) * 32)
        share = "99 of 100 rows have" if max_rows >= 100 else "no row has"
        why = f"{share} {'at most' if max_rows >= 100 else 'more than'} {needed:,}, by {unit}"
    if length > limit:
        length, why = limit, why if is_running_text else f"{why}; longer ones are cut"
    return length, why


def unknown_token_warning(splits: Sequence[Rows], base: Base, chosen: Proposal) -> str | None:
    """Return a warning if the tokenizer does not know many characters of the texts; else None.

    Args:
        splits: The rows of train, and of other files, of which a sample is encoded.
        base: The base model, whose tokenizer is used if available.
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
        # lone surrogates would stop the tokenizer
        clean = [
            [text.encode("utf-8", "replace").decode() for text in row_texts] for row_texts in texts
        ]
        encoded = [
            [i for text in row_texts for i in token_ids(base.tokenizer, text)]
            for row_texts in clean
        ]
        ids = np.array([i for row in encoded for i in row], dtype=np.int64)
        unknown = count_unknown(base.tokenizer, ids, np.cumsum([len(row) for row in encoded]))
        if unknown.first is not None and unknown.share > MOST_UNKNOWN:
            place = f"row {sample[unknown.first][0] + 1}"
            return unknown_warning(
                base.tokenizer, "the texts", unknown.share, place, texts[unknown.first]
            )
    return None


def _tokens(
    rows: Rows, base: Base, chosen: Proposal, turns: TurnCounter | None
) -> tuple[list[int], str]:
    """Return the lengths of rows, and how they were measured."""
    if chosen.is_chat and turns is not None:
        counts = [
            turns.whole(conversation)
            for row in rows
            for conversation in conversations_of(row, chosen)
        ]
        if lengths := [length for length in counts if length is not None]:
            return lengths, "the model's tokens"
    texts = [[_as_read(chosen, name, row.get(name)) for name in chosen.inputs] for row in rows]
    if base.tokenizer is not None:
        return base.tokens(texts), "the model's tokens"
    lengths = [sum(estimated_tokens(text) + 2 for text in row) for row in texts]
    return lengths, "a guess on the long side: the model's tokenizer could not be fetched"


def estimated_tokens(text: str) -> int:
    """Estimate the number of tokens of a text, with a margin.

    English has about 4 characters per token, other languages fewer, Chinese and Japanese one.
    """
    n_wide = sum(character > "\u2e7f" for character in text)
    n_other = sum("\x7f" < character <= "\u2e7f" for character in text)
    n_ascii = len(text) - n_wide - n_other
    return math.ceil(max(n_ascii / 3 + n_other / 1.5 + n_wide * 1.2, len(text.split()) * 1.4))


def _as_read(chosen: Proposal, column: str, value: Any) -> str:
    """Return the text of a column as the task reads it, with its prefix; the longest of a list."""
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
