"""Find and read two text files whose lines belong together."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

from lora_cli.data.detect_format import EMPTY, DataFile, bytes_of
from lora_cli.data.file_formats import read_rows
from lora_cli.data.parallel_texts import joined_name, parts_of
from lora_cli.data.text_encoding import encoding_of
from lora_cli.data.unreadable_files import reject_binary
from lora_cli.errors import LoraError
from lora_cli.recipe import FormatSpec

LANGUAGE = re.compile(r"[._-]([a-z]{2})(?<!gz)(?=[._-]|$)")


def translations_of(file: DataFile) -> list[Path]:
    """Return the files beside a text that seem to say the same in other languages, line by line."""
    if file.form.get("type", "text") != "text" or len(file.columns) > 1:
        return []
    names = reversed([*LANGUAGE.finditer(file.path.name)])  # `train.en-de.en`: the last is its own
    return next((found for name in names if (found := _others(file, name))), [])


def _others(file: DataFile, name: re.Match[str]) -> list[Path]:
    """Return files of as many lines beside a file, whose names differ in the language alone."""
    before, after = file.path.name[: name.start(1)], file.path.name[name.end(1) :]
    pattern = re.compile(f"{re.escape(before)}([a-z]{{2}}){re.escape(after)}")
    found = []
    for other in sorted(file.path.absolute().parent.iterdir()):
        if pattern.fullmatch(other.name) and other.name != file.path.name:
            with gzip.open(other) if other.suffix == ".gz" else other.open("rb") as lines:
                if sum(bool(line.strip()) for line in lines) == len(file.rows):
                    found.append(other)
    return found


def read_pair(first: Path, second: Path) -> DataFile:
    """Read two text files whose lines belong together.

    Raises:
        LoraError: If they are no such files.
    """
    path = joined_name(first, second)
    encodings = []
    for part in (first, second):
        raw = bytes_of(part)
        if not raw.strip():
            raise LoraError("the file is empty", str(part), EMPTY)
        reject_binary(raw, part)
        if not raw.isascii():  # which is right in any encoding
            encodings.append(encoding_of(raw))
    encodings = encodings or [("utf-8", "")]
    if encodings[0][0] != encodings[-1][0]:
        what = f"one file is in {encodings[0][0]}, the other in {encodings[-1][0]}"
        hint = f"`iconv -f {encodings[-1][0]} -t {encodings[0][0]} {second.name}` makes them equal"
        raise LoraError(what, str(path), hint)
    form: dict[str, Any] = {"type": "text"}
    why = {"type": "two files, line by line"}
    if encodings[0][0] != "utf-8":
        form["encoding"], why["encoding"] = encodings[0]
    rows = list(read_rows(path, FormatSpec.model_validate(form)))
    good = [row.columns for row in rows if row.columns is not None]
    errors = [row for row in rows if row.columns is None]
    about = f"two plain texts, line by line, {encodings[0][0]}"
    return DataFile(path, form, why, good, errors, list(parts_of(path)), True, about)
