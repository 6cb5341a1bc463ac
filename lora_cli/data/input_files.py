"""Decide how to read a file that is given to `lora predict` or `lora eval`."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from lora_cli.data.csv_rows import delimiter_of
from lora_cli.data.detect_format import Head
from lora_cli.data.detect_table import DELIMITERS, SPARE_DELIMITERS
from lora_cli.data.file_formats import columns_of, form_of, kind_of
from lora_cli.data.labelled_text import FASTTEXT, LABEL_COLUMN
from lora_cli.data.text_encoding import lines_of
from lora_cli.errors import LoraError
from lora_cli.recipe import FormatSpec

COLUMN = re.compile(r"[^\W\d]\w*([ _.-]\w+)?")  # likely a column name, not a text


def input_form(
    source: Path,
    head: Head,
    form: FormatSpec,
    requested: Sequence[str],
    labels: Collection[str] = (),
) -> FormatSpec:
    """Return the settings to read a file with: the recipe's if they fit, otherwise detected ones.

    The rows to predict or evaluate are often written differently from the training data: with
    another delimiter, without labels, or as one text per line.

    Args:
        source: The file.
        head: The format detected from its first lines.
        form: The recipe's `data.format`.
        requested: The columns to read.
        labels: The labels of the model, as a line of text may begin with one.
    """
    form = form_of(source, form)
    if form.quoting == "none" and delimiter_of(source, form) == ",":
        form = form.model_copy(update={"quoting": "auto"})  # the training data was a tsv file
    # the number format cannot be detected from a header, or from every number
    number_form = {"decimal": form.decimal, "thousands": form.thousands}
    encoding = {"encoding": _encoding(head, form)}
    detected = head.form.model_copy(update={**encoding, **number_form})
    form = form.model_copy(update=encoding)
    if head.kind in ("json", "parquet"):
        return detected
    if head.kind == "conll":  # the recipe may name its columns
        return detected.model_copy(update={"type": "conll", "columns": form.columns})
    if head.kind == "text" and (form.label_from or detected.label_from):
        return _with_or_without_labels(head, detected, form, requested, labels)
    if form.header and kind_of(source, form) == "csv" and _fits(source, form, requested):
        return form
    if (with_header := _by_header(head, detected, requested, form.header)) is not None:
        return with_header
    if head.kind == "csv":
        names = columns_of(source, detected)
        if head.named and set(requested) <= set(names):
            return detected
        if not form.header and form.columns and len(names) == len(form.columns):
            if head.named:
                raise LoraError(
                    f"the first line of {source.name} names its columns: {', '.join(names)}",
                    "--input",
                    f"rename the column to be read to `{requested[0]}`, as the recipe does",
                )
            return detected.model_copy(update={"columns": form.columns})
        if head.named or len(names) > 1:
            return form
    if len(requested) > 1:
        return form
    if head.kind == "text" and kind_of(source, form) == "text":
        detected = detected.model_copy(update={"sample_by": form.sample_by})
    return detected.model_copy(update={"columns": requested})  # a file with one unnamed column


def _with_or_without_labels(
    head: Head,
    detected: FormatSpec,
    recipe_form: FormatSpec,
    requested: Sequence[str],
    labels: Collection[str],
) -> FormatSpec:
    """Return the settings for lines that may begin with labels, as the training data did.

    If labels are not requested, the first word of a line is removed only if every line begins with
    a label of the model.
    """
    texts = [name for name in requested if name != LABEL_COLUMN]
    lines = lines_of(head.raw.decode(detected.encoding, errors="replace").removeprefix("\ufeff"))
    filled = [line for line in lines if line.strip()]
    label_from = None
    if LABEL_COLUMN in requested and recipe_form.label_from:
        label_from = recipe_form.label_from
    elif any(FASTTEXT in line for line in filled):
        label_from = "fasttext"
    elif "first_word" in (recipe_form.label_from, detected.label_from):
        all_labelled = all(line.split()[0] in labels for line in filled)
        label_from = "first_word" if all_labelled else None
    form = {"type": "text", "label_from": label_from, "columns": texts[:1] or None}
    return FormatSpec.model_validate({**form, "encoding": detected.encoding})


def _by_header(
    head: Head, detected: FormatSpec, requested: Sequence[str], guess: bool
) -> FormatSpec | None:
    """Return the settings for a table whose first line names the requested columns.

    A header must be recognised even if some rows are broken: the file must not be read as one text
    per line. With `guess`, a first line of any plausible names is taken as a header.
    """
    text = head.raw.decode(detected.encoding, errors="replace").removeprefix("\ufeff")
    lines = lines_of(text)[detected.skip_lines :]
    table = {"type": "csv", "header": True, "columns": None, "quoting": "auto"}
    for delimiter in DELIMITERS:
        names = [name.strip() for name in next(csv.reader(lines[:1], delimiter=delimiter), [])]
        if _has_names(names, requested) or (
            guess and len(names) > 1 and all(map(COLUMN.fullmatch, names))
        ):
            return detected.model_copy(update={**table, "delimiter": delimiter})
    if len(requested) == 1 and lines and lines[0].strip().strip('"') == requested[0]:
        unused = next((mark for mark in SPARE_DELIMITERS if mark not in text), ",")
        return detected.model_copy(update={**table, "delimiter": unused})
    return None


def _fits(source: Path, form: FormatSpec, requested: Sequence[str]) -> bool:
    """Return whether the file has the requested columns when read with these settings."""
    try:
        names = columns_of(source, form)
    except LoraError:
        return False
    return _has_names(names, requested)


def _has_names(header: Sequence[str], requested: Sequence[str]) -> bool:
    """Return whether a header has all requested names; a single name could be a text."""
    return set(requested) <= set(header) and len(header) > 1


def _encoding(head: Head, form: FormatSpec) -> str:
    """Return the encoding: the recipe's, unless the file is UTF-8 or cannot be decoded with it."""
    if head.raw.isascii() and head.form.encoding != "utf-8":
        return (
            head.form.encoding
        )  # escape sequences or two-byte characters, unlikely in plain ASCII
    if head.raw.isascii() or (head.form.encoding != "utf-8" and form.encoding != "utf-8"):
        try:
            head.raw.decode(form.encoding)
        except (UnicodeError, LookupError):
            return head.form.encoding
        return form.encoding
    return head.form.encoding
