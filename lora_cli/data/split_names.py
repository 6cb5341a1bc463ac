"""Recognise names of splits in file and folder names: `train`, `test_set`, `val2`."""

from __future__ import annotations

import re
from collections.abc import Collection

SPLITS = ("train", "validation", "test")
SPLIT_FILES = {
    "train": r"train(ing)?",
    "validation": r"(validation|valid|val|dev)",
    "test": r"(test|eval)",
}


def names_split(part: str, splits: Collection[str] = SPLITS) -> bool:
    """Return whether a part of a path names one of the splits."""
    patterns = (SPLIT_FILES.get(split, re.escape(split.lower())) for split in splits)
    return any(re.search(rf"(^|[^a-z]){pattern}([^a-z]|$)", part.lower()) for pattern in patterns)
