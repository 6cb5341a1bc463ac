"""Concatenate the rows of several data sets to one split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from lora_cli.data.boxes import CATEGORY_KEYS
from lora_cli.data.rows import MEDIA_ROWS, Indices, Rows
from lora_cli.recipe import Recipe


def mix_rows(recipe: Recipe, by_set: dict[str, Rows]) -> MixedRows:
    """Concatenate the rows of several data sets.

    Args:
        recipe: The recipe, whose `data.mix` says how the files of each set are read.
        by_set: The rows of each set, in the order of the recipe.
    """
    digest = hashlib.sha256()
    for name, rows in by_set.items():
        spec = recipe.data.mix[name]
        settings = spec.format.model_dump_json(), sorted(spec.columns.items())
        content = rows.sha256, rows.source, hashlib.sha256(rows.indices.tobytes()).hexdigest()
        digest.update(json.dumps([name, *settings, *content]).encode())
    label_names = [rows.label_names for rows in by_set.values()]
    # the meaning of a number depends on the set, unless all sets have the same label names
    shared = {
        column
        for column, names in label_names[0].items()
        if len(label_names) == len(recipe.data.mix)
        and all(n.get(column) == names for n in label_names)
    }
    return MixedRows(
        dataset=None,
        source=", ".join(dict.fromkeys(rows.source for rows in by_set.values())),
        sha256=digest.hexdigest(),
        indices=np.arange(sum(map(len, by_set.values())), dtype=np.int64),
        label_names={column: label_names[0][column] for column in shared},
        skipped=tuple(f"{line} (set {name})" for name, rows in by_set.items()
                      for line in rows.skipped),
        dropped=sum(rows.dropped for rows in by_set.values()),
        media=tuple(dict.fromkeys(column for rows in by_set.values() for column in rows.media)),
        of_sets=tuple(by_set.items()),
    )  # fmt: skip


@dataclass(frozen=True)
class MixedRows(Rows):
    """The rows of several data sets; `indices` refer to their concatenation."""

    of_sets: tuple[tuple[str, Rows], ...] = field(default=())

    def __getitem__(self, i: int) -> dict[str, Any]:
        number, position = self._find(i)
        return self._with_label_names(number, self.of_sets[number][1][position])

    def batches(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows in lists of at most `size`."""
        size = min(size, MEDIA_ROWS) if self.media else size
        for start in range(0, len(self), size):
            batch: list[dict[str, Any]] = []
            places = [self._find(i) for i in range(start, min(start + size, len(self)))]
            for number, group in groupby(places, key=lambda place: place[0]):
                rows = self.of_sets[number][1]
                chosen = rows.select(np.array([position for _, position in group]))
                batch += (self._with_label_names(number, row) for row in next(chosen.batches(size)))
            yield batch

    def place(self, i: int) -> str:
        """Return the location of row i, with its set: `train.csv:17 (set math)`."""
        number, position = self._find(i)
        name, rows = self.of_sets[number]
        return f"{rows.place(position)} (set {name})"

    @property
    def sets(self) -> dict[str, Indices]:
        """The positions of the rows of each set."""
        set_indices = self._set_indices()
        by_set = {
            name: np.flatnonzero(set_indices == i) for i, (name, _) in enumerate(self.of_sets)
        }
        return {name: positions for name, positions in by_set.items() if len(positions)}

    @property
    def parts(self) -> list[Rows]:
        """The rows of each set."""
        sources = {name: rows.source for name, rows in self.of_sets}
        return [
            replace(self.select(positions), source=f"{sources[name]} (set {name})")
            for name, positions in self.sets.items()
        ]

    def set_of(self, i: int) -> str | None:
        """Return the name of the set that row i belongs to."""
        return self.of_sets[self._find(i)[0]][0]

    def content_sha256(self) -> str:
        """Return the SHA-256 of the rows in order, including the set of each row."""
        parts = [(name, self.select(positions)) for name, positions in self.sets.items()]
        hashes = [[name, Rows.content_sha256(part)] for name, part in parts]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def _set_indices(self) -> Indices:
        starts = np.cumsum([0, *(len(rows) for _, rows in self.of_sets)])
        return np.searchsorted(starts, self.indices, side="right").astype(np.int64) - 1

    def _find(self, i: int) -> tuple[int, int]:
        """Return the index of the set of row i, and the position of the row in it."""
        position = int(self.indices[i])
        for number, (_, rows) in enumerate(self.of_sets):
            if position < len(rows):
                return number, position
            position -= len(rows)
        raise IndexError(i)

    def _with_label_names(self, set_index: int, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with label names instead of numbers where the numbering differs by set."""
        names_by_column = {c: n for c, n in self.of_sets[set_index][1].label_names.items()
               if c not in self.label_names}  # fmt: skip
        return row | {c: _label(row[c], names) for c, names in names_by_column.items() if c in row}


def _label(value: Any, names: list[str]) -> Any:
    """Replace numbered labels in a cell, a list or objects by their names; keep other values."""
    if isinstance(value, dict):
        return {k: _label(v, names) if k in CATEGORY_KEYS else v for k, v in value.items()}
    if isinstance(value, list):
        return [_label(item, names) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return names[value]
    return value
