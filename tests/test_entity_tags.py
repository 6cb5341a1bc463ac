"""Tagging schemes: how they are read and recognised, and the entities that tags stand for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from lora_cli.data.entity_tags import (
    Beginnings,
    Entity,
    entities_of,
    iob2_tags,
    tag_error,
)
from lora_cli.metrics.entity_scores import entity_scores, entity_sums

ENTITIES = [Entity(0, 1, "PER"), Entity(2, 4, "LOC"), Entity(4, 5, "LOC"), Entity(6, 9, "PER")]
SCHEMES = {
    "iob2": "B-PER O B-LOC I-LOC B-LOC O B-PER I-PER I-PER",
    "iob1": "I-PER O I-LOC I-LOC B-LOC O I-PER I-PER I-PER",
    "iobes": "S-PER O B-LOC E-LOC S-LOC O B-PER I-PER E-PER",
    "bilou": "U-PER O B-LOC L-LOC U-LOC O B-PER I-PER L-PER",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_read_and_recognised(scheme: str) -> None:
    tags = SCHEMES[scheme].split()
    assert entities_of(tags) == ENTITIES
    name = "iobes" if scheme == "bilou" else scheme
    assert Beginnings.of([tags] * 3).scheme == name
    assert tag_error(tags, name) == ""  # type: ignore[arg-type]


def test_io_merges_adjacent_entities_of_one_type() -> None:
    for tags in (["PER", "O", "LOC", "LOC", "PER"], ["I-PER", "O", "I-LOC", "I-LOC", "I-PER"]):
        assert entities_of(tags) == [Entity(0, 1, "PER"), Entity(2, 4, "LOC"), Entity(4, 5, "PER")]
        assert Beginnings.of([tags]).scheme == "io"
        assert tag_error(tags, "io") == ""


@pytest.mark.parametrize(
    ("scheme", "tags", "what"),
    [
        ("iob2", "O I-PER", "tag 2, `I-PER`, continues an entity that no `B-PER` began"),
        ("iob2", "B-LOC I-PER", "continues an entity that no `B-PER` began"),
        ("iob2", "B-PER E-PER", "a prefix that only IOBES has, and the scheme is iob2"),
        ("iob2", "PER O", "neither O nor a type with a prefix, such as `B-PER`"),
        ("iob1", "o O", "`o`, is neither O nor"),
        ("iob1", "S-PER", "only IOBES has"),
        ("io", "O B-", "tag 2, `B-`, has a prefix, and no type after it"),
        ("io", "O B-PER", "begins with B, which IO does not have"),
        ("iobes", "O I-PER E-PER", "tag 2, `I-PER`, continues an entity that no `B-PER` began"),
        ("iobes", "E-PER", "continues an entity that no `B-PER` began"),
        ("iobes", "B-PER O", "tag 2, `O`, follows `B-PER`, which no `E-PER` has ended"),
        ("iobes", "B-PER S-PER", "which no `E-PER` has ended"),
        ("iobes", "B-PER E-LOC", "continues an entity that no `B-LOC` began"),
        ("iobes", "O B-PER I-PER", "the last tag is `I-PER`, which no `E-PER` has ended"),
    ],
)
def test_tags_that_violate_their_scheme_are_an_error(scheme: Any, tags: str, what: str) -> None:
    assert what in tag_error(tags.split(), scheme)


def test_tags_of_a_single_type_may_be_only_prefixes() -> None:
    tags = ["B", "I", "O", "B"]
    assert entities_of(tags) == [Entity(0, 2, "entity"), Entity(3, 4, "entity")]
    assert Beginnings.of([tags]).scheme == "iob2"
    assert tag_error(tags, "iob2") == ""
    assert "no `B-entity` began" in tag_error(["O", "I"], "iob2")


def test_iob2_tags_survive_a_round_trip() -> None:
    draw = random.Random(0)
    for _ in range(200):
        at, entities = 0, []
        while at < 12:
            length = draw.randint(1, 3)
            if draw.random() < 0.5:
                entities.append(Entity(at, at + length, draw.choice("AB")))
            at += length
        tags = iob2_tags(entities, 15)
        assert entities_of(tags) == entities
        assert tag_error(tags, "iob2") == ""


def counted_by_hand(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return the entities by conlleval's two conditions, for the begin and end of a chunk."""
    result, start = set(), None
    pairs = [("O", ""), *((t[:1], t[2:]) for t in tags), ("O", "")]
    for i in range(1, len(pairs)):
        (p, kind_before), (q, kind) = pairs[i - 1], pairs[i]
        ends = p in "BIES" and (q in "BSO" or p in "ES" or kind_before != kind)
        begins = q in "BS" or (q in "IE" and (p in "ESO" or kind_before != kind))
        if ends and start is not None:
            result.add((start, i - 1, kind_before))
            start = None
        if begins:
            start = i - 1
    return result


def test_scores_equal_those_of_an_independent_count() -> None:
    draw = random.Random(1)
    kinds = ["O", "O", *(f"{p}-{k}" for p in "BI" for k in ("X", "Y"))]
    rows = [[draw.choice(kinds) for _ in range(draw.randint(1, 12))] for _ in range(60)]
    other = [[t if draw.random() < 0.7 else draw.choice(kinds) for t in row] for row in rows]
    said, expected = (
        {(i, *e) for i, row in enumerate(x) for e in counted_by_hand(row)} for x in (other, rows)
    )
    assert said == {
        (i, e.start, e.end, e.label) for i, row in enumerate(other) for e in entities_of(row)
    }
    right = len(said & expected)
    precision, recall = right / len(said), right / len(expected)
    result = entity_scores(other, rows)
    assert result["precision"] == pytest.approx(precision)
    assert result["recall"] == pytest.approx(recall)
    assert result["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert 0.1 < result["f1"] < 0.9
    for name, value in result.items():
        sums = [entity_sums(name, *pair) for pair in zip(other, rows, strict=True)]
        assert sum(a for a, _ in sums) / sum(b for _, b in sums) == pytest.approx(value)
    assert entity_scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}
