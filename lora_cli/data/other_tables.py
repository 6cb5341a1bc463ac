"""Recognise tables and feature files in formats that are not supported."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lora_cli.errors import LoraError

MIN_LINES = 5  # minimum number of lines to recognise a format by
MIN_SHARE = 0.95  # share of the lines; the last lines of a sample may be truncated
LONG_DELIMITERS = ("+++$+++", "::", "@@@")
# the line below the header of a Markdown table
MARKDOWN_RULE = re.compile(r"\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?")
FEATURES = re.compile(r"[-+]?\d+(\.\d+)?(\s+(qid|\d+):[-+\d.eE]+)+\s*(#.*)?")


def reject_other_tables(text: str, path: Path, has_delimiter: bool) -> None:
    """Reject a table that would be misread as lines of text, or with markup in its values.

    Args:
        text: The beginning of the file.
        path: The file.
        has_delimiter: Whether a single-character delimiter splits the lines evenly.

    Raises:
        LoraError: If it is such a table; the hint says how to convert it.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    stated = next((line for line in lines if not line.startswith("%")), "")  # after comments
    if re.match(r"(?i)@relation\s", stated):
        what = "this is an ARFF file, as Weka writes it, not rows of text"
        hint = "write it as csv: the names of its `@attribute` lines, then the rows after `@data`"
        raise LoraError(what, str(path), hint)
    if len(lines) < MIN_LINES or stated.lstrip().startswith(("{", "[")):
        return
    if _share(lines, FEATURES) >= MIN_SHARE:
        what = "these are numbers of features (libsvm), and no text"
        raise LoraError(what, str(path), "give the texts that the features were counted in")
    if "|" in lines[0] and "|" in lines[1] and MARKDOWN_RULE.fullmatch(lines[1].strip()):
        edits = ["/^[ |:-]*$/d", "s/^ *| *//", "s/ *| *$//", "s/ *| */\\t/g"]
        what = "this is a table of Markdown, whose bars and dashes would be read as values"
        raise LoraError(what, str(path), _tabs_hint(edits, path))
    for mark in () if has_delimiter else LONG_DELIMITERS:
        counts = [line.count(mark) for line in lines]
        if counts[0] and counts.count(counts[0]) >= MIN_SHARE * len(counts):
            what = f"`{mark}` divides each line into columns, and a delimiter is one character"
            escaped = mark.replace("$", "\\$")
            raise LoraError(what, str(path), _tabs_hint([f"s/ *{escaped} */\\t/g"], path))


def _share(lines: Sequence[str], pattern: re.Pattern[str]) -> float:
    return sum(pattern.fullmatch(line) is not None for line in lines) / len(lines)


def _tabs_hint(edits: Sequence[str], path: Path) -> str:
    """Return a hint with a `sed` command that separates the columns by tabs."""
    name = path.name
    expressions = " ".join(f"-e {shlex.quote(edit)}" for edit in edits)
    source = f"zcat {shlex.quote(name)} | sed {expressions}"
    if not name.lower().endswith(".gz"):
        source = f"sed {expressions} {shlex.quote(name)}"
    return f"write it with tabs: `{source} > rows.tsv`"
