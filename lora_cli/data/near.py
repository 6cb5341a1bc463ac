"""Find equal and nearly equal texts among many, without comparing all pairs.

A text is its normalised words; two are near duplicates where the sets of their runs of five
characters have much in common (Jaccard similarity). That is estimated by MinHash (Broder, "On the
resemblance and containment of documents", 1997): of `HASHES` hash functions each keeps the smallest
value over a text's runs, and two texts agree in a value with a probability equal to their
similarity. Only texts that agree in a whole band of values are compared, so the time grows with the
number of texts, and nothing of a text is kept but its hashes: 520 bytes. Nothing is drawn at
random: the same texts give the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from lora_cli.data.splits import normalised

SIMILAR = 0.8
"""Share of common runs from which on two texts are near duplicates."""
RUN = 5  # characters
HASHES = 128
BAND = 4  # a pair at `SIMILAR` agrees in one of 32 bands with a probability of 0.99999
MOST_ROWS = 500_000  # of a split that are compared: their hashes take 256 MiB
MOST_RUNS = 4096  # of a text; of a longer one, those with the smallest hashes stand for it
MOST_CHARACTERS = 1_000_000  # of a text, and about as many of the texts that are hashed together

Hashes = NDArray[np.uint64]
Signatures = NDArray[np.uint32]
Indices = NDArray[np.int64]

_seeds = np.random.default_rng(0x10A).integers(0, 2**32, (2, HASHES), dtype=np.uint32)
_XOR, _ODD = _seeds[0], _seeds[1] | np.uint32(1)


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of the texts of a split.

    Args:
        exact: A hash of each text (N,); 64 bits, so that equal ones are equal texts.
        near: MinHash values (M, HASHES) of the first M texts; empty where they were not wanted.
    """

    exact: Hashes
    near: Signatures

    @classmethod
    def of(cls, batches: Iterable[list[str]], near: bool = True) -> Fingerprints:
        """Return the fingerprints of texts that come in batches."""
        exact: list[Hashes] = []
        signatures = [np.empty((0, HASHES), dtype=np.uint32)]
        count = 0
        for batch in batches:
            texts = [normalised(text) for text in batch]
            hashed = [xxhash.xxh3_64_intdigest(t.encode("utf-8", "surrogatepass")) for t in texts]
            exact.append(np.array(hashed, dtype=np.uint64))
            if near and count < MOST_ROWS:
                signatures += [_signatures(group) for group in _groups(texts[: MOST_ROWS - count])]
            count += len(texts)
        return cls(
            np.concatenate(exact) if exact else np.empty(0, dtype=np.uint64),
            np.concatenate(signatures),
        )

    def __len__(self) -> int:
        return len(self.exact)


def repeated(texts: Fingerprints) -> tuple[Indices, Indices]:
    """Return the texts that are equal to an earlier one, and of each the first such."""
    _, first, which = np.unique(texts.exact, return_index=True, return_inverse=True)
    earliest = first[which]
    rows = np.flatnonzero(earliest != np.arange(len(texts)))
    return rows, earliest[rows]


def shared(texts: Fingerprints, others: Fingerprints) -> tuple[Indices, Indices]:
    """Return the texts that are equal to one of `others`, and of each the first such."""
    keys, first = np.unique(others.exact, return_index=True)
    found = _find(texts.exact, keys)
    rows = np.flatnonzero(found >= 0)
    return rows, first[found[rows]]


def near_repeated(texts: Fingerprints) -> tuple[Indices, Indices]:
    """Return the texts that are nearly equal to an earlier one, and that one; no equal ones."""
    _, first = np.unique(texts.exact[: len(texts.near)], return_index=True)
    own = np.sort(first)  # one of each text
    return _near(texts.near, own, texts.near, own, within=True)


def near_shared(texts: Fingerprints, others: Fingerprints) -> tuple[Indices, Indices]:
    """Return the texts that are nearly equal to one of `others`, and that; no equal ones."""
    equal, _ = shared(texts, others)
    mine = np.setdiff1d(np.arange(len(texts.near)), equal)
    _, first = np.unique(others.exact[: len(others.near)], return_index=True)
    return _near(texts.near, mine, others.near, np.sort(first), within=False)


def _near(
    a: Signatures, a_rows: Indices, b: Signatures, b_rows: Indices, within: bool
) -> tuple[Indices, Indices]:
    """Return rows of `a` that have a near duplicate in `b`, with it.

    A row is compared, for each band, with one row of `b` in the same bucket: within a split with
    the one before it, otherwise with the first.
    """
    partner = np.full(len(a), -1, dtype=np.int64)
    for band in range(0, HASHES, BAND):
        keys = _bucket(b[b_rows, band : band + BAND])
        if within:
            order = np.argsort(keys, kind="stable")
            same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
            rows, others = b_rows[order[same + 1]], b_rows[order[same]]
        else:
            keys, first = np.unique(keys, return_index=True)
            found = _find(_bucket(a[a_rows, band : band + BAND]), keys)
            rows, others = a_rows[found >= 0], b_rows[first[found[found >= 0]]]
        unknown = partner[rows] < 0
        rows, others = rows[unknown], others[unknown]
        for start in range(0, len(rows), 100_000):  # bounds the memory of what is compared
            part, beside = rows[start : start + 100_000], others[start : start + 100_000]
            good = (a[part] == b[beside]).mean(axis=1) >= SIMILAR
            partner[part[good]] = beside[good]
    rows = np.flatnonzero(partner >= 0)
    return rows, partner[rows]


def _find(wanted: Hashes, keys: Hashes) -> Indices:
    """Return where each wanted value stands in sorted keys, -1 where it does not."""
    if not len(keys):
        return np.full(len(wanted), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)


def _bucket(values: Signatures) -> Hashes:
    """Return one number for each row of a band (N, BAND)."""
    key = np.zeros(len(values), dtype=np.uint64)
    for column in values.T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


# ------------------------------------------------------------------------------------- hashing


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts, padded, in groups of a bounded number of characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        padded = f" {text[:MOST_CHARACTERS]} ".ljust(RUN)
        if group and size + len(padded) > MOST_CHARACTERS:
            yield group
            group, size = [], 0
        group.append(padded)
        size += len(padded)
    if group:
        yield group


def _signatures(texts: list[str]) -> Signatures:
    """Return the MinHash values (N, HASHES) of texts of at least `RUN` characters."""
    runs = _run_hashes("".join(texts))
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths) - lengths
    counts = lengths - RUN + 1
    if counts.max() > MOST_RUNS:
        pieces = [
            _smallest(runs[start : start + count])
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        ]
        runs = np.concatenate(pieces)
        counts = np.array([len(piece) for piece in pieces])
        starts = np.cumsum(counts) - counts
    # every other interval is what lies between two texts, or nothing of use
    bounds = np.stack([starts, starts + counts], axis=1).ravel()[:-1]
    result = np.empty((len(texts), HASHES), dtype=np.uint32)
    for i in range(HASHES):
        result[:, i] = np.minimum.reduceat((runs ^ _XOR[i]) * _ODD[i], bounds)[::2]
    return result


def _smallest(runs: Signatures) -> Signatures:
    return runs if len(runs) <= MOST_RUNS else np.partition(runs, MOST_RUNS)[:MOST_RUNS]


def _run_hashes(text: str) -> Signatures:
    """Return a hash of each run of `RUN` characters of a text."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    count = len(codes) - RUN + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for i in range(RUN):
        mixed = (mixed ^ codes[i : i + count]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(32)).astype(np.uint32)
