"""Recognise files that are not rows of text, and say how to convert them."""

from __future__ import annotations

import re
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.git_lfs import FETCH, POINTER, POINTS

SAMPLE_BYTES = 100_000
EXPORT = "save its sheet or table as csv"
OTHER = "give a csv, tsv, json lines, parquet or text file"
MAGIC = {
    b"PK\x03\x04": ("an Excel workbook or another zip archive", f"{EXPORT}, or unpack it"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook or another Office file", EXPORT),
    b"\x1f\x8b": ("compressed by gzip", "rename it so that it ends in .gz"),
    b"BZh": ("compressed by bzip2", "unpack it: `bunzip2 --keep FILE`"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it: `unxz --keep FILE`"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it: `unzstd FILE`"),
    b"%PDF": ("a PDF", "extract its text first"),
    b"SQLite format": ("an SQLite database", EXPORT),
    b"ARROW1": ("an Arrow file", "write it as parquet"),
    b"\xff\xff\xff\xff": ("an Arrow file", "write it as parquet"),  # a stream, cached by datasets
    POINTER: (POINTS, FETCH),
    b"\x89PNG": ("a picture", OTHER), b"\xff\xd8\xff": ("a picture", OTHER),
    b"RIFF": ("sound or a picture", OTHER), b"fLaC": ("sound", OTHER), b"ID3": ("sound", OTHER),
    b"OggS": ("sound", OTHER), b"\x80\x04": ("a pickle, which is never opened", EXPORT),
    b"\x93NUMPY": ("a NumPy array", EXPORT),
}  # fmt: skip
# a web page or any XML
MARKUP = re.compile(rb"(<!doctype html|<html)[\s>]|<\?xml\s", re.IGNORECASE)
MARKUP_NAMES = (".txt", ".text", ".html", ".htm")  # extensions of files whose text may be markup
TRANSLATION_MEMORY = re.compile(rb"<(tmx|xliff)[\s>]", re.IGNORECASE)
HEAD = 4_000  # bytes that include the first element, after comments and tool names
CONTROLS = set(map(chr, range(1, 32))) - set("\t\n\v\f\r\x1b\x1c\x1d\x1e\x1f")


def reject_binary(raw: bytes, path: Path) -> None:
    """Reject a file that is neither text nor parquet, whatever its name.

    Raises:
        LoraError: With what the file is instead.
    """
    for start, (what, hint) in MAGIC.items():
        if raw.startswith(start):
            raise LoraError(f"this is {what}, by its first bytes", str(path), hint)
    head = raw[:HEAD].replace(b"\0", b"").removeprefix(b"\xef\xbb\xbf").lstrip(b"\xff\xfe \r\n\t")
    if head.startswith(b"<") and (match := TRANSLATION_MEMORY.search(head)):
        what = f"this is a translation memory ({match[1].decode().upper()}), not rows of text"
        hint = "write its segments as a csv file with a column for each language, named `en`, `de`"
        raise LoraError(what, str(path), hint)
    name = path.name.lower().removesuffix(".gz")
    if (match := MARKUP.match(head)) and not name.endswith(MARKUP_NAMES):
        what, hint = "XML, not rows of text", "write its records as a csv file or as JSON lines"
        if match[1]:
            what = "a web page (HTML), not rows of text"
            hint = "was it saved in the place of the file? Download the file itself"
        raise LoraError(f"this is {what}", str(path), hint)


def reject_control_characters(raw: bytes, encoding: str, path: Path) -> None:
    """Reject a file whose text is full of control characters.

    Raises:
        LoraError: If it is.
    """
    text = raw[:SAMPLE_BYTES].decode(encoding, errors="replace")
    if len(set(text) & CONTROLS) > 5:
        raise LoraError("this is not text: it is full of control characters", str(path), OTHER)
