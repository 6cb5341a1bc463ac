"""Files in the form of CoNLL: a word a line with its tags, a blank line between sentences.

    -DOCSTART- -X- -X- O

    EU      NNP  B-NP  B-ORG
    rejects VBZ  B-VP  O

The columns stand between tabs or spaces. The first is the word and the last its tag, unless
`data.format.columns` names them otherwise; a row has a list for each column. Lines of comments and
of documents (`-DOCSTART-`) are no words, nor are CoNLL-U's ranges (`1-2`) and empty nodes (`1.1`).
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
FEWEST_COUNTED = 3  # words of a sentence, where the first column may count them
FEWEST_LINES = 10  # by which such a file is recognised
MOSTLY = 0.95  # of its lines


def read_conll(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    """Yield the sentences of a file, a list for each column.

    Raises:
        LoraError: If `data.format.columns` names another number of columns than the file has.
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
            if _is_header(reader.divided(text)):
                continue
        fields = reader.divided(text)
        begins = not words and not error
        is_part = reader.universal and not fields[0].isdecimal()  # of words, or left out of a text
        if is_part or (begins and _is_comment(text, is_word=len(fields) == reader.count)):
            continue
        first = number if begins else first
        if bad := byte_error(text, spec.encoding):
            error = error or f"line {number}: {bad}"
        elif len(fields) != reader.count:
            wanted = f"where there are {reader.count}"
            error = error or f"line {number} has {counted(len(fields), 'column')} {wanted}"
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
        is_word: It has the columns of a word.
    """
    alone = MARK.match(text) is not None and not is_word
    return alone or COMMENT.match(text) is not None


def _is_header(fields: Sequence[str]) -> bool:
    """Return whether the first line names the columns, as a few such files have it."""
    return fields[0].lower() in WORD_NAMES and fields[-1].lower() in TAG_NAMES


class _Columns:
    """How the lines of a file are divided, by the first one that holds a word."""

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
        """Check by the first column of a sentence that it holds words, and does not count them.

        Raises:
            LoraError: If it does, in the first sentence of some words.
        """
        if self.are_known or len(first) < FEWEST_COUNTED:
            return
        self.are_known = True
        start = int(first[0]) if first[0] in ("0", "1") else None
        if start is not None and list(first) == [str(start + i) for i in range(len(first))]:
            names = ["id", TOKENS, *(f"column_{i}" for i in range(3, self.count)), TAGS]
            what = f"the first of {self.count} columns counts the words, and is taken for the words"
            hint = f"name the columns: `--set 'data.format.columns=[{', '.join(names)}]'`"
            raise LoraError(what, str(self.path), hint)

    def divided(self, text: str) -> list[str]:
        """Return the fields of a line; one that lacks the file's tabs may have spaces."""
        fields = [field.strip(" ") for field in text.split("\t")] if self.has_tabs else []
        return fields if len(fields) == self.count else self._by_spaces(text, fields)

    def _by_spaces(self, text: str, fields: list[str]) -> list[str]:
        spaced = SPACES.split(text)
        return spaced if len(spaced) == self.count or not fields else fields


def _default_names(count: int) -> list[str]:
    between = [f"column_{i}" for i in range(2, count)]
    return [TOKENS, *between, TAGS] if count > 1 else [TOKENS]


def is_conll(lines: Sequence[str]) -> bool:
    """Return whether lines are those of such a file: nearly all end with a tag, some are not O."""
    filled = [text for line in lines if (text := line.strip(" \t\r\n\ufeff"))]
    filled = [text for text in filled if not text.startswith(DOCUMENT)]
    fields = [SPACES.split(text) for text in filled]
    fields = [some for some in fields if not _is_comment(" ".join(some), _is_tag(some[-1]))]
    tags = [some[-1] for some in fields if len(some) > 1 and _is_tag(some[-1])]
    return len(fields) >= FEWEST_LINES and len(tags) >= MOSTLY * len(fields) and len(set(tags)) > 1


def _is_tag(text: str) -> bool:
    return text == OUTSIDE or (len(text) < 60 and TAG.fullmatch(text) is not None)
