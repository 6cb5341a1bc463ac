"""Numbers, binary flags and lists of labels in human notation."""

from __future__ import annotations

from typing import Any

import pytest

from lora_cli.data.cell_values import (
    PLAIN,
    NumberForm,
    binary_value,
    currency_of,
    half_width,
    number_form,
    other_forms,
    read_number,
    split_labels,
)

COMMA, THOUSANDS, GERMAN = NumberForm(","), NumberForm(".", ","), NumberForm(",", ".")


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        ("812", PLAIN, 812), (" -1.5e3 ", PLAIN, -1500), (".5", PLAIN, 0.5), ("5.", PLAIN, 5),
        ("\uff18\uff12", PLAIN, 82), ("\uff14\uff0e\uff15", PLAIN, 4.5), ("\u22125", PLAIN, -5),
        ("\u0662\u0663", PLAIN, 23), ("\u0662\u066b\u0665", PLAIN, 2.5),
        ("4059\u5186", PLAIN, 4059), ("\uffe58501", PLAIN, 8501), ("$ 12.50", PLAIN, 12.5),
        ("-\u20ac5", PLAIN, -5), ("\u20ac-5", PLAIN, -5), ("12 EUR", PLAIN, 12),
        ("CHF 1'200.50", PLAIN, 1200.5), ("1 234 567", PLAIN, 1234567),
        ("1\u00a0234", PLAIN, 1234), ("1\u202f234,5", COMMA, 1234.5),
        ("2,301", THOUSANDS, 2301), ("\uff12\uff0c\uff13\uff10\uff11", THOUSANDS, 2301),
        ("\u00a58,501", THOUSANDS, 8501), ("1,234,567.5", THOUSANDS, 1234567.5),
        ("12,34,567", THOUSANDS, 1234567), ("-2,301", THOUSANDS, -2301), ("812", THOUSANDS, 812),
        ("2,301", COMMA, 2.301), ("0,5", COMMA, 0.5), ("12,50 \u20ac", COMMA, 12.5),
        ("2.301", GERMAN, 2301), ("1.234.567,5", GERMAN, 1234567.5), ("7,5", GERMAN, 7.5),
    ],
)  # fmt: skip
def test_numbers(text: str, form: NumberForm, expected: float) -> None:
    assert read_number(text, form) == expected


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("2,301", PLAIN), ("1,5", PLAIN), ("0.5", COMMA), ("1.234,5", COMMA), ("12,34", THOUSANDS),
        ("1,2345", THOUSANDS), ("0.5", GERMAN), ("1.23", GERMAN), ("1_0", PLAIN), ("nan", PLAIN),
        ("inf", PLAIN), ("1e99", PLAIN), ("12%", PLAIN), ("5\u00b2", PLAIN), ("\u00bd", PLAIN),
        ("3\u4e07", PLAIN), ("", PLAIN), ("$", PLAIN), ("\u5186", PLAIN), ("1 2", PLAIN),
        ("1.2.3", PLAIN), ("--5", PLAIN), ("0x1F", PLAIN), ("five", PLAIN),
    ],
)  # fmt: skip
def test_other_texts_are_not_numbers(text: str, form: NumberForm) -> None:
    assert read_number(text, form) is None


@pytest.mark.parametrize(
    ("texts", "delimiter", "form"),
    [
        (["2,301", "812", "1,050"], ",", THOUSANDS),
        (["2,301", "1,050"], ",", THOUSANDS),
        (["2,301", "812"], "\t", THOUSANDS),
        (
            ["2,301", "1,250"],
            ";",
            COMMA,
        ),  # in a semicolon-separated file, a comma is a decimal mark
        (["2,301", "812"], ";", THOUSANDS),
        (["0,250", "2,301"], ",", COMMA),
        (["2,301", "1812"], ",", COMMA),  # a number of four digits has no separator
        (["0,5", "2,25", "3"], ";", COMMA),
        (["1,2", "2,3"], ",", None),  # two labels
        (["1,234.5", "2"], ",", THOUSANDS),
        (["1.234,5", "2"], ";", GERMAN),
        (["2.301", "812"], ";", GERMAN),
        (["2.301", "812"], ",", PLAIN),
        (["2.301", "1.250"], ";", PLAIN),
        (["0.125", "1.250", "3"], ";", PLAIN),
        (["1.2", "1,2"], ",", None),
        (["\uff18\uff12", "\uff14\uff0e\uff15"], ",", PLAIN),
        (["\u00a58,501", "\u00a5920"], ",", THOUSANDS),
        (["4059\u5186", "312\u5186"], ",", PLAIN),
        (["a", "1"], ",", None),
    ],
)
def test_the_number_format_of_a_column(
    texts: list[str], delimiter: str, form: NumberForm | None
) -> None:
    assert number_form(texts, delimiter) == form


def test_settings_that_would_give_a_number_are_suggested() -> None:
    assert other_forms("2,301", PLAIN) == (
        '`--set "data.format.decimal=,"` reads 2.301, `--set "data.format.thousands=,"` reads 2301'
    )
    assert "reads 1234.5" in other_forms("1.234,5", COMMA)
    assert other_forms("five", PLAIN) == ""
    assert [currency_of(t) for t in ("\uffe5812", "4059\u5186", "12", "$-5")] == [
        "\xa5",
        "円",
        "",
        "$",
    ]


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("請求、配送", "、", ["請求", "配送"]), ("請求､配送、", "、", ["請求", "配送"]),
        ("a\uff1bb;c", ";", ["a", "b", "c"]), ("a\uff0cb,c", ",", ["a", "b", "c"]),
        ("a\uff5cb|c", "\uff5c", ["a", "b", "c"]), ("a b", " ", ["a", "b"]),
        ("a||b|c", "||", ["a", "b|c"]), ("a^b]c", "^", ["a", "b]c"]), ("", ",", []),
    ],
)  # fmt: skip
def test_labels_in_a_text(text: str, separator: str, expected: list[str]) -> None:
    assert split_labels(text, separator) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0), (1.0, 1), (True, 1), ("\uff11", 1), ("\uff10", 0), (" TRUE ", 1), ("false", 0),
     (2, None), (None, None), ("", None), ("yes", None)],
)  # fmt: skip
def test_flags(value: Any, expected: int | None) -> None:
    assert binary_value(value) == expected


def test_only_width_and_digits_change() -> None:
    assert half_width("\uff21\uff11\uff0c \u0969 5\u00b2 文") == "A1, 3 5\u00b2 文"


def test_amounts_in_several_currencies_are_not_numbers() -> None:
    assert number_form(["$1,200", "$3"], ",") == NumberForm(".", ",")
    assert number_form(["$1,200", "3"], ",") == NumberForm(".", ",")
    assert number_form(["$1,200", "\u20ac3"], ",") is None
