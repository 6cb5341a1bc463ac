"""Lists of labels that stand in a table as text: `['a', 'b']`, `["a", "b"]`, `[1, 2]`."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

QUOTES_APART = re.compile(r"(['\"])\s+(['\"])")
LONGEST = 10_000  # characters; a list of labels is short


def listed_labels(value: Any) -> list[Any] | None:
    """Return the items of a list that is written as text, or None for anything else.

    As JSON has it, as Python prints lists, tuples and sets, or as NumPy prints arrays of words,
    which have no commas.
    """
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] + text[-1:] not in ("[]", "()", "{}") or len(text) > LONGEST:
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            items = read(QUOTES_APART.sub(r"\1, \2", text))
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        break
    else:
        return None
    if not isinstance(items, list | tuple | set | frozenset):
        return None
    if not all(isinstance(item, str | int | float) for item in items):
        return None
    return sorted(items, key=str) if isinstance(items, set | frozenset) else list(items)


def list_in_cell(value: Any) -> list[Any] | None:
    """Return a list, also one that a table holds as text: as JSON or Python write it."""
    if isinstance(value, list):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] + text[-1:] != "[]":
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            items = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return items if isinstance(items, list) else None
    return None
