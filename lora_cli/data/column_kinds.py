"""Detect the kind of a column: text, categories, numbers, binary, conversations, and so on."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_cli.data.cell_values import (
    FORMS,
    PLAIN,
    NumberForm,
    half_width,
    number_form,
    read_number,
    split_labels,
)
from lora_cli.data.cell_values import binary_value as parse_binary
from lora_cli.data.chat_formats import is_pair
from lora_cli.data.label_lists import listed_labels, read_nested
from lora_cli.data.media import LEAST_ENCODED, decode_base64_media

URL = re.compile(r"(https?://|www\.)\S+$", re.IGNORECASE)
DATE = re.compile(
    r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})"
    r"([T ]\d{1,2}:\d{2}\S*( [AP]M)?)?$"
)
ID_NAME = re.compile(
    r"(?i:(.*[_\W])?(id|ids|idx|index|uuid|guid|key|hash|row|no|nr))|.*[a-z](Id|ID)"
)
ID_VALUE = re.compile(r"[A-Za-z]*[-_#]?\d+|[0-9a-fA-F]{8}-[0-9a-fA-F-]{20,}|[0-9a-f]{16,}")
CLASS_ID = re.compile(r"(?i)(label|class|target)[ _]?(id|idx|index|no)")
GROUP_NAME = re.compile(
    r"(?i)(.*[_\W])?(customer|client|user|author|conversation|session|thread|patient|document|doc|"
    r"dialog(ue)?|speaker|ticket|account|product|group|family)s?([_ ]?(id|name|no|nr|key))?"
)
TOKEN_OR_TAG = re.compile(r"<\|[^<>|]+\|>|</?\w+>")  # a token of a tokenizer, or of HTML
CONVERSATION_NAME = re.compile(
    r"(?i)conversations?|conv|messages|dialog(ue)?s?|chats?|turns|rounds|talks?|utterances"
)
FILE_NAME = re.compile(
    r"(?i)\S[^\n]*\.(?P<kind>wav|mp3|flac|ogg|opus|m4a|png|jpe?g|gif|bmp|tiff?|webp|mp4|avi)"
)
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation",
    "validation": "validation", "dev": "validation", "test": "test", "testing": "test",
    "eval": "test",
}  # fmt: skip
NEARLY_NUMBER = re.compile(r"\d")
CONVERSATIONS = ("openai", "sharegpt", "pairs")  # column kinds
MISSING = re.compile(r"(?i)nan|n/?a|null|none|nil|missing|inf(inity)?|[-?.*\u2013\u2014]+|#\S+")
MOSTLY = 0.9  # minimum share of numbers in a number column
MAX_CLASSES = 20  # distinct whole numbers that may still be class names
SEPARATORS = (";", "|", ",", "、", "・", "·", "+", "/", "&", "\n", "\u3000", " ")
# words that may also occur inside a label: every part must be a label elsewhere in the column
CONJUNCTIONS = ("と", "および", "及び", "和", " and ", " und ", " et ", " y ", " - ")


@dataclass(frozen=True)
class Column:
    """A column and what its values are.

    Args:
        name: Name in the file.
        kind: `blank`, `url`, `date`, `file` (audio or images), `split` (train, dev, test),
            `id`, `binary`, `number`, `category`, `text`, `list` (of short texts), `openai`,
            `sharegpt`, `pairs` or `other` (objects, and lists of them).
        count: Number of rows in which the column is not blank.
        counts: Number of occurrences of each value, as the label it would be; for `list`, of each
            item.
        characters: Mean length of a value in characters.
        words: Mean number of words per value.
        has_fractions: Whether any number is not whole.
        separator: Separator of the labels in a value; None if a value is one label.
        numbers: How the numbers are written.
        strays: Cells of a number column that are not numbers, as (row number from 1, text).
    """

    name: str
    kind: str
    count: int
    counts: Counter[str]
    characters: float = 0.0
    words: float = 0.0
    has_fractions: bool = False
    separator: str | None = None
    numbers: NumberForm = PLAIN
    strays: tuple[tuple[int, str], ...] = ()

    @property
    def rows_per_value(self) -> float:
        """Mean number of rows that share a value."""
        return self.counts.total() / max(len(self.counts), 1)

    @property
    def is_id_by_name(self) -> bool:
        """Whether the name is one of an ID column."""
        return ID_NAME.fullmatch(self.name) is not None


def label_text(value: Any) -> str:
    """Return a value as the label that the task would read."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def binary_value(value: Any) -> int | None:
    """Return a value of a binary column as 0 or 1; None if it is blank or not binary."""
    if is_blank(value):
        return None
    return parse_binary(value)


def is_blank(value: Any) -> bool:
    """Return whether a value is missing: None, NaN or whitespace."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def describe_column(name: str, rows: Sequence[dict[str, Any]], delimiter: str = ",") -> Column:
    """Detect the kind of a column, and collect statistics of its values.

    Args:
        name: Name of the column.
        rows: The rows of the file.
        delimiter: The delimiter of the file's columns.
    """
    values = [value for row in rows if not is_blank(value := row.get(name))]
    if not values:
        return Column(name, "blank", 0, Counter())
    if any(isinstance(value, list | dict) for value in values):
        return _list_column(name, values)
    if (form := conversation_form(name, values)) is not None:
        return Column(name, form, len(values), Counter())
    lists = [listed_labels(value) for value in values]
    if all(items is not None for items in lists) and any(lists):
        return _list_column(name, lists)
    texts = [label_text(value) for value in values]
    counts = Counter(texts)
    characters = sum(map(len, texts)) / len(texts)
    words = sum(len(text.split()) for text in texts) / len(texts)
    # values that the file stores as numbers need no parsing
    strings = [value for value in values if isinstance(value, str)]
    numbers = number_form(strings, delimiter) if strings else PLAIN
    if numbers is None and (strays := _strays(name, rows, delimiter)):
        number_rows = set(range(1, len(rows) + 1)) - {number for number, _ in strays}
        column = describe_column(
            name, [rows[number - 1] for number in sorted(number_rows)], delimiter
        )
        return replace(column, strays=strays)
    kind = _kind(name, texts, counts, words, numbers)
    if kind == "number" and numbers != PLAIN and _are_class_id_lists(counts):
        kind = "category"  # `2,14` is a list of two class IDs
    column = Column(
        name,
        kind,
        len(values),
        counts,
        characters,
        words,
        kind == "number" and any(not as_number(text, numbers).is_integer() for text in texts),
        numbers=numbers or PLAIN,
    )
    separator = _separator(column) if kind in ("category", "text", "id") else None
    if separator is None:
        return column
    parts = Counter(part for text in texts for part in split_labels(text, separator))
    return Column(name, "list", len(values), parts, characters, words, separator=separator)


def _kind(
    name: str,
    texts: list[str],
    counts: Counter[str],
    words: float,
    numbers: NumberForm | None,
) -> str:
    """Return the kind of a column of single values."""

    def nearly_all(test: Any) -> bool:
        return sum(bool(test(text)) for text in texts) >= 0.95 * len(texts)

    if nearly_all(URL.match):
        return "url"
    if nearly_all(DATE.match):
        return "date"
    if nearly_all(FILE_NAME.fullmatch) or (
        len(texts[0]) >= LEAST_ENCODED and nearly_all(decode_base64_media)
    ):
        return "file"
    splits = [SPLIT_NAMES.get(text.lower()) for text in counts]
    if None not in splits and "train" in splits and len(set(splits)) > 1:
        return "split"
    if all(parse_binary(text) is not None for text in counts):
        return "binary"
    is_unique = len(counts) == len(texts) and len(texts) > 1
    repeats = len(counts) * 5 <= len(texts) and CLASS_ID.fullmatch(name) is not None
    named_id = ID_NAME.fullmatch(name) is not None and not repeats
    if nearly_all(ID_VALUE.fullmatch) and (
        named_id or (is_unique and not all(map(_is_small, counts)))
    ):
        return "id"
    if numbers is not None and all(_is_number(text, numbers) for text in texts):
        are_whole = all(text.lstrip("-").isdecimal() for text in texts)
        return "id" if is_unique and are_whole and _numbers_rows(texts) else "number"
    if named_id and words < 2:
        return "id"
    if len(counts) * 2 <= len(texts) and words <= 6 and max(map(len, counts)) <= 80:
        return "category"
    return "text" if _is_natural(texts, words) else "category"


def _are_class_id_lists(counts: Counter[str]) -> bool:
    """Return whether values such as `2,14` and `27` are lists of class IDs, not decimal numbers.

    In decimal numbers, the digits after the comma rarely also occur before one, and often begin
    with a zero.
    """
    lists = [[part.strip() for part in value.split(",")] for value in counts]
    parts = {part for ids in lists for part in ids}
    if not all(part.isdecimal() and (part == "0" or part[0] != "0") for part in parts):
        return False
    single = {ids[0] for ids in lists if len(ids) == 1}
    first = {ids[0] for ids in lists if ids[1:]}
    later = {part for ids in lists for part in ids[1:]}
    overlap = len(first & later) >= 0.7 * len(first | later)
    return (len(later) > 2 and first | later <= single) or (len(later) > 4 and overlap)


def _strays(
    name: str, rows: Sequence[dict[str, Any]], delimiter: str
) -> tuple[tuple[int, str], ...]:
    """Return the cells of a number column that are not numbers; empty for any other column.

    A few names among small whole numbers may be labels: `1`, `2`, `3` and `unknown`.
    """
    cells = [(i, label_text(row[name])) for i, row in enumerate(rows, 1) if name in row]
    cells = [(i, text) for i, text in cells if not is_blank(text)]
    plausible = [(i, text) for i, text in cells if NEARLY_NUMBER.search(half_width(text))]
    if len(plausible) < MOSTLY * len(cells):  # skips the slow part for most text columns
        return ()
    strays = [
        (i, text)
        for i, text in cells
        if all(read_number(text, form) is None for form in (PLAIN, *FORMS))
    ]
    if not strays or len(strays) > (1 - MOSTLY) * len(cells) or len(cells) - len(strays) < 5:
        return ()
    stray_rows = {i for i, _ in strays}
    form = number_form([text for i, text in cells if i not in stray_rows], delimiter)
    if form is None:
        return ()
    numbers = [as_number(text, form) for i, text in cells if i not in stray_rows]
    is_measured = len(set(numbers)) > MAX_CLASSES or not all(map(float.is_integer, numbers))
    look_like_numbers = all(
        MISSING.fullmatch(text) or NEARLY_NUMBER.search(text) for _, text in strays
    )
    unlabelled = all(text == "-" for _, text in strays)  # as in SNLI: rows without a label
    return tuple(strays) if is_measured or (look_like_numbers and not unlabelled) else ()


def as_number(text: str, form: NumberForm | None = None) -> float:
    """Parse a number in the column's form, or as Python writes it, with a decimal point."""
    value = read_number(text, form or PLAIN)
    return float(text) if value is None else value


def _is_number(text: str, form: NumberForm) -> bool:
    """Return whether a text is a number in the column's form or as Python writes it."""
    return read_number(text, form) is not None or (form != PLAIN and read_number(text) is not None)


def _is_small(text: str) -> bool:
    return len(text) <= 2


def _numbers_rows(texts: list[str]) -> bool:
    """Return whether distinct whole numbers merely number the rows."""
    numbers = [int(text) for text in texts]
    return all(b == a + 1 for a, b in itertools.pairwise(numbers)) or (
        len(numbers) > 50 and min(numbers) >= 0
    )


def _is_natural(texts: list[str], words: float) -> bool:
    """Return whether the values are natural language, in words or in a script without spaces."""
    sample = "".join(texts[:500])
    letter_share = sum(character.isalpha() or character.isspace() for character in sample) / max(
        len(sample), 1
    )
    wide_share = sum(character > "\u2e7f" for character in sample) / max(len(sample), 1)
    return letter_share > 0.5 and (
        words >= 1.5 or (wide_share > 0.3 and len(sample) / len(texts[:500]) > 4)
    )


# ------------------------------------------------------------------------------- several values


def _list_column(name: str, values: list[Any]) -> Column:
    form = conversation_form(name, values)
    if form is not None:
        return Column(name, form, len(values), Counter())
    items = [item for value in values if isinstance(value, list) for item in value]
    are_flat_lists = all(isinstance(value, list) for value in values) and not any(
        isinstance(item, list | dict) or is_blank(item) for item in items
    )
    if not are_flat_lists or not items:
        return Column(name, "other", len(values), Counter())
    return Column(name, "list", len(values), Counter(map(label_text, items)))


def conversation_form(name: str, values: Sequence[Any]) -> str | None:
    """Return `openai`, `sharegpt` or `pairs` if nearly all values are conversations; else None.

    Pairs also need a column name such as `dialogue`: they may be unrelated questions.
    """
    forms = Counter(_conversation_form_of(value) for value in values)
    form, times = forms.most_common(1)[0]
    if form is None or times < 0.9 * len(values):
        return None
    return form if form != "pairs" or CONVERSATION_NAME.fullmatch(name) else None


def _conversation_form_of(value: Any) -> str | None:
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return None
        value = read_nested(value.strip())
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    turn = value[0]
    if "role" in turn and "content" in turn:
        return "openai"
    if {"from", "role"} & {*turn} and "value" in turn:
        return "sharegpt"
    return "pairs" if all(map(is_pair, value)) else None


def _separator(column: Column) -> str | None:
    """Return the separator of a multi-label column; None if each value is one label.

    The parts of multi-label values recur in other combinations: `Action;Drama`, `Drama`,
    `Drama;War`. The parts of `New York` do not recur, and prose has too many different parts. If
    every part is also the only label of another row, one row with several labels is enough.
    """
    if any(
        TOKEN_OR_TAG.search(value) for value in column.counts
    ):  # `Yes<|endoftext|>` is one label
        return None
    for separator in (*SEPARATORS[:-1], *CONJUNCTIONS):
        divisions = [split_labels(value, separator) for value in column.counts]
        multiple = [division for division in divisions if len(division) > 1]
        single = column.counts.keys() - {value for value in column.counts if separator in value}
        if multiple and all(part in single for division in multiple for part in division):
            return separator
    for separator in SEPARATORS:
        if separator == " " and not re.fullmatch(r"(?i)(labels|tags|topics|genres)", column.name):
            continue
        parts: Counter[str] = Counter()  # number of distinct values that contain each part
        n_multiple = 0
        for value, times in column.counts.items():
            labels = split_labels(value, separator)
            parts.update(set(labels))
            n_multiple += times if len(labels) > 1 else 0
            if max((len(part.split()) for part in labels), default=0) > 3:
                break
        else:
            recurring = sum(times > 1 for times in parts.values())
            are_frequent = n_multiple >= max(2, column.count / 20)
            are_few = 2 <= len(parts) <= max(4, column.count / 3)
            if are_frequent and are_few and recurring >= max(2, len(parts) / 2):
                return separator
    return None
