"""Images and audio in rows, as encoded bytes or paths, which are decoded only when used.

A media value is `{"bytes": b"…" or None, "path": "…" or None}`, like undecoded `Image` and `Audio`
columns of `datasets`. Csv and JSON files store it as a path relative to the file's folder, or as
base64; parquet files and the Hub as bytes, or as such a pair. Rows are compared and hashed by the
bytes, no matter where these are stored.
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
# base64 of the first bytes of PNG, JPEG, GIF, WebP and wav; flac, ogg, TIFF; aiff, au; mp3
ENCODED_STARTS = (
    "iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "ZkxhQ", "T2dnUw", "SUkqA", "TU0AK",
    "Rk9STQ", "LnNuZA", "SUQz", *(f"//{letter}" for letter in "IJKLMNOPopqrstuv"),
)  # fmt: skip
LEAST_ENCODED = 60  # characters of base64 without a `data:` prefix
MEDIA_FOLDERS = ("clips", "wavs", "audio", "recordings", "images")
"""Folders next to a table that may contain its files, besides one named like the table."""
N_INSPECTED_PATHS = 50  # number of paths used to find the folder that they are relative to
FILE_URL = "file://"  # prefix of the URL of a local file
FILE_NAME = "file_name"  # name of the path column in a metadata.csv
MAX_SHOWN = 200


def is_media(value: Any) -> bool:
    """Return whether a value of a row is a media value."""
    return isinstance(value, dict) and value.keys() == KEYS


def media_value(value: Any, folder: Path | None = None) -> Any:
    """Convert a cell to a media value; return it unchanged if that is impossible.

    Args:
        value: A path, bytes (base64 in JSON), or a pair of both.
        folder: The folder that paths are relative to; None leaves them unchanged.
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
        elif (data := _from_base64(data) if isinstance(data, str) else data) is not None:
            medium = media_value(data)
            if is_media(medium):
                return {**medium, "path": path if isinstance(path, str) else None}
        return {name: item for name, item in value.items() if name != "bytes"}  # not a file
    if isinstance(value, str) and value.strip():
        if (content := decode_base64_media(value.strip())) is not None:
            return {"bytes": content, "path": None}
        if value.startswith(FILE_URL):
            value = url2pathname(value.removeprefix(FILE_URL))
        path = value if folder is None or ADDRESS.match(value) else str(folder / value)
        return {"bytes": None, "path": local_path(path)}
    return value


def decode_base64_media(text: str) -> bytes | None:
    """Decode a text that is a media file in base64; return None if it is not."""
    is_bare = len(text) >= LEAST_ENCODED and text.startswith(ENCODED_STARTS)
    return _from_base64(text) if is_bare or ENCODED.match(text) else None


def _from_base64(text: str) -> bytes | None:
    """Decode base64 with or without a `data:` prefix."""
    encoded = "".join(ENCODED.sub("", text, count=1).split())
    try:
        return base64.b64decode(encoded, validate=True) or None
    except ValueError:
        return None


def folder_of_paths(table: Path, paths: Sequence[str]) -> Path:
    """Return the folder that the paths in a table are relative to.

    It is the folder of the table, or a folder inside it, such as `clips` of Common Voice.

    Args:
        table: The file.
        paths: Some of the paths in the table.
    """
    folder, name = table.parent, table.stem
    candidates = [f"{outer}{inner}" for outer in ("", *MEDIA_FOLDERS) for inner in ("", f"/{name}")]
    return first_folder_with([folder / part.strip("/") for part in candidates], paths) or folder


def first_folder_with(folders: Sequence[Path], paths: Sequence[str]) -> Path | None:
    """Return the first folder that contains any of the files; None if no folder does."""
    for folder in folders:
        try:
            if any(Path(local_path(str(folder / path))).is_file() for path in paths):
                return folder
        except (OSError, ValueError):  # the name is too long, or contains a null character
            continue
    return None


def local_path(path: str) -> str:
    """Convert a path from Windows to this system's notation, if that leads to a file."""
    if "\\" not in path or ADDRESS.match(path):
        return path
    converted = path.replace("\\", "/")
    try:
        return converted if not Path(path).exists() and Path(converted).exists() else path
    except (OSError, ValueError):  # the name is too long, or contains a null character
        return path


def paths_of(rows: Iterable[RawRow], columns: Collection[str]) -> list[str]:
    """Return the media paths in the first rows of a table."""
    paths: list[str] = []
    for row in islice(rows, N_INSPECTED_PATHS):
        values = row.columns or {}
        for column in columns:
            value = media_value(values.get(column, values.get(FILE_NAME)))
            if is_media(value) and value["bytes"] is None and not ADDRESS.match(value["path"]):
                paths.append(value["path"])
    return paths


def with_media(row: RawRow, folder: Path, columns: Collection[str]) -> RawRow:
    """Return a row with its media columns converted to media values.

    Args:
        row: The row as it was read.
        folder: The folder that paths are relative to.
        columns: Names of the media columns.
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
    """Return an error for the first media column without an existing file; empty if none."""
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
        shown = printable(str(path), MAX_SHOWN)
        if ADDRESS.match(str(path)):
            return f"column `{column}` holds the address `{shown}`: download the file before"
        try:
            if Path(path).is_file():
                continue
            missing = not Path(path).exists()
        except (OSError, ValueError):  # the name is too long, or contains a null character
            missing = True
        return f"there is no file `{shown}`" if missing else f"`{shown}` is no file"
    return ""


def media_hash(value: dict[str, Any]) -> str:
    """Return a hash (xxh3, 128 bits) of the bytes of a media value.

    For a file that cannot be read, hash its path: the row is reported elsewhere.
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


def with_media_hashes(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with media values replaced by the hashes of their bytes."""
    return {name: media_hash(v) if is_media(v) else v for name, v in row.items()}


def media_name(value: dict[str, Any]) -> str:
    """Return a name for a media value in messages: its file name, or its size in bytes."""
    if value["path"]:
        return Path(value["path"]).name
    return counted(len(value["bytes"] or b""), "byte")


def without_decoding(dataset: Any) -> Any:
    """Return a Hub data set whose media columns are not decoded on access."""
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
    """Yield the media of a row in the form in which they are stored next to its JSON."""
    for column in columns:
        if is_media(row.get(column)):
            yield {"column": column, **row[column]}
