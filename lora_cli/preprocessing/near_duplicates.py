"""Find equal and nearly equal texts among many, without comparing all pairs.

A text is its normalised words; two are near duplicates where the sets of their runs of characters
have much in common (Jaccard similarity). A run is five characters long, in a short text three; one
that begins with a character of Chinese, Japanese or Korean, which says more than a letter, is two.
Texts of about `SHORT` characters have runs of both lengths, so that any two of about the same
length can be compared.

The similarity is estimated by MinHash (Broder, "On the resemblance and containment of documents",
1997): of `HASHES` hash functions each keeps the smallest value over a text's runs, and two texts
agree in a value with a probability equal to their similarity. Only texts that agree in a whole band
of values are compared, so the time grows with the number of texts. Of two short texts, of which
many differ by one word, the similarity is counted instead. Nothing of a text is kept but hashes:
520 bytes, of a short one 200 more. Nothing is drawn at random: the same texts give the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from lora_cli.characters import normalised

SIMILAR = 0.8
"""Share of common runs from which on two texts are near duplicates."""
RUN, SHORT_RUN, WIDE_RUN = 5, 3, 2  # characters: of a text, of a short one, of wide letters
SHORT, AROUND_SHORT = 40, 6  # characters: of what is short, and how much more may be either
SHORT_WIDTH = SHORT + AROUND_SHORT + 2  # runs of the longest short text with a space at both ends
HASHES = 128
BAND = 4  # a pair at `SIMILAR` agrees in one of 32 bands with a probability of 0.99999
WIDE = ((0x1100, 0x11FF), (0x2E80, 0xA4CF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
MOST_ROWS = 500_000  # of a split that are compared: their hashes take 256 to 700 MiB
MOST_RUNS = 4096  # of a text; of a longer one, those with the smallest hashes stand for it
MOST_CHARACTERS = 1_000_000  # of a text, and about as many of the texts that are hashed together

Hashes = NDArray[np.uint64]
Signatures = NDArray[np.uint32]
Indices = NDArray[np.int64]
Shares = NDArray[np.float64]

_seeds = np.random.default_rng(0x10A).integers(0, 2**32, (2, HASHES), dtype=np.uint32)
_XOR, _ODD = _seeds[0], _seeds[1] | np.uint32(1)


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of the texts of a split.

    Args:
        exact: A hash of each text (N,); 64 bits, so that equal ones are equal texts.
        near: MinHash values (M, HASHES) of the first texts; empty where they were not wanted.
        near_rows: Which text each of them is of (M,), ascending.
        runs: The runs of the short texts (S, SHORT_WIDTH), filled up with the first.
        runs_at: Where each of the MinHash values has its runs (M,), -1 for long texts.
    """

    exact: Hashes
    near: Signatures
    near_rows: Indices
    runs: Signatures
    runs_at: Indices

    @classmethod
    def of(cls, batches: Iterable[list[str]], near: bool = True) -> Fingerprints:
        """Return the fingerprints of texts that come in batches."""
        exact: list[Hashes] = []
        signatures = [np.empty((0, HASHES), dtype=np.uint32)]
        rows = [np.empty(0, dtype=np.int64)]
        runs, runs_at = [np.empty((0, SHORT_WIDTH), dtype=np.uint32)], [rows[0]]
        count = short = 0
        for batch in batches:
            texts = [normalised(text) for text in batch]
            hashed = [xxhash.xxh3_64_intdigest(t.encode("utf-8", "surrogatepass")) for t in texts]
            exact.append(np.array(hashed, dtype=np.uint64))
            compared = texts[: max(MOST_ROWS - count, 0)] if near else []
            for run, chosen in _by_run(compared):
                of = np.array([i + count for i, _ in chosen], dtype=np.int64)
                signatures += [_signatures(group, run) for group in _groups([t for _, t in chosen])]
                rows.append(of)
                is_short = run == SHORT_RUN
                if is_short:
                    runs.append(_short_runs([text for _, text in chosen]))
                runs_at.append(short + np.arange(len(of)) if is_short else np.full(len(of), -1))
                short += len(of) if is_short else 0
            count += len(texts)
        by_row = np.argsort(np.concatenate(rows), kind="stable")
        return cls(
            np.concatenate(exact) if exact else np.empty(0, dtype=np.uint64),
            np.concatenate(signatures)[by_row],
            np.concatenate(rows)[by_row],
            np.concatenate(runs),
            np.concatenate(runs_at)[by_row],
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
    _, first = np.unique(texts.exact, return_index=True)
    own = np.flatnonzero(np.isin(texts.near_rows, first))  # of one of each text
    return _near(texts, own, texts, own, within=True)


def near_shared(texts: Fingerprints, others: Fingerprints) -> tuple[Indices, Indices]:
    """Return the texts that are nearly equal to one of `others`, and that; no equal ones."""
    equal, _ = shared(texts, others)
    mine = np.flatnonzero(~np.isin(texts.near_rows, equal))
    _, first = np.unique(others.exact, return_index=True)
    theirs = np.flatnonzero(np.isin(others.near_rows, first))
    return _near(texts, mine, others, theirs, within=False)


def _near(
    a: Fingerprints, own: Indices, b: Fingerprints, theirs: Indices, within: bool
) -> tuple[Indices, Indices]:
    """Return texts of `a` that have a near duplicate in `b`, with it.

    A text is compared, for each band, with one text of `b` in the same bucket: within a split with
    the one before it, otherwise with the first.

    Args:
        a: The texts.
        own: Which of its MinHash values are compared, ascending.
        b: The other texts.
        theirs: Likewise.
        within: Whether both are the same.
    """
    partner = np.full(len(a), -1, dtype=np.int64)
    for band in range(0, HASHES, BAND):
        keys = _bucket(b.near[theirs, band : band + BAND])
        if within:
            order = np.argsort(keys, kind="stable")
            same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
            ours, others = theirs[order[same + 1]], theirs[order[same]]
        else:
            keys, first = np.unique(keys, return_index=True)
            found = _find(_bucket(a.near[own, band : band + BAND]), keys)
            ours, others = own[found >= 0], theirs[first[found[found >= 0]]]
        unknown = partner[a.near_rows[ours]] < 0
        ours, others = ours[unknown], others[unknown]
        for start in range(0, len(ours), 10_000):  # bounds the memory of what is compared
            part, against = ours[start : start + 10_000], others[start : start + 10_000]
            good = _similarity(a, part, b, against) >= SIMILAR
            partner[a.near_rows[part[good]]] = b.near_rows[against[good]]
    rows = np.flatnonzero(partner >= 0)
    return rows, partner[rows]


def _similarity(a: Fingerprints, ours: Indices, b: Fingerprints, others: Indices) -> Shares:
    """Return how similar pairs of texts are (N,): of short ones counted, of others estimated."""
    result: Shares = (a.near[ours] == b.near[others]).mean(axis=1)
    short = np.flatnonzero((a.runs_at[ours] >= 0) & (b.runs_at[others] >= 0))
    x, y = np.sort(a.runs[a.runs_at[ours[short]]]), np.sort(b.runs[b.runs_at[others[short]]])
    first_x, first_y = (
        np.diff(runs, axis=1, prepend=~runs[:, :1]) != 0  # of equal runs, the first counts
        for runs in (x, y)
    )
    common = ((x[:, :, None] == y[:, None, :]).any(axis=2) & first_x).sum(axis=1)
    result[short] = common / (first_x.sum(axis=1) + first_y.sum(axis=1) - common)
    return result


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


def _by_run(texts: list[str]) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Yield the length of a run, and the texts that are cut into such with their positions."""
    short = [(i, text) for i, text in enumerate(texts) if len(text) < SHORT + AROUND_SHORT]
    long = [(i, text) for i, text in enumerate(texts) if len(text) >= SHORT]
    yield from ((run, chosen) for run, chosen in ((SHORT_RUN, short), (RUN, long)) if chosen)


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


def _signatures(texts: list[str], run: int) -> Signatures:
    """Return the MinHash values (N, HASHES) of texts of at least `RUN` characters."""
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths) - lengths
    runs = _run_hashes("".join(texts), starts, lengths, run)
    counts = lengths
    if counts.max() > MOST_RUNS:
        pieces = [
            _smallest(runs[start : start + count])
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        ]
        runs = np.concatenate(pieces)
        counts = np.array([len(piece) for piece in pieces])
        starts = np.cumsum(counts) - counts
    result = np.empty((len(texts), HASHES), dtype=np.uint32)
    for i in range(HASHES):
        result[:, i] = np.minimum.reduceat((runs ^ _XOR[i]) * _ODD[i], starts)
    return result


def _short_runs(texts: list[str]) -> Signatures:
    """Return the hashes of the runs of short texts (N, SHORT_WIDTH)."""
    padded = [f" {text} ".ljust(RUN) for text in texts]
    lengths = np.array([len(text) for text in padded])
    starts = np.cumsum(lengths) - lengths
    runs = _run_hashes("".join(padded), starts, lengths, SHORT_RUN)
    columns = np.arange(SHORT_WIDTH)
    inside = columns < lengths[:, None]
    result: Signatures = runs[starts[:, None] + np.where(inside, columns, 0)]
    return result


def _smallest(runs: Signatures) -> Signatures:
    return runs if len(runs) <= MOST_RUNS else np.partition(runs, MOST_RUNS)[:MOST_RUNS]


def _run_hashes(text: str, starts: Indices, lengths: Indices, run: int) -> Signatures:
    """Return for each character a hash of the run that begins with it.

    Where the text that it stands in ends before the run does, that text's first run takes its
    place, which adds nothing to the set.

    Args:
        text: Texts, one behind the other.
        starts: Where each begins.
        lengths: Characters of each.
        run: Characters of a run without wide letters.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    behind = np.concatenate([codes, np.zeros(RUN, dtype=np.uint32)])
    mixed = np.zeros(len(codes), dtype=np.uint64)
    for i in range(run):
        mixed = (mixed ^ behind[i : i + len(codes)]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(31)
        if i + 1 == WIDE_RUN:
            of_wide = mixed
    wide = _is_wide(behind)
    wide = wide[: len(codes)] | wide[1 : len(codes) + 1]  # either of the first two
    room = np.repeat(starts + lengths, lengths) - np.arange(len(codes))
    hashes = (np.where(wide, of_wide, mixed) >> np.uint64(32)).astype(np.uint32)
    return np.where(
        room >= np.where(wide, WIDE_RUN, run), hashes, np.repeat(hashes[starts], lengths)
    )


def _is_wide(codes: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return which characters are Chinese, Japanese or Korean ones."""
    found = np.zeros(len(codes), dtype=bool)
    for low, high in WIDE:
        found |= (codes >= low) & (codes <= high)
    return found
