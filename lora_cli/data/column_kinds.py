"""What a column holds: text, a category, numbers, 0 and 1, a conversation, or nothing to learn."""

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
    divided,
    half_width,
    number_form,
    read_number,
)
from lora_cli.data.cell_values import flag as value_of_flag
from lora_cli.data.chat_formats import is_pair
from lora_cli.data.label_lists import listed_labels, read_nested
from lora_cli.data.media import LEAST_ENCODED, decoded

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
MARK = re.compile(r"<\|[^<>|]+\|>|</?\w+>")  # a token of a tokenizer, or of HTML
TALK = re.compile(r"(?i)conversations?|conv|messages|dialog(ue)?s?|chats?|turns|rounds|talks?")
FILE_NAME = re.compile(
    r"(?i)\S[^\n]*\.(?P<kind>wav|mp3|flac|ogg|opus|m4a|png|jpe?g|gif|bmp|tiff?|webp|mp4|avi)"
)
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation",
    "validation": "validation", "dev": "validation", "test": "test", "testing": "test",
    "eval": "test",
}  # fmt: skip
NEARLY_NUMBER = re.compile(r"\d")
CONVERSATIONS = ("openai", "sharegpt", "pairs")  # kinds of columns
MISSING = re.compile(r"(?i)nan|n/?a|null|none|nil|missing|inf(inity)?|[-?.*\u2013\u2014]+|#\S+")
MOSTLY = 0.9  # share of a column's cells that makes it one of numbers
MOST_CLASSES = 20  # different whole numbers that may be the names of classes
SEPARATORS = (";", "|", ",", "、", "・", "·", "+", "/", "&", "\n", "\u3000", " ")
# words that may be a part of one label too, so that all that they divide has to be a label
BETWEEN = ("と", "および", "及び", "和", " and ", " und ", " et ", " y ", " - ")


@dataclass(frozen=True)
class Column:
    """A column, as its values show it.

    Args:
        name: As in the file.
        kind: `blank`, `url`, `date`, `file` (of sound or pictures), `split` (train, dev, test),
            `id`, `binary`, `number`, `category`, `text`, `list` (of short texts), `openai`,
            `sharegpt`, `pairs` or `other` (objects, and lists of them).
        count: Rows in which it is not blank.
        counts: How often each value stands, as the label it would be; `list` counts the items.
        characters: Mean length of a value.
        words: Mean number of words of a value.
        has_fractions: Some number is not whole.
        separator: What divides the labels in a value, where there are several.
        numbers: How its numbers are written.
        strays: Of a column of numbers, the cells that are none: (row, from 1, and its text).
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
        """Whether the name says that the values name things."""
        return ID_NAME.fullmatch(self.name) is not None


def label_text(value: Any) -> str:
    """Return a value as the label that the task would read."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def flag(value: Any) -> int | None:
    """Return 0 or 1 for what a column of 0 and 1 holds, or None."""
    if is_blank(value):
        return None
    return value_of_flag(value)


def is_blank(value: Any) -> bool:
    """Return whether nothing stands there."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def describe(name: str, rows: Sequence[dict[str, Any]], delimiter: str = ",") -> Column:
    """Return what a column holds.

    Args:
        name: Of the column.
        rows: The rows of the file.
        delimiter: What divides the columns of the file.
    """
    values = [value for row in rows if not is_blank(value := row.get(name))]
    if not values:
        return Column(name, "blank", 0, Counter())
    if any(isinstance(value, list | dict) for value in values):
        return _of_lists(name, values)
    if (form := conversation_form(name, values)) is not None:
        return Column(name, form, len(values), Counter())
    lists = [listed_labels(value) for value in values]
    if all(items is not None for items in lists) and any(lists):
        return _of_lists(name, lists)
    texts = [label_text(value) for value in values]
    counts = Counter(texts)
    characters = sum(map(len, texts)) / len(texts)
    words = sum(len(text.split()) for text in texts) / len(texts)
    # a number that is one in the file needs no reading
    written = [value for value in values if isinstance(value, str)]
    numbers = number_form(written, delimiter) if written else PLAIN
    if numbers is None and (strays := _strays(name, rows, delimiter)):
        rest = set(range(1, len(rows) + 1)) - {number for number, _ in strays}
        column = describe(name, [rows[number - 1] for number in sorted(rest)], delimiter)
        return replace(column, strays=strays)
    kind = _kind(name, texts, counts, words, numbers)
    if kind == "number" and numbers != PLAIN and _are_ids(counts):
        kind = "category"  # `2,14` are two labels by their numbers
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
    parts = Counter(part for text in texts for part in divided(text, separator))
    return Column(name, "list", len(values), parts, characters, words, separator=separator)


def _kind(
    name: str,
    texts: list[str],
    counts: Counter[str],
    words: float,
    numbers: NumberForm | None,
) -> str:
    """Return the kind of a column of single values."""

    def most(test: Any) -> bool:
        return sum(bool(test(text)) for text in texts) >= 0.95 * len(texts)

    if most(URL.match):
        return "url"
    if most(DATE.match):
        return "date"
    if most(FILE_NAME.fullmatch) or (len(texts[0]) >= LEAST_ENCODED and most(decoded)):
        return "file"
    splits = [SPLIT_NAMES.get(text.lower()) for text in counts]
    if None not in splits and "train" in splits and len(set(splits)) > 1:
        return "split"
    if all(value_of_flag(text) is not None for text in counts):
        return "binary"
    is_unique = len(counts) == len(texts) and len(texts) > 1
    repeats = len(counts) * 5 <= len(texts) and CLASS_ID.fullmatch(name) is not None
    named_id = ID_NAME.fullmatch(name) is not None and not repeats
    if most(ID_VALUE.fullmatch) and (named_id or (is_unique and not all(map(_is_small, counts)))):
        return "id"
    if numbers is not None and all(_reads(text, numbers) for text in texts):
        whole = all(text.lstrip("-").isdecimal() for text in texts)
        return "id" if is_unique and whole and _is_count(texts) else "number"
    if named_id and words < 2:
        return "id"
    if len(counts) * 2 <= len(texts) and words <= 6 and max(map(len, counts)) <= 80:
        return "category"
    return "text" if _is_natural(texts, words) else "category"


def _are_ids(counts: Counter[str]) -> bool:
    """Return whether values such as `2,14` and `27` are lists of the numbers of labels.

    A fraction differs: what stands behind its comma does not stand before the others, and begins
    with zeros as often as not.
    """
    lists = [[part.strip() for part in value.split(",")] for value in counts]
    parts = {part for several in lists for part in several}
    if not all(part.isdecimal() and (part == "0" or part[0] != "0") for part in parts):
        return False
    alone = {several[0] for several in lists if len(several) == 1}
    first = {several[0] for several in lists if several[1:]}
    others = {part for several in lists for part in several[1:]}
    is_same = len(first & others) >= 0.7 * len(first | others)
    return (len(others) > 2 and first | others <= alone) or (len(others) > 4 and is_same)


def _strays(
    name: str, rows: Sequence[dict[str, Any]], delimiter: str
) -> tuple[tuple[int, str], ...]:
    """Return the cells of a column of numbers that are none, or nothing if it is no such column.

    Few names among small whole numbers may be labels: `1`, `2`, `3` and `unknown`.
    """
    cells = [(i, label_text(row[name])) for i, row in enumerate(rows, 1) if name in row]
    cells = [(i, text) for i, text in cells if not is_blank(text)]
    plausible = [(i, text) for i, text in cells if NEARLY_NUMBER.search(half_width(text))]
    if len(plausible) < MOSTLY * len(cells):  # which spares most columns of text the rest
        return ()
    found = [
        (i, text)
        for i, text in cells
        if all(read_number(text, form) is None for form in (PLAIN, *FORMS))
    ]
    if not found or len(found) > (1 - MOSTLY) * len(cells) or len(cells) - len(found) < 5:
        return ()
    bad = {i for i, _ in found}
    form = number_form([text for i, text in cells if i not in bad], delimiter)
    if form is None:
        return ()
    numbers = [as_number(text, form) for i, text in cells if i not in bad]
    is_measured = len(set(numbers)) > MOST_CLASSES or not all(map(float.is_integer, numbers))
    marks = all(MISSING.fullmatch(text) or NEARLY_NUMBER.search(text) for _, text in found)
    unlabelled = all(text == "-" for _, text in found)  # as in SNLI: rows without a label
    return tuple(found) if is_measured or (marks and not unlabelled) else ()


def as_number(text: str, form: NumberForm | None = None) -> float:
    """Return the number that a text is; one that Python wrote has a dot whatever the form."""
    value = read_number(text, form or PLAIN)
    return float(text) if value is None else value


def _reads(text: str, form: NumberForm) -> bool:
    """Return whether a text is a number, as the column has them or as Python writes them."""
    return read_number(text, form) is not None or (form != PLAIN and read_number(text) is not None)


def _is_small(text: str) -> bool:
    return len(text) <= 2


def _is_count(texts: list[str]) -> bool:
    """Return whether whole numbers count the rows."""
    numbers = [int(text) for text in texts]
    return all(b == a + 1 for a, b in itertools.pairwise(numbers)) or (
        len(numbers) > 50 and min(numbers) >= 0
    )


def _is_natural(texts: list[str], words: float) -> bool:
    """Return whether the values are what people write: words, or letters that need no spaces."""
    sample = "".join(texts[:500])
    letters = sum(letter.isalpha() or letter.isspace() for letter in sample) / max(len(sample), 1)
    wide = sum(letter > "\u2e7f" for letter in sample) / max(len(sample), 1)
    return letters > 0.5 and (words >= 1.5 or (wide > 0.3 and len(sample) / len(texts[:500]) > 4))


# ------------------------------------------------------------------------------- several values


def _of_lists(name: str, values: list[Any]) -> Column:
    form = conversation_form(name, values)
    if form is not None:
        return Column(name, form, len(values), Counter())
    items = [item for value in values if isinstance(value, list) for item in value]
    plain = all(isinstance(value, list) for value in values) and not any(
        isinstance(item, list | dict) or is_blank(item) for item in items
    )
    if not plain or not items:
        return Column(name, "other", len(values), Counter())
    return Column(name, "list", len(values), Counter(map(label_text, items)))


def conversation_form(name: str, values: Sequence[Any]) -> str | None:
    """Return `openai`, `sharegpt` or `pairs` where nearly all are conversations, else None.

    Pairs are taken for one by the name of their column: they can also be questions apart.
    """
    forms = Counter(_form(value) for value in values)
    form, times = forms.most_common(1)[0]
    if form is None or times < 0.9 * len(values):
        return None
    return form if form != "pairs" or TALK.fullmatch(name) else None


def _form(value: Any) -> str | None:
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
    """Return what divides the labels of a value, if its parts recur in other company.

    `Action;Drama`, `Drama`, `Drama;War`: three values of few parts. In `New York`, the parts recur
    nowhere, and in prose they are too many. Where each part is a label of other rows by itself, one
    row with several labels is enough.
    """
    if any(MARK.search(value) for value in column.counts):  # `Yes<|endoftext|>` is one label
        return None
    for separator in (*SEPARATORS[:-1], *BETWEEN):
        divisions = [divided(value, separator) for value in column.counts]
        composed = [division for division in divisions if len(division) > 1]
        alone = column.counts.keys() - {value for value in column.counts if separator in value}
        if composed and all(part in alone for division in composed for part in division):
            return separator
    for separator in SEPARATORS:
        if separator == " " and not re.fullmatch(r"(?i)(labels|tags|topics|genres)", column.name):
            continue
        parts: Counter[str] = Counter()  # in how many different values each stands
        several = 0
        for value, times in column.counts.items():
            inside = divided(value, separator)
            parts.update(set(inside))
            several += times if len(inside) > 1 else 0
            if max((len(part.split()) for part in inside), default=0) > 3:
                break
        else:
            recurring = sum(times > 1 for times in parts.values())
            enough = several >= max(2, column.count / 20)
            few = 2 <= len(parts) <= max(4, column.count / 3)
            if enough and few and recurring >= max(2, len(parts) / 2):
                return separator
    return None
