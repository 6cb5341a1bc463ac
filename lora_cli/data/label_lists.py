"""Parse lists that tables store as text: `['a', 'b']`, `["a", "b"]`, `['a' 'b']`, `[1, 2]`."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""  # a Python string literal
ARRAY = re.compile(rf"\[\s*{STRING}(?:\s+{STRING})+\s*\]", re.DOTALL)
STRING_OR_GAP = re.compile(
    rf"{STRING}|(\}}\s+\{{)", re.DOTALL
)  # between objects, outside of strings
MAX_LENGTH = 10_000  # characters; a list of labels is short


def listed_labels(value: Any) -> list[Any] | None:
    """Parse a list of scalars that is stored as text; return None for anything else.

    The text may be JSON, a list, tuple or set as printed by Python, or an array as printed by
    NumPy, without commas.
    """
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] + text[-1:] not in ("[]", "()", "{}") or len(text) > MAX_LENGTH:
        return None
    items = read_nested(text)
    if not isinstance(items, list | tuple | set | frozenset):
        return None
    if not all(isinstance(item, str | int | float) for item in items):
        return None
    return sorted(items, key=str) if isinstance(items, set | frozenset) else list(items)


def list_in_cell(value: Any) -> list[Any] | None:
    """Return the list in a cell, parsing text in the notation of JSON, Python or NumPy."""
    if isinstance(value, list):
        return value
    text = value.strip() if isinstance(value, str) else ""
    items = read_nested(text) if text[:1] + text[-1:] == "[]" else None
    return items if isinstance(items, list) else None


def texts_in_cell(value: Any) -> list[Any]:
    """Return the texts of a cell, which has a single text or a list, possibly stored as text."""
    if isinstance(value, list):
        return value
    items = list_in_cell(value)
    are_texts = items is not None and all(isinstance(item, str) for item in items)
    return items if items is not None and are_texts else [value]


def read_nested(text: str) -> Any:
    """Parse a text as JSON or as a Python literal; return None if it is neither.

    Tables written by pandas contain lists and objects as printed by Python or NumPy.
    """
    if ARRAY.fullmatch(text):  # NumPy writes no commas; Python would join the strings
        text = ", ".join(re.findall(STRING, text)).join("[]")
    for read in (json.loads, ast.literal_eval, _read_object_array):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def _read_object_array(text: str) -> Any:
    """Parse an array of objects, between which NumPy writes no commas."""
    return ast.literal_eval(STRING_OR_GAP.sub(lambda match: "}, {" if match[1] else match[0], text))
