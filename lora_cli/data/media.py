"""Pictures and sound in rows: encoded bytes or a path, undecoded until they are used.

A media value of a row is `{"bytes": b"…" or None, "path": "…" or None}`, as `datasets` keeps
undecoded `Image` and `Audio` columns. In a csv or JSON file it is written as a path, relative to
the file's folder, or as bytes in base64; in parquet files and on the Hub as bytes, or as such a
pair. Rows are compared and hashed by the bytes, wherever these lie.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import xxhash

from lora_cli.data.text_lines import RawRow
from lora_cli.errors import counted, printable

KEYS = {"bytes", "path"}
ADDRESS = re.compile(r"(?i)[a-z][a-z0-9+.-]+://|data:")
ENCODED = re.compile(r"(?i)data:[\w.+-]*/?[\w.+-]*(;[\w=.+-]+)*;base64,")
# base64 of how files begin: PNG, JPEG, GIF, WebP and wav; flac, ogg, TIFF; aiff, au; mp3
BEGINNINGS = (
    "iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "ZkxhQ", "T2dnUw", "SUkqA", "TU0AK",
    "Rk9STQ", "LnNuZA", "SUQz", *(f"//{letter}" for letter in "IJKLMNOPopqrstuv"),
)  # fmt: skip
LEAST_ENCODED = 60  # characters of a file without an address before it
LOOKED_INTO = ("clips", "wavs", "audio", "recordings", "images")
"""Folders next to a table in which its files may be, besides those of the table's own name."""
LOOKED_FOR = 50  # paths of a table by which the folder that they start from is found
OF_FILE = "file://"  # the address of a file of this machine
FILE_NAME = "file_name"  # what the column of the path is called in a metadata.csv
MOST_SHOWN = 200


def is_media(value: Any) -> bool:
    """Return whether a value of a row is a picture or sound."""
    return isinstance(value, dict) and value.keys() == KEYS


def media_value(value: Any, folder: Path | None = None) -> Any:
    """Return a media value of what a column holds; what cannot be one is returned as it is.

    Args:
        value: A path, bytes (in JSON in base64), or a pair of both.
        folder: What a path is relative to; None leaves it as it is.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, dict):
        if not {"bytes", "path"} & value.keys():
            return value
        data, path = value.get("bytes"), value.get("path")
        if data is None:
            if path is None or isinstance(path, str):
                return media_value(path, folder)
        elif (data := _of_base64(data) if isinstance(data, str) else data) is not None:
            found = media_value(data)
            if is_media(found):
                return {**found, "path": path if isinstance(path, str) else None}
        return {name: own for name, own in value.items() if name != "bytes"}  # not a file
    if isinstance(value, str) and value.strip():
        if (inside := decoded(value.strip())) is not None:
            return {"bytes": inside, "path": None}
        if value.startswith(OF_FILE):
            value = url2pathname(value.removeprefix(OF_FILE))
        path = value if folder is None or ADDRESS.match(value) else str(folder / value)
        return {"bytes": None, "path": written_here(path)}
    return value


def decoded(text: str) -> bytes | None:
    """Return the bytes of a picture or sound that a text holds in base64; None if it holds none."""
    is_bare = len(text) >= LEAST_ENCODED and text.startswith(BEGINNINGS)
    return _of_base64(text) if is_bare or ENCODED.match(text) else None


def _of_base64(text: str) -> bytes | None:
    """Return the bytes of a text in base64, with or without an address before it."""
    letters = "".join(ENCODED.sub("", text, count=1).split())
    try:
        return base64.b64decode(letters, validate=True) or None
    except ValueError:
        return None


def folder_of_paths(table: Path, paths: Sequence[str]) -> Path:
    """Return the folder that the paths of a table start from: the first that has one of them.

    It is the folder of the table, or one in it, such as `clips` of Common Voice.

    Args:
        table: The file.
        paths: Some that it holds.
    """
    here, name = table.parent, table.stem
    inner = [f"{above}{below}" for above in ("", *LOOKED_INTO) for below in ("", f"/{name}")]
    return first_with([here / part.strip("/") for part in inner], paths) or here


def first_with(folders: Sequence[Path], paths: Sequence[str]) -> Path | None:
    """Return the first folder that has one of some files."""
    for folder in folders:
        try:
            if any(Path(written_here(str(folder / path))).is_file() for path in paths):
                return folder
        except (OSError, ValueError):  # a name that is too long, or holds a zero
            continue
    return None


def written_here(path: str) -> str:
    """Return a path that was written on Windows as it is here, if a file is there."""
    if "\\" not in path or ADDRESS.match(path):
        return path
    here = path.replace("\\", "/")
    try:
        return here if not Path(path).exists() and Path(here).exists() else path
    except (OSError, ValueError):  # a name that is too long, or holds a zero
        return path


def paths_of(rows: Iterable[RawRow], columns: Collection[str]) -> list[str]:
    """Return the paths in the first rows of a table."""
    found: list[str] = []
    for row in islice(rows, LOOKED_FOR):
        values = row.columns or {}
        for column in columns:
            value = media_value(values.get(column, values.get(FILE_NAME)))
            if is_media(value) and value["bytes"] is None and not ADDRESS.match(value["path"]):
                found.append(value["path"])
    return found


def with_media(row: RawRow, folder: Path, columns: Collection[str]) -> RawRow:
    """Return a row of a file with media values in the columns that hold them.

    Args:
        row: The row as it was read.
        folder: Of the file.
        columns: Names of the columns that hold media.
    """
    if row.columns is None or not columns:
        return row
    values = dict(row.columns)
    for column in columns:
        if column not in values and FILE_NAME in values:
            values[column] = values.pop(FILE_NAME)
        if column in values:
            values[column] = media_value(values[column], folder)
    return RawRow(values, row.place, row.error)


def media_error(row: dict[str, Any], columns: Collection[str]) -> str:
    """Return which media column holds no file that there is, or nothing."""
    for column in columns:
        value = row.get(column)
        if value is None or value == "":
            return f"column `{column}` is blank"
        if not is_media(value):
            what = "a file's path" if isinstance(value, str) else "a file"
            return f"column `{column}` does not hold {what}"
        path = value["path"]
        if value["bytes"] is not None:
            continue
        shown = printable(str(path), MOST_SHOWN)
        if ADDRESS.match(str(path)):
            return f"column `{column}` holds the address `{shown}`: download the file before"
        try:
            if Path(path).is_file():
                continue
            missing = not Path(path).exists()
        except (OSError, ValueError):  # a name that is too long, or holds a zero
            missing = True
        return f"there is no file `{shown}`" if missing else f"`{shown}` is no file"
    return ""


def media_hash(value: dict[str, Any]) -> str:
    """Return a hash (xxh3, 128 bits) of the bytes of a media value.

    Of a file that cannot be read it is a hash of the path: the row is reported elsewhere.
    """
    if value["bytes"] is not None:
        return xxhash.xxh3_128_hexdigest(value["bytes"])
    try:
        status = Path(value["path"]).stat()
        state = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _hash_of_file(value["path"], state)
    except (OSError, ValueError):
        return xxhash.xxh3_128_hexdigest(str(value["path"]).encode("utf-8", "surrogateescape"))


@functools.lru_cache(maxsize=1 << 20)
def _hash_of_file(path: str, _state: tuple[int, ...]) -> str:
    return xxhash.xxh3_128_hexdigest(Path(path).read_bytes())


def hashed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row in which media values are replaced by the hashes of their bytes."""
    return {name: media_hash(v) if is_media(v) else v for name, v in row.items()}


def described(value: dict[str, Any]) -> str:
    """Return a media value in words: the name of its file, or the size of its bytes."""
    if value["path"]:
        return Path(value["path"]).name
    return counted(len(value["bytes"] or b""), "byte")


def undecoded(dataset: Any) -> Any:
    """Return a data set of the Hub whose media are not decoded when its rows are read."""
    import datasets

    for column, feature in (dataset.features or {}).items():
        plain = _undecoded_feature(feature)
        if plain != feature:
            dataset = dataset.cast_column(column, plain)
        assert not isinstance(plain, datasets.Image | datasets.Audio) or not plain.decode
    return dataset


def _undecoded_feature(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Image | datasets.Audio):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded_feature(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded_feature(feature.feature), length=feature.length)
    return feature


def stored_media(row: dict[str, Any], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the media of a row apart, as they are kept next to its JSON."""
    for column in columns:
        if is_media(row.get(column)):
            yield {"column": column, **row[column]}
