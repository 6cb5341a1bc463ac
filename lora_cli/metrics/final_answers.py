"""The final answer in a text, found by the recipe's `task.answer_pattern`, and when two are equal.

Of `Half of 48 is 24. #### 72`, the pattern `#### (-?[0-9.,]+)` finds `72`.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

import regex

from lora_cli.errors import LoraError
from lora_cli.metrics.word_tokenizers import canonical

PATIENCE_S = 1.0  # for one text; most take a thousandth of it
_NUMBER = regex.compile(r"[+-]?(\d[\d,]*(\.\d*)?|\.\d+)")


def final_answer(pattern: str, text: str) -> str | None:
    """Return the last match in a text: its first group that took part, or the whole of it.

    Args:
        pattern: A regular expression of the package `regex`.
        text: What a model wrote, or a reference.

    Returns:
        The answer without spaces around it, or None where the pattern finds none.

    Raises:
        LoraError: If the pattern takes too long.
    """
    found = None
    try:
        for found in regex.finditer(pattern, canonical(text), timeout=PATIENCE_S):  # noqa: B007 - the last
            pass
    except TimeoutError:
        raise LoraError(
            f"`{pattern}` takes more than {PATIENCE_S:g} s for one text",
            "task.answer_pattern",
            "write it without a repetition inside a repetition",
        ) from None
    if found is None:
        return None
    group = next((group for group in found.groups() if group is not None), found[0])
    return str(group).strip()


def is_same_answer(said: str, wanted: str) -> bool:
    """Return whether two answers are equal: numbers by their value, else letter by letter.

    `1,234.0` is 1234, and a full stop behind a number ends a sentence: `72.` is 72.
    """
    numbers = _value(said), _value(wanted)
    if None in numbers:
        return said == wanted
    return numbers[0] == numbers[1]


def _value(text: str) -> Decimal | None:
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:  # digits of a script that decimal does not know
        return None
