"""Retrieval metrics, computed from the ranks of the relevant texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

RETRIEVAL_METRICS = ("ndcg_at_10", "mrr_at_10", "accuracy_at_1", "recall_at_1", "recall_at_10")
SEARCH = (
    "each row's anchor searches the split's other texts by cosine similarity, and ties count "
    "against it"
)
DEFINITIONS = {
    "ndcg_at_10": "discounted cumulative gain of the first 10 texts, as a share of the best "
    f"possible, mean over rows, 0 to 1; {SEARCH}",
    "mrr_at_10": "reciprocal rank of the first right text, 0 if none is among the first 10; mean "
    "over rows",
    "accuracy_at_1": "share of rows whose nearest text is right",
    "recall_at_1": "share of a row's right texts that come first, mean over rows",
    "recall_at_10": "share of a row's right texts among the first 10, mean over rows",
}


def retrieval_scores(ranks: Sequence[Sequence[int]], counts: Sequence[int]) -> dict[str, float]:
    """Return the mean of each of `RETRIEVAL_METRICS` over all rows.

    Args:
        ranks: For each row, the ranks (from 1) of the relevant texts among the first ten results.
        counts: For each row, the number of relevant texts.
    """
    rows = list(zip(ranks, counts, strict=True))
    return {
        name: sum(row_score(name, *row) for row in rows) / len(rows) for name in RETRIEVAL_METRICS
    }


def row_score(name: str, ranks: Sequence[int], count: int) -> float:
    """Return one of `RETRIEVAL_METRICS` for one row."""
    match name:
        case "ndcg_at_10":
            best = sum(1 / math.log2(i + 1) for i in range(1, min(count, 10) + 1))
            return sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10) / best
        case "mrr_at_10":
            return max((1 / rank for rank in ranks if rank <= 10), default=0.0)
        case "accuracy_at_1":
            return float(1 in ranks)
        case "recall_at_1":
            return float(1 in ranks) / count
        case _:
            return sum(rank <= 10 for rank in ranks) / count
