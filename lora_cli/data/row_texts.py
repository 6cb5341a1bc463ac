"""The texts of a row: as one string by which rows are compared, or to be read by a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xxhash

from lora_cli.data.media import described, is_media, media_hash

NO_WORDS = ("role", "from", "type", "id", "tool_call_id", "weight")  # keys of turns and parts
TURN = (("role", "from"), ("content", "value"))  # keys of a turn


def text_of(row: dict[str, Any], columns: list[str]) -> str:
    """Return the text by which a row is compared; of a conversation, without the system's turn."""
    return "\n".join(_text(row.get(column)) for column in columns)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    if is_media(value):
        return media_hash(value)
    if isinstance(value, dict):
        if "system" in (value.get("role"), value.get("from")):
            return ""
        return "\n".join(_text(v) for key, v in value.items() if key not in NO_WORDS)
    if isinstance(value, bytes):
        return xxhash.xxh3_128_hexdigest(value)
    return "" if value is None else str(value)


def shown_value(values: Sequence[Any]) -> str:
    """Return values of a row in words: texts as they are, a conversation turn by turn."""
    parts: list[str] = []
    for value in values:
        for turn in value if isinstance(value, list) else [value]:
            if is_media(turn):
                turn = described(turn)
            elif isinstance(turn, dict):  # of a conversation, as OpenAI or ShareGPT have it
                who, what = (turn.get(a, turn.get(b)) for a, b in TURN)
                turn = f"{who}: {what}"
            parts += [] if turn is None else [str(turn)]
    return "\n".join(parts)
