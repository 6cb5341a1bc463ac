"""Lists that stand in a table as text: `['a', 'b']`, `["a", "b"]`, `['a' 'b']`, `[1, 2]`."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

TEXT = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""  # as Python writes one
ARRAY = re.compile(rf"\[\s*{TEXT}(?:\s+{TEXT})+\s*\]", re.DOTALL)
GAP = re.compile(rf"{TEXT}|(\}}\s+\{{)", re.DOTALL)  # between objects, and in no text
LONGEST = 10_000  # characters; a list of labels is short


def listed_labels(value: Any) -> list[Any] | None:
    """Return the items of a list that is written as text, or None for anything else.

    As JSON has it, as Python prints lists, tuples and sets, or as NumPy prints arrays of words,
    which have no commas.
    """
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] + text[-1:] not in ("[]", "()", "{}") or len(text) > LONGEST:
        return None
    items = read_nested(text)
    if not isinstance(items, list | tuple | set | frozenset):
        return None
    if not all(isinstance(item, str | int | float) for item in items):
        return None
    return sorted(items, key=str) if isinstance(items, set | frozenset) else list(items)


def list_in_cell(value: Any) -> list[Any] | None:
    """Return a list, also one that a table holds as text: as JSON, Python or NumPy write it."""
    if isinstance(value, list):
        return value
    text = value.strip() if isinstance(value, str) else ""
    items = read_nested(text) if text[:1] + text[-1:] == "[]" else None
    return items if isinstance(items, list) else None


def texts_in_cell(value: Any) -> list[Any]:
    """Return the texts of a cell that holds one, or a list of them, which a table has as text."""
    if isinstance(value, list):
        return value
    items = list_in_cell(value)
    are_texts = items is not None and all(isinstance(item, str) for item in items)
    return items if items is not None and are_texts else [value]


def read_nested(text: str) -> Any:
    """Return what JSON or Python read in a text, or None if neither reads it.

    Tables that pandas wrote hold lists and objects as Python prints them, or as NumPy does.
    """
    if ARRAY.fullmatch(text):  # of NumPy: without commas, Python would join all texts to one
        text = ", ".join(re.findall(TEXT, text)).join("[]")
    for read in (json.loads, ast.literal_eval, _of_array):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def _of_array(text: str) -> Any:
    """Return what Python reads in an array of objects, between which NumPy writes no commas."""
    return ast.literal_eval(GAP.sub(lambda found: "}, {" if found[1] else found[0], text))
