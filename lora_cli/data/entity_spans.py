"""Read entities as character spans, in the formats that annotation tools export.

A span is `{"start": 0, "end": 5, "label": "PER"}`, with offsets in characters and an exclusive end.
Doccano's `[0, 5, "PER"]` and `start_offset`, Label Studio's `labels` (a list of one), and spans in
an object's `value` are supported too. Whitespace at either end is stripped from a span.
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
MIN_SPANS = 10  # spans needed to tell whether ends are inclusive
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
    """Return the spans of a text, sorted by position, or an error message.

    Args:
        value: The value of the span column.
        text: The text that the spans refer to.
    """
    if not isinstance(value, list):
        return f"holds {JSON_NAMES.get(type(value), 'something else')}, not a list of spans"
    spans = []
    for number, item in enumerate(value, 1):
        parsed = _read_span(item)
        if isinstance(parsed, str):
            return f"span {number} {parsed}"
        start, end, label = parsed
        if 0 <= start == end < len(text):
            return f"span {number}, {start} to {end} (`{label}`), is empty: {END_AFTER}"
        if not 0 <= start < end <= len(text):
            return (
                f"span {number}, {start} to {end} (`{label}`), is not inside the text, which has "
                f"{counted(len(text), 'character')}"
            )
        covered = text[start:end]
        start += len(covered) - len(covered.lstrip())
        end -= len(covered) - len(covered.rstrip())
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
    for a, b in pairwise(spans):
        if b.start < a.end:
            return (
                f"two spans overlap: {a.start} to {a.end} (`{a.label}`) and {b.start} to "
                f"{b.end} (`{b.label}`)"
            )
    return spans


def _read_span(item: Any) -> tuple[int, int, str] | str:
    """Return the start, end and label of a span, or an error message."""
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
    n_readable = sum(not isinstance(_read_span(item), str) for item in items)
    return len(lists) == len(values) and bool(items) and n_readable >= 0.9 * len(items)


def end_inside_words(texts: Sequence[tuple[str, Sequence[Span]]]) -> bool:
    """Return whether nearly all spans stop before the last letter of a word, as inclusive ends do.

    Korean and scripts without spaces do not count: suffixes may follow an entity in the same word.
    """
    lacking = [
        LAST_LETTER.match(text, span.end - 1) is not None for text, spans in texts for span in spans
    ]
    return len(lacking) >= MIN_SPANS and sum(lacking) >= 0.9 * len(lacking)


def words_of(text: str) -> list[tuple[int, int]]:
    """Split raw text into words, and return the (start, end) of each.

    Words are separated by spaces. Punctuation and symbols at the beginning or end of a word are
    words of their own, except for a leading `@` or `#`; inside a word they belong to it (`don't`,
    `e-mail`, `3.5`). In scripts without spaces (Chinese, Japanese, Thai, …), each character is a
    word.
    """
    words: list[tuple[int, int]] = []
    for chunk in CHUNKS.finditer(text):
        start, end = chunk.span()
        while (mark := OPENING.match(text, start, end)) and mark.end() < end:
            words.append(mark.span())
            start = mark.end()
        closing = []
        while (mark := CLOSING.search(text, start, end)) and mark.start() > start:
            closing.append(mark.span())
            end = mark.start()
        words += [match.span() for match in WORD.finditer(text, start, end)]
        words += reversed(closing)
    return words
