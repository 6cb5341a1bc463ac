"""Text files that hold their labels themselves: as a folder's name, or as words of a line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

FASTTEXT = "__label__"
LABEL_COLUMN = "label"
MARKED_WORD = re.compile(rf"(?<!\S){FASTTEXT}(\S*)\s*")
FEWEST_LINES = 20
ROWS_PER_LABEL = 5
COMMON = 3  # lines of a label that is not rare


def divide(line: str, label_from: str) -> tuple[str, str]:
    """Return the label and the text of a line.

    Args:
        line: The line, without its end.
        label_from: `first_word` or `fasttext`, as in `data.format.label_from`. Several labels of
            a line, which only `fasttext` has, are joined by a space.
    """
    if label_from == "fasttext":
        labels = [match[1] for match in MARKED_WORD.finditer(line)]
        return " ".join(filter(None, labels)), MARKED_WORD.sub("", line).strip()
    label, _, text = line.strip().partition(" ")
    return label, text.strip()


def label_source(lines: Sequence[str]) -> str | None:
    """Return where the labels of lines are: `fasttext`, `first_word`, or None if they have none.

    The first words of prose are many, and half of them occur once; labels are few, and common.
    """
    filled = [line for line in lines if line.strip()]
    if sum(line.startswith(FASTTEXT) for line in filled) > 0.95 * len(filled):
        return "fasttext" if filled else None
    if len(filled) < FEWEST_LINES or any("\t" in line for line in filled):
        return None
    pairs = [divide(line, "first_word") for line in filled]
    counts = Counter(label for label, _ in pairs)
    if not 2 <= len(counts) <= len(filled) / ROWS_PER_LABEL or not all(text for _, text in pairs):
        return None
    common = sum(times >= COMMON for times in counts.values())
    plain = all(re.fullmatch(r"[\w:/&+-]*\w", label) for label in counts)
    inside = {word for _, text in pairs for word in text.split()}
    # names of speakers and words of prose are found inside the texts too
    own = sum(label not in inside for label in counts) >= 0.9 * len(counts)
    found = plain and common >= 0.9 * len(counts) and (own or _are_numbers(counts))
    return "first_word" if found else None


def _are_numbers(labels: Iterable[str]) -> bool:
    return all(label.isdecimal() and len(label) < 3 for label in labels)


def class_files(files: Sequence[Path]) -> list[Path]:
    """Return the files whose folder names their class: it holds files, and no folders.

    Args:
        files: Paths relative to the folder of the data.
    """
    holding = {folder for file in files for folder in file.parent.parents}
    return [file for file in files if file.parent not in holding and len(file.parts) > 1]
