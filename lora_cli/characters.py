"""Texts in any script: normal forms for comparing them, their width, and where to cut them.

Chinese, Japanese, Thai and some others are written without spaces between words. Where words are
counted or compared, each of their letters takes the place of a word.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable

import regex
from rich.cells import cell_len

# letters of the scripts that have no spaces between words (Unicode Standard Annex 14, classes ID,
# CJ and SA), with the punctuation and the marks of length and voice that belong to no one script
UNSPACED = (
    "".join(
        rf"\p{{Script={script}}}"
        for script in (
            "Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tai_Le",
            "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Ahom", "Balinese", "Javanese", "Tibetan",
        )
    )
    + r"\u3001-\u303f\u3099-\u309c\u30a0\u30fb\u30fc\uff61-\uff65\uff70\uff9e\uff9f"
)  # fmt: skip
_UNITS = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[^\s{UNSPACED}]+")
_PAIRS = regex.compile(rf"(?:[{UNSPACED}]\p{{M}}*){{2}}")
# begins with the space: what looks back at every letter takes ten times as long
_NEEDLESS_SPACE = regex.compile(rf" (?<=[{UNSPACED}] )(?=[{UNSPACED}])")
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_ENDS_SENTENCE = regex.compile(r"[\p{Terminal_Punctuation}\s]")
_GRAPHEMES = regex.compile(r"\X")
_JOINER = "\N{ZERO WIDTH JOINER}"


def normalised(text: str) -> str:
    """Return the normal form by which texts are compared: their words, however they are typed.

    Two texts are the same where they differ in nothing but case, spaces, width (letters as wide as
    Chinese ones, or half as wide), the normal form of Unicode (macOS takes accents apart),
    characters that cannot be seen, or the punctuation at their end.
    """
    if text.isascii():
        return _without_last_marks(" ".join(text.lower().split()))
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = _INVISIBLE.sub("", unicodedata.normalize("NFKC", folded))
    return _without_last_marks(_NEEDLESS_SPACE.sub("", " ".join(folded.split())))


def folded(text: str) -> str:
    """Return a text without spaces, invisible characters, or differences of case and width."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(_INVISIBLE.sub("", text).split())


def difference_of_form(text: str, other: str) -> str:
    """Return how two texts that look the same differ, or nothing if they are really different."""
    if text == other or folded(text) != folded(other):
        return ""

    def differ(normal: Callable[[str], str]) -> bool:
        return normal(text) != normal(other)

    if not differ(functools.partial(unicodedata.normalize, "NFC")):
        codes = (t.encode("unicode_escape").decode() for t in (text, other))
        return "the normal form of Unicode ({} and {})".format(*codes)
    if not differ(functools.partial(unicodedata.normalize, "NFKC")):
        return "the width or the form of letters"
    if not differ(str.casefold):
        return "case"
    if not differ(lambda t: "".join(t.split())):
        return "spaces"
    if not differ(lambda t: _INVISIBLE.sub("", t)):
        return "characters that cannot be seen"
    return "case, spaces, or the form of letters"


def _without_last_marks(text: str) -> str:
    """Return a text without the punctuation at its end, unless it consists of nothing else."""
    end = len(text)
    while end and _ENDS_SENTENCE.match(text[end - 1]):
        end -= 1
    return text[:end] or text


def words(text: str) -> list[str]:
    """Return the words of a text; in scripts without spaces, each character with its marks."""
    return text.split() if text.isascii() else _UNITS.findall(text)


def pairs_of_letters(text: str) -> list[str]:
    """Return all pairs of adjacent characters in scripts without spaces."""
    return [] if text.isascii() else _PAIRS.findall(text, overlapped=True)


# ---------------------------------------------------------------------------------- on a screen


def cells(text: str) -> int:
    """Return the width of a text in terminal columns: that of `返品` is four."""
    return len(text) if text.isascii() else cell_len(text)


def padded(text: str, width: int, right: bool = False) -> str:
    """Return a text padded to a width in columns, on its right or, with `right`, on its left."""
    spaces = " " * (width - cells(text))
    return spaces + text if right else text + spaces


def aligned(rows: list[list[str]]) -> list[str]:
    """Return rows as lines of aligned columns, the first to the left, the others to the right."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            padded(cell, width, right=i > 0)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def shortened(text: str, width: int) -> str:
    """Return a text shortened to at most `width` columns, ending with a whole character and `…`.

    A character is what a reader takes for one: a letter with its accents, an emoji of several.
    """
    if len(text) <= width and cells(text) <= width:
        return text
    kept, room = "", width - 1
    # no character needs many code points: what is far beyond the cut cannot matter
    for match in _GRAPHEMES.finditer(text[: 32 * width]):
        room -= cells(match[0])
        if room < 0:
            break
        kept += match[0]
    return kept + "…"


def first_characters(text: str, count: int) -> str:
    """Return at most `count` code points of a text, ending with a whole character."""
    if len(text) <= count:
        return text
    end = 0
    for match in _GRAPHEMES.finditer(text[: count + 1]):
        if match.end() > count:
            break
        end = match.end()
    return text[: end or count]


def without_half_character(text: str) -> str:
    """Return a text that was cut, without an incomplete character at its end."""
    text = text.rstrip(_JOINER)
    flags = regex.search(r"\p{Regional_Indicator}+$", text[-64:])
    return text[:-1] if flags and len(flags[0]) % 2 else text
