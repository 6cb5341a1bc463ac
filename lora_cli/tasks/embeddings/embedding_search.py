"""How good embeddings are at search: the rank at which each anchor finds what belongs to it.

The second texts of a split are the corpus, each once; where rows have a label, all texts are. An
anchor never finds itself. A rank is 1 and the number of wrong texts that are at least as near, so
that embeddings which are all the same find nothing.
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

FIRST = 10  # places that are looked at
AT_ONCE = 1 << 25  # cosines in memory together


@dataclass(frozen=True)
class Corpus:
    """The texts that are searched, and those that search.

    Args:
        anchors: Embeddings of the texts that search (N, D).
        texts: Embeddings of the corpus (M, D).
        right: Of each anchor, the places in the corpus of what it should find; there may be none.
        left_out: Of each anchor, the places of texts that it is not compared with.
    """

    anchors: NDArray[np.float32]
    texts: NDArray[np.float32]
    right: Sequence[NDArray[np.int64]]
    left_out: Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class Found:
    """What an anchor finds.

    Args:
        ranks: The ranks of right texts that are among the first `FIRST`, in order.
        best: The rank of the nearest right text.
        nearest: The place in the corpus of the text that is nearest of all.
        cosine: Of the nearest right text.
        nearest_cosine: Of the nearest of all.
    """

    ranks: list[int]
    best: int
    nearest: int
    cosine: float
    nearest_cosine: float


def search(corpus: Corpus) -> list[Found | None]:
    """Return what each anchor finds; None for one that has nothing to find."""
    anchors = normalize(torch.from_numpy(corpus.anchors), dim=1)
    texts = normalize(torch.from_numpy(corpus.texts), dim=1)
    size, found = max(1, AT_ONCE // len(texts)), []
    for start in range(0, len(anchors), size):
        some = slice(start, min(start + size, len(anchors)))
        cosines = anchors[some] @ texts.T
        # what is not a number is the farthest, for right and wrong texts alike
        cosines = cosines.nan_to_num(nan=-torch.inf)
        right = _mask(corpus.right[some], cosines)
        cosines[_mask(corpus.left_out[some], cosines) & ~right] = -torch.inf
        found += _found(cosines, right)
    return found


def _mask(places: Sequence[NDArray[np.int64]], like: Tensor) -> Tensor:
    mask = torch.zeros(like.shape, dtype=torch.bool)
    lines = np.repeat(np.arange(len(places)), [len(some) for some in places])
    if len(lines):
        mask[torch.from_numpy(lines), torch.from_numpy(np.concatenate(places))] = True
    return mask


def _found(cosines: Tensor, right: Tensor) -> list[Found | None]:
    """Return what anchors find, given their cosines (N, M) and which texts are right."""
    nearest_cosine, nearest = cosines.max(1)
    best = cosines.masked_fill(~right, -torch.inf).max(1).values
    rank = 1 + ((cosines >= best[:, None]) & ~right).sum(1)
    # among equally near texts, the wrong ones come first
    lowered = torch.where(right, cosines.nextafter(torch.tensor(-torch.inf)), cosines)
    first = lowered.topk(min(FIRST, cosines.shape[1]))
    hits = right.gather(1, first.indices) & (first.values > -torch.inf)
    rows = zip(
        right.any(1).tolist(), hits.tolist(), rank.tolist(), nearest.tolist(), best.tolist(),
        nearest_cosine.tolist(), strict=True,
    )  # fmt: skip
    return [
        Found([i for i, hit in enumerate(line, 1) if hit], at, near, cosine, near_cosine)
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
    """Return the corpus of pairs, and the row that each of its texts comes from.

    Args:
        anchors: Embeddings of the anchors of rows (N, D).
        positives: Of their positives.
        anchor_texts: Hashes by which equal texts are found.
        positive_texts: Likewise.
    """
    place: dict[int, int] = {}
    rows: list[int] = []
    for row, text in enumerate(positive_texts):
        if text not in place:
            place[text] = len(rows)
            rows.append(row)
    of_anchor: dict[int, set[int]] = defaultdict(set)
    for anchor, text in zip(anchor_texts, positive_texts, strict=True):
        of_anchor[anchor].add(place[text])
    right = [np.array(sorted(of_anchor[anchor]), dtype=np.int64) for anchor in anchor_texts]
    own = [[place[anchor]] if anchor in place else [] for anchor in anchor_texts]
    left_out = [np.array(places, dtype=np.int64) for places in own]
    return Corpus(anchors, positives[rows], right, left_out), rows


def labelled_corpus(
    vectors: NDArray[np.float32], texts: Sequence[int], labels: Sequence[int]
) -> tuple[Corpus, list[int]]:
    """Return the corpus of texts with labels, and the row that each of its texts comes from.

    Args:
        vectors: Embeddings of the texts of rows (N, D).
        texts: Hashes by which equal texts are found.
        labels: Of each row.
    """
    rows: list[int] = []
    of_label: dict[int, list[int]] = defaultdict(list)
    of_text: dict[int, list[int]] = defaultdict(list)
    known: set[tuple[int, int]] = set()
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if (text, label) not in known:
            known.add((text, label))
            of_label[label].append(len(rows))
            of_text[text].append(len(rows))
            rows.append(row)
    alike = {label: np.array(places, dtype=np.int64) for label, places in of_label.items()}
    left_out = [np.array(of_text[text], dtype=np.int64) for text in texts]
    right = [np.setdiff1d(alike[label], own) for label, own in zip(labels, left_out, strict=True)]
    return Corpus(vectors, vectors[rows], right, left_out), rows
