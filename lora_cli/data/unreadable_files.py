"""Recognise files that are something else than rows of text, and say what to do with them."""

from __future__ import annotations

import re
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.git_lfs import FETCH, POINTER, POINTS

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
    b"\xff\xff\xff\xff": ("an Arrow file", "write it as parquet"),  # a stream, as datasets caches
    POINTER: (POINTS, FETCH),
    b"\x89PNG": ("a picture", OTHER), b"\xff\xd8\xff": ("a picture", OTHER),
    b"RIFF": ("sound or a picture", OTHER), b"fLaC": ("sound", OTHER), b"ID3": ("sound", OTHER),
    b"OggS": ("sound", OTHER), b"\x80\x04": ("a pickle, which is never opened", TABLE),
    b"\x93NUMPY": ("a NumPy array", TABLE),
}  # fmt: skip
# what holds translations as XML, also in UTF-16
MARKUP = re.compile(rb"(<!doctype html|<html)[\s>]|<\?xml\s", re.IGNORECASE)
MARKUP_NAMES = (".txt", ".text", ".html", ".htm")  # of files that may be a text of markup
MEMORY = re.compile(rb"<(tmx|xliff)[\s>]", re.IGNORECASE)
HEAD = 4_000  # bytes in which its first element stands, after comments and what it is made with
CONTROLS = set(map(chr, range(1, 32))) - set("\t\n\v\f\r\x1b\x1c\x1d\x1e\x1f")


def reject_binary(raw: bytes, path: Path) -> None:
    """Reject what is no text and no parquet file, whatever its name.

    Raises:
        LoraError: If it is such a file.
    """
    for start, (what, hint) in MAGIC.items():
        if raw.startswith(start):
            raise LoraError(f"this is {what}, by its first bytes", str(path), hint)
    head = raw[:HEAD].replace(b"\0", b"").removeprefix(b"\xef\xbb\xbf").lstrip(b"\xff\xfe \r\n\t")
    if head.startswith(b"<") and (found := MEMORY.search(head)):
        what = f"this is a translation memory ({found[1].decode().upper()}), not rows of text"
        hint = "write its segments as a csv file with a column for each language, named `en`, `de`"
        raise LoraError(what, str(path), hint)
    name = path.name.lower().removesuffix(".gz")
    if (found := MARKUP.match(head)) and not name.endswith(MARKUP_NAMES):
        what, hint = "XML, not rows of text", "write its records as a csv file or as JSON lines"
        if found[1]:
            what = "a web page (HTML), not rows of text"
            hint = "was it saved in the place of the file? Download the file itself"
        raise LoraError(f"this is {what}", str(path), hint)


def reject_other_lines(raw: bytes, encoding: str, path: Path) -> None:
    """Reject what is not text.

    Raises:
        LoraError: If it is one; it says what was seen.
    """
    text = raw[:SAMPLE_BYTES].decode(encoding, errors="replace")
    if len(set(text) & CONTROLS) > 5:
        raise LoraError("this is not text: it is full of control characters", str(path), OTHER)
