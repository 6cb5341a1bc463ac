"""Parse the text of a cell as a number, a binary flag, or a list of labels.

People write numbers with separators (`2,301`), currency symbols (`¥8,501`) and the digits of their
keyboard (full-width, Arabic). `data.format.decimal` and `data.format.thousands` in the recipe say
what a comma or a dot means.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
FLOAT32_MAX = 3.4028234663852886e38
CURRENCY_WORDS = (
    "円|元|원|圓|圆|USD|EUR|GBP|JPY|CNY|RMB|KRW|CHF|AUD|CAD|INR|SEK|NOK|DKK|PLN|CZK|BRL"
)
SPACES = " \u00a0\u2009\u202f'\u2019"  # between groups of three digits
MINUS = str.maketrans({"\u2212": "-", "\u066b": ".", "\u066c": "'"})
GROUPS = {mark: re.compile(rf"\d{{1,3}}([{mark}]\d{{3}})+") for mark in (",", ".", SPACES)}
INDIAN = re.compile(r"\d{1,2}(,\d\d)+,\d{3}")  # lakh and crore
FLAGS = {"0": 0, "false": 0, "0.0": 0, "1": 1, "true": 1, "1.0": 1}


class NumberForm(NamedTuple):
    """How numbers are written: the decimal mark, and the thousands separator."""

    decimal: str = "."
    thousands: str | None = None


PLAIN = NumberForm()
FORMS = (PLAIN, NumberForm(","), NumberForm(".", ","), NumberForm(",", "."))


def half_width(text: str) -> str:
    """Replace full-width characters, and the digits of any script, by ASCII.

    NFKC would change more: it turns 5 squared into 52.
    """
    if text.isascii():
        return text
    characters = []
    for character in text:
        digit = unicodedata.decimal(character, None)
        if digit is not None:
            character = str(digit)
        elif "\uff01" <= character <= "\uff5e":
            character = chr(ord(character) - 0xFEE0)
        elif "\uffe0" <= character <= "\uffe6":  # currency symbols
            character = unicodedata.normalize("NFKC", character)
        characters.append(character)
    return "".join(characters).translate(MINUS)


def split_currency(text: str) -> tuple[str, str]:
    """Split an amount into its number and the currency symbol or name before or after it."""
    symbols = "".join({character for character in text if unicodedata.category(character) == "Sc"})
    words = "|".join([*map(re.escape, symbols), CURRENCY_WORDS])
    match = re.fullmatch(rf"([-+]?)\s*({words})\s*(.*)", text) or re.fullmatch(
        rf"([-+]?)(?P<number>.*?)\s*({words})", text
    )
    if match is None:
        return text, ""
    if "number" in match.groupdict():
        return match[1] + match["number"], match[3]
    return match[1] + match[3], match[2]


def read_number(text: str, form: NumberForm = PLAIN) -> float | None:
    """Return the number that a text represents.

    Returns:
        The number; None if the text is not a number, does not fit a float32, or has a comma or dot
        that the form does not explain.
    """
    number = text.strip()
    if not re.fullmatch(NUMBER, number):
        number, _ = split_currency(half_width(number))
    if not re.fullmatch(NUMBER, number):  # most numbers already match
        sign = number[:1] if number[:1] in ("-", "+") else ""
        integer_part, mark, fraction = number.removeprefix(sign).partition(form.decimal)
        for separator in (form.thousands, SPACES):
            if separator and GROUPS[separator].fullmatch(integer_part):
                integer_part = re.sub(f"[{separator}]", "", integer_part)
        if form.thousands == "," and INDIAN.fullmatch(integer_part):
            integer_part = integer_part.replace(",", "")
        number = sign + integer_part + ("." if mark else "") + fraction
    elif form.decimal == "," and "." in number:
        if form.thousands != "." or not GROUPS["."].fullmatch(number.lstrip("+-")):
            return None
        number = number.replace(".", "")
    if not re.fullmatch(NUMBER, number):
        return None
    value = float(number)
    return value if abs(value) <= FLOAT32_MAX else None


def currency_of(text: str) -> str:
    """Return the currency symbol or name of an amount; empty if it has none."""
    return split_currency(half_width(text).strip())[1]


def other_forms(text: str, form: NumberForm) -> str:
    """Return which keys of `data.format` would turn a text into a number, and which number."""
    suggestions = []
    for other in FORMS:
        value = read_number(text, other)
        if value is None or other == form:
            continue
        keys = [f"decimal='{other.decimal}'"] if other.decimal != form.decimal else []
        if other.thousands != form.thousands:
            keys.append(f"thousands='{other.thousands}'" if other.thousands else "thousands=null")
        flags = " ".join(f'--set "data.format.{key}"'.replace("'", "") for key in keys)
        suggestions.append(
            f"`{flags}` reads {value:g}" if value < 1e6 else f"`{flags}` reads {value:.0f}"
        )
    return ", ".join(suggestions[:2])


def number_form(texts: Sequence[str], delimiter: str) -> NumberForm | None:
    """Return how the numbers of a column are written; None if they are not numbers.

    Amounts in several currencies do not count as numbers, as they cannot be compared.

    A comma before three digits is read as a thousands separator if the file is comma-separated, or
    if other numbers of the column have no comma; in `1,2` it may separate two labels.

    Args:
        texts: The values of the column.
        delimiter: The delimiter of the file's columns.
    """
    fitting = [form for form in FORMS if all(read_number(text, form) is not None for text in texts)]
    if not fitting or len({sign for text in texts if (sign := currency_of(text))}) > 1:
        return None
    plain = [split_currency(half_width(text).strip())[0].lstrip("+-") for text in texts]
    if FORMS[0] in fitting:
        dotted = [text for text in plain if "." in text]
        has_dot_groups = (
            FORMS[3] in fitting
            and delimiter == ";"
            and 0 < len(dotted) < len(plain)
            and all(text[0] != "0" and GROUPS["."].fullmatch(text) for text in dotted)
        )
        return FORMS[3] if has_dot_groups else FORMS[0]
    if FORMS[1] in fitting and FORMS[2] in fitting:  # three digits follow every comma
        has_zero = any(text.startswith("0,") for text in plain)
        is_long = any(text.isdecimal() and len(text) > 3 for text in plain)
        all_have_commas = all("," in text for text in plain)
        is_fraction = has_zero or is_long or (delimiter == ";" and all_have_commas)
        return FORMS[1] if is_fraction else FORMS[2]
    if FORMS[1] in fitting:
        is_unambiguous = any(re.match(r"0,\d|\d+,0", text) for text in plain)
        return FORMS[1] if is_unambiguous else None
    return fitting[0]


def binary_value(value: Any) -> int | None:
    """Return a binary value as 0 or 1; None if it is not one."""
    if isinstance(value, int | float):
        value = str(float(value))
    return FLAGS.get(half_width(str(value)).strip().lower())


def split_labels(text: str, separator: str) -> list[str]:
    """Split a text into labels; full-width and half-width separators count as the same."""
    if len(separator) == 1:
        narrow = half_width(separator).replace("\uff64", "\u3001").replace("\uff65", "\u30fb")
        wide = chr(ord(narrow) + 0xFEE0) if "!" <= narrow <= "~" else narrow
        # half-width forms outside ASCII, of the ideographic comma and the middle dot
        half_width_form = {"\u3001": "\uff64", "\u30fb": "\uff65"}.get(narrow, "")
        parts = re.split(f"[{re.escape(narrow + wide + half_width_form)}]", text)
    else:
        parts = text.split(separator)
    return [part.strip() for part in parts if part.strip()]
