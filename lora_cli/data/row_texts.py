"""Join the texts of a row to one string, to compare rows or to show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xxhash

from lora_cli.data.media import is_media, media_hash, media_name

KEYS_WITHOUT_TEXT = (
    "role",
    "from",
    "type",
    "id",
    "tool_call_id",
    "weight",
)  # keys of turns and content parts without text
TURN_KEYS = (("role", "from"), ("content", "value"))  # keys of the role and the text of a turn


def text_of(row: dict[str, Any], columns: list[str]) -> str:
    """Return the text by which rows are compared, without the system turns of conversations."""
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
        return "\n".join(_text(v) for key, v in value.items() if key not in KEYS_WITHOUT_TEXT)
    if isinstance(value, bytes):
        return xxhash.xxh3_128_hexdigest(value)
    return "" if value is None else str(value)


def readable_value(values: Sequence[Any]) -> str:
    """Return values of a row as readable text, with one line per turn of a conversation."""
    parts: list[str] = []
    for value in values:
        for turn in value if isinstance(value, list) else [value]:
            if is_media(turn):
                turn = media_name(turn)
            elif isinstance(turn, dict):  # a turn in the OpenAI or ShareGPT format
                role, text = (turn.get(a, turn.get(b)) for a, b in TURN_KEYS)
                turn = f"{role}: {text}"
            parts += [] if turn is None else [str(turn)]
    return "\n".join(parts)
