"""The rows of a split, stored on disk and decoded on access."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.media import media_value, with_media_hashes

Indices = NDArray[np.int64]
STORED = {"row", "place", "fault"}
STORED_WITH_MEDIA = STORED | {"media"}
MEDIA_ROWS = 50  # in memory at once


@dataclass(frozen=True)
class Rows:
    """The rows of a split, stored on disk and decoded on access.

    `self[i]` is a dictionary of the columns of row i, and `self.place(i)` its location.
    """

    dataset: (
        Any  # datasets.Dataset: columns row (JSON), place, fault; or the columns of a Hub data set
    )
    source: str
    sha256: str
    indices: Indices
    label_names: dict[str, list[str]] = field(default_factory=dict)  # of ClassLabel columns
    skipped: tuple[str, ...] = ()
    dropped: int = 0  # rows removed because they would be on both sides of a held-out split
    media: tuple[str, ...] = ()  # columns of images or audio

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._decode(self.dataset[int(self.indices[i])])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for batch in self.batches(1000) for row in batch)

    def batches(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows in lists of at most `size`."""
        size = min(size, MEDIA_ROWS) if self.media else size  # encoded media may be large
        for start in range(0, len(self), size):
            columns = self.dataset[self.indices[start : start + size]]
            count = len(next(iter(columns.values())))
            yield [self._decode({k: v[i] for k, v in columns.items()}) for i in range(count)]

    def _decode(self, stored: dict[str, Any]) -> dict[str, Any]:
        if STORED <= set(stored) <= STORED_WITH_MEDIA:
            row: dict[str, Any] = json.loads(stored["row"])
            for value in stored.get("media") or ():
                row[value["column"]] = {"bytes": value["bytes"], "path": value["path"]}
            return row
        return stored | {c: media_value(stored[c]) for c in self.media if c in stored}

    def place(self, i: int) -> str:
        """Return the location of row i: `train.csv:17`."""
        index = int(self.indices[i])
        if STORED <= set(self.dataset.column_names) <= STORED_WITH_MEDIA:
            return str(self.dataset.data.column("place")[index].as_py())
        return f"{self.source}[{index}]"

    @property
    def sets(self) -> dict[str, Indices]:
        """The positions of the rows of each set; empty if no data sets are mixed."""
        return {}

    @property
    def parts(self) -> list[Rows]:
        """The rows of each set of a mixture; otherwise only these rows."""
        return [self]

    def set_of(self, i: int) -> str | None:
        """Return the name of the set of row i; None if no data sets are mixed."""
        return None

    @property
    def columns(self) -> list[str]:
        """Names of the columns, from the first rows."""
        first = [self[i] for i in range(min(100, len(self)))]
        return list(dict.fromkeys(name for row in first for name in row))

    def select(self, positions: Indices, skipped: Sequence[str] = ()) -> Rows:
        """Return the rows at the given positions of this split."""
        return replace(self, indices=self.indices[positions], skipped=(*self.skipped, *skipped))

    def content_sha256(self) -> str:
        """Return the SHA-256 of the contents of the rows, in order."""
        digest = hashlib.sha256()
        for row in self:
            digest.update(json.dumps(with_media_hashes(row), sort_keys=True, default=str).encode())
            digest.update(b"\n")
        return digest.hexdigest()
