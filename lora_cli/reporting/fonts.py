"""Fonts for the characters of a plot, and the characters that no installed font has."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

DEFAULT = "DejaVu Sans"  # which matplotlib brings along
BOXES = "Last Resort"  # matplotlib's own, which has a box for every letter
SHAPED = (3, 11)  # the first version of matplotlib that joins letters and writes to the left


@dataclass(frozen=True)
class Fonts:
    """Font families to try in order for each character, and the characters that none has."""

    families: list[str]
    lacking: frozenset[str]

    def can_draw(self, text: str) -> bool:
        """Return whether every character of a text is rendered correctly."""
        return not self.lacking & set(text)


def fonts_for(texts: Iterable[str]) -> Fonts:
    """Return as few installed fonts as possible that have all characters of some texts."""
    wanted = {c for text in texts for c in text if c.isprintable() and not c.isspace()}
    joined = frozenset(filter(_needs_shaping, wanted)) if _version() < SHAPED else frozenset()
    families = [DEFAULT]
    wanted -= joined | _letters_of_default()
    available = _installed() if wanted else {}
    while best := max(available, key=lambda name: len(wanted & available[name]), default=""):
        if not wanted & available[best]:
            break
        families.append(best)
        wanted -= available[best]
    return Fonts(families, joined | wanted)


def _needs_shaping(letter: str) -> bool:
    """Return whether a character is written right to left, or is shaped by its neighbours."""
    if unicodedata.bidirectional(letter) in ("R", "AL"):
        return True
    return 0x0900 <= ord(letter) <= 0x109F or 0x1780 <= ord(letter) <= 0x17FF  # Indic, to Khmer


def _version() -> tuple[int, ...]:
    import matplotlib

    return tuple(int(part) for part in matplotlib.__version__.split(".")[:2])


def _letters_of_default() -> frozenset[str]:
    from matplotlib import font_manager

    return frozenset(_letters(font_manager.findfont(DEFAULT)))


def _letters(path: str) -> Collection[str]:
    """Return the characters of a font file; none for a font with a single size."""
    from matplotlib.ft2font import FT2Font

    try:
        font: Any = FT2Font(path)
        return {chr(code) for code in font.get_charmap()} if font.scalable else set()
    except (OSError, RuntimeError, ValueError):  # a damaged file, or a kind that it cannot read
        return set()


@functools.cache
def _installed() -> dict[str, frozenset[str]]:
    """Return the characters of each installed family, upright sans-serif fonts first.

    Reading hundreds of fonts takes seconds: this is for letters that the default does not have.
    """
    from matplotlib import font_manager

    manager: Any = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:  # matplotlib keeps a list, which is not up to date
            try:
                manager.addfont(path)
            except (OSError, RuntimeError, ValueError):
                continue
    upright = [
        font
        for font in manager.ttflist
        if font.style == "normal"
        and 300 <= _weight(font) <= 500
        and not font.name.startswith(BOXES)
    ]
    found: dict[str, frozenset[str]] = {}
    for font in sorted(upright, key=lambda f: ("Sans" not in f.name, "Mono" in f.name, f.name)):
        if font.name not in found:
            found[font.name] = frozenset(_letters(font.fname))
    return found


def _weight(font: Any) -> int:
    return font.weight if isinstance(font.weight, int) else {"normal": 400}.get(font.weight, 400)
