"""Which encoding a text is in, found from its bytes, and where its lines end."""

from __future__ import annotations

import re
import unicodedata

BOMS = {
    b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
BOM = b"\xef\xbb\xbf"
LEGACY = [
    "cp1252", "cp1251", "cp1250", "cp1253", "cp932", "euc_jp", "gb18030", "big5", "euc_kr",
]  # fmt: skip
LINE_END = re.compile("\r\n|[\r\n]")
C1 = re.compile("[\x80-\x84\x86-\x9f]")
CYRILLIC = ("cp1251", "koi8_r", "cp866", "iso8859_5", "mac_cyrillic")  # likelier ones first
COMMON_RUSSIAN = set("оеаинтсрвл")
EASTERN = "ìøòõšžðºþ³¹¿£¥¼¾ª¯"  # what cp1252 makes of their letters


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without their ends.

    `str.splitlines` ends a line at U+2028, U+0085 and other characters too, which stand inside the
    texts of data files.
    """
    lines = LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


# a switch to another set of letters, as ISO 2022 makes it (`tput` writes `ESC ( B` too)
ESCAPE = re.compile(rb"\x1b(\$[@ABC]|\$\([A-DO-Q]|\$\)[A-C]|\([IJ])")
ISO_2022 = ("iso2022_jp", "iso2022_jp_ext", "iso2022_jp_2", "iso2022_jp_2004", "iso2022_kr")
HZ = re.compile(rb"~\{([\x21-\x77][\x21-\x7e])+~\}")
UTF_7 = re.compile(rb"\+[A-Za-z0-9+/]{3,}")
COMMON_CHINESE = set(
    "的一是不了在人有我他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生很好没"
)


def seven_bit_encoding(raw: bytes) -> str | None:
    """Return the encoding of a text that looks like ASCII, and is Japanese, Korean or Chinese.

    Its letters are written in codes (`ESC $ B`, `~{`, `+AGE-`), so that it can be read as ASCII.
    """
    if not raw.isascii():
        return None
    if ESCAPE.search(raw):
        names = ISO_2022[::-1] if b"\x1b$)C" in raw else ISO_2022
        return next((name for name in names if _decoded(raw, name) is not None), None)
    if HZ.search(raw) and (text := _decoded(raw, "hz")) is not None:
        letters = [letter for letter in text if "\u4e00" <= letter <= "\u9fff"]
        if sum(letter in COMMON_CHINESE for letter in letters) > len(letters) / 20:
            return "hz"
    if UTF_7.search(raw) and (text := _decoded(raw, "utf-7")) is not None:
        letters = [letter for letter in text if letter > "\x7f"]
        enough = 1 if b"-" in raw else 3
        if len(letters) >= enough and set(map(_kind, letters)) <= set("LMPNZS"):
            return "utf-7"
    return None


def _kind(letter: str) -> str:
    return unicodedata.category(letter)[0]


def _by_kana(raw: bytes) -> str | None:
    """Return the encoding in which bytes are Japanese: no other language writes kana."""
    for encoding in ("euc_jp", "cp932"):
        text = _decoded(raw, encoding)
        letters = [letter for letter in text or "" if letter > "\x7f"]
        kana = sum("\u3041" <= letter <= "\u30fe" for letter in letters)
        narrow = sum("\uff61" <= letter <= "\uff9f" for letter in letters)
        if letters and kana >= len(letters) / 5 and narrow < len(letters) / 5:
            return encoding
    return None


def _by_common_russian(raw: bytes) -> str | None:
    """Return the encoding in which bytes have the letters that Russian and its kin use most.

    The same bytes are Cyrillic in all of these encodings, with other letters.
    """
    shares = {}
    words = re.findall(r"\w*[^\W\x00-\x7f]\w*", raw.decode("cp866"))
    if sum(letter > "\x7f" for word in words for letter in word) < 0.9 * sum(map(len, words)):
        return None  # words of Latin letters, of which some have accents
    for encoding in CYRILLIC:
        letters = [letter for letter in _decoded(raw, encoding) or "" if letter > "\x7f"]
        common = sum(letter in COMMON_RUSSIAN for letter in letters)
        shares[encoding] = common / max(len(letters), 1)
    best = max(shares, key=lambda encoding: shares[encoding])
    return best if shares[best] > 0.45 else None


def c1_share(text: str) -> tuple[int, float]:
    """Return how many control characters of U+0080 to U+009F a text has, and their share.

    No text has them: they are what other encodings' letters become in latin-1. The share is that of
    all letters beyond ASCII; U+0085, a line end of old computers, does not count.
    """
    found = len(C1.findall(text))
    return found, found / max(sum(letter > "\x7f" for letter in text), 1) if found else 0.0


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
    may_be = head.count(0) > len(head) / 4 or not _is_utf_8(raw)
    for encoding, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[0::2])):
        if may_be and zeros.count(0) > len(zeros) / 50 and zeros.count(0) > head.count(0) * 0.9:
            return encoding, "by its zero bytes, which stand on one side of every pair"
    if (found := seven_bit_encoding(raw)) is not None:
        return found, "by the codes that stand for its letters"
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
    if (japanese := _by_kana(sample)) is not None and _decoded(raw, japanese) is not None:
        return japanese, "not UTF-8; read so, it is Japanese"
    if (cyrillic := _by_common_russian(sample)) is not None and _decoded(raw, cyrillic) is not None:
        return cyrillic, "not UTF-8; read so, its letters are as frequent as in Russian"
    best = from_bytes(sample, cp_isolation=LEGACY).best()
    encoding = best.encoding if best else "latin-1"
    if encoding == "cp1250" and _is_western(_decoded(sample, "cp1252") or ""):
        encoding = "cp1252"
    if _decoded(raw, encoding) is None:
        encoding = "latin-1"
    words = re.findall(r"\w*[^\W\x00-\x7f]\w*", _decoded(sample, encoding) or "")
    example = max(words[:200], key=len, default="")[:30]
    return encoding, f"not UTF-8; most likely, by its letters; read that way, it says `{example}`"


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
