"""The rows of a split, kept on the disk and read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.media import hashed, media_value

Indices = NDArray[np.int64]
STORED = {"row", "place", "fault"}
STORED_WITH_MEDIA = STORED | {"media"}
MEDIA_ROWS = 50  # in memory at once


@dataclass(frozen=True)
class Rows:
    """The rows of a split, kept on the disk and read one at a time.

    `self[i]` is a dictionary of the columns of row i, `self.place(i)` says where it stands.
    """

    dataset: Any  # datasets.Dataset: columns row (JSON), place, error; or the Hub's own columns
    source: str
    sha256: str
    indices: Indices
    label_names: dict[str, list[str]] = field(default_factory=dict)  # the Hub's ClassLabel columns
    skipped: tuple[str, ...] = ()
    dropped: int = 0  # rows that would have stood on both sides of a held-out split
    media: tuple[str, ...] = ()  # columns of pictures or sound

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._decode(self.dataset[int(self.indices[i])])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for batch in self.batches(1000) for row in batch)

    def batches(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows in lists of at most `size`."""
        size = min(size, MEDIA_ROWS) if self.media else size  # encoded pictures may be large
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
        """Return where row i stands: `train.csv:17`."""
        index = int(self.indices[i])
        if STORED <= set(self.dataset.column_names) <= STORED_WITH_MEDIA:
            return str(self.dataset.data.column("place")[index].as_py())
        return f"{self.source}[{index}]"

    @property
    def sets(self) -> dict[str, Indices]:
        """The positions of each set's rows, one set after the other; empty if nothing is mixed."""
        return {}

    @property
    def parts(self) -> list[Rows]:
        """The rows of each set that is mixed; these rows themselves if none is."""
        return [self]

    def set_of(self, i: int) -> str | None:
        """Return the set that row i is of, where several are mixed."""
        return None

    @property
    def columns(self) -> list[str]:
        """Names of the columns, from the first rows."""
        first = [self[i] for i in range(min(100, len(self)))]
        return list(dict.fromkeys(name for row in first for name in row))

    def select(self, positions: Indices, skipped: Sequence[str] = ()) -> Rows:
        """Return the rows at some positions of this split."""
        return replace(self, indices=self.indices[positions], skipped=(*self.skipped, *skipped))

    def content_sha256(self) -> str:
        """Return the SHA-256 of the rows themselves, in their order."""
        digest = hashlib.sha256()
        for row in self:
            digest.update(json.dumps(hashed(row), sort_keys=True, default=str).encode())
            digest.update(b"\n")
        return digest.hexdigest()
