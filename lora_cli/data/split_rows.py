"""Draw held-out rows so that nothing stands on both sides.

Rows are drawn in units: rows with equal texts, or with the same group, go together. With
`substring`, a unit is a longest text with all the texts inside it. SST-2 shows why: its train split
holds the phrases of each sentence as rows of their own, so about nine in ten rows of a random
part stand word for word inside other rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_cli.characters import normalised, pairs_of_letters, words
from lora_cli.errors import LoraError, counted

Indices = NDArray[np.int64]
NO_ANSWER = "\0"  # the stratum of rows that cannot be measured


def draw(
    texts: Sequence[str],
    fraction: float,
    seed: tuple[int, ...],
    disjoint: str | None = "exact",
    strata: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    at: str = "data.validation",
    answered: Sequence[bool] | None = None,
) -> tuple[Indices, Indices]:
    """Choose rows to hold out.

    Args:
        texts: Text of each row.
        fraction: Share of the rows to hold out.
        seed: Decides which; the same seed and rows give the same draw.
        disjoint: `exact`, `substring` or None, as in the recipe.
        strata: Value of each row whose proportions are kept.
        groups: Value of each row that must not stand on both sides.
        at: Where the recipe asks for it, for errors.
        answered: Whether each row has an answer, without which it cannot be measured: such rows
            are not held out, and do not count in the fraction.

    Returns:
        Positions held out and positions kept, each in order. With `substring`, rows that stand
        inside texts of both sides are in neither; nor are rows without an answer that belong with
        one that is held out.

    Raises:
        LoraError: If the rows cannot be divided.
    """
    assert disjoint != "substring" or groups is None  # the recipe rejects it
    normal = [normalised(text) for text in texts]
    if disjoint == "substring":
        holders = containing(normal)
    else:
        keys = _joined(normal if disjoint else [str(i) for i in range(len(texts))], groups)
        holders = [[key] for key in keys]

    units: dict[int, list[int]] = defaultdict(list)  # rows in which a unit has a part
    for row, owners in enumerate(holders):
        for owner in owners:
            units[owner].append(row)
    drawn = _draw_units(units, holders, fraction, seed, strata, answered)
    inside = [sum(owner in drawn for owner in owners) for owners in holders]
    held_out = [i for i, count in enumerate(inside) if count == len(holders[i])]
    held_out = [i for i in held_out if answered is None or answered[i]]
    kept = [i for i, count in enumerate(inside) if count == 0]
    if not held_out or not kept:
        raise LoraError(
            f"{fraction:g} of {counted(len(texts), 'row')} ({len(units)} that differ) leaves one "
            "side empty",
            at,
            "use a `fraction` nearer to 0.5, or more rows; `group_by` may keep too many together",
        )
    return np.array(held_out, dtype=np.int64), np.array(kept, dtype=np.int64)


def _draw_units(
    units: dict[int, list[int]],
    holders: list[list[int]],
    fraction: float,
    seed: tuple[int, ...],
    strata: Sequence[str] | None,
    answered: Sequence[bool] | None,
) -> set[int]:
    """Draw units in random order until their rows make up the fraction, of each stratum."""
    order = sorted(units)
    np.random.default_rng(seed).shuffle(order)
    value = list(strata) if strata is not None else [""] * len(holders)
    counts = Counter(value)
    if answered is not None:
        counts = Counter(one for one, has in zip(value, answered, strict=True) if has)
        value = [one if has else NO_ANSWER for one, has in zip(value, answered, strict=True)]
    wanted = {name: fraction * count for name, count in counts.items()}
    wanted[NO_ANSWER] = 0.0
    missing = [len(owners) for owners in holders]  # owners of a row that are not drawn yet
    drawn: set[int] = set()
    for unit in order:
        # a unit has the number of one of its rows
        stratum = next((value[i] for i in (unit, *units[unit]) if value[i] != NO_ANSWER), NO_ANSWER)
        if wanted[stratum] < 0.5:
            continue
        drawn.add(unit)
        for row in units[unit]:
            missing[row] -= 1
            if missing[row] == 0:
                wanted[value[row]] -= 1
    return drawn


def _joined(texts: Sequence[str], groups: Sequence[str] | None) -> list[int]:
    """Return a unit for each row: rows with the same text or the same group share one."""
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


def containing(texts: Sequence[str]) -> list[list[int]]:
    """Return, for each text, the longest texts that it stands inside (itself, if in none).

    A text stands inside another if its words stand there side by side; in scripts without spaces,
    if its letters do. Candidates are found by the text's rarest word or pair of letters, so that
    few pairs of texts are compared.

    Args:
        texts: Normalised texts.
    """
    first = {text: i for i, text in reversed(list(enumerate(texts)))}
    frequency = Counter(key for text in first for key in _keys(text))
    rarest = {
        text: min(_keys(text), key=lambda key: (frequency[key], key), default="") for text in first
    }
    wanted = set(rarest.values())
    holding: dict[str, list[tuple[int, str]]] = defaultdict(list)  # maximal texts by what they hold
    owners: dict[str, list[int]] = {}
    for text in sorted(first, key=len, reverse=True):
        # between spaces, so that `art` does not stand inside `part`
        spaced = f" {' '.join(words(text))} "
        found = [i for i, longer in holding[rarest[text]] if spaced in longer]
        owners[text] = found or [first[text]]
        if not found:
            for key in _keys(text) & wanted:
                holding[key].append((first[text], spaced))
    return [owners[text] for text in texts]


def _keys(text: str) -> set[str]:
    """Return the words of a text; of scripts without spaces its letters and their pairs."""
    return {*words(text), *pairs_of_letters(text)}
