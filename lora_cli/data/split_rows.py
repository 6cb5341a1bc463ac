"""Draw held-out rows so that no text is on both sides.

Rows are drawn in units: rows with the same text or the same group stay together. With `substring`,
a unit is a maximal text with all texts that it contains. SST-2 shows why this is needed: its train
split has the phrases of each sentence as separate rows, so about nine in ten rows of a random
sample occur word for word inside other rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_cli.characters import normalised, pairs_of_letters, words
from lora_cli.errors import LoraError, counted

Indices = NDArray[np.int64]
NO_ANSWER = "\0"  # stratum of rows that cannot be evaluated


def draw(
    texts: Sequence[str],
    fraction: float,
    seed: tuple[int, ...],
    disjoint: str | None = "exact",
    strata: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    location: str = "data.validation",
    answered: Sequence[bool] | None = None,
) -> tuple[Indices, Indices]:
    """Choose rows to hold out.

    Args:
        texts: Text of each row.
        fraction: Share of the rows to hold out.
        seed: Random seed; the same seed and rows give the same draw.
        disjoint: `exact`, `substring` or None, as in the recipe.
        strata: Stratum of each row; the proportions of strata are preserved.
        groups: Group of each row; a group is never on both sides.
        location: Location in the recipe, for errors.
        answered: Whether each row has a label, without which it cannot be evaluated. Rows without
            one are not held out, and do not count in the fraction.

    Returns:
        Sorted positions of the held-out rows and of the remaining rows. Two kinds of rows are in
        neither: with `substring`, rows that occur in texts of both sides; and rows without a label
        that share a unit with a held-out row.

    Raises:
        LoraError: If one side would be empty.
    """
    assert disjoint != "substring" or groups is None  # the recipe rejects it
    normalised_texts = [normalised(text) for text in texts]
    if disjoint == "substring":
        holders = containing_texts(normalised_texts)
    else:
        keys = _units_by_text_and_group(
            normalised_texts if disjoint else [str(i) for i in range(len(texts))], groups
        )
        holders = [[key] for key in keys]

    units: dict[int, list[int]] = defaultdict(list)  # rows that belong to each unit
    for row, owners in enumerate(holders):
        for owner in owners:
            units[owner].append(row)
    drawn = _draw_units(units, holders, fraction, seed, strata, answered)
    n_drawn = [sum(owner in drawn for owner in owners) for owners in holders]
    held_out = [i for i, count in enumerate(n_drawn) if count == len(holders[i])]
    held_out = [i for i in held_out if answered is None or answered[i]]
    remaining = [i for i, count in enumerate(n_drawn) if count == 0]
    if not held_out or not remaining:
        raise LoraError(
            f"{fraction:g} of {counted(len(texts), 'row')} ({len(units)} that differ) leaves one "
            "side empty",
            location,
            "use a `fraction` nearer to 0.5, or more rows; `group_by` may keep too many together",
        )
    return np.array(held_out, dtype=np.int64), np.array(remaining, dtype=np.int64)


def _draw_units(
    units: dict[int, list[int]],
    holders: list[list[int]],
    fraction: float,
    seed: tuple[int, ...],
    strata: Sequence[str] | None,
    answered: Sequence[bool] | None,
) -> set[int]:
    """Draw units in random order until they have the fraction of the rows of each stratum."""
    order = sorted(units)
    np.random.default_rng(seed).shuffle(order)
    stratum_of = list(strata) if strata is not None else [""] * len(holders)
    counts = Counter(stratum_of)
    if answered is not None:
        counts = Counter(
            name for name, has_label in zip(stratum_of, answered, strict=True) if has_label
        )
        stratum_of = [
            name if has_label else NO_ANSWER
            for name, has_label in zip(stratum_of, answered, strict=True)
        ]
    remaining = {name: fraction * count for name, count in counts.items()}
    remaining[NO_ANSWER] = 0.0
    undrawn = [len(owners) for owners in holders]  # number of undrawn owners of each row
    drawn: set[int] = set()
    for unit in order:
        # the ID of a unit is the index of one of its rows
        stratum = next(
            (stratum_of[i] for i in (unit, *units[unit]) if stratum_of[i] != NO_ANSWER), NO_ANSWER
        )
        if remaining[stratum] < 0.5:
            continue
        drawn.add(unit)
        for row in units[unit]:
            undrawn[row] -= 1
            if undrawn[row] == 0:
                remaining[stratum_of[row]] -= 1
    return drawn


def _units_by_text_and_group(texts: Sequence[str], groups: Sequence[str] | None) -> list[int]:
    """Return the unit of each row: rows with the same text or group share one (union-find)."""
    parent = list(range(len(texts)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for values in (texts, groups or ()):
        first: dict[str, int] = {}
        for i, value in enumerate(values):
            j = first.setdefault(value, i)
            a, b = find(i), find(j)
            parent[max(a, b)] = min(a, b)
    return [find(i) for i in range(len(texts))]


def containing_texts(texts: Sequence[str]) -> list[list[int]]:
    """Return, for each text, the maximal texts that contain it (itself if there are none).

    A text contains another if the words of the latter (in scripts without spaces, its characters)
    occur in it consecutively. Candidates are looked up by the rarest word or pair of characters of
    a text, so that few pairs of texts are compared.

    Args:
        texts: Normalised texts.

    Returns:
        Indices of the first row with each maximal text.
    """
    first_row = {text: i for i, text in reversed(list(enumerate(texts)))}
    frequency = Counter(key for text in first_row for key in _keys(text))
    rarest = {
        text: min(_keys(text), key=lambda key: (frequency[key], key), default="")
        for text in first_row
    }
    lookup_keys = set(rarest.values())
    containers: dict[str, list[tuple[int, str]]] = defaultdict(
        list
    )  # maximal texts by the keys they contain
    owners: dict[str, list[int]] = {}
    for text in sorted(first_row, key=len, reverse=True):
        # surrounded by spaces, so that `part` does not contain `art`
        padded = f" {' '.join(words(text))} "
        found_in = [i for i, longer in containers[rarest[text]] if padded in longer]
        owners[text] = found_in or [first_row[text]]
        if not found_in:
            for key in _keys(text) & lookup_keys:
                containers[key].append((first_row[text], padded))
    return [owners[text] for text in texts]


def _keys(text: str) -> set[str]:
    """Return the words of a text, and the characters and pairs of scripts without spaces."""
    return {*words(text), *pairs_of_letters(text)}
