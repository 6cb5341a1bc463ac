"""Read CoNLL files: one word with its tags per line, a blank line between sentences.

    -DOCSTART- -X- -X- O

    EU      NNP  B-NP  B-ORG
    rejects VBZ  B-VP  O

Columns are separated by tabs or spaces. The first is the word and the last its tag, unless
`data.format.columns` says otherwise; a row has one list per column. Comments, document markers
(`-DOCSTART-`), and CoNLL-U's multiword ranges (`1-2`) and empty nodes (`1.1`) are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_cli.data.entity_tags import OUTSIDE, TAG
from lora_cli.data.text_lines import RawRow, byte_error, read_lines
from lora_cli.errors import LoraError, counted, printable
from lora_cli.recipe import FormatSpec

DOCUMENT = "-DOCSTART-"
COMMENT = re.compile(r"#\s+([\w.:-]+\s*=|newdoc\b|newpar\b|id\s+\S+\s+domain=)|#$")
MARK = re.compile(r"#+[ \t]")
SPACES = re.compile(r"[ \t]+")
TOKENS, TAGS = "tokens", "tags"
WORD_NAMES = ("word", "words", "token", "tokens", "form")
TAG_NAMES = ("tag", "tags", "label", "labels", "ner", "ner_tag", "ner_tags", "entity", "bio", "iob")
UNIVERSAL = ("id", TOKENS, "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
MIN_NUMBERED_WORDS = 3  # words in a sentence by which to tell whether the first column numbers them
MIN_LINES = 10  # needed to recognise a CoNLL file
TAGGED_SHARE = 0.95  # share of the lines that end with a tag


def read_conll(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    """Yield the sentences of a file, with one list per column.

    Raises:
        LoraError: If `data.format.columns` does not name as many columns as the file has.
    """
    reader: _Columns | None = None
    words: list[list[str]] = []
    first, error = 0, ""
    for number, line in read_lines(path, spec.encoding):
        text = line.strip(" \t\r\n\ufeff")
        if not text or text.startswith(DOCUMENT):
            if words or error:
                yield _row(reader, words, f"{path.name}:{first}", error)
            words, error = [], ""
            continue
        if reader is None:
            if _is_comment(text, is_word=_is_tag(SPACES.split(text)[-1])):
                continue
            reader = _Columns.of(text, spec, path)
            if _is_header(reader.split(text)):
                continue
        fields = reader.split(text)
        at_start = not words and not error
        is_part = (
            reader.universal and not fields[0].isdecimal()
        )  # a multiword range or an empty node
        if is_part or (at_start and _is_comment(text, is_word=len(fields) == reader.count)):
            continue
        first = number if at_start else first
        if encoding_fault := byte_error(text, spec.encoding):
            error = error or f"line {number}: {encoding_fault}"
        elif len(fields) != reader.count:
            expected = f"where there are {reader.count}"
            error = error or f"line {number} has {counted(len(fields), 'column')} {expected}"
        words.append(fields)
    if words or error:
        yield _row(reader, words, f"{path.name}:{first}", error)


def _row(reader: _Columns | None, words: list[list[str]], place: str, error: str) -> RawRow:
    if error or reader is None:
        return RawRow(None, place, error)
    reader.require_words([fields[0] for fields in words])
    columns = zip(*words, strict=True)
    return RawRow(dict(zip(reader.names, map(list, columns), strict=True)), place)


def _is_comment(text: str, is_word: bool) -> bool:
    """Return whether a line before a sentence's first word is a comment; `#` may be a word.

    Args:
        text: The line.
        is_word: Whether the line has the columns of a word.
    """
    has_mark = MARK.match(text) is not None and not is_word
    return has_mark or COMMENT.match(text) is not None


def _is_header(fields: Sequence[str]) -> bool:
    """Return whether the first line is a header, which a few CoNLL files have."""
    return fields[0].lower() in WORD_NAMES and fields[-1].lower() in TAG_NAMES


class _Columns:
    """How the lines of a file are split into columns, according to its first word line."""

    def __init__(
        self, has_tabs: bool, names: Sequence[str], universal: bool, path: Path, named: bool
    ) -> None:
        self.has_tabs, self.names, self.universal = has_tabs, list(names), universal
        self.path = path
        self.are_known = named or universal or len(self.names) < 3

    @property
    def count(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, text: str, spec: FormatSpec, path: Path) -> _Columns:
        has_tabs = "\t" in text
        fields = text.split("\t") if has_tabs else SPACES.split(text)
        universal = len(fields) == len(UNIVERSAL) and fields[0].partition("-")[0].isdecimal()
        names = list(UNIVERSAL) if universal else _default_names(len(fields))
        if spec.columns is not None:
            if len(spec.columns) != len(fields):
                what = f"`data.format.columns` names {counted(len(spec.columns), 'column')}, and "
                what += f"the file has {len(fields)}: `{printable(text, 60)}`"
                raise LoraError(what, str(path), "name them all, from left to right")
            names = list(spec.columns)
        return cls(has_tabs, names, universal, path, spec.columns is not None)

    def require_words(self, first: Sequence[str]) -> None:
        """Check that the first column of a sentence has the words, not their numbers.

        Raises:
            LoraError: If it numbers the words of the first sentence with enough words.
        """
        if self.are_known or len(first) < MIN_NUMBERED_WORDS:
            return
        self.are_known = True
        start = int(first[0]) if first[0] in ("0", "1") else None
        if start is not None and list(first) == [str(start + i) for i in range(len(first))]:
            names = ["id", TOKENS, *(f"column_{i}" for i in range(3, self.count)), TAGS]
            what = f"the first of {self.count} columns counts the words, and is taken for the words"
            hint = f"name the columns: `--set 'data.format.columns=[{', '.join(names)}]'`"
            raise LoraError(what, str(self.path), hint)

    def split(self, text: str) -> list[str]:
        """Split a line into fields: by spaces if it lacks the tabs of the file."""
        fields = [field.strip(" ") for field in text.split("\t")] if self.has_tabs else []
        return fields if len(fields) == self.count else self._split_by_spaces(text, fields)

    def _split_by_spaces(self, text: str, fields: list[str]) -> list[str]:
        spaced = SPACES.split(text)
        return spaced if len(spaced) == self.count or not fields else fields


def _default_names(count: int) -> list[str]:
    between = [f"column_{i}" for i in range(2, count)]
    return [TOKENS, *between, TAGS] if count > 1 else [TOKENS]


def is_conll(lines: Sequence[str]) -> bool:
    """Return whether lines look like CoNLL: nearly all end with a tag, and not all tags are O."""
    filled = [text for line in lines if (text := line.strip(" \t\r\n\ufeff"))]
    filled = [text for text in filled if not text.startswith(DOCUMENT)]
    fields = [SPACES.split(text) for text in filled]
    fields = [
        columns for columns in fields if not _is_comment(" ".join(columns), _is_tag(columns[-1]))
    ]
    tags = [columns[-1] for columns in fields if len(columns) > 1 and _is_tag(columns[-1])]
    return (
        len(fields) >= MIN_LINES and len(tags) >= TAGGED_SHARE * len(fields) and len(set(tags)) > 1
    )


def _is_tag(text: str) -> bool:
    return text == OUTSIDE or (len(text) < 60 and TAG.fullmatch(text) is not None)
