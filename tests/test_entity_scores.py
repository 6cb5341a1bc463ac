"""Scores of entities, against a count that is made here of what begins and ends where."""

from __future__ import annotations

import random

import pytest

from lora_cli.metrics.entity_scores import entity_scores, entity_sums

TAGS = ["O", "O", "B-A", "I-A", "B-B", "I-B"]
SCORES = ("f1", "precision", "recall")


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Return the first word, the last and the type of each entity, by conlleval's rule."""
    found: set[tuple[int, int, str]] = set()
    before = start = kind = None
    for i, tag in enumerate([*tags, "O"]):
        goes_on = tag[0] == "I" and before is not None and before[2:] == tag[2:]
        if kind is not None and not goes_on:
            assert start is not None
            found.add((start, i - 1, kind))
            kind = None
        if tag != "O" and not goes_on:
            start, kind = i, tag[2:]
        before = None if tag == "O" else tag
    return found


def drawn(seed: int, rows: int = 40) -> tuple[list[list[str]], list[list[str]]]:
    """Return tags as a model and as the data might have them, not at all alike in number."""
    rng = random.Random(seed)
    wanted = [[rng.choice(TAGS) for _ in range(rng.randint(1, 9))] for _ in range(rows)]
    said = [[tag if rng.random() < 0.7 else "O" for tag in tags] for tags in wanted]
    return said, wanted


def counted(said: list[list[str]], wanted: list[list[str]]) -> dict[str, float]:
    pairs = [(entities(one), entities(other)) for one, other in zip(said, wanted, strict=True)]
    right = sum(len(one & other) for one, other in pairs)
    found, there = (sum(len(pair[i]) for pair in pairs) for i in (0, 1))
    assert found != there
    precision, recall = right / found, right / there
    return {
        "f1": 2 * precision * recall / (precision + recall),
        "precision": precision,
        "recall": recall,
    }


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_an_own_count(seed: int) -> None:
    said, wanted = drawn(seed)
    assert entity_scores(said, wanted) == pytest.approx(counted(said, wanted))


@pytest.mark.parametrize("score", SCORES)
def test_a_score_is_the_quotient_of_what_rows_add(score: str) -> None:
    said, wanted = drawn(9)
    parts = [entity_sums(score, *pair) for pair in zip(said, wanted, strict=True)]
    above, below = (sum(part[i] for part in parts) for i in (0, 1))
    assert above / below == pytest.approx(counted(said, wanted)[score])


def test_what_one_row_adds() -> None:
    said = ["B-A", "I-A", "O", "B-B", "B-A"]
    wanted = ["B-A", "I-A", "O", "B-A", "O"]
    assert entity_sums("f1", said, wanted) == (2.0, 5.0)
    assert entity_sums("precision", said, wanted) == (1.0, 3.0)
    assert entity_sums("recall", said, wanted) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("said", "wanted"), [(["O", "O"], ["B-A", "O"]), (["B-A", "O"], ["O", "O"]), (["O"], ["O"])]
)
def test_where_nothing_is_right_each_score_is_zero(said: list[str], wanted: list[str]) -> None:
    assert entity_scores([said], [wanted]) == dict.fromkeys(SCORES, 0.0)
