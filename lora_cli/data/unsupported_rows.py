"""Rows of a kind that no task reads, though their columns look like those of one that does.

A collection of preferences, rated answers or pictures has a prompt and an answer too. Trained as
if it had nothing else, a model would learn its bad answers as well as its good ones.
"""

from __future__ import annotations

import re
from typing import Any

from lora_cli.data.label_lists import listed_labels

REJECTED = re.compile(
    r"(?i)(.*[_\W])?(rejected|dispreferred|non_?preferred|unpreferred|losing|loser)([_\W].*)?"
)
RATED = re.compile(
    r"(?i)(is_)?(labels?|kto_(label|tag)|desirable|preferred|accepted|approved|thumbs_up|upvoted|"
    r"good|correct|chosen|safe|helpful)"
)
MEDIA = re.compile(
    r"(?i)(images?|pictures?|videos?|audios?|image_(paths?|urls?|files?)|audio_(paths?|urls?|files?"
    r")|video_(paths?|urls?|files?)|pixel_values)"
)
ANSWERS = re.compile(
    r"(?i)(.*[_\W])?(responses|completions|candidates|answers|outputs|generations|replies|"
    r"continuations)"
)
SCORES = re.compile(r"(?i)(.*[_\W])?(scores?|ranks?|rankings?|rewards?|ratings?|preferences?)")
ASKED = re.compile(r"(?i)(.*[_\W])?(prompts?|questions?|instructions?|query|queries|inputs?)")
NO = ("false", "0", "0.0", "no")
DROP = "remove the column from the file"


Found = tuple[str, str]


def unsupported(row: dict[str, Any]) -> Found | None:
    """Return what a row holds besides its prompt and answer or its conversation, and a hint.

    Args:
        row: A row of a language model's data.

    Returns:
        What no task reads, to be said after "it has", and how to go on; None if there is nothing.
    """
    return several_answers(row) or bad_answer(row) or unread_media(row)


def several_answers(row: dict[str, Any], label: str | None = None) -> Found | None:
    """Return which column holds several answers to one prompt, to be ranked, and a hint.

    Args:
        row: A row.
        label: The column that is learned, where the other columns do not matter.
    """
    lists = {name: items for name, value in row.items() if (items := _listed(value))}
    for column, value in lists.items():
        if not all(isinstance(item, str | dict) for item in value):
            continue
        scores = [
            name
            for name, numbers in lists.items()
            if SCORES.fullmatch(name)
            and len(numbers) == len(value)
            and all(map(_is_number, numbers))
        ]
        is_ranked = bool(scores) and (ANSWERS.fullmatch(column) or _are_long(value))
        is_asked = ANSWERS.fullmatch(column) and any(map(ASKED.fullmatch, row))
        # who names the label may well have short answers that are labels
        is_asked = is_asked and (label is None or _are_long(value))
        if (is_ranked or is_asked) and label in (None, column, *scores):
            scored = f" with `{scores[0]}`" if scores else ""
            return (
                f"several answers in `{column}`{scored}: they are there to be ranked, which no "
                "task learns",
                "keep the best answer of each row, as a text, in a column of its own",
            )
    return None


def _listed(value: Any) -> list[Any]:
    """Return the items of a list of two or more, also of one that is written as text."""
    if isinstance(value, str):
        value = listed_labels(value) if value.lstrip().startswith("[") else None
    return value if isinstance(value, list) and len(value) > 1 else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_long(items: list[Any]) -> bool:
    """Return whether items are sentences: labels have few words."""
    texts = [item for item in items if isinstance(item, str)]
    return sum(len(text.split()) > 3 for text in texts) * 2 > len(items)


def unread_media(row: dict[str, Any]) -> Found | None:
    """Return what is to be seen or heard beside the text of a row, and a hint."""
    for column, value in row.items():
        if MEDIA.fullmatch(column) and value not in (None, "", [], {}):
            return (
                f"pictures, sound or films in `{column}`, which no task reads",
                f"to learn from the text alone, {DROP}, and the rows that need it",
            )
    return None


def bad_answer(row: dict[str, Any]) -> Found | None:
    """Return which column of a row says that an answer is bad, and a hint."""
    for column, value in row.items():
        if REJECTED.fullmatch(column) and value and isinstance(value, str | list | dict):
            return (
                f"a rejected answer in `{column}`: it is a preference, which no task learns from",
                f"to learn the good answers alone, {DROP}",
            )
        if _is_rated_bad(column, value):
            return (
                f"{str(value).lower()} in `{column}`: an answer that is marked as bad would be "
                "learned like a good one",
                f"keep the rows whose `{column}` is true; if it means something else, {DROP}",
            )
    return None


def _is_rated_bad(column: str, value: Any) -> bool:
    if not RATED.fullmatch(column):
        return False
    if isinstance(value, bool):
        return not value
    # 0 is false of a `label` alone: a count of other things has 0 too
    numbers = NO if column.lower().endswith(("label", "labels", "tag")) else ("false", "no")
    return isinstance(value, str | int) and str(value).strip().lower() in numbers
