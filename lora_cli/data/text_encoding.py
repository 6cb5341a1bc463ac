"""Detect the encoding of a text from its bytes, and split it into lines."""

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
CYRILLIC = ("cp1251", "koi8_r", "cp866", "iso8859_5", "mac_cyrillic")  # most likely first
COMMON_RUSSIAN = set("оеаинтсрвл")
RARE_IN_WESTERN = "ìøòõšžðºþ³¹¿£¥¼¾ª¯"  # cp1252 reading of letters of cp1250


def lines_of(text: str) -> list[str]:
    """Split a text into lines, without line ends.

    `str.splitlines` would also split at U+2028, U+0085 and other characters, which occur inside the
    texts of data files.
    """
    lines = LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


# an ISO 2022 switch to another character set (without `ESC ( B`, which `tput` writes too)
ESCAPE = re.compile(rb"\x1b(\$[@ABC]|\$\([A-DO-Q]|\$\)[A-C]|\([IJ])")
ISO_2022 = ("iso2022_jp", "iso2022_jp_ext", "iso2022_jp_2", "iso2022_jp_2004", "iso2022_kr")
HZ = re.compile(rb"~\{([\x21-\x77][\x21-\x7e])+~\}")
UTF_7 = re.compile(rb"\+[A-Za-z0-9+/]{3,}")
COMMON_CHINESE = set(
    "的一是不了在人有我他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生很好没"
)


def seven_bit_encoding(raw: bytes) -> str | None:
    """Detect ISO 2022, HZ and UTF-7, whose bytes are all ASCII; return None for plain ASCII.

    They write other characters with escape sequences (`ESC $ B`, `~{`, `+AGE-`).
    """
    if not raw.isascii():
        return None
    if ESCAPE.search(raw):
        names = ISO_2022[::-1] if b"\x1b$)C" in raw else ISO_2022
        return next((name for name in names if _decoded(raw, name) is not None), None)
    if HZ.search(raw) and (text := _decoded(raw, "hz")) is not None:
        characters = [character for character in text if "\u4e00" <= character <= "\u9fff"]
        if sum(character in COMMON_CHINESE for character in characters) > len(characters) / 20:
            return "hz"
    if UTF_7.search(raw) and (text := _decoded(raw, "utf-7")) is not None:
        characters = [character for character in text if character > "\x7f"]
        min_characters = 1 if b"-" in raw else 3
        if len(characters) >= min_characters and set(map(_kind, characters)) <= set("LMPNZS"):
            return "utf-7"
    return None


def _kind(character: str) -> str:
    return unicodedata.category(character)[0]


def _detect_japanese(raw: bytes) -> str | None:
    """Detect Japanese, the only language written with kana; return None for other texts."""
    for encoding in ("euc_jp", "cp932"):
        text = _decoded(raw, encoding)
        characters = [character for character in text or "" if character > "\x7f"]
        kana = sum("\u3041" <= character <= "\u30fe" for character in characters)
        narrow = sum("\uff61" <= character <= "\uff9f" for character in characters)
        if characters and kana >= len(characters) / 5 and narrow < len(characters) / 5:
            return encoding
    return None


def _detect_russian(raw: bytes) -> str | None:
    """Return the encoding in which the most frequent letters are those of Russian; None if none.

    The same bytes are Cyrillic letters in all of these encodings, but different ones.
    """
    shares = {}
    words = re.findall(r"\w*[^\W\x00-\x7f]\w*", raw.decode("cp866"))
    if sum(letter > "\x7f" for word in words for letter in word) < 0.9 * sum(map(len, words)):
        return None  # Latin words with a few accented letters
    for encoding in CYRILLIC:
        letters = [letter for letter in _decoded(raw, encoding) or "" if letter > "\x7f"]
        common = sum(letter in COMMON_RUSSIAN for letter in letters)
        shares[encoding] = common / max(len(letters), 1)
    best = max(shares, key=lambda encoding: shares[encoding])
    return best if shares[best] > 0.45 else None


def c1_share(text: str) -> tuple[int, float]:
    """Return the number of control characters U+0080 to U+009F, and their share.

    Proper text has none: they result from reading other encodings as latin-1. The share is relative
    to all characters beyond ASCII. U+0085, a line end on old systems, does not count.
    """
    count = len(C1.findall(text))
    return count, count / max(sum(character > "\x7f" for character in text), 1) if count else 0.0


def encoding_of(raw: bytes) -> tuple[str, str]:
    """Detect the encoding of a text, and return it with the reason.

    Text that is valid UTF-8 is almost certainly UTF-8. The remaining candidates are legacy
    encodings with one or two bytes per character, which only letter frequencies can distinguish.
    """
    for mark, encoding in BOMS.items():
        if raw.startswith(mark) and (encoding != "utf-8" or _is_utf_8(raw)):
            return encoding, "by the byte order mark at its beginning"
    raw = raw.removeprefix(BOM)
    head = raw[:4000]
    may_be_utf_16 = head.count(0) > len(head) / 4 or not _is_utf_8(raw)
    for encoding, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[0::2])):
        if (
            may_be_utf_16
            and zeros.count(0) > len(zeros) / 50
            and zeros.count(0) > head.count(0) * 0.9
        ):
            return encoding, "by its zero bytes, which stand on one side of every pair"
    if (detected := seven_bit_encoding(raw)) is not None:
        return detected, "by the codes that stand for its letters"
    if raw.isascii():
        return "utf-8", "it is ASCII"
    return ("utf-8", "its bytes are UTF-8") if _is_utf_8(raw) else _legacy(raw)


def _is_utf_8(raw: bytes) -> bool:
    """Return whether the bytes are UTF-8, apart from a little damage."""
    text = raw.removeprefix(BOM).decode("utf-8", errors="surrogateescape")
    n_invalid = sum("\udc80" <= character <= "\udcff" for character in text)
    n_valid = sum(character > "\x7f" for character in text) - n_invalid
    return n_invalid <= n_valid / 20


def _legacy(raw: bytes) -> tuple[str, str]:
    from charset_normalizer import from_bytes

    lines = [line for line in raw.splitlines(keepends=True) if not line.isascii()]
    sample = b"".join(lines[:2000])
    if (japanese := _detect_japanese(sample)) is not None and _decoded(raw, japanese) is not None:
        return japanese, "not UTF-8; read so, it is Japanese"
    if (cyrillic := _detect_russian(sample)) is not None and _decoded(raw, cyrillic) is not None:
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
    """Return whether a text decoded as cp1252 is more likely cp1252 than cp1250.

    If it is cp1250, letters of Czech, Polish or Hungarian appear as symbols and letters that
    Western European languages rarely use.
    """
    characters = [character for character in text if character > "\x7f"]
    rare = set(RARE_IN_WESTERN) - (set("õ") if "ã" in characters else set())
    if set("åø") <= set(characters):  # Danish or Norwegian
        rare -= set("ø")
    if set(characters) <= set("àèéìîòóùú\u2019«»"):  # Italian
        rare = set()
    return sum(character in rare for character in characters) < 0.03 * len(characters)


def _decoded(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None
