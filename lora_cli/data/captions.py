"""Captions of pictures: how their tags change places."""

from __future__ import annotations

import numpy as np


def tags_of(caption: str) -> list[str]:
    """Return the tags of a caption, which stand between commas."""
    return [tag.strip() for tag in caption.split(",") if tag.strip()]


def shuffled(caption: str, keep: int, rng: np.random.Generator) -> str:
    """Return a caption whose tags stand in another order, but for the first `keep`."""
    tags = tags_of(caption)
    rest = tags[keep:]
    return ", ".join([*tags[:keep], *(rest[i] for i in rng.permutation(len(rest)))])
