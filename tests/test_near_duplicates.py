"""Tests of equal and nearly equal texts, against a comparison of all pairs."""

from __future__ import annotations

import functools
import random
import tracemalloc
import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.characters import normalised
from lora_cli.preprocessing import near_duplicates
from lora_cli.preprocessing.near_duplicates import (
    Fingerprints,
    near_repeated,
    near_shared,
    repeated,
    shared,
)

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
    """Return the exact Jaccard similarity, for the shingle length that both texts have."""
    a, b = normalised(a), normalised(b)
    shares = [0.0]
    for run, suits in (
        (3, lambda text: len(text) < near_duplicates.SHORT + near_duplicates.AROUND_SHORT),
        (5, lambda text: len(text) >= near_duplicates.SHORT),
    ):
        if suits(a) and suits(b):
            x, y = runs(a, run), runs(b, run)
            shares.append(len(x & y) / len(x | y))
    return max(shares)


@functools.cache
def runs(text: str, length: int) -> set[str]:
    """Return the shingles of a text; those that start with a CJK character have two characters."""
    text = f" {text} ".ljust(5)
    wide = [unicodedata.east_asian_width(letter) == "W" for letter in text] + [False]
    sizes = [2 if wide[i] or wide[i + 1] else length for i in range(len(text))]
    return {text[i : i + n] for i, n in enumerate(sizes) if i + n <= len(text)}


@given(st.lists(st.text(alphabet="aB \n", max_size=4), max_size=12), st.integers(1, 5))
def test_repeated_texts_are_found(texts: list[str], size: int) -> None:
    normal = [normalised(text) for text in texts]
    expected = [(i, normal.index(t)) for i, t in enumerate(normal) if normal.index(t) < i]
    rows, first = repeated(prints(texts, size))
    assert list(zip(rows.tolist(), first.tolist(), strict=True)) == expected


@given(*[st.lists(st.text(alphabet="aB ", max_size=3), max_size=8)] * 2)
def test_texts_shared_by_two_splits_are_found(a: list[str], b: list[str]) -> None:
    others = [normalised(text) for text in b]
    expected = [
        (i, others.index(normalised(t))) for i, t in enumerate(a) if normalised(t) in others
    ]
    rows, first = shared(prints(a), prints(b))
    assert list(zip(rows.tolist(), first.tolist(), strict=True)) == expected


@pytest.mark.parametrize("words", [5, 12, 60, 2000])
@pytest.mark.slow_after(1)
def test_changed_copies_are_found_and_unrelated_texts_are_not(words: int) -> None:
    rng = random.Random(words)
    count = 300 if words < 1000 else 20
    texts = [sentence(rng, words) for _ in range(count)]
    copies = []
    for text in texts:  # a character is dropped, or punctuation and capitals are added
        at = rng.randrange(len(text))
        shorter = text[:at] + text[at + 1 :]
        copies.append(rng.choice([f"{text.upper()} ok", f"{text}s", shorter]))
    alike = [similarity(a, b) >= 0.86 for a, b in zip(texts, copies, strict=True)]
    strangers = [sentence(rng, words) for _ in range(count)]
    rows, others = near_shared(prints(copies + strangers), prints(texts))
    assert (others == rows).all()  # the partner is the original, and unrelated texts have none
    found = np.isin(np.flatnonzero(alike), rows)
    assert sum(alike) > count / 2
    assert found.mean() >= 0.97


@pytest.mark.slow
def test_near_duplicates_within_a_split_equal_those_of_all_pairs() -> None:
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
        and any(
            t != texts[i] and similarity(t, texts[i]) >= near_duplicates.MIN_SIMILARITY
            for t in texts[:i]
        )
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


def test_a_short_text_with_a_changed_word_is_another_text() -> None:
    pairs = ["turn the light on", "turn the light off", "a", "b", "", "I like it", "I hate it"]
    assert len(near_repeated(prints(pairs))[0]) == 0


def test_the_same_texts_give_the_same_hashes() -> None:
    texts = ["a warm and funny film", "the plot is dull", "…日本語 \U0001f600 \ud800"]
    once, parts = prints(texts), prints(texts, 1)
    assert (once.exact == parts.exact).all()
    assert (once.near == parts.near).all()
    assert once.near[0, :3].tolist() == [
        312251911,
        28563615,
        1848495,
    ]  # the same on any machine, in any process


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_the_texts() -> None:
    text = "some words that go on and on " * 3000
    tracemalloc.start()
    result = Fingerprints.of([f"{i} {text}"] * 10 for i in range(20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(result) == 200
    assert peak < 60e6  # the texts are 17 MB, their codes would be 70


def test_the_number_of_compared_rows_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_ROWS", 3)
    texts = [f"{word} is a long and winding text" for word in "ab"] * 3
    result = prints(texts, 2)
    assert (len(result), len(result.near)) == (6, 3)
    assert near_repeated(result)[0].tolist() == [1]
    assert len(repeated(result)[0]) == 4


@pytest.mark.parametrize(
    ("text", "copy"),
    [
        ("商品を返品したいです。", "商品を返品したいです"),
        ("ガソリン代はいくらですか", "ｶﾞｿﾘﾝ代はいくらですか？"),
        ("パソコンが届かない", unicodedata.normalize("NFD", "パソコンが届かない")),
        ("注文番号１２３は？", "注文番号123は"),
        ("我要退货", "我要退货！"),
        ("ราคาเท่าไร", " ราคา\u200bเท่าไร "),
        ("반품하고 싶어요", unicodedata.normalize("NFD", "반품하고 싶어요.")),
        ("मुझे वापस करना है।", "मुझे वापस करना है"),
        ("أريد إرجاع المنتج؟", "أريد إرجاع المنتج"),
        ("Straße", "STRASSE"),
        ("Café", "Cafe\u0301 !"),
        ("返品 したい", "返品したい"),
    ],
)
def test_copies_with_other_typography_are_equal(text: str, copy: str) -> None:
    rows, first = repeated(prints([text, copy]))
    assert (rows.tolist(), first.tolist()) == ([1], [0])


def test_texts_of_punctuation_are_not_normalised_away() -> None:
    assert len(repeated(prints(["?", "!", "...", "", "\u200b!"]))[0]) == 1  # the last is `!`


@pytest.mark.parametrize(
    ("text", "changed", "other"),
    [
        (
            "先週買った靴のサイズが合わないので交換してもらえますか",
            "先週買った靴のサイズが合わないので交換してもらえませんか",
            "先週買った服の色が気に入らないので返金してもらえますか",
        ),
        (
            "昨天买的鞋子尺码不合适，请问可以帮我换一双大一点的吗",
            "昨天买的鞋子尺码不合适，请问可以帮我换一双大一些的吗",
            "昨天买的衣服颜色不好看，请问可以帮我退货并且退款的吗",
        ),
        ("where can I see what I ordered", "where can I see what i orderd", "when will it be here"),
    ],
)
def test_changed_copies_of_short_texts_are_found(text: str, changed: str, other: str) -> None:
    rows, partner = near_repeated(prints([text, other, changed]))
    assert (rows.tolist(), partner.tolist()) == ([2], [0])


def test_the_similarity_of_short_texts_is_exact() -> None:
    things = ["帽子", "椅子", "靴", "時計", "スマホ", "バッグ", "椅子と机", "大きな椅子"]
    texts = [f"{thing}を返品したいのですが" for thing in things]
    texts += [f"where is my {thing}" for thing in ("bag", "bags", "big bag", "hat", "old hat")]
    rows, others = near_repeated(prints(texts))
    found = set(zip(rows.tolist(), others.tolist(), strict=True))
    assert all(similarity(texts[i], texts[j]) >= near_duplicates.MIN_SIMILARITY for i, j in found)
    pairs = {
        (i, j) for i in range(len(texts)) for j in range(i)
        if similarity(texts[i], texts[j]) >= near_duplicates.MIN_SIMILARITY
    }  # fmt: skip
    assert pairs
    assert {i for i, _ in pairs} == {i for i, _ in found}
    # two texts of different splits, each pair by itself
    for i in range(len(texts)):
        for j in range(i):
            near_rows, _ = near_shared(prints([texts[i]]), prints([texts[j]]))
            assert bool(len(near_rows)) == (
                similarity(texts[i], texts[j]) >= near_duplicates.MIN_SIMILARITY
            )


def test_texts_around_the_limit_of_short_texts_are_compared() -> None:
    for length in range(
        near_duplicates.SHORT - 3, near_duplicates.SHORT + near_duplicates.AROUND_SHORT + 3
    ):
        text = sentence(random.Random(length), 9)[:length]
        assert similarity(text, text + "x") >= 0.85
        assert near_repeated(prints([text, text + "x"]))[0].tolist() == [1], length
