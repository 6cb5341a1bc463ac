"""Read the lines of text files, gzipped or not, and reject files that are not text.

Bytes that cannot be decoded do not stop the reading: the row that contains them is reported.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import shlex
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lora_cli.data.text_encoding import c1_share, encoding_of, seven_bit_encoding
from lora_cli.data.unreadable_files import reject_binary
from lora_cli.errors import LoraError, counted, warn
from lora_cli.git_lfs import FETCH, POINTS, is_pointer

NOT_TEXT = re.compile("[\udc80-\udcff]")  # undecodable bytes, mapped by `surrogateescape`
HEAD_BYTES = 4096
MAX_CONTROL_SHARE = 0.02  # share of the characters beyond ASCII; fewer may be damage
HINT_BYTES = 1 << 20
UTF_MARKS = {  # by byte order mark, longer ones first
    b"\xff\xfe\x00\x00": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip


@dataclass(frozen=True)
class RawRow:
    """A row as read from a file: its columns, or the reason why it cannot be read."""

    columns: dict[str, Any] | None
    place: str
    error: str = ""


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def read_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its line end); undecodable bytes become surrogates."""
    codec = codecs.lookup(encoding).name
    try:
        with _open(path) as raw:
            head = raw.read(HEAD_BYTES)
            is_utf_8 = codec in ("utf-8", "utf-8-sig")
            if is_utf_8:
                codec = "utf-8"
                _reject_non_text(head, path)
            else:
                _reject_controls(head + raw.read(HINT_BYTES), codec, path)
            # text in another encoding may follow a UTF-8 mark if a program joined two files
            raw.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
            text = io.TextIOWrapper(raw, encoding=codec, errors="surrogateescape", newline="")
            for number, line in enumerate(text, 1):
                if is_utf_8 and "\x1b" in line:
                    _reject_seven_bit(line.encode(errors="surrogateescape"), f"{path}:{number}")
                yield number, line
    except (
        UnicodeError
    ) as error:  # an error of the whole file, such as an incomplete last character
        hint = "name its encoding, `--set data.format.encoding=utf-8`; `lora init` finds it out"
        raise LoraError(f"not {encoding} text: {error.args[-1]}", str(path), hint) from error
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def _reject_controls(raw: bytes, encoding: str, path: Path) -> None:
    """Reject a text that decodes to many control characters; warn if it has a few.

    Raises:
        LoraError: With the encoding that is likely the right one.
    """
    n_controls, share = c1_share(raw.decode(encoding, errors="ignore"))
    if not n_controls:
        return
    count = counted(n_controls, "control character")
    what = f"read as {encoding}, the text has {count} (U+0080 to U+009F), which no text has"
    if share > MAX_CONTROL_SHARE:
        raise LoraError(what, str(path), encoding_hint(path, encoding))
    warn(f"{path}: {what}; is it of another encoding, or damaged there?")


def encoding_hint(path: Path, encoding: str) -> str:
    """Return a hint for a file that cannot be decoded: its likely encoding, or to repair it."""
    try:
        with _open(path) as raw:
            detected, why = encoding_of(raw.read(HINT_BYTES))
    except (OSError, EOFError, zlib.error):
        detected, why = encoding, ""
    if codecs.lookup(detected).name != codecs.lookup(encoding).name:
        return f"`--set data.format.encoding={detected}`, if that is right ({why})"
    return "the other bytes are what they should be: fix these; are they of another file?"


def _reject_seven_bit(raw: bytes, place: str) -> None:
    """Reject a text in an encoding with escape sequences, which would be read as ASCII.

    Raises:
        LoraError: With the name of the encoding; the hint says how to read the text anyway.
    """
    if (detected := seven_bit_encoding(raw)) is not None:
        what = f"this is {detected} text, by the codes that stand for its letters, and not UTF-8"
        hint = f"`--set data.format.encoding={detected}`; `ascii` reads the codes as they stand"
        raise LoraError(what, place, hint)


def whole_text(path: Path) -> str:
    """Read a small text file as UTF-8, replacing invalid bytes.

    Raises:
        LoraError: If the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> LoraError:
    """Return the error for a file that the system or gzip cannot read."""
    if isinstance(error, gzip.BadGzipFile | EOFError | zlib.error):
        is_cut_off = isinstance(error, EOFError)
        if is_pointer(path):
            return LoraError(f"this is {POINTS}", str(path), FETCH)
        what = (
            "the gzip file is cut off"
            if is_cut_off
            else "this is not a gzip file, or it is damaged"
        )
        hint = "copy or download it again" + ("" if is_cut_off else "; if it is plain, rename it")
        return LoraError(what, str(path), hint)
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    is_forbidden = isinstance(error, PermissionError)
    hint = (
        f"`chmod +r {shlex.quote(str(path))}` lets it be read"
        if is_forbidden
        else "is the path right, and the disk healthy?"
    )
    return LoraError(f"cannot be read: {reason}", str(path), hint)


def _reject_non_text(head: bytes, path: Path) -> None:
    """Reject a file whose first bytes show that it is not UTF-8 text."""
    reject_binary(head, path)
    _reject_seven_bit(head[: head.rfind(b"\n") + 1] or head, str(path))
    if head.startswith(b"PAR1"):
        hint = "`--set data.format.type=parquet`"
        raise LoraError("this is a parquet file, by its first bytes", str(path), hint)
    for mark, encoding in UTF_MARKS.items():
        if head.startswith(mark):
            what = f"this is {encoding.upper()} text, by its first bytes, and not UTF-8"
            raise LoraError(what, str(path), f"`--set data.format.encoding={encoding}`")
    zeros = head.count(0)
    if zeros <= len(head) // 4:
        return
    for encoding, half in (("utf-16-le", head[1::2]), ("utf-16-be", head[0::2])):
        if half.count(0) == zeros and zeros < len(head) * 0.75:
            what = "this is UTF-16 text, by its zero bytes, and not UTF-8"
            raise LoraError(what, str(path), f"`--set data.format.encoding={encoding}`")
    what = f"this is not text: {zeros} of its first {len(head)} bytes are zero"
    raise LoraError(what, str(path), "was it copied completely?")


def byte_error(text: str, encoding: str) -> str:
    """Return an error for the first byte that could not be decoded; empty if all could."""
    match = None if text.isascii() else NOT_TEXT.search(text)
    return f"byte 0x{ord(match[0]) - 0xDC00:02x} is not {encoding} text" if match else ""
