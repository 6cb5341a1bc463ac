"""Evaluates embeddings by search: the rank at which each anchor finds its correct texts.

The corpus is the set of distinct second texts of a split; if rows have labels, it is all texts. An
anchor is never compared with itself. A rank is 1 plus the number of wrong texts that are at least
as near, so embeddings that are all equal find nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

MAX_RANK = 10  # the highest rank that is reported
MAX_COSINES = 1 << 25  # in memory at the same time


@dataclass(frozen=True)
class Corpus:
    """The texts to search, and the anchors to search for.

    Args:
        anchors: The embeddings of the anchors (N, D).
        texts: The embeddings of the corpus (M, D).
        right: For each anchor, the positions in the corpus of its correct texts, if any.
        excluded: For each anchor, the positions of texts that it is not compared with.
    """

    anchors: NDArray[np.float32]
    texts: NDArray[np.float32]
    right: Sequence[NDArray[np.int64]]
    excluded: Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class SearchResult:
    """The result of the search for an anchor.

    Args:
        ranks: The ranks of its correct texts up to `MAX_RANK`, in order.
        best: The rank of the nearest correct text.
        nearest: The position in the corpus of the nearest of all texts.
        cosine: The cosine of the nearest correct text.
        nearest_cosine: The cosine of the nearest of all texts.
    """

    ranks: list[int]
    best: int
    nearest: int
    cosine: float
    nearest_cosine: float


def search(corpus: Corpus) -> list[SearchResult | None]:
    """Return the result for each anchor; None if it has no correct text."""
    anchors = normalize(torch.from_numpy(corpus.anchors), dim=1)
    texts = normalize(torch.from_numpy(corpus.texts), dim=1)
    n_anchors, results = max(1, MAX_COSINES // len(texts)), []
    for start in range(0, len(anchors), n_anchors):
        part = slice(start, min(start + n_anchors, len(anchors)))
        cosines = anchors[part] @ texts.T
        # a NaN counts as the farthest, for correct and wrong texts alike
        cosines = cosines.nan_to_num(nan=-torch.inf)
        right = _mask(corpus.right[part], cosines)
        cosines[_mask(corpus.excluded[part], cosines) & ~right] = -torch.inf
        results += _results(cosines, right)
    return results


def _mask(places: Sequence[NDArray[np.int64]], like: Tensor) -> Tensor:
    mask = torch.zeros(like.shape, dtype=torch.bool)
    row_indices = np.repeat(np.arange(len(places)), [len(row_places) for row_places in places])
    if len(row_indices):
        mask[torch.from_numpy(row_indices), torch.from_numpy(np.concatenate(places))] = True
    return mask


def _results(cosines: Tensor, right: Tensor) -> list[SearchResult | None]:
    """Return the results of anchors, given their cosines and which texts are correct (N, M)."""
    nearest_cosine, nearest = cosines.max(1)
    best = cosines.masked_fill(~right, -torch.inf).max(1).values
    rank = 1 + ((cosines >= best[:, None]) & ~right).sum(1)
    # correct texts are moved behind wrong ones that are equally near
    lowered = torch.where(right, cosines.nextafter(torch.tensor(-torch.inf)), cosines)
    first = lowered.topk(min(MAX_RANK, cosines.shape[1]))
    hits = right.gather(1, first.indices) & (first.values > -torch.inf)
    rows = zip(
        right.any(1).tolist(), hits.tolist(), rank.tolist(), nearest.tolist(), best.tolist(),
        nearest_cosine.tolist(), strict=True,
    )  # fmt: skip
    return [
        SearchResult([i for i, hit in enumerate(line, 1) if hit], at, near, cosine, near_cosine)
        if has_right
        else None
        for has_right, line, at, near, cosine, near_cosine in rows
    ]


def pairs_corpus(
    anchors: NDArray[np.float32],
    positives: NDArray[np.float32],
    anchor_texts: Sequence[int],
    positive_texts: Sequence[int],
) -> tuple[Corpus, list[int]]:
    """Return the corpus of pairs, and the row from which each of its texts comes.

    Args:
        anchors: The embeddings of the anchors of rows (N, D).
        positives: The embeddings of their positives (N, D).
        anchor_texts: Hashes of the anchors, by which equal texts are found.
        positive_texts: Hashes of the positives.
    """
    place: dict[int, int] = {}
    rows: list[int] = []
    for row, text in enumerate(positive_texts):
        if text not in place:
            place[text] = len(rows)
            rows.append(row)
    positions_of_anchor: dict[int, set[int]] = defaultdict(set)
    for anchor, text in zip(anchor_texts, positive_texts, strict=True):
        positions_of_anchor[anchor].add(place[text])
    right = [
        np.array(sorted(positions_of_anchor[anchor]), dtype=np.int64) for anchor in anchor_texts
    ]
    same_text = [[place[anchor]] if anchor in place else [] for anchor in anchor_texts]
    excluded = [np.array(places, dtype=np.int64) for places in same_text]
    return Corpus(anchors, positives[rows], right, excluded), rows


def labelled_corpus(
    vectors: NDArray[np.float32], texts: Sequence[int], labels: Sequence[int]
) -> tuple[Corpus, list[int]]:
    """Return the corpus of texts with labels, and the row from which each of its texts comes.

    Args:
        vectors: The embeddings of the texts of rows (N, D).
        texts: Hashes of the texts, by which equal texts are found.
        labels: The label of each row, as a hash.
    """
    rows: list[int] = []
    positions_of_label: dict[int, list[int]] = defaultdict(list)
    positions_of_text: dict[int, list[int]] = defaultdict(list)
    known_texts: set[tuple[int, int]] = set()
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if (text, label) not in known_texts:
            known_texts.add((text, label))
            positions_of_label[label].append(len(rows))
            positions_of_text[text].append(len(rows))
            rows.append(row)
    same_label = {
        label: np.array(places, dtype=np.int64) for label, places in positions_of_label.items()
    }
    excluded = [np.array(positions_of_text[text], dtype=np.int64) for text in texts]
    right = [
        np.setdiff1d(same_label[label], same_text)
        for label, same_text in zip(labels, excluded, strict=True)
    ]
    return Corpus(vectors, vectors[rows], right, excluded), rows
