"""Entity-level precision, recall and F1, computed by seqeval with conlleval's rules."""

from __future__ import annotations

from collections.abc import Sequence

RULE = (
    "an entity is right if its first word, last word and type are right, by conlleval's rule (an "
    "I- tag that does not continue an entity of its type begins one), counted over all rows by "
    "seqeval"
)
DEFINITIONS = {
    "f1": f"of entities: harmonic mean of precision and recall; {RULE}; 0 if none is right",
    "precision": "of entities: share of the predicted ones that are right; counted as for f1",
    "recall": "of entities: share of those in the data that are found; counted as for f1",
}


def entity_scores(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return precision, recall and F1 over the entities of all rows, 0 to 1.

    Args:
        predictions: The tags of each row's words, in IOB2.
        references: The true tags, one for each of the same words.
    """
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        [list(tags) for tags in references],
        [list(tags) for tags in predictions],
        average="micro",
        zero_division=0,
    )
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall)}


def entity_sums(
    score: str, predicted: Sequence[str], reference: Sequence[str]
) -> tuple[float, float]:
    """Return what one row adds to the numerator and to the denominator of a score.

    Args:
        score: `f1`, `precision` or `recall`.
        predicted: The tags of the row's words, in IOB2.
        reference: The true tags.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    found, expected = (set(get_entities(list(tags))) for tags in (predicted, reference))
    n_correct = len(found & expected)
    if score == "f1":
        return 2.0 * n_correct, float(len(found) + len(expected))
    return float(n_correct), float(len(found if score == "precision" else expected))
