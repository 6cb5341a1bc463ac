"""How many rows would lose their whole answer if their end were cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_cli.data.conversations import conversation_fault, read_conversations
from lora_cli.inference.model import SAMPLE, Base
from lora_cli.inference.written import Chosen

TURN_TOKENS = 4  # that a template adds to a turn, at the least


def rows_without_answer(
    splits: Sequence[Sequence[dict[str, Any]]], base: Base, chosen: Chosen, length: int
) -> tuple[int, int] | None:
    """Return in how many of some rows the prompt alone is as long as an example may be.

    Args:
        splits: The rows of train, and of other files; a sample of them is measured.
        base: Its tokenizer counts; without one, nothing is known.
        chosen: The task.
        length: `max_length`, in tokens.

    Returns:
        Those rows, and how many were measured; None if there are none.
    """
    if base.tokenizer is None or not (chosen.is_chat or "prompt_column" in chosen.keys):
        return None
    rows = [row for split in splits for row in split[:: max(1, len(split) // SAMPLE)]]
    found = [(text, turns) for row in rows for text, turns in _prompt(row, chosen)]
    lengths = base.tokens([[text] for text, _ in found])
    count = sum(n + extra >= length for n, (_, extra) in zip(lengths, found, strict=True))
    return (count, len(found)) if count else None


def _prompt(row: dict[str, Any], chosen: Chosen) -> list[tuple[str, int]]:
    """Return what stands before the first answer, and the tokens that a template adds to it."""
    keys = chosen.keys
    if not chosen.is_chat:
        return [(str(row.get(keys["prompt_column"]) or "") + keys.get("separator", ""), 0)]
    form, column = keys["format"], keys.get("messages_column")
    if conversation_fault(row, form, column):
        return []
    messages = read_conversations(row, form, column)[0].messages
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    text = "\n".join(str(message.get("content") or "") for message in messages[:first])
    return [(text, TURN_TOKENS * (first + 1))]
