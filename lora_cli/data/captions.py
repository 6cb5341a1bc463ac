"""Shuffle the tags of image captions."""

from __future__ import annotations

import numpy as np


def tags_of(caption: str) -> list[str]:
    """Return the comma-separated tags of a caption."""
    return [tag.strip() for tag in caption.split(",") if tag.strip()]


def shuffle_tags(caption: str, keep: int, rng: np.random.Generator) -> str:
    """Return a caption with its tags in random order, except for the first `keep`."""
    tags = tags_of(caption)
    movable = tags[keep:]
    return ", ".join([*tags[:keep], *(movable[i] for i in rng.permutation(len(movable)))])
