"""Texts of every script: compared, measured in columns, and cut between characters."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.characters import (
    aligned,
    cells,
    difference_of_form,
    first_characters,
    normalised,
    pairs_of_letters,
    shortened,
    without_half_character,
    words,
)

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
JAPAN = "\U0001f1ef\U0001f1f5"


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@given(st.text(), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_the_normal_form_makes_no_difference(text: str, form: str) -> None:
    assert normalised(unicodedata.normalize(form, text)) == normalised(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("商品Aを返品", ["商", "品", "A", "を", "返", "品"]),
        ("スーパー々", ["ス", "ー", "パ", "ー", "々"]),
        ("ที่นี่", ["ที่", "นี่"]),  # a letter keeps its marks
        ("我要 退货", ["我", "要", "退", "货"]),
        ("반품하고 싶어요", ["반품하고", "싶어요"]),
        ("मुझे वापस", ["मुझे", "वापस"]),
        ("أريد إرجاع", ["أريد", "إرجاع"]),
        ("schön für dich", ["schön", "für", "dich"]),
        ("cafe\u0301 col·lega", ["cafe\u0301", "col·lega"]),
        ("", []),
    ],
)
def test_words_are_letters_where_there_are_no_spaces(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_pairs_of_letters_overlap() -> None:
    assert pairs_of_letters("返品A交換 した") == ["返品", "交換", "した"]
    assert pairs_of_letters("返品した") == ["返品", "品し", "した"]
    assert pairs_of_letters("abc") == []


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("abc", 3),
        ("返品", 4),
        ("ＡＢ", 4),
        ("ｶﾞ", 2),
        ("반품", 4),
        ("cafe\u0301", 4),
        (FAMILY, 2),
        (JAPAN, 2),
        ("", 0),
    ],
)
def test_cells_are_the_columns_of_a_terminal(text: str, width: int) -> None:
    assert cells(text) == width


def test_columns_are_aligned_by_what_they_take_on_the_screen() -> None:
    lines = aligned([["label", "rows"], ["返品", "12"], ["cafe\u0301", "3"], [FAMILY, "456"]])
    assert [cells(line) for line in lines] == [11] * 4
    assert lines[1] == "返品     12"


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("返品したい", 10, "返品したい"),
        ("返品したい", 9, "返品した…"),
        ("返品したい", 8, "返品し…"),
        ("abcdef", 5, "abcd…"),
        ("e\u0301" * 4, 3, "e\u0301e\u0301…"),
        (FAMILY * 3, 5, FAMILY * 2 + "…"),
        (JAPAN * 3, 4, JAPAN + "…"),
        ("\u0301" * 100, 3, "\u0301" * 96 + "…"),  # marks without end
    ],
)
def test_a_shortened_text_ends_on_a_whole_character(text: str, width: int, expected: str) -> None:
    assert shortened(text, width) == expected
    assert cells(shortened(text, width)) <= width


def test_the_first_characters_are_whole() -> None:
    assert first_characters("ab" + FAMILY, 4) == "ab"
    assert first_characters("ab" + FAMILY, 7) == "ab" + FAMILY
    assert first_characters("か\u3099き", 1) == "か"  # a character longer than the room is cut
    assert first_characters("あか\u3099き", 2) == "あ"


def test_what_cannot_be_a_whole_character_is_left_out_at_the_end() -> None:
    assert without_half_character("ok " + FAMILY[:2]) == "ok " + FAMILY[0]
    assert without_half_character("ok " + JAPAN[:1]) == "ok "
    assert without_half_character("ok " + JAPAN * 2) == "ok " + JAPAN * 2


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ("ガス", unicodedata.normalize("NFD", "ガス"), "normal form of Unicode (\\u30ac"),
        ("返品A", "返品Ａ", "width"),
        ("ﾃﾚﾋﾞ", "テレビ", "width"),
        ("Refund", "refund", "case"),
        ("返品 希望", "返品希望", "spaces"),
        ("返品\u200b", "返品", "cannot be seen"),
        ("返品", "交換", ""),
        ("same", "same", ""),
    ],
)
def test_labels_that_look_alike_differ_in_something_that_is_named(
    one: str, other: str, what: str
) -> None:
    assert what in difference_of_form(one, other)
    assert bool(difference_of_form(one, other)) == bool(what)
