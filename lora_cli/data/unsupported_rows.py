"""Recognise rows that no task supports although they have a prompt and an answer.

Preference data, rated answers and multimodal data have prompts and answers too. If the other
columns were ignored, a model would learn the bad answers as well as the good ones.
"""

from __future__ import annotations

import re
from typing import Any

from lora_cli.data.label_lists import listed_labels

REJECTED_NAME = re.compile(
    r"(?i)(.*[_\W])?(rejected|dispreferred|non_?preferred|unpreferred|losing|loser)([_\W].*)?"
)
RATING_NAME = re.compile(
    r"(?i)(is_)?(labels?|kto_(label|tag)|desirable|preferred|accepted|approved|thumbs_up|upvoted|"
    r"good|correct|chosen|safe|helpful)"
)
MEDIA_NAME = re.compile(
    r"(?i)(images?|pictures?|videos?|audios?|image_(paths?|urls?|files?)|audio_(paths?|urls?|files?"
    r")|video_(paths?|urls?|files?)|pixel_values)"
)
ANSWERS_NAME = re.compile(
    r"(?i)(.*[_\W])?(responses|completions|candidates|answers|outputs|generations|replies|"
    r"continuations)"
)
SCORES_NAME = re.compile(r"(?i)(.*[_\W])?(scores?|ranks?|rankings?|rewards?|ratings?|preferences?)")
PROMPT_NAME = re.compile(r"(?i)(.*[_\W])?(prompts?|questions?|instructions?|query|queries|inputs?)")
FALSE_VALUES = ("false", "0", "0.0", "no")
REMOVE = "remove the column from the file"


Finding = tuple[str, str]


def unsupported(row: dict[str, Any]) -> Finding | None:
    """Return the unsupported content of a row besides its prompt and answer, and a hint.

    Args:
        row: A row of a language model's data.

    Returns:
        The unsupported content, as a phrase after "it has", and a hint; None if there is none.
    """
    return several_answers(row) or bad_answer(row) or unread_media(row)


def several_answers(row: dict[str, Any], label: str | None = None) -> Finding | None:
    """Return a message on a column of several answers to be ranked, and a hint; None without one.

    Args:
        row: A row.
        label: The column to learn, if only that column matters.
    """
    lists = {name: items for name, value in row.items() if (items := _items(value))}
    for column, value in lists.items():
        if not all(isinstance(item, str | dict) for item in value):
            continue
        scores = [
            name
            for name, numbers in lists.items()
            if SCORES_NAME.fullmatch(name)
            and len(numbers) == len(value)
            and all(map(_is_number, numbers))
        ]
        is_ranked = bool(scores) and (ANSWERS_NAME.fullmatch(column) or _are_long(value))
        has_prompt = ANSWERS_NAME.fullmatch(column) and any(map(PROMPT_NAME.fullmatch, row))
        # if the user names the label column, short answers may be labels
        has_prompt = has_prompt and (label is None or _are_long(value))
        if (is_ranked or has_prompt) and label in (None, column, *scores):
            note = f" with `{scores[0]}`" if scores else ""
            return (
                f"several answers in `{column}`{note}: they are there to be ranked, which no "
                "task learns",
                "keep the best answer of each row, as a text, in a column of its own",
            )
    return None


def _items(value: Any) -> list[Any]:
    """Return the items of a list, or of a list stored as text, if there are at least two."""
    if isinstance(value, str):
        value = listed_labels(value) if value.lstrip().startswith("[") else None
    return value if isinstance(value, list) and len(value) > 1 else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_long(items: list[Any]) -> bool:
    """Return whether most items are sentences, as labels have few words."""
    texts = [item for item in items if isinstance(item, str)]
    return sum(len(text.split()) > 3 for text in texts) * 2 > len(items)


def unread_media(row: dict[str, Any]) -> Finding | None:
    """Return a message on a column of images, audio or video, and a hint; None without one."""
    for column, value in row.items():
        if MEDIA_NAME.fullmatch(column) and value not in (None, "", [], {}):
            return (
                f"pictures, sound or films in `{column}`, which no task reads",
                f"to learn from the text alone, {REMOVE}, and the rows that need it",
            )
    return None


def bad_answer(row: dict[str, Any]) -> Finding | None:
    """Return a message on a column that marks an answer as bad, and a hint; None without one."""
    for column, value in row.items():
        if REJECTED_NAME.fullmatch(column) and value and isinstance(value, str | list | dict):
            return (
                f"a rejected answer in `{column}`: it is a preference, which no task learns from",
                f"to learn the good answers alone, {REMOVE}",
            )
        if _is_rated_bad(column, value):
            return (
                f"{str(value).lower()} in `{column}`: an answer that is marked as bad would be "
                "learned like a good one",
                f"keep the rows whose `{column}` is true; if it means something else, {REMOVE}",
            )
    return None


def _is_rated_bad(column: str, value: Any) -> bool:
    if not RATING_NAME.fullmatch(column):
        return False
    if isinstance(value, bool):
        return not value
    # 0 means false only in a label column: in others, it may be a count
    false_values = (
        FALSE_VALUES if column.lower().endswith(("label", "labels", "tag")) else ("false", "no")
    )
    return isinstance(value, str | int) and str(value).strip().lower() in false_values
