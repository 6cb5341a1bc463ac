"""Find equal and nearly equal texts among many, without comparing all pairs.

Texts are normalised first. Two texts are near duplicates if the Jaccard similarity of their sets of
shingles (substrings of fixed length) is high. A shingle has five characters, and three in a short
text. If it starts with a Chinese, Japanese or Korean character, which carries more information than
a letter, it has two. Texts of about `SHORT` characters have shingles of both lengths, so that any
two texts of about the same length can be compared.

The similarity is estimated by MinHash (Broder, "On the resemblance and containment of documents",
1997): each of `HASHES` hash functions keeps its smallest value over a text's shingles, and two
texts agree in such a value with a probability equal to their similarity. Only texts that agree in
a whole band of values are compared, so the time is linear in the number of texts. For pairs of
short texts, many of which differ by one word, the exact similarity is computed instead. Only hashes
are stored: 520 bytes for a text, and 200 more for a short one. The hash functions are fixed, so the
result is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from lora_cli.characters import normalised

MIN_SIMILARITY = 0.8
"""Two texts are near duplicates if their Jaccard similarity is at least this."""
SHINGLE, SHORT_SHINGLE, WIDE_SHINGLE = (
    5,
    3,
    2,
)  # characters: in general, in short texts, from a CJK character
SHORT, AROUND_SHORT = 40, 6  # characters: a text is short below 40; up to 46 it counts as both
SHORT_WIDTH = SHORT + AROUND_SHORT + 2  # shingles of the longest short text, with outer spaces
HASHES = 128
BAND = 4  # a pair at `MIN_SIMILARITY` agrees in one of the 32 bands with probability 0.99999
WIDE = ((0x1100, 0x11FF), (0x2E80, 0xA4CF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
MAX_ROWS = 500_000  # of a split that are compared; their hashes take 256 to 700 MiB
MAX_SHINGLES = 4096  # of a text; a longer one is represented by those with the smallest hashes
MAX_CHARACTERS = 1_000_000  # of a text, and approximately of a group that is hashed together

Hashes = NDArray[np.uint64]
Signatures = NDArray[np.uint32]
Indices = NDArray[np.int64]
Shares = NDArray[np.float64]

_seeds = np.random.default_rng(0x10A).integers(0, 2**32, (2, HASHES), dtype=np.uint32)
_XOR, _ODD = _seeds[0], _seeds[1] | np.uint32(1)


@dataclass(frozen=True)
class Fingerprints:
    """Hashes of the texts of a split.

    Args:
        exact: A 64-bit hash of each text, shape (N,). Texts with equal hashes are taken as equal.
        near: MinHash values of the first texts, shape (M, HASHES); empty if not requested.
        near_rows: The index of the text for each row of `near`, shape (M,), ascending.
        shingles: Hashes of the shingles of the short texts, shape (S, SHORT_WIDTH), padded with
            the first.
        shingle_rows: The index into `shingles` for each row of `near`, shape (M,); -1 for long
            texts.
    """

    exact: Hashes
    near: Signatures
    near_rows: Indices
    shingles: Signatures
    shingle_rows: Indices

    @classmethod
    def of(cls, batches: Iterable[list[str]], near: bool = True) -> Fingerprints:
        """Compute the fingerprints of texts, which come in batches."""
        exact: list[Hashes] = []
        signatures = [np.empty((0, HASHES), dtype=np.uint32)]
        rows = [np.empty(0, dtype=np.int64)]
        shingles, shingle_rows = [np.empty((0, SHORT_WIDTH), dtype=np.uint32)], [rows[0]]
        count = short = 0
        for batch in batches:
            texts = [normalised(text) for text in batch]
            hashed = [xxhash.xxh3_64_intdigest(t.encode("utf-8", "surrogatepass")) for t in texts]
            exact.append(np.array(hashed, dtype=np.uint64))
            compared = texts[: max(MAX_ROWS - count, 0)] if near else []
            for length, chosen in _by_shingle_length(compared):
                positions = np.array([i + count for i, _ in chosen], dtype=np.int64)
                signatures += [
                    _signatures(group, length) for group in _groups([t for _, t in chosen])
                ]
                rows.append(positions)
                is_short = length == SHORT_SHINGLE
                if is_short:
                    shingles.append(_short_shingles([text for _, text in chosen]))
                shingle_rows.append(
                    short + np.arange(len(positions)) if is_short else np.full(len(positions), -1)
                )
                short += len(positions) if is_short else 0
            count += len(texts)
        by_row = np.argsort(np.concatenate(rows), kind="stable")
        return cls(
            np.concatenate(exact) if exact else np.empty(0, dtype=np.uint64),
            np.concatenate(signatures)[by_row],
            np.concatenate(rows)[by_row],
            np.concatenate(shingles),
            np.concatenate(shingle_rows)[by_row],
        )

    def __len__(self) -> int:
        return len(self.exact)


def repeated(texts: Fingerprints) -> tuple[Indices, Indices]:
    """Return the indices of texts that are equal to an earlier one, and of the first equal one."""
    _, first, inverse = np.unique(texts.exact, return_index=True, return_inverse=True)
    earliest = first[inverse]
    rows = np.flatnonzero(earliest != np.arange(len(texts)))
    return rows, earliest[rows]


def shared(texts: Fingerprints, others: Fingerprints) -> tuple[Indices, Indices]:
    """Return the indices of texts that are equal to one of `others`, and of the first such one."""
    keys, first = np.unique(others.exact, return_index=True)
    matches = _find(texts.exact, keys)
    rows = np.flatnonzero(matches >= 0)
    return rows, first[matches[rows]]


def near_repeated(texts: Fingerprints) -> tuple[Indices, Indices]:
    """Return the indices of texts that are nearly equal to an earlier one, and of that one.

    Texts that are equal to an earlier one are not returned.
    """
    _, first = np.unique(texts.exact, return_index=True)
    candidates = np.flatnonzero(np.isin(texts.near_rows, first))  # one copy of each text
    return _near(texts, candidates, texts, candidates, is_same=True)


def near_shared(texts: Fingerprints, others: Fingerprints) -> tuple[Indices, Indices]:
    """Return the indices of texts that are nearly equal to one of `others`, and of that one.

    Texts that are equal to one of `others` are not returned.
    """
    equal, _ = shared(texts, others)
    candidates = np.flatnonzero(~np.isin(texts.near_rows, equal))
    _, first = np.unique(others.exact, return_index=True)
    other_candidates = np.flatnonzero(np.isin(others.near_rows, first))
    return _near(texts, candidates, others, other_candidates, is_same=False)


def _near(
    a: Fingerprints, of_a: Indices, b: Fingerprints, of_b: Indices, is_same: bool
) -> tuple[Indices, Indices]:
    """Return the indices of texts of `a` that have a near duplicate in `b`, and of the duplicates.

    For each band, a text is compared with one text of `b` in the same bucket: within a split with
    the previous one, otherwise with the first.

    Args:
        a: The texts.
        of_a: The rows of `a.near` to compare, ascending.
        b: The other texts.
        of_b: The rows of `b.near` to compare, ascending.
        is_same: Whether `a` and `b` are the same.
    """
    partner = np.full(len(a), -1, dtype=np.int64)
    for band in range(0, HASHES, BAND):
        keys = _bucket(b.near[of_b, band : band + BAND])
        if is_same:
            order = np.argsort(keys, kind="stable")
            same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
            a_indices, b_indices = of_b[order[same + 1]], of_b[order[same]]
        else:
            keys, first = np.unique(keys, return_index=True)
            matches = _find(_bucket(a.near[of_a, band : band + BAND]), keys)
            a_indices, b_indices = of_a[matches >= 0], of_b[first[matches[matches >= 0]]]
        unmatched = partner[a.near_rows[a_indices]] < 0
        a_indices, b_indices = a_indices[unmatched], b_indices[unmatched]
        for start in range(0, len(a_indices), 10_000):  # bounds the memory
            a_chunk, b_chunk = a_indices[start : start + 10_000], b_indices[start : start + 10_000]
            is_similar = _similarity(a, a_chunk, b, b_chunk) >= MIN_SIMILARITY
            partner[a.near_rows[a_chunk[is_similar]]] = b.near_rows[b_chunk[is_similar]]
    rows = np.flatnonzero(partner >= 0)
    return rows, partner[rows]


def _similarity(a: Fingerprints, a_indices: Indices, b: Fingerprints, b_indices: Indices) -> Shares:
    """Return the similarity of pairs, shape (N,): exact for short texts, otherwise estimated."""
    result: Shares = (a.near[a_indices] == b.near[b_indices]).mean(axis=1)
    short = np.flatnonzero((a.shingle_rows[a_indices] >= 0) & (b.shingle_rows[b_indices] >= 0))
    x, y = (
        np.sort(a.shingles[a.shingle_rows[a_indices[short]]]),
        np.sort(b.shingles[b.shingle_rows[b_indices[short]]]),
    )
    first_x, first_y = (
        np.diff(shingles, axis=1, prepend=~shingles[:, :1]) != 0  # count equal shingles once
        for shingles in (x, y)
    )
    common = ((x[:, :, None] == y[:, None, :]).any(axis=2) & first_x).sum(axis=1)
    result[short] = common / (first_x.sum(axis=1) + first_y.sum(axis=1) - common)
    return result


def _find(values: Hashes, keys: Hashes) -> Indices:
    """Return the index of each value in the sorted keys, -1 if it is missing."""
    if not len(keys):
        return np.full(len(values), -1, dtype=np.int64)
    positions = np.minimum(np.searchsorted(keys, values), len(keys) - 1)
    return np.where(keys[positions] == values, positions, -1)


def _bucket(values: Signatures) -> Hashes:
    """Hash each row of a band, shape (N, BAND), to one integer."""
    key = np.zeros(len(values), dtype=np.uint64)
    for column in values.T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


# ------------------------------------------------------------------------------------- hashing


def _by_shingle_length(texts: list[str]) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Yield each shingle length, and the texts with such shingles, with their positions."""
    short = [(i, text) for i, text in enumerate(texts) if len(text) < SHORT + AROUND_SHORT]
    long = [(i, text) for i, text in enumerate(texts) if len(text) >= SHORT]
    yield from (
        (length, chosen) for length, chosen in ((SHORT_SHINGLE, short), (SHINGLE, long)) if chosen
    )


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Yield the padded texts in groups with a bounded number of characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        padded = f" {text[:MAX_CHARACTERS]} ".ljust(SHINGLE)
        if group and size + len(padded) > MAX_CHARACTERS:
            yield group
            group, size = [], 0
        group.append(padded)
        size += len(padded)
    if group:
        yield group


def _signatures(texts: list[str], shingle_length: int) -> Signatures:
    """Return the MinHash values of texts of at least `SHINGLE` characters, shape (N, HASHES)."""
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths) - lengths
    shingles = _shingle_hashes("".join(texts), starts, lengths, shingle_length)
    counts = lengths
    if counts.max() > MAX_SHINGLES:
        pieces = [
            _smallest(shingles[start : start + count])
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        ]
        shingles = np.concatenate(pieces)
        counts = np.array([len(piece) for piece in pieces])
        starts = np.cumsum(counts) - counts
    result = np.empty((len(texts), HASHES), dtype=np.uint32)
    for i in range(HASHES):
        result[:, i] = np.minimum.reduceat((shingles ^ _XOR[i]) * _ODD[i], starts)
    return result


def _short_shingles(texts: list[str]) -> Signatures:
    """Return the hashes of the shingles of short texts, shape (N, SHORT_WIDTH)."""
    padded = [f" {text} ".ljust(SHINGLE) for text in texts]
    lengths = np.array([len(text) for text in padded])
    starts = np.cumsum(lengths) - lengths
    shingles = _shingle_hashes("".join(padded), starts, lengths, SHORT_SHINGLE)
    columns = np.arange(SHORT_WIDTH)
    inside = columns < lengths[:, None]
    result: Signatures = shingles[starts[:, None] + np.where(inside, columns, 0)]
    return result


def _smallest(shingles: Signatures) -> Signatures:
    return (
        shingles
        if len(shingles) <= MAX_SHINGLES
        else np.partition(shingles, MAX_SHINGLES)[:MAX_SHINGLES]
    )


def _shingle_hashes(text: str, starts: Indices, lengths: Indices, length: int) -> Signatures:
    """Return, for each character, a hash of the shingle that starts with it.

    If the shingle would extend beyond the end of its text, the hash of the text's first shingle is
    returned, which adds nothing to the set.

    Args:
        text: The concatenated texts.
        starts: The position of the first character of each text.
        lengths: The number of characters of each text.
        length: The number of characters of a shingle without CJK characters.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    padded = np.concatenate([codes, np.zeros(SHINGLE, dtype=np.uint32)])
    mixed = np.zeros(len(codes), dtype=np.uint64)
    for i in range(length):
        mixed = (mixed ^ padded[i : i + len(codes)]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(31)
        if i + 1 == WIDE_SHINGLE:
            wide_hashes = mixed
    wide = _is_wide(padded)
    wide = wide[: len(codes)] | wide[1 : len(codes) + 1]  # one of the first two characters
    characters_left = np.repeat(starts + lengths, lengths) - np.arange(len(codes))
    hashes = (np.where(wide, wide_hashes, mixed) >> np.uint64(32)).astype(np.uint32)
    return np.where(
        characters_left >= np.where(wide, WIDE_SHINGLE, length),
        hashes,
        np.repeat(hashes[starts], lengths),
    )


def _is_wide(codes: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return which characters are Chinese, Japanese or Korean, as a mask."""
    is_wide = np.zeros(len(codes), dtype=bool)
    for low, high in WIDE:
        is_wide |= (codes >= low) & (codes <= high)
    return is_wide
