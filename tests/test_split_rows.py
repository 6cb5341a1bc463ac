"""Held-out rows: disjoint sides, preserved proportions, unsplit groups, reproducible draws."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.split_rows import containing_texts, draw
from lora_cli.errors import LoraError

SEED = (0, 1)
phrases = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "D", "e"]), min_size=0, max_size=6).map(" ".join),
    min_size=2,
    max_size=40,
)
fractions = st.floats(0.05, 0.95)


def normal(text: str) -> list[str]:
    return text.lower().split()


def inside(short: list[str], long: list[str]) -> bool:
    """Return whether words occur consecutively in other words, by a slow and obvious search."""
    n = len(short)
    return bool(n) and any(long[i : i + n] == short for i in range(len(long) - n + 1))


def attempt(*args: object, **options: object) -> tuple[list[int], list[int]] | None:
    """Return (held out, remaining), or None if the rows cannot be split."""
    try:
        held_out, remaining = draw(*args, **options)  # type: ignore[arg-type]
    except LoraError:
        return None
    assert held_out.dtype == remaining.dtype == np.int64
    assert held_out.tolist() == sorted(held_out)
    assert remaining.tolist() == sorted(remaining)
    assert held_out.size
    assert remaining.size
    assert not set(held_out) & set(remaining)
    return held_out.tolist(), remaining.tolist()


@given(texts=phrases, fraction=fractions, seed=st.integers(0, 99))
def test_no_text_is_on_both_sides(texts: list[str], fraction: float, seed: int) -> None:
    sides = attempt(texts, fraction, (seed, 1))
    if sides is None:
        return
    held_out, remaining = sides
    assert sorted(held_out + remaining) == list(range(len(texts)))
    assert not {tuple(normal(texts[i])) for i in held_out} & {
        tuple(normal(texts[i])) for i in remaining
    }


@given(texts=phrases, fraction=fractions, seed=st.integers(0, 99))
def test_no_text_occurs_inside_one_of_the_other_side(
    texts: list[str], fraction: float, seed: int
) -> None:
    sides = attempt(texts, fraction, (seed, 1), "substring")
    if sides is None:
        return
    held_out, remaining = sides
    for i in held_out:
        for j in remaining:
            one, other = normal(texts[i]), normal(texts[j])
            assert one != other
            assert not inside(one, other)
            assert not inside(other, one)
    # a row in neither occurs in texts of both sides
    for i in set(range(len(texts))) - set(held_out) - set(remaining):
        for side in (held_out, remaining):
            assert any(inside(normal(texts[i]), normal(texts[j])) for j in side)


def test_substrings_consist_of_words_not_letters() -> None:
    texts = ["art", "party art show", "party", "a b", "b a", "c a b d"]
    seen = set()
    for seed in range(30):
        held_out, _ = draw(texts, 0.4, (seed,), "substring")
        seen |= {frozenset((i in held_out, j in held_out)) for i, j in [(0, 1), (2, 1), (3, 5)]}
        assert (0 in held_out) == (1 in held_out) == (2 in held_out)
        assert (3 in held_out) == (5 in held_out)
    assert seen == {frozenset({True}), frozenset({False})}
    both = draw(["art", "part"], 0.5, SEED, "substring")
    assert [side.size for side in both] == [1, 1]


@pytest.mark.parametrize(
    ("texts", "alone"),
    [
        (["返品", "返品したい", "商品を返品したいです。"], "交換"),
        (["退货", "我要退货", "你好，我要退货！"], "换货"),
        (["ราคา", "ราคาเท่าไร", "สินค้านี้ราคาเท่าไร"], "จัดส่ง"),
        (["ﾊﾞｯﾃﾘｰ", "バッテリーが膨らんだ", "スマホのバッテリーが膨らんだ"], "画面"),
        (["A型", "血液A型です", "私は血液Ａ型です"], "B型"),
    ],
)
def test_scripts_without_spaces_are_compared_by_characters(texts: list[str], alone: str) -> None:
    seen = set()
    for seed in range(20):
        held_out, _ = draw([*texts, alone], 0.25, (seed,), "substring")
        assert len({i in held_out for i in range(len(texts))}) == 1
        seen.add(0 in held_out)
    assert seen == {True, False}


def test_words_next_to_scripts_without_spaces_stay_words() -> None:
    # `part` does not contain `art`, whatever script is next to it
    assert containing_texts(["art", "partを買う", "artを買う"]) == [[2], [1], [2]]


def test_a_phrase_of_both_sides_is_in_neither() -> None:
    texts = ["good film", "a good film today", "one good film tomorrow"]
    held_out, remaining = draw(texts, 0.4, SEED, "substring")
    assert sorted([*held_out, *remaining]) == [1, 2]


@given(
    texts=phrases,
    groups=st.lists(st.sampled_from("uvwxyz"), min_size=40, max_size=40),
    fraction=fractions,
    disjoint=st.sampled_from(["exact", None]),
)
def test_a_group_is_never_on_both_sides(
    texts: list[str], groups: list[str], fraction: float, disjoint: str | None
) -> None:
    groups = groups[: len(texts)]
    sides = attempt(texts, fraction, SEED, disjoint, groups=groups)
    if sides is None:
        return
    held_out, remaining = sides
    assert sorted(held_out + remaining) == list(range(len(texts)))
    assert not {groups[i] for i in held_out} & {groups[i] for i in remaining}
    if disjoint:  # equal texts and groups connect rows in chains
        assert not {tuple(normal(texts[i])) for i in held_out} & {
            tuple(normal(texts[i])) for i in remaining
        }


def test_equal_texts_may_be_split_without_disjoint() -> None:
    held_out, remaining = draw(["same"] * 10, 0.3, SEED, None)
    assert (held_out.size, remaining.size) == (3, 7)
    with pytest.raises(LoraError, match=r"10 rows \(1 that differ\)[\s\S]*at data\.test"):
        draw(["same"] * 10, 0.3, SEED, "exact", location="data.test")


@pytest.mark.parametrize("disjoint", ["exact", "substring", None])
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_proportions_of_strata_are_preserved(fraction: float, disjoint: str | None) -> None:
    labels = ["a"] * 600 + ["b"] * 300 + ["c"] * 100
    texts = [f"word{i}" for i in range(1000)]
    held_out, remaining = draw(texts, fraction, SEED, disjoint, strata=labels)
    counts = Counter(labels[i] for i in held_out)
    assert counts == {"a": 600 * fraction, "b": 300 * fraction, "c": 100 * fraction}
    assert held_out.size + remaining.size == 1000


def test_proportions_of_strata_are_nearly_preserved_with_substring() -> None:
    random = np.random.default_rng(0)
    texts, labels = [], []
    for i in range(400):  # a sentence and one of its phrases, often with another label
        words = [f"w{i}x{j}" for j in range(8)]
        texts += [" ".join(words[2:5]), " ".join(words)]
        labels += [str(random.integers(2)), "1" if i % 4 else "0"]
    held_out, remaining = draw(texts, 0.25, SEED, "substring", strata=labels)
    share = [Counter(labels[i] for i in side)["1"] / side.size for side in (held_out, remaining)]
    assert abs(share[0] - share[1]) < 0.05
    assert held_out.size == pytest.approx(200, abs=20)


def test_only_the_seed_determines_the_draw() -> None:
    texts = [f"text {i}" for i in range(500)]
    first, again, other = (draw(texts, 0.1, (seed, 1))[0].tolist() for seed in (3, 3, 4))
    assert first == again != other
    assert len(first) == len(other) == 50
    # fixed values: held-out rows of published results must not change
    assert draw([f"t{i}" for i in range(12)], 0.34, (0, 1))[0].tolist() == GOLDEN


GOLDEN = [0, 1, 7, 11]


@pytest.mark.slow
def test_phrases_are_found_quickly() -> None:
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(3000)]
    texts = [
        " ".join(words[i] for i in random.integers(3000, size=size))
        for size in random.integers(1, 20, 20_000)
    ]
    held_out, remaining = draw(texts, 0.02, SEED, "substring")
    assert held_out.size == pytest.approx(400, rel=0.2)
    assert remaining.size > 18_000


@pytest.mark.parametrize("disjoint", ["exact", "substring", None])
@given(texts=phrases, fraction=fractions, has=st.lists(st.booleans(), min_size=40, max_size=40))
def test_rows_without_a_label_are_not_held_out(
    disjoint: str | None, texts: list[str], fraction: float, has: list[bool]
) -> None:
    has = has[: len(texts)]
    sides = attempt(texts, fraction, SEED, disjoint, answered=has)
    if sides is None:
        return
    held_out, remaining = sides
    assert all(has[i] for i in held_out)
    if disjoint is not None:
        assert not {tuple(normal(texts[i])) for i in held_out} & {
            tuple(normal(texts[i])) for i in remaining
        }
    if disjoint is None:
        assert len(held_out) == pytest.approx(fraction * sum(has), abs=1)
        assert len(held_out) + len(remaining) == len(texts)
    if all(has):
        assert sides == attempt(texts, fraction, SEED, disjoint)
