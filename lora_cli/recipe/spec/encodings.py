"""Names of encodings that other programs use, but Python does not know."""

from __future__ import annotations

import codecs
import re

OTHER_NAMES = {
    "cp932": "windows31j cswindows31j xsjis ms932 cp943 cp943c ibm943 xmscp932 sjiswin",
    "euc_jp": "xeucjp eucjpwin eucjpms cp51932",
    "iso2022_jp_ext": "cp50220 cp50221 cp50222 iso2022jpms",
    "cp949": "windows949 xwindows949 ms949",
    "gbk": "windows936 xgbk",
    "gb18030": "cp54936",
    "cp950": "windows950 ms950",
    "big5": "cnbig5 xxbig5 big5eten",
    "mac_roman": "macintosh xmacroman macosroman",
    "mac_cyrillic": "xmaccyrillic",
    "cp874": "windows874 dos874",
    "iso8859_8": "iso88598i iso88598e",
    "koi8_u": "koi8ru",
    "utf-8": "utf8mb4 utf8mb3 utf8bom utf8withbom unicode11utf8",
    "utf-16": "unicode ucs2 iso10646ucs2",
    "utf-16-be": "unicodefffe",
    "utf-32": "ucs4 iso10646ucs4",
}
_NAMES = {other: name for name, others in OTHER_NAMES.items() for other in others.split()}


def python_name(name: str) -> str:
    """Return Python's name of an encoding that goes by another name; other names unchanged."""
    try:
        codecs.lookup(name)
    except (LookupError, ValueError):  # a NUL is a ValueError
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        return _NAMES.get(plain, name)
    return name
