"""What a user should know of the pictures of a split: animations, transparent parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_cli.data.load_rows import Rows
from lora_cli.data.pictures import PictureFacts
from lora_cli.errors import counted

READS = {
    "is_animated": "several pictures in one file, of which the first is read",
    "is_transparent": "transparent parts, which are read as white",
}
FEATURES = dict.fromkeys(READS, "bool")
"""The types of these facts in an example."""


def odd_facts(facts: PictureFacts) -> dict[str, bool]:
    """Return the facts of a picture that an example keeps."""
    return {"is_animated": facts.is_animated, "is_transparent": facts.is_transparent}


def odd_pictures(name: str, rows: Rows, examples: Any) -> str | None:
    """Return a warning of pictures that are animated, or have transparent parts.

    Args:
        name: What the rows are called.
        rows: The rows.
        examples: Of the rows: a data set, or a list.
    """
    said = []
    for key, what in READS.items():
        positions = where(examples, key)
        found = list(dict.fromkeys(int(examples[i]["row"]) for i in positions))
        if found:
            have = "has" if len(found) == 1 else "have"
            place = rows.place(found[0])
            said.append(f"{counted(len(found), f'{name} row')} {have} {what}: {place}")
    return "; ".join(said) or None


def where(examples: Any, key: str) -> list[int]:
    """Return the positions of the examples in which a key is not false, nor 0."""
    if hasattr(examples, "data"):
        values = examples.data.column(key).to_numpy()
    else:
        values = [example[key] for example in examples]
    return [int(i) for i in np.flatnonzero(values)]
