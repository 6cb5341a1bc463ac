"""How a file is read that is given to `lora predict` or `lora eval`."""

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

COLUMN = re.compile(r"[^\W\d]\w*([ _.-]\w+)?")  # the name of a column, and hardly a text


def input_form(
    source: Path,
    head: Head,
    given: FormatSpec,
    wanted: Sequence[str],
    labels: Collection[str] = (),
) -> FormatSpec:
    """Return how a file is read: as the recipe says, if that fits, else as its first lines say.

    The rows to predict or to measure are often written in another way than those that were trained
    on: another delimiter, no label, one text a line.

    Args:
        source: The file.
        head: What its first lines say.
        given: The recipe's `data.format`.
        wanted: The columns that are to be read.
        labels: Of the model; a line of text may begin with one.
    """
    given = form_of(source, given)
    if given.quoting == "none" and delimiter_of(source, given) == ",":
        given = given.model_copy(update={"quoting": "auto"})  # which was said of a tsv file
    # how numbers are written shows in no header, and not in every number
    numbers = {"decimal": given.decimal, "thousands": given.thousands}
    encoding = {"encoding": _encoding(head, given)}
    found = head.form.model_copy(update={**encoding, **numbers})
    given = given.model_copy(update=encoding)
    if head.kind in ("json", "parquet"):
        return found
    if head.kind == "conll":  # whose columns have the names that the recipe gives them, if any
        return found.model_copy(update={"type": "conll", "columns": given.columns})
    if head.kind == "text" and (given.label_from or found.label_from):
        return _with_or_without_labels(head, found, given, wanted, labels)
    if given.header and kind_of(source, given) == "csv" and _fits(source, given, wanted):
        return given
    if (named := _by_header(head, found, wanted, given.header)) is not None:
        return named
    if head.kind == "csv":
        names = columns_of(source, found)
        if head.named and set(wanted) <= set(names):
            return found
        if not given.header and given.columns and len(names) == len(given.columns):
            if head.named:
                raise LoraError(
                    f"the first line of {source.name} names its columns: {', '.join(names)}",
                    "--input",
                    f"rename the column to be read to `{wanted[0]}`, as the recipe does",
                )
            return found.model_copy(update={"columns": given.columns})
        if head.named or len(names) > 1:
            return given
    if len(wanted) > 1:
        return given
    if head.kind == "text" and kind_of(source, given) == "text":
        found = found.model_copy(update={"sample_by": given.sample_by})
    return found.model_copy(update={"columns": wanted})  # a file of one column without a name


def _with_or_without_labels(
    head: Head,
    found: FormatSpec,
    given: FormatSpec,
    wanted: Sequence[str],
    labels: Collection[str],
) -> FormatSpec:
    """Return how lines are read that may begin with labels, as those that were trained on did.

    Where labels are not wanted, the first word of a line is only taken away if it is a label of the
    model in every line.
    """
    texts = [name for name in wanted if name != LABEL_COLUMN]
    lines = lines_of(head.raw.decode(found.encoding, errors="replace").removeprefix("\ufeff"))
    filled = [line for line in lines if line.strip()]
    label_from = None
    if LABEL_COLUMN in wanted and given.label_from:
        label_from = given.label_from
    elif any(FASTTEXT in line for line in filled):
        label_from = "fasttext"
    elif "first_word" in (given.label_from, found.label_from):
        known = all(line.split()[0] in labels for line in filled)
        label_from = "first_word" if known else None
    form = {"type": "text", "label_from": label_from, "columns": texts[:1] or None}
    return FormatSpec.model_validate({**form, "encoding": found.encoding})


def _by_header(
    head: Head, found: FormatSpec, wanted: Sequence[str], guess: bool
) -> FormatSpec | None:
    """Return how a table is read whose first line holds the names that are wanted, or any names.

    A few broken rows must not make one text a line of a table. Without `guess`, other names are
    taken for values.
    """
    text = head.raw.decode(found.encoding, errors="replace").removeprefix("\ufeff")
    lines = lines_of(text)[found.skip_lines :]
    table = {"type": "csv", "header": True, "columns": None, "quoting": "auto"}
    for delimiter in DELIMITERS:
        names = [name.strip() for name in next(csv.reader(lines[:1], delimiter=delimiter), [])]
        if _names(names, wanted) or (
            guess and len(names) > 1 and all(map(COLUMN.fullmatch, names))
        ):
            return found.model_copy(update={**table, "delimiter": delimiter})
    if len(wanted) == 1 and lines and lines[0].strip().strip('"') == wanted[0]:
        spare = next((mark for mark in SPARE_DELIMITERS if mark not in text), ",")
        return found.model_copy(update={**table, "delimiter": spare})
    return None


def _fits(source: Path, form: FormatSpec, wanted: Sequence[str]) -> bool:
    """Return whether a header, read so, names the columns that are wanted, and others too."""
    try:
        names = columns_of(source, form)
    except LoraError:
        return False
    return _names(names, wanted)


def _names(header: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether a header names what is wanted; one word alone may be a text."""
    return set(wanted) <= set(header) and len(header) > 1


def _encoding(head: Head, given: FormatSpec) -> str:
    """Return the encoding of a file: the recipe's, unless its bytes are UTF-8 or not in it."""
    if head.raw.isascii() and head.form.encoding != "utf-8":
        return head.form.encoding  # letters written in codes, or of two bytes: hardly ASCII
    if head.raw.isascii() or (head.form.encoding != "utf-8" and given.encoding != "utf-8"):
        try:
            head.raw.decode(given.encoding)
        except (UnicodeError, LookupError):
            return head.form.encoding
        return given.encoding
    return head.form.encoding
