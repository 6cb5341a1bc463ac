"""Read rows from JSON files: one object per line, or a list of objects."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_cli.data.jq_commands import field, jq_command
from lora_cli.data.json_layouts import (
    reject_lists,
    reject_multiline_objects,
    reject_whole_file,
)
from lora_cli.data.text_lines import NOT_TEXT, RawRow, byte_error, encoding_hint, read_lines
from lora_cli.errors import LoraError
from lora_cli.recipe import FormatSpec

JSON_NAMES: dict[type, str] = {
    str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list",
    dict: "an object", type(None): "null", bytes: "bytes",
}  # fmt: skip


def read_json(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    """Yield the rows of a JSON lines file, or of a single JSON list."""
    lines = ((n, line) for n, line in read_lines(path, spec.encoding) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        yield from _read_json_list(path, spec)
        return
    for number, line in itertools.chain([first], lines):
        row = _json_row(line, f"{path.name}:{number}", spec)
        if row.error and number == first[0]:
            _reject_one_object(path, spec)
        yield row


def _json_row(line: str, place: str, spec: FormatSpec) -> RawRow:
    if reason := byte_error(line, spec.encoding):
        return RawRow(None, place, reason)
    try:
        value = ROW.decode(line)
    except (ValueError, RecursionError) as error:
        return RawRow(None, place, json_error(error))
    return _json_object(value, place, may_have_surrogates="\\u" in line)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, rejecting repeated keys, of which Python silently keeps the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise _RepeatedKeyError(f"the key `{repeated}` appears twice")
    return value


class _RepeatedKeyError(ValueError):
    """A JSON object has the same key twice."""


ROW = json.JSONDecoder(
    object_pairs_hook=_without_repeats
)  # shared, as creating a decoder takes as long as decoding a row


def json_error(error: Exception) -> str:
    """Explain why a text is not JSON; Python's messages vary by version and suit programmers."""
    if isinstance(error, RecursionError):
        return "the JSON is too deep"
    if not isinstance(error, json.JSONDecodeError):
        return (
            str(error)
            if isinstance(error, _RepeatedKeyError)
            else "not valid JSON: a number is too long"
        )
    following = error.doc[error.pos :].lstrip()
    preceding = error.doc[: error.pos].rstrip()
    if error.msg == "Extra data":
        what = f"{'a comma' if following[0] == ',' else 'something'} follows the row"
    elif following.startswith("'"):
        what = "JSON needs double quotation marks"
    elif not following:
        what = "it ends too early"
    elif "string" in error.msg:
        what = "a quotation mark is not closed"
    elif "control character" in error.msg:
        what = "a text contains a tab or another control character"
    elif "escape" in error.msg:
        what = "a backslash is followed by something that is not an escape code"
    elif preceding.endswith(",") and following[0] in "]}":
        what = f"there is a comma before the closing `{following[0]}`"
    else:
        what = f"`{following[0]}` is unexpected here"
    return f"not valid JSON: {what} (column {error.colno})"


def _json_object(value: Any, place: str, may_have_surrogates: bool = True) -> RawRow:
    """Return a value as a row, after a check for lone surrogates unless it cannot have any."""
    if not isinstance(value, dict):
        return RawRow(None, place, f"a row is a JSON object, not {JSON_NAMES[type(value)]}")
    try:
        if may_have_surrogates:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        return RawRow(None, place, f"{surrogate} is half of a character")
    return RawRow(value, place)


def _read_json_list(path: Path, spec: FormatSpec) -> Iterator[RawRow]:
    text = "".join(line for _, line in read_lines(path, spec.encoding))
    if reason := byte_error(text, spec.encoding):
        line = NOT_TEXT.split(text, maxsplit=1)[0].count("\n") + 1
        raise LoraError(reason, f"{path}:{line}", encoding_hint(path, spec.encoding))
    try:
        values = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        reject_lists(_lines_of_json(text), path, is_list=False)
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        hint = "copy or download it again, or write the rows as lines, one object each"
        raise LoraError(json_error(error), place, hint) from error
    reject_lists(values, path, is_list=True)
    for number, value in enumerate(values):
        yield _json_object(value, f"{path.name}[{number}]")


def _lines_of_json(text: str) -> list[Any]:
    """Parse each line of a text as JSON; return an empty list if any line is not JSON."""
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        return []


def _reject_one_object(path: Path, spec: FormatSpec) -> None:
    """Raise an error if a file with an invalid first line is in another JSON layout."""
    first = next(line for _, line in read_lines(path, spec.encoding) if line.strip())
    if first.rstrip().endswith("}"):
        return
    text = "".join(line for _, line in read_lines(path, spec.encoding)).strip()
    if not first.lstrip().startswith("{"):
        reject_lists(_lines_of_json(text), path, is_list=False)
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        reject_multiline_objects(text, path)
        return
    reject_whole_file(value, path)
    lists = {key: item for key, item in value.items() if isinstance(item, list) and item}
    key = "train" if "train" in lists else next(iter(lists), "rows")
    program = f"{field(key)}[]"
    if all(isinstance(item, list) and len(item) == 2 for item in lists.get(key, [None])):
        program += " | {text: .[0], label: .[1]}"
    raise LoraError(
        "the file is one JSON object, and not a list of rows",
        str(path),
        f"extract the rows: {jq_command(program, path.name, 'rows.jsonl')}",
    )
