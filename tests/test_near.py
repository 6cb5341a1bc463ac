"""Equal and nearly equal texts: against all pairs compared one by one."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data import near
from lora_cli.data.near import Fingerprints, near_repeated, near_shared, repeated, shared
from lora_cli.data.splits import normalised

WORDS = [
    "river",
    "stone",
    "market",
    "window",
    "garden",
    "letter",
    "engine",
    "silver",
    "winter",
    "captain",
]


def prints(texts: Sequence[str], size: int = 1000) -> Fingerprints:
    return Fingerprints.of(list(texts[i : i + size]) for i in range(0, len(texts), size))


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(1000)) for _ in range(words))


def similarity(a: str, b: str) -> float:
    """Return the exact share of common runs."""
    x, y = (
        {t[i : i + near.RUN] for i in range(len(t) - near.RUN + 1)}
        for t in (f" {normalised(s)} ".ljust(near.RUN) for s in (a, b))
    )
    return len(x & y) / len(x | y)


@given(st.lists(st.text(alphabet="aB \n", max_size=4), max_size=12), st.integers(1, 5))
def test_repeated_are_those_that_stand_before(texts: list[str], size: int) -> None:
    normal = [normalised(text) for text in texts]
    expected = [(i, normal.index(t)) for i, t in enumerate(normal) if normal.index(t) < i]
    rows, first = repeated(prints(texts, size))
    assert list(zip(rows.tolist(), first.tolist(), strict=True)) == expected


@given(*[st.lists(st.text(alphabet="aB ", max_size=3), max_size=8)] * 2)
def test_shared_are_those_that_stand_on_the_other_side(a: list[str], b: list[str]) -> None:
    others = [normalised(text) for text in b]
    expected = [
        (i, others.index(normalised(t))) for i, t in enumerate(a) if normalised(t) in others
    ]
    rows, first = shared(prints(a), prints(b))
    assert list(zip(rows.tolist(), first.tolist(), strict=True)) == expected


@pytest.mark.parametrize("words", [5, 12, 60, 2000])
def test_changed_copies_are_found_and_strangers_are_not(words: int) -> None:
    rng = random.Random(words)
    count = 300 if words < 1000 else 20
    texts = [sentence(rng, words) for _ in range(count)]
    copies = []
    for text in texts:  # a letter is lost, or a mark and capitals are added
        at = rng.randrange(len(text))
        shorter = text[:at] + text[at + 1 :]
        copies.append(rng.choice([f"{text.upper()} !", f"{text}.", shorter]))
    alike = [similarity(a, b) >= 0.86 for a, b in zip(texts, copies, strict=True)]
    strangers = [sentence(rng, words) for _ in range(count)]
    rows, others = near_shared(prints(copies + strangers), prints(texts))
    assert (others == rows).all()  # the partner is the original, and no stranger has one
    found = np.isin(np.flatnonzero(alike), rows)
    assert sum(alike) > count / 2
    assert found.mean() >= 0.97


def test_within_a_split_as_with_all_pairs_compared() -> None:
    rng = random.Random(1)
    texts: list[str] = []
    for _ in range(150):
        text = sentence(rng, 8)
        words = text.split()
        texts += [text, f"well {text}", " ".join([*words[:4], "quite", *words[4:]])]
        texts += [text] if rng.random() < 0.2 else []
    rng.shuffle(texts)
    rows, others = near_repeated(prints(texts))
    exact = {
        i
        for i in range(len(texts))
        if texts[i] not in texts[:i]
        and any(t != texts[i] and similarity(t, texts[i]) >= near.SIMILAR for t in texts[:i])
    }
    both = exact & set(rows.tolist())
    assert (others < rows).all()
    assert len(both) / len(exact) > 0.9
    assert all(
        similarity(texts[a], texts[b]) > 0.65
        for a, b in zip(rows.tolist(), others.tolist(), strict=True)
    )


def test_equal_texts_are_not_near_duplicates() -> None:
    texts = prints(["the same text here", "The  same TEXT here", "something else"])
    assert len(near_repeated(texts)[0]) == 0
    assert len(near_shared(texts, texts)[0]) == 0


def test_a_changed_word_of_a_short_text_makes_another_text() -> None:
    pairs = ["turn the light on", "turn the light off", "a", "b", "", "I like it", "I hate it"]
    assert len(near_repeated(prints(pairs))[0]) == 0


def test_the_same_texts_give_the_same_hashes() -> None:
    texts = ["a warm and funny film", "the plot is dull", "…日本語 \U0001f600 \ud800"]
    once, parts = prints(texts), prints(texts, 1)
    assert (once.exact == parts.exact).all()
    assert (once.near == parts.near).all()
    assert once.near[0, :3].tolist() == [
        648874325,
        96886345,
        525527221,
    ]  # on any machine, in any process


def test_memory_does_not_grow_with_the_length_of_the_texts() -> None:
    text = "some words that go on and on " * 3000
    tracemalloc.start()
    result = Fingerprints.of([f"{i} {text}"] * 10 for i in range(20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(result) == 200
    assert peak < 60e6  # the texts are 17 MB, their codes would be 70


def test_only_so_many_rows_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MOST_ROWS", 3)
    texts = [f"{word} is a long and winding text" for word in "ab"] * 3
    result = prints(texts, 2)
    assert (len(result), len(result.near)) == (6, 3)
    assert near_repeated(result)[0].tolist() == [1]
    assert len(repeated(result)[0]) == 4
