"""What a text in a column means: a number, one of two flags, or several labels.

People write numbers with separators (`2,301`), signs of a currency (`¥8,501`) and the digits of
their keyboard (full-width, Arabic). What a comma means, the recipe says: `data.format.decimal` and
`data.format.thousands`.
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
    """How numbers are written: what stands before the fraction, and between thousands."""

    decimal: str = "."
    thousands: str | None = None


PLAIN = NumberForm()
FORMS = (PLAIN, NumberForm(","), NumberForm(".", ","), NumberForm(",", "."))


def half_width(text: str) -> str:
    """Return a text with ASCII for full-width letters and signs and for the digits of any script.

    NFKC does more: it makes 52 of 5 squared.
    """
    if text.isascii():
        return text
    letters = []
    for letter in text:
        digit = unicodedata.decimal(letter, None)
        if digit is not None:
            letter = str(digit)
        elif "\uff01" <= letter <= "\uff5e":
            letter = chr(ord(letter) - 0xFEE0)
        elif "\uffe0" <= letter <= "\uffe6":  # signs of currencies
            letter = unicodedata.normalize("NFKC", letter)
        letters.append(letter)
    return "".join(letters).translate(MINUS)


def divided_currency(text: str) -> tuple[str, str]:
    """Return the number in a text, and the sign or name of a currency before or behind it."""
    signs = "".join({letter for letter in text if unicodedata.category(letter) == "Sc"})
    words = "|".join([*map(re.escape, signs), CURRENCY_WORDS])
    found = re.fullmatch(rf"([-+]?)\s*({words})\s*(.*)", text) or re.fullmatch(
        rf"([-+]?)(?P<number>.*?)\s*({words})", text
    )
    if found is None:
        return text, ""
    if "number" in found.groupdict():
        return found[1] + found["number"], found[3]
    return found[1] + found[3], found[2]


def read_number(text: str, form: NumberForm = PLAIN) -> float | None:
    """Return the number that a text is, or None if it is none that a float32 holds.

    A comma or a dot that the form does not explain makes it none.
    """
    number = text.strip()
    if not re.fullmatch(NUMBER, number):
        number, _ = divided_currency(half_width(number))
    if not re.fullmatch(NUMBER, number):  # most are plain
        sign = number[:1] if number[:1] in ("-", "+") else ""
        whole, mark, fraction = number.removeprefix(sign).partition(form.decimal)
        for between in (form.thousands, SPACES):
            if between and GROUPS[between].fullmatch(whole):
                whole = re.sub(f"[{between}]", "", whole)
        if form.thousands == "," and INDIAN.fullmatch(whole):
            whole = whole.replace(",", "")
        number = sign + whole + ("." if mark else "") + fraction
    elif form.decimal == "," and "." in number:
        if form.thousands != "." or not GROUPS["."].fullmatch(number.lstrip("+-")):
            return None
        number = number.replace(".", "")
    if not re.fullmatch(NUMBER, number):
        return None
    value = float(number)
    return value if abs(value) <= FLOAT32_MAX else None


def currency_of(text: str) -> str:
    """Return the sign or name of the currency of a number, or nothing."""
    return divided_currency(half_width(text).strip())[1]


def other_forms(text: str, form: NumberForm) -> str:
    """Return which keys of `data.format` would make a number of a text, and which number."""
    ways = []
    for other in FORMS:
        value = read_number(text, other)
        if value is None or other == form:
            continue
        keys = [f"decimal='{other.decimal}'"] if other.decimal != form.decimal else []
        if other.thousands != form.thousands:
            keys.append(f"thousands='{other.thousands}'" if other.thousands else "thousands=null")
        flags = " ".join(f'--set "data.format.{key}"'.replace("'", "") for key in keys)
        ways.append(f"`{flags}` reads {value:g}" if value < 1e6 else f"`{flags}` reads {value:.0f}")
    return ", ".join(ways[:2])


def number_form(texts: Sequence[str], delimiter: str) -> NumberForm | None:
    """Return how the numbers of a column are written, or None if they are no numbers.

    Amounts in several currencies are no numbers that can be compared.

    A comma before three digits stands between thousands where commas divide the columns too, or
    where other numbers of the column have none; in `1,2` it may stand between two labels.

    Args:
        texts: The values of the column.
        delimiter: What divides the columns of the file.
    """
    fitting = [form for form in FORMS if all(read_number(text, form) is not None for text in texts)]
    if not fitting or len({sign for text in texts if (sign := currency_of(text))}) > 1:
        return None
    plain = [divided_currency(half_width(text).strip())[0].lstrip("+-") for text in texts]
    if FORMS[0] in fitting:
        dotted = [text for text in plain if "." in text]
        thousands = (
            FORMS[3] in fitting
            and delimiter == ";"
            and 0 < len(dotted) < len(plain)
            and all(text[0] != "0" and GROUPS["."].fullmatch(text) for text in dotted)
        )
        return FORMS[3] if thousands else FORMS[0]
    if FORMS[1] in fitting and FORMS[2] in fitting:  # three digits behind every comma
        has_zero = any(text.startswith("0,") for text in plain)
        is_long = any(text.isdecimal() and len(text) > 3 for text in plain)
        all_have = all("," in text for text in plain)
        fraction = has_zero or is_long or (delimiter == ";" and all_have)
        return FORMS[1] if fraction else FORMS[2]
    if FORMS[1] in fitting:
        clear = any(re.match(r"0,\d|\d+,0", text) for text in plain)
        return FORMS[1] if clear else None
    return fitting[0]


def flag(value: Any) -> int | None:
    """Return 0 or 1 for what a column of flags holds, or None."""
    if isinstance(value, int | float):
        value = str(float(value))
    return FLAGS.get(half_width(str(value)).strip().lower())


def divided(text: str, separator: str) -> list[str]:
    """Return the labels in a text; a full-width separator divides as the narrow one does."""
    if len(separator) == 1:
        narrow = half_width(separator).replace("\uff64", "\u3001").replace("\uff65", "\u30fb")
        wide = chr(ord(narrow) + 0xFEE0) if "!" <= narrow <= "~" else narrow
        # narrow ones, that are no ASCII: of the ideographic comma and of the middle dot
        also = {"\u3001": "\uff64", "\u30fb": "\uff65"}.get(narrow, "")
        parts = re.split(f"[{re.escape(narrow + wide + also)}]", text)
    else:
        parts = text.split(separator)
    return [part.strip() for part in parts if part.strip()]
