"""Explain PyYAML's errors in terms that the author of a recipe knows."""

from __future__ import annotations

import re

import yaml

TOO_DEEP = "brackets or indentation are too deep"
BACKSLASH = (
    "inside quotation marks a backslash starts an escape code; write `\\\\` for the backslash "
    "itself"
)
COLUMNS = "keys of one section start in the same column, and only a section has keys below it"
LINE_END = f"{COLUMNS}; after a text in quotation marks the line ends"
CHECK_SYNTAX = "check the quotation marks, brackets and indentation, here and in the line above"
QUOTES = "a text that begins with a special character needs quotation marks"
DIRECTIVE = "a line begins with `%`"
UNCLOSED = "a quotation mark is not closed"

# a pattern of PyYAML's message, the message to show (with the pattern's groups), and the hint
EXPLANATIONS: tuple[tuple[str, str, str], ...] = (
    (TOO_DEEP, TOO_DEEP, "a recipe is a few levels deep"),
    (r"another document", "a recipe is one document, and a second begins here", "remove the `---`"),
    (r"character '\\t'", "there is a tab in the indentation", "indent with spaces"),
    (
        r"mapping values are not allowed",
        "a colon is not allowed here",
        "a text with a colon needs quotation marks; " + COLUMNS,
    ),
    (r"expected ',' or '(.)'", "a `{0}` or a comma is missing", CHECK_SYNTAX),
    (r"found '[]}]'|found ','", "a value is missing here", CHECK_SYNTAX),
    (r"sequence entries are not", "a list starts where none is allowed", COLUMNS),
    (r"expected <block end>", "this line does not continue what is above it", LINE_END),
    (r"unexpected (end of stream|document separator)", UNCLOSED, CHECK_SYNTAX),
    (r"expected the node content", "a bracket is not closed, or a value is missing", CHECK_SYNTAX),
    (r"expected ':'", "this line is neither `key: value` nor an item `- value`", COLUMNS),
    (r"unknown escape character '(.+)'", "`\\{0}` is not an escape code of YAML", BACKSLASH),
    (r"undefined alias '(.*)'", "`*{0}` refers to a name that is not defined", QUOTES),
    (r"second occurrence", "two values have the same name (`&name`)", "leave such names out"),
    (r"undefined tag handle '(.*)'", "`{0}` starts a tag that recipes do not use", QUOTES),
    (r"character '(.)' that cannot start", "a text cannot begin with `{0}` as it is", QUOTES),
    (r"(indentation indicator|chomping)", "after `|` or `>` the text begins on a new line", QUOTES),
    (r"expected alphabetic", "`&` and `*` are followed by a name", QUOTES),
    (r"URI|expected '[!>]'|expected ' '", "a tag is not complete", QUOTES),
    (r"YAML document|directive|<document start>", DIRECTIVE, "remove the line"),
)


def explain(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """Return a message that says what is wrong, and a hint."""
    message = str(error.problem or error.context or "it cannot be read")
    message = re.sub(r"'(<stream end>|\\x00|\0)'", "the end", message)
    for pattern, what, hint in EXPLANATIONS:
        if match := re.search(pattern, message):
            return what.format(*match.groups()), hint
    return message, CHECK_SYNTAX


def line_of(error: yaml.MarkedYAMLError) -> int | None:
    """Return the line with the mistake, counted from 0."""
    mark, opened = error.problem_mark or error.context_mark, error.context_mark
    if opened and re.search("expected ':'|unexpected", str(error.problem)):
        mark = opened  # PyYAML only notices the mistake further below
    return mark.line if mark else None


def opening_line(error: yaml.MarkedYAMLError) -> int | None:
    """Return the line of a bracket that is not closed, if it differs from `line_of(error)`."""
    opened = error.context_mark
    if opened is None or not re.search("expected ','", str(error.problem)):
        return None
    return opened.line if opened.line != line_of(error) else None
