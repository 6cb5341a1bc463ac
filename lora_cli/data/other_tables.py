"""Recognise tables and features that are written in a way that no reader here knows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lora_cli.errors import LoraError

FEW = 5  # lines, of which nothing can be said
MOSTLY = 0.95  # of the lines: the last ones of a sample may be cut
LONG_DELIMITERS = ("+++$+++", "::", "@@@")
# below the header of a Markdown table
RULE = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")
FEATURES = re.compile(r"[-+]?\d+(\.\d+)?(\s+(qid|\d+):[-+\d.eE]+)+\s*(#.*)?")


def reject_other_tables(text: str, path: Path, is_divided: bool) -> None:
    """Reject a table that would be read as lines of text, or with its markup as values.

    Args:
        text: The beginning of the file.
        path: The file.
        is_divided: Whether a delimiter of one character gives its lines the same number of fields.

    Raises:
        LoraError: If it is such a table; the hint says how to write it as one that is read.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    stated = next((line for line in lines if not line.startswith("%")), "")  # after comments
    if re.match(r"(?i)@relation\s", stated):
        what = "this is an ARFF file, as Weka writes it, not rows of text"
        hint = "write it as csv: the names of its `@attribute` lines, then the rows after `@data`"
        raise LoraError(what, str(path), hint)
    if len(lines) < FEW or stated.lstrip().startswith(("{", "[")):
        return
    if _share(lines, FEATURES) >= MOSTLY:
        what = "these are numbers of features (libsvm), and no text"
        raise LoraError(what, str(path), "give the texts that the features were counted in")
    if "|" in lines[0] and "|" in lines[1] and RULE.fullmatch(lines[1]):
        edits = ["/^[ |:-]*$/d", "s/^ *| *//", "s/ *| *$//", "s/ *| */\\t/g"]
        what = "this is a table of Markdown, whose bars and dashes would be read as values"
        raise LoraError(what, str(path), _tabs(edits, path))
    for mark in () if is_divided else LONG_DELIMITERS:
        counts = [line.count(mark) for line in lines]
        if counts[0] and counts.count(counts[0]) >= MOSTLY * len(counts):
            what = f"`{mark}` divides each line into columns, and a delimiter is one character"
            escaped = mark.replace("$", "\\$")
            raise LoraError(what, str(path), _tabs([f"s/ *{escaped} */\\t/g"], path))


def _share(lines: Sequence[str], pattern: re.Pattern[str]) -> float:
    return sum(pattern.fullmatch(line) is not None for line in lines) / len(lines)


def _tabs(edits: Sequence[str], path: Path) -> str:
    """Return the hint to write the columns with tabs between them."""
    name = path.name
    written = " ".join(f"-e {shlex.quote(edit)}" for edit in edits)
    source = f"zcat {shlex.quote(name)} | sed {written}"
    if not name.lower().endswith(".gz"):
        source = f"sed {written} {shlex.quote(name)}"
    return f"write it with tabs: `{source} > rows.tsv`"
