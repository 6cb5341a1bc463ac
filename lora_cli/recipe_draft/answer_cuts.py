"""Count the rows that would lose their whole answer if long examples were truncated."""

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
    """Count the rows whose prompt alone has at least `length` tokens.

    Args:
        splits: The rows of train, and of other files, of which a sample is measured.
        base: The base model, whose tokenizer counts.
        chosen: The task.
        length: `max_length` in tokens.
        turns: Counts the tokens of conversations with the chat template.

    Returns:
        The number of such rows, and the number of measured rows. None if there are no such rows, or
        if the tokenizer is not available.
    """
    if base.tokenizer is None or not (chosen.is_chat or "prompt_column" in chosen.keys):
        return None
    rows = [row for split in splits for row in split[:: max(1, len(split) // SAMPLE)]]
    if chosen.is_chat:
        if turns is None:
            return None
        prompt_lengths = [
            turns.prompt(conversation)
            for row in rows
            for conversation in conversations_of(row, chosen)
        ]
        lengths = [tokens for tokens in prompt_lengths if tokens is not None]
    else:
        lengths = base.tokens([[_prompt(row, chosen)] for row in rows])
    count = sum(tokens >= length for tokens in lengths)
    return (count, len(lengths)) if count else None


def _prompt(row: dict[str, Any], chosen: Proposal) -> str:
    """Return the text before the answer."""
    keys = chosen.keys
    return str(row.get(keys["prompt_column"]) or "") + str(keys.get("separator", ""))
