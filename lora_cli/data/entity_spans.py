"""Entities as places in a text, in the forms in which annotation tools export them.

A span is `{"start": 0, "end": 5, "label": "PER"}`, in characters, the end being the first one
after it. Also read are Doccano's `[0, 5, "PER"]` and `start_offset`, Label Studio's `labels`, which
is a list of one, and spans inside an object's `value`. Spaces at either end are no part of a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import regex

from lora_cli.characters import UNSPACED
from lora_cli.data.json_rows import JSON_NAMES
from lora_cli.errors import counted, printable

STARTS = ("start", "start_offset", "begin", "start_char")
ENDS = ("end", "end_offset", "stop", "end_char")
# `entity` comes last: beside a type, it is the entity's text
LABELS = ("label", "labels", "entity_group", "entity_type", "type", "tag", "entity")
END_AFTER = "an end is the place after the last character"
MANY = 10  # spans that show how ends are counted
CHUNKS = regex.compile(r"\S+")
WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[^{UNSPACED}]+")
LETTER = rf"[\p{{L}}\p{{N}}--[{UNSPACED}\p{{Script=Hangul}}]]"
LAST_LETTER = regex.compile(rf"{LETTER}{LETTER}(?![\p{{L}}\p{{N}}\p{{M}}])", regex.V1)
OPENING = regex.compile(r"(?![@#])[\p{P}\p{S}]\p{M}*")
CLOSING = regex.compile(r"[\p{P}\p{S}]\p{M}*$")


@dataclass(frozen=True)
class Span:
    """An entity in a text: `text[start:end]`."""

    start: int
    end: int
    label: str


def read_spans(value: Any, text: str) -> list[Span] | str:
    """Return the spans of a text, in their order, or what is wrong with them.

    Args:
        value: What the column of spans holds.
        text: The text that they are places of.
    """
    if not isinstance(value, list):
        return f"holds {JSON_NAMES.get(type(value), 'something else')}, not a list of spans"
    spans = []
    for number, item in enumerate(value, 1):
        found = _read(item)
        if isinstance(found, str):
            return f"span {number} {found}"
        start, end, label = found
        if 0 <= start == end < len(text):
            return f"span {number}, {start} to {end} (`{label}`), is empty: {END_AFTER}"
        if not 0 <= start < end <= len(text):
            return (
                f"span {number}, {start} to {end} (`{label}`), is not inside the text, which has "
                f"{counted(len(text), 'character')}"
            )
        inside = text[start:end]
        start += len(inside) - len(inside.lstrip())
        end -= len(inside) - len(inside.rstrip())
        if start >= end:
            return f"span {number} (`{label}`) holds nothing but spaces"
        stated = item.get("text") if isinstance(item, dict) else None
        if isinstance(stated, str) and stated.strip() != text[start:end]:
            if stated.strip() == text[start : end + 1]:
                return f"span {number} (`{label}`) lacks its last character: {END_AFTER}"
            return (
                f"span {number} (`{label}`) is `{printable(text[start:end], 40)}` by its places, "
                f"and `{printable(stated, 40)}` by its own text: are they counted in bytes, "
                "or in units of UTF-16?"
            )
        spans.append(Span(start, end, label))
    spans.sort(key=lambda span: (span.start, span.end))
    for one, two in pairwise(spans):
        if two.start < one.end:
            return (
                f"two spans overlap: {one.start} to {one.end} (`{one.label}`) and {two.start} to "
                f"{two.end} (`{two.label}`)"
            )
    return spans


def _read(item: Any) -> tuple[int, int, str] | str:
    """Return start, end and label of a span, or what is wrong with it."""
    if isinstance(item, list | tuple):
        if len(item) != 3:
            return f"has {len(item)} parts, not start, end and label"
        start, end, label = item
    elif isinstance(item, dict):
        if isinstance(item.get("value"), dict):
            item = item["value"]
        start, end, label = (
            next((item[name] for name in names if name in item), None)
            for names in (STARTS, ENDS, LABELS)
        )
    else:
        return f"is {JSON_NAMES.get(type(item), 'something else')}, not start, end and label"
    if isinstance(label, list):
        if len(label) != 1:
            return f"has {len(label)} labels, and one is read"
        label = label[0]
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, int):
            return f"has no `{name}` that is a whole number"
    if not isinstance(label, str) or not label.strip():
        return "has no label"
    return start, end, label.strip()


def are_spans(values: Sequence[Any]) -> bool:
    """Return whether nearly all values are lists of spans, and some are not empty."""
    lists = [value for value in values if isinstance(value, list)]
    items = [item for value in lists for item in value]
    read = sum(not isinstance(_read(item), str) for item in items)
    return len(lists) == len(values) and bool(items) and read >= 0.9 * len(items)


def end_inside_words(texts: Sequence[tuple[str, Sequence[Span]]]) -> bool:
    """Return whether nearly all spans lack the last letter of a word, as inclusive ends do.

    In Korean, and in scripts without spaces, what follows an entity stands in the same word.
    """
    lacking = [
        LAST_LETTER.match(text, span.end - 1) is not None for text, spans in texts for span in spans
    ]
    return len(lacking) >= MANY and sum(lacking) >= 0.9 * len(lacking)


def words_of(text: str) -> list[tuple[int, int]]:
    """Return the places of the words of a typed text.

    Words stand between spaces. Punctuation and symbols at the beginning and the end of a word are
    words by themselves, but for `@` and `#` at the beginning; inside a word they belong to it
    (`don't`, `e-mail`, `3.5`). In scripts without spaces (Chinese, Japanese, Thai, …) each letter
    is a word.
    """
    found: list[tuple[int, int]] = []
    for chunk in CHUNKS.finditer(text):
        start, end = chunk.span()
        while (mark := OPENING.match(text, start, end)) and mark.end() < end:
            found.append(mark.span())
            start = mark.end()
        closing = []
        while (mark := CLOSING.search(text, start, end)) and mark.start() > start:
            closing.append(mark.span())
            end = mark.start()
        found += [match.span() for match in WORD.finditer(text, start, end)]
        found += reversed(closing)
    return found
