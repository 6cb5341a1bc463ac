"""Extraction of final answers from texts by the recipe's `task.answer_pattern`, and comparison.

In `Half of 48 is 24. #### 72`, the pattern `#### (-?[0-9.,]+)` finds `72`.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

import regex

from lora_cli.errors import LoraError
from lora_cli.metrics.word_tokenizers import canonical

TIMEOUT_S = 1.0  # for one text; most take a thousandth of this
_NUMBER = regex.compile(r"[+-]?(\d[\d,]*(\.\d*)?|\.\d+)")


def final_answer(pattern: str, text: str) -> str | None:
    """Return the last match in a text: its first group that matched, or else the whole match.

    Args:
        pattern: A regular expression for the package `regex`.
        text: A generated text or a reference.

    Returns:
        The answer without surrounding spaces, or None if the pattern does not match.

    Raises:
        LoraError: If the pattern takes too long.
    """
    match = None
    try:
        for match in regex.finditer(pattern, canonical(text), timeout=TIMEOUT_S):  # noqa: B007 - the last
            pass
    except TimeoutError:
        raise LoraError(
            f"`{pattern}` takes more than {TIMEOUT_S:g} s for one text",
            "task.answer_pattern",
            "write it without a repetition inside a repetition",
        ) from None
    if match is None:
        return None
    group = next((group for group in match.groups() if group is not None), match[0])
    return str(group).strip()


def is_same_answer(a: str, b: str) -> bool:
    """Return whether two answers are equal; numbers are compared by value.

    `1,234.0` equals 1234, and a full stop after a number is ignored: `72.` equals 72.
    """
    values = _value(a), _value(b)
    if None in values:
        return a == b
    return values[0] == values[1]


def _value(text: str) -> Decimal | None:
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:  # digits of a script that `Decimal` does not accept
        return None
