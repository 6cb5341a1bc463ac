"""Text files that are labelled by the name of their folder, or by words in each line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

FASTTEXT = "__label__"
LABEL_COLUMN = "label"
MARKED_WORD = re.compile(rf"(?<!\S){FASTTEXT}(\S*)\s*")
MIN_LINES = 20
ROWS_PER_LABEL = 5
COMMON_LINES = 3  # minimum number of lines for a label that is not rare


def split_label(line: str, label_from: str) -> tuple[str, str]:
    """Split a line into its label and its text.

    Args:
        line: The line, without its line end.
        label_from: `first_word` or `fasttext`, as in `data.format.label_from`. Multiple labels of a
            line, which only `fasttext` supports, are joined by spaces.
    """
    if label_from == "fasttext":
        labels = [match[1] for match in MARKED_WORD.finditer(line)]
        return " ".join(filter(None, labels)), MARKED_WORD.sub("", line).strip()
    label, _, text = line.strip().partition(" ")
    return label, text.strip()


def label_source(lines: Sequence[str]) -> str | None:
    """Return where the labels of lines are: `fasttext`, `first_word`, or None without labels.

    The first words of prose are diverse, and half of them occur once. Labels are few and common.
    """
    filled = [line for line in lines if line.strip()]
    if sum(line.startswith(FASTTEXT) for line in filled) > 0.95 * len(filled):
        return "fasttext" if filled else None
    if len(filled) < MIN_LINES or any("\t" in line for line in filled):
        return None
    pairs = [split_label(line, "first_word") for line in filled]
    counts = Counter(label for label, _ in pairs)
    if not 2 <= len(counts) <= len(filled) / ROWS_PER_LABEL or not all(text for _, text in pairs):
        return None
    common = sum(times >= COMMON_LINES for times in counts.values())
    are_plain = all(re.fullmatch(r"[\w:/&+-]*\w", label) for label in counts)
    text_words = {word for _, text in pairs for word in text.split()}
    # unlike labels, speaker names and ordinary words also occur inside the texts
    are_distinct = sum(label not in text_words for label in counts) >= 0.9 * len(counts)
    are_labels = (
        are_plain and common >= 0.9 * len(counts) and (are_distinct or _are_numbers(counts))
    )
    return "first_word" if are_labels else None


def _are_numbers(labels: Iterable[str]) -> bool:
    return all(label.isdecimal() and len(label) < 3 for label in labels)


def class_files(files: Sequence[Path]) -> list[Path]:
    """Return the files whose folder is a class, which contains files but no folders.

    Args:
        files: Paths relative to the data folder.
    """
    holding = {folder for file in files for folder in file.parent.parents}
    return [file for file in files if file.parent not in holding and len(file.parts) > 1]
