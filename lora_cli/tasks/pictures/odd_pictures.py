"""Warnings about unusual images: animations and transparency."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_cli.data.load_rows import Rows
from lora_cli.data.pictures import PictureFacts
from lora_cli.errors import counted

EFFECTS = {
    "is_animated": "several pictures in one file, of which the first is read",
    "is_transparent": "transparent parts, which are read as white",
}
ODD_FEATURES = dict.fromkeys(EFFECTS, "bool")
"""The types of `odd_facts` in an example."""


def odd_facts(facts: PictureFacts) -> dict[str, bool]:
    """Return the facts that `odd_pictures` needs, to be stored in an example."""
    return {"is_animated": facts.is_animated, "is_transparent": facts.is_transparent}


def odd_pictures(name: str, rows: Rows, examples: Any) -> str | None:
    """Return a warning about images that are animated or partly transparent, or None.

    Args:
        name: What the warning calls the rows.
        rows: The rows.
        examples: The rows' examples: a data set or a list.
    """
    warnings = []
    for key, effect in EFFECTS.items():
        positions = positions_where(examples, key)
        indices = list(dict.fromkeys(int(examples[i]["row"]) for i in positions))
        if indices:
            verb = "has" if len(indices) == 1 else "have"
            place = rows.place(indices[0])
            warnings.append(f"{counted(len(indices), f'{name} row')} {verb} {effect}: {place}")
    return "; ".join(warnings) or None


def positions_where(examples: Any, key: str) -> list[int]:
    """Return the positions of the examples in which a feature is true or nonzero."""
    if hasattr(examples, "data"):
        values = examples.data.column(key).to_numpy()
    else:
        values = [example[key] for example in examples]
    return [int(i) for i in np.flatnonzero(values)]
