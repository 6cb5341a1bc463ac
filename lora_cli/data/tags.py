"""Recognise tokens with a tag each: they can be read, but no task learns them yet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_cli.errors import LoraError

TAG = re.compile(r"O|[BIESLUM]-\S+")
COMMENT = re.compile(r"# |-DOCSTART-")
SAMPLE_BYTES = 100_000
TAG_NAME = re.compile(r"(?i)(.*_)?(tags?|labels?|entities)")
HINT = (
    "the tasks so far are sequence_classification (a label for a whole text) and causal_lm "
    "(text to continue)"
)


def refuse_tagged_lines(raw: bytes, encoding: str, place: str) -> None:
    """Refuse a file in CoNLL's form: a token and its tag a line, a blank line after a sentence.

    Raises:
        LoraError: If it is one; it says what was seen.
    """
    if not _is_tagged(raw[:SAMPLE_BYTES].decode(encoding, errors="replace").splitlines()[:-1]):
        return
    lines = raw.decode(encoding, errors="replace").splitlines()
    fields = [line.split() for line in lines if line.strip()]
    tags = Counter(found[-1] for found in fields if TAG.fullmatch(found[-1]))
    pairs = zip(["", *lines], lines, strict=False)
    sentences = sum(bool(line.strip()) and not before.strip() for before, line in pairs)
    raise _error(f"one a line, {sentences:,} sentences", tags, place)


def _is_tagged(lines: Sequence[str]) -> bool:
    fields = [line.split() for line in lines if line.strip() and not COMMENT.match(line)]
    tags = [found[-1] for found in fields if len(found) > 1 and TAG.fullmatch(found[-1])]
    return len(fields) >= 10 and len(tags) >= 0.95 * len(fields) and len(set(tags)) > 1


def refuse_tagged_rows(rows: Sequence[dict[str, Any]], place: str) -> None:
    """Refuse rows of two lists, tokens and tags, of the same length.

    Raises:
        LoraError: If there are such; it names the columns.
    """
    lists = [name for name in rows[0] if all(_is_plain(row.get(name)) for row in rows)]
    for tags in filter(TAG_NAME.fullmatch, lists):
        for tokens in lists:
            even = all(len(row[tokens]) == len(row[tags]) for row in rows)
            if tokens != tags and even and sum(len(row[tags]) for row in rows) > len(rows):
                counts = Counter(str(tag) for row in rows for tag in row[tags])
                what = f"`{tokens}` and `{tags}`, {len(rows):,} sentences"
                raise _error(what, counts, place)


def _is_plain(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(v, list | dict | None) for v in value)


def _error(what: str, tags: Counter[str], place: str) -> LoraError:
    kinds = sorted({tag.partition("-")[2] or tag for tag in tags if tag != "O"})
    shown = ", ".join(kinds[:8]) + (", …" if len(kinds) > 8 else "")
    return LoraError(
        f"these are tokens with a tag each ({what}, {len(tags)} tags: {shown}), and there is no "
        "task yet that learns to tag tokens",
        place,
        HINT,
    )
