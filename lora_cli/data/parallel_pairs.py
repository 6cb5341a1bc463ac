"""Find and read two parallel text files, whose lines correspond."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

from lora_cli.data.detect_format import EMPTY, DataFile, bytes_of
from lora_cli.data.file_formats import read_rows
from lora_cli.data.parallel_texts import paired_name, parts_of
from lora_cli.data.text_encoding import encoding_of
from lora_cli.data.unreadable_files import reject_binary
from lora_cli.errors import LoraError
from lora_cli.recipe import FormatSpec

LANGUAGE = re.compile(r"[._-]([a-z]{2})(?<!gz)(?=[._-]|$)")


def translations_of(file: DataFile) -> list[Path]:
    """Return files next to a text file that seem to be its translations, line by line."""
    if file.form.get("type", "text") != "text" or len(file.columns) > 1:
        return []
    names = reversed(
        [*LANGUAGE.finditer(file.path.name)]
    )  # in `train.en-de.en`, the last is the language of the file
    return next((files for name in names if (files := _files_in_other_languages(file, name))), [])


def _files_in_other_languages(file: DataFile, name: re.Match[str]) -> list[Path]:
    """Return files with as many lines, whose names differ only in the language."""
    before, after = file.path.name[: name.start(1)], file.path.name[name.end(1) :]
    pattern = re.compile(f"{re.escape(before)}([a-z]{{2}}){re.escape(after)}")
    files = []
    for other in sorted(file.path.absolute().parent.iterdir()):
        if pattern.fullmatch(other.name) and other.name != file.path.name:
            with gzip.open(other) if other.suffix == ".gz" else other.open("rb") as lines:
                if sum(bool(line.strip()) for line in lines) == len(file.rows):
                    files.append(other)
    return files


def read_pair(first: Path, second: Path) -> DataFile:
    """Read two parallel text files, whose lines correspond.

    Raises:
        LoraError: If they are not parallel, or have different encodings.
    """
    path = paired_name(first, second)
    encodings = []
    for part in (first, second):
        raw = bytes_of(part)
        if not raw.strip():
            raise LoraError("the file is empty", str(part), EMPTY)
        reject_binary(raw, part)
        if not raw.isascii():  # ASCII is valid in any encoding
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
    readable = [row.columns for row in rows if row.columns is not None]
    errors = [row for row in rows if row.columns is None]
    summary = f"two plain texts, line by line, {encodings[0][0]}"
    return DataFile(path, form, why, readable, errors, list(parts_of(path)), True, summary)
