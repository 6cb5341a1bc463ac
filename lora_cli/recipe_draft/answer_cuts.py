"""How many rows would lose their whole answer if their end were cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_cli.recipe_draft.base_model_info import SAMPLE, Base
from lora_cli.recipe_draft.chat_lengths import TurnCounter, conversations_of
from lora_cli.tasks.proposal import Proposal


def rows_without_answer(
    splits: Sequence[Sequence[dict[str, Any]]],
    base: Base,
    chosen: Proposal,
    length: int,
    turns: TurnCounter | None = None,
) -> tuple[int, int] | None:
    """Return in how many of some rows the prompt alone is as long as an example may be.

    Args:
        splits: The rows of train, and of other files; a sample of them is measured.
        base: Its tokenizer counts; without one, nothing is known.
        chosen: The task.
        length: `max_length`, in tokens.
        turns: Counts conversations with the chat template.

    Returns:
        Those rows, and how many were measured; None if there are none.
    """
    if base.tokenizer is None or not (chosen.is_chat or "prompt_column" in chosen.keys):
        return None
    rows = [row for split in splits for row in split[:: max(1, len(split) // SAMPLE)]]
    if chosen.is_chat:
        if turns is None:
            return None
        asked = [turns.prompt(one) for row in rows for one in conversations_of(row, chosen)]
        lengths = [tokens for tokens in asked if tokens is not None]
    else:
        lengths = base.tokens([[_prompt(row, chosen)] for row in rows])
    count = sum(tokens >= length for tokens in lengths)
    return (count, len(lengths)) if count else None


def _prompt(row: dict[str, Any], chosen: Proposal) -> str:
    """Return what stands before the answer."""
    keys = chosen.keys
    return str(row.get(keys["prompt_column"]) or "") + str(keys.get("separator", ""))
