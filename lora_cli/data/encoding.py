"""Which encoding a text is in, found from its bytes, and where its lines end."""

from __future__ import annotations

import re

BOMS = {
    b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
BOM = b"\xef\xbb\xbf"
LEGACY = [
    "cp1252", "cp1251", "cp1250", "cp1253", "cp932", "euc_jp", "gb18030", "big5", "euc_kr",
]  # fmt: skip
LINE_END = re.compile("\r\n|[\r\n]")
EASTERN = "ìøòõšžðºþ³¹¿£¥¼¾ª¯"  # what cp1252 makes of their letters


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without their ends.

    `str.splitlines` ends a line at U+2028, U+0085 and other characters too, which stand inside the
    texts of data files.
    """
    lines = LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def encoding_of(raw: bytes) -> tuple[str, str]:
    """Return the encoding of a text and what says so.

    UTF-8 is nearly certain where it fits. What is left is one of the older encodings of a byte or
    two a letter, which only the likelihood of the letters tells apart.
    """
    for mark, encoding in BOMS.items():
        if raw.startswith(mark) and (encoding != "utf-8" or _is_utf_8(raw)):
            return encoding, "by the byte order mark at its beginning"
    raw = raw.removeprefix(BOM)
    head = raw[:4000]
    for encoding, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[0::2])):
        if zeros.count(0) > len(zeros) / 50 and zeros.count(0) > head.count(0) * 0.9:
            return encoding, "by its zero bytes, which stand on one side of every pair"
    if raw.isascii():
        return "utf-8", "it is ASCII"
    return ("utf-8", "its bytes are UTF-8") if _is_utf_8(raw) else _legacy(raw)


def _is_utf_8(raw: bytes) -> bool:
    """Return whether all bytes, but for a few that are damaged, are UTF-8."""
    text = raw.removeprefix(BOM).decode("utf-8", errors="surrogateescape")
    bad = sum("\udc80" <= letter <= "\udcff" for letter in text)
    good = sum(letter > "\x7f" for letter in text) - bad
    return bad <= good / 20


def _legacy(raw: bytes) -> tuple[str, str]:
    from charset_normalizer import from_bytes

    lines = [line for line in raw.splitlines(keepends=True) if not line.isascii()]
    sample = b"".join(lines[:2000])
    best = from_bytes(sample, cp_isolation=LEGACY).best()
    encoding = best.encoding if best else "latin-1"
    if encoding == "cp1250" and _is_western(_decoded(sample, "cp1252") or ""):
        encoding = "cp1252"
    if _decoded(raw, encoding) is None:
        encoding = "latin-1"
    words = re.findall(r"\w*[^\W\x00-\x7f]\w*", _decoded(sample, encoding) or "")
    example = max(words[:200], key=len, default="")[:30]
    return encoding, f"not UTF-8; likeliest by its letters: read so, it says `{example}`"


def _is_western(text: str) -> bool:
    """Return whether a text read as cp1252 is likelier to be that than the cp1250 of Prague.

    Read wrongly, the letters of Czech, Polish, Hungarian and their neighbours become signs and
    letters that the languages of the west hardly use.
    """
    letters = [letter for letter in text if letter > "\x7f"]
    rare = set(EASTERN) - (set("õ") if "ã" in letters else set())
    if set("åø") <= set(letters):  # Danish or Norwegian
        rare -= set("ø")
    if set(letters) <= set("àèéìîòóùú\u2019«»"):  # Italian
        rare = set()
    return sum(letter in rare for letter in letters) < 0.03 * len(letters)


def _decoded(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None
