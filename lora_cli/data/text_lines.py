"""Lines of text files, packed or not, and what says that a file is no text.

Bytes that are no text of the encoding do not stop the reading: the row that holds them is reported.
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

NOT_TEXT = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes
HEAD_BYTES = 4096
MOST_CONTROLS = 0.02  # of the letters beyond ASCII: fewer may be damage
HINT_BYTES = 1 << 20
UTF = {  # by their marks; longer ones first
    b"\xff\xfe\x00\x00": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip


@dataclass(frozen=True)
class RawRow:
    """A row as it was read: its columns, or why it could not be read."""

    columns: dict[str, Any] | None
    place: str
    error: str = ""


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def read_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its line end); bytes that are no text become surrogates."""
    codec = codecs.lookup(encoding).name
    try:
        with _open(path) as raw:
            head = raw.read(HEAD_BYTES)
            checked = codec in ("utf-8", "utf-8-sig")
            if checked:
                codec = "utf-8"
                _reject_no_text(head, path)
            else:
                _reject_controls(head + raw.read(HINT_BYTES), codec, path)
            # a mark before text that is no UTF-8 is left over from a program that joined two files
            raw.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
            text = io.TextIOWrapper(raw, encoding=codec, errors="surrogateescape", newline="")
            for number, line in enumerate(text, 1):
                if checked and "\x1b" in line:
                    _reject_seven_bit(line.encode(errors="surrogateescape"), f"{path}:{number}")
                yield number, line
    except UnicodeError as error:  # of a whole file, such as an end within a character
        hint = "name its encoding, `--set data.format.encoding=utf-8`; `lora init` finds it out"
        raise LoraError(f"not {encoding} text: {error.args[-1]}", str(path), hint) from error
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def _reject_controls(raw: bytes, encoding: str, path: Path) -> None:
    """Reject a text that is full of control characters, read so; warn where it has few.

    Raises:
        LoraError: With the encoding that its bytes are likely to be in.
    """
    found, share = c1_share(raw.decode(encoding, errors="ignore"))
    if not found:
        return
    count = counted(found, "control character")
    what = f"read as {encoding}, the text has {count} (U+0080 to U+009F), which no text has"
    if share > MOST_CONTROLS:
        raise LoraError(what, str(path), encoding_hint(path, encoding))
    warn(f"{path}: {what}; is it of another encoding, or damaged there?")


def encoding_hint(path: Path, encoding: str) -> str:
    """Return how to read a file that has bytes which are no text of its encoding."""
    try:
        with _open(path) as raw:
            found, why = encoding_of(raw.read(HINT_BYTES))
    except (OSError, EOFError, zlib.error):
        found, why = encoding, ""
    if codecs.lookup(found).name != codecs.lookup(encoding).name:
        return f"`--set data.format.encoding={found}`, if that is right ({why})"
    return "the other bytes are what they should be: fix these; are they of another file?"


def _reject_seven_bit(raw: bytes, place: str) -> None:
    """Reject a text that looks like ASCII and is of another encoding; `ascii` allows it.

    Raises:
        LoraError: With the encoding's name.
    """
    if (found := seven_bit_encoding(raw)) is not None:
        what = f"this is {found} text, by the codes that stand for its letters, and not UTF-8"
        hint = f"`--set data.format.encoding={found}`; `ascii` reads the codes as they stand"
        raise LoraError(what, place, hint)


def whole_text(path: Path) -> str:
    """Return the content of a small text file; what is not UTF-8 in it is replaced.

    Raises:
        LoraError: If the system cannot read it.
    """
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> LoraError:
    """Return what to say of a file that the system, or gzip, cannot read."""
    if isinstance(error, gzip.BadGzipFile | EOFError | zlib.error):
        cut = isinstance(error, EOFError)
        if is_pointer(path):
            return LoraError(f"this is {POINTS}", str(path), FETCH)
        what = "the gzip file is cut off" if cut else "this is not a gzip file, or it is damaged"
        hint = "copy or download it again" + ("" if cut else "; if it is plain, rename it")
        return LoraError(what, str(path), hint)
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    denied = isinstance(error, PermissionError)
    hint = (
        f"`chmod +r {shlex.quote(str(path))}` lets it be read"
        if denied
        else "is the path right, and the disk healthy?"
    )
    return LoraError(f"cannot be read: {reason}", str(path), hint)


def _reject_no_text(head: bytes, path: Path) -> None:
    """Reject a file that is, by its first bytes, anything but text in UTF-8."""
    reject_binary(head, path)
    _reject_seven_bit(head[: head.rfind(b"\n") + 1] or head, str(path))
    if head.startswith(b"PAR1"):
        hint = "`--set data.format.type=parquet`"
        raise LoraError("this is a parquet file, by its first bytes", str(path), hint)
    for mark, encoding in UTF.items():
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
    """Return which byte of a text could not be decoded, or nothing."""
    found = None if text.isascii() else NOT_TEXT.search(text)
    return f"byte 0x{ord(found[0]) - 0xDC00:02x} is not {encoding} text" if found else ""
