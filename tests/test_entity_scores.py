"""Tests of entity scores against an independent implementation of conlleval's rule."""

from __future__ import annotations

import random

import pytest

from lora_cli.metrics.entity_scores import entity_scores, entity_sums

TAGS = ["O", "O", "B-A", "I-A", "B-B", "I-B"]
SCORES = ("f1", "precision", "recall")


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Return the first word, last word and type of each entity, by conlleval's rule."""
    spans: set[tuple[int, int, str]] = set()
    previous = start = kind = None
    for i, tag in enumerate([*tags, "O"]):
        continues = tag[0] == "I" and previous is not None and previous[2:] == tag[2:]
        if kind is not None and not continues:
            assert start is not None
            spans.add((start, i - 1, kind))
            kind = None
        if tag != "O" and not continues:
            start, kind = i, tag[2:]
        previous = None if tag == "O" else tag
    return spans


def random_tags(seed: int, rows: int = 40) -> tuple[list[list[str]], list[list[str]]]:
    """Return random predictions and references with different numbers of entities."""
    rng = random.Random(seed)
    references = [[rng.choice(TAGS) for _ in range(rng.randint(1, 9))] for _ in range(rows)]
    predictions = [[tag if rng.random() < 0.7 else "O" for tag in tags] for tags in references]
    return predictions, references


def expected_scores(predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
    pairs = [
        (entities(predicted), entities(true))
        for predicted, true in zip(predictions, references, strict=True)
    ]
    n_right = sum(len(predicted & true) for predicted, true in pairs)
    n_predicted, n_true = (sum(len(pair[i]) for pair in pairs) for i in (0, 1))
    assert n_predicted != n_true
    precision, recall = n_right / n_predicted, n_right / n_true
    return {
        "f1": 2 * precision * recall / (precision + recall),
        "precision": precision,
        "recall": recall,
    }


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_an_independent_count(seed: int) -> None:
    predictions, references = random_tags(seed)
    assert entity_scores(predictions, references) == pytest.approx(
        expected_scores(predictions, references)
    )


@pytest.mark.parametrize("score", SCORES)
def test_row_sums_add_up_to_the_score(score: str) -> None:
    predictions, references = random_tags(9)
    sums = [entity_sums(score, *pair) for pair in zip(predictions, references, strict=True)]
    numerator, denominator = (sum(part[i] for part in sums) for i in (0, 1))
    assert numerator / denominator == pytest.approx(expected_scores(predictions, references)[score])


def test_sums_of_one_row() -> None:
    predicted = ["B-A", "I-A", "O", "B-B", "B-A"]
    reference = ["B-A", "I-A", "O", "B-A", "O"]
    assert entity_sums("f1", predicted, reference) == (2.0, 5.0)
    assert entity_sums("precision", predicted, reference) == (1.0, 3.0)
    assert entity_sums("recall", predicted, reference) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("predicted", "reference"),
    [(["O", "O"], ["B-A", "O"]), (["B-A", "O"], ["O", "O"]), (["O"], ["O"])],
)
def test_scores_are_zero_if_nothing_is_right(predicted: list[str], reference: list[str]) -> None:
    assert entity_scores([predicted], [reference]) == dict.fromkeys(SCORES, 0.0)
