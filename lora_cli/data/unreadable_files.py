"""Recognise files that are something else than rows of text, and say what to do with them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.data.text_encoding import lines_of
from lora_cli.errors import LoraError

TAG = re.compile(r"O|[BIESLUM]-\S+")
COMMENT = re.compile(r"# |-DOCSTART-")
SAMPLE_BYTES = 100_000
TABLE = "save its sheet or table as csv"
OTHER = "give a csv, tsv, json lines, parquet or text file"
MAGIC = {
    b"PK\x03\x04": ("an Excel workbook or another zip archive", f"{TABLE}, or unpack it"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook or another Office file", TABLE),
    b"\x1f\x8b": ("compressed by gzip", "rename it so that it ends in .gz"),
    b"BZh": ("compressed by bzip2", "unpack it: `bunzip2 --keep FILE`"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it: `unxz --keep FILE`"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it: `unzstd FILE`"),
    b"%PDF": ("a PDF", "extract its text first"),
    b"SQLite format": ("an SQLite database", TABLE),
    b"ARROW1": ("an Arrow file", "write it as parquet"),
    b"\x89PNG": ("a picture", OTHER), b"\xff\xd8\xff": ("a picture", OTHER),
    b"RIFF": ("sound or a picture", OTHER), b"fLaC": ("sound", OTHER), b"ID3": ("sound", OTHER),
    b"OggS": ("sound", OTHER), b"\x80\x04": ("a pickle, which is never opened", TABLE),
    b"\x93NUMPY": ("a NumPy array", TABLE),
}  # fmt: skip
CONTROLS = set(map(chr, range(1, 32))) - set("\t\n\v\f\r\x1b\x1c\x1d\x1e\x1f")
TAG_NAME = re.compile(r"(?i)(.*_)?(tags?|labels?|entities)")
HINT = (
    "the supported tasks are sequence_classification (a label for a whole text) and causal_lm "
    "(text to continue)"
)


def reject_binary(raw: bytes, path: Path) -> None:
    """Refuse what is no text and no parquet file, whatever its name.

    Raises:
        LoraError: If it is such a file.
    """
    for start, (what, hint) in MAGIC.items():
        if raw.startswith(start):
            raise LoraError(f"this is {what}, by its first bytes", str(path), hint)


def reject_other_lines(raw: bytes, encoding: str, path: Path) -> None:
    """Reject what is not text, and texts in the form of CoNLL, with a tag for each token.

    Raises:
        LoraError: If it is one; it says what was seen.
    """
    text = raw[:SAMPLE_BYTES].decode(encoding, errors="replace")
    if len(set(text) & CONTROLS) > 5:
        raise LoraError("this is not text: it is full of control characters", str(path), OTHER)
    sample = lines_of(text)
    sample = sample[:-1] if len(raw) > SAMPLE_BYTES else sample
    filled = [line for line in sample if line.strip()]
    if _is_tagged(filled):
        _reject_tagged(raw, encoding, path.name)


def _reject_tagged(raw: bytes, encoding: str, place: str) -> None:
    lines = lines_of(raw.decode(encoding, errors="replace"))
    fields = [line.split() for line in lines if line.strip()]
    tags = Counter(found[-1] for found in fields if TAG.fullmatch(found[-1]))
    pairs = zip(["", *lines], lines, strict=False)
    sentences = sum(bool(line.strip()) and not before.strip() for before, line in pairs)
    raise _error(f"one a line, {sentences:,} sentences", tags, place)


def _is_tagged(lines: Sequence[str]) -> bool:
    fields = [line.split() for line in lines if not COMMENT.match(line)]
    tags = [found[-1] for found in fields if len(found) > 1 and TAG.fullmatch(found[-1])]
    return len(fields) >= 10 and len(tags) >= 0.95 * len(fields) and len(set(tags)) > 1


def reject_tagged_rows(rows: Sequence[dict[str, Any]], place: str) -> None:
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
