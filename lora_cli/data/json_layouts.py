"""Recognise JSON layouts other than one object per line or a list of objects.

pandas alone writes five such layouts. Each is rejected with the command that converts it to JSON
lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.data.jq_commands import field, jq_command
from lora_cli.data.split_names import names_split
from lora_cli.errors import LoraError

MIN_TEXTS = 5  # in an object that maps texts to labels
NOT_BLANK = re.compile(r"\S")
TEXT_KEY = re.compile(r"(?i)(.*[_\W])?(text|sentence|content|question|prompt|input|body|query)s?")
BY_COLUMN = "first(.[]) | keys_unsorted[] as $i | $all | map_values(.[$i])"
BY_LIST = "range(first(.[]) | length) as $i | $all | map_values(.[$i])"
NAMED_ONCE = ".columns as $names | .data[] | [$names, .] | transpose | map({(.[0]): .[1]}) | add"

Rejection = tuple[str, str]  # message and hint


def reject_whole_file(value: dict[str, Any], path: Path) -> None:
    """Reject an object that contains all rows of a file instead of being one row.

    Raises:
        LoraError: If it is such an object; the hint is a command that extracts the rows.
    """
    _reject(_rows_in_object(value, path.name), path)


def reject_lists(rows: Sequence[Any], path: Path, is_list: bool) -> None:
    """Reject rows that are lists or texts instead of objects.

    Args:
        rows: The rows.
        path: The file.
        is_list: Whether the file is one list of rows, instead of one row per line.

    Raises:
        LoraError: If they are; the hint is a command that turns them into objects.
    """
    _reject(_rows_in_lists(rows, path.name, is_list), path)


def reject_multiline_objects(text: str, path: Path) -> None:
    """Reject consecutive objects that span several lines each.

    Raises:
        LoraError: If the text is one; the hint is a command that writes each object as a line.
    """
    _reject(_multiline_objects(text, path.name), path)


def _reject(rejection: Rejection | None, path: Path) -> None:
    if rejection is not None:
        raise LoraError(rejection[0], str(path), rejection[1])


def _rows_in_object(value: dict[str, Any], name: str) -> Rejection | None:
    """Return the error and hint for an object that contains all rows; None for a single row."""
    items = list(value.values())
    if _is_list_of(value.get("columns"), str) and _is_list_of(value.get("data"), list):
        return _rejection("the names of the columns stand apart from the rows", NAMED_ONCE, name)
    if "schema" in value and _is_list_of(value.get("data"), dict):
        return _rejection("the rows stand inside `data`", ".data[]", name)
    if (rejection := _lists_of_splits(value, name)) is not None:
        return rejection
    if len(items) > 1 and all(isinstance(item, dict) and item for item in items):
        return _object_of_objects(value, name)
    if len(items) > 1 and all(_is_list_of(item, str, int, float, bool) for item in items):
        return _object_of_lists(value, name)
    n_texts = sum(len(key.split()) > 1 for key in value)
    are_scalars = all(isinstance(item, str | int | float) for item in items)
    if are_scalars and n_texts >= MIN_TEXTS and n_texts > 0.8 * len(items):
        program = "to_entries[] | {text: .key, label: .value}"
        return _rejection("each key is a text, and its value the label", program, name)
    return None


def _rows_in_lists(rows: Sequence[Any], name: str, is_list: bool) -> Rejection | None:
    start = ".[] | " if is_list else ""
    if rows and all(isinstance(row, str) for row in rows):
        return _rejection("the rows are texts, and not objects", f"{start}{{text: .}}", name)
    if not _is_list_of(rows, list) or not all(rows):
        return None
    if all(isinstance(turn, dict) for turn in rows[0]):
        column = "conversations" if "from" in rows[0][0] else "messages"
        program = f"{start}{{{column}: .}}"
        return _rejection("the rows are lists of turns, and not objects with names", program, name)
    fields = _fields(rows)
    return _rejection("the rows are lists, and not objects with names", f"{start}{fields}", name)


def _multiline_objects(text: str, name: str) -> Rejection | None:
    decoder, position, count = json.JSONDecoder(), 0, 0
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return None
        count += isinstance(value, dict)
        if match := NOT_BLANK.search(text, position):
            position = match.start()
        else:
            break
    if count < 2:
        return None
    return _rejection("each object goes over several lines", ".", name)


def _rejection(what: str, program: str, name: str) -> Rejection:
    return what, f"write each row as a line: {jq_command(program, name, 'rows.jsonl')}"


def _is_list_of(value: Any, *kinds: type) -> bool:
    """Return whether a value is a list of at least two items of the given types, or None."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 1
        and all(isinstance(item, kinds) or item is None for item in value)
        and any(item is not None for item in value)
    )


def _lists_of_splits(value: dict[str, Any], name: str) -> Rejection | None:
    """Return the error and hint for an object with one list of rows per split."""
    lists = [key for key, item in value.items() if _is_list_of(item, dict, list)]
    train = next((key for key in lists if names_split(key, ["train"])), None)
    if train is None or len(lists) < 2 or len(lists) < len(value):
        return None
    first = value[train][0]
    program = f"{field(train)}[]"
    if isinstance(first, list):
        program += f" | {_fields(value[train])}"
    others = ", ".join(f"`{key}`" for key in lists if key != train)
    what = "the file holds a list of rows for each split"
    return (
        what,
        f"write each as a file: {jq_command(program, name, 'train.jsonl')}; so too {others}",
    )


def _object_of_objects(value: dict[str, Any], name: str) -> Rejection | None:
    """Return the error and hint for an object of objects, which are columns or rows."""
    items = list(value.values())
    same_keys = all(item.keys() == items[0].keys() for item in items)
    outer, inner = _are_numbers(value), _are_numbers(items[0])
    if same_keys and not outer and (inner or len(items[0]) > len(items)):
        return _rejection("each column is an object", f". as $all | {BY_COLUMN}", name)
    if outer or len(items) > max(map(len, items)):
        return _rejection("each row has a key", ".[]", name)
    return None


def _object_of_lists(value: dict[str, Any], name: str) -> Rejection | None:
    """Return the error and hint for an object of lists: columns, rows, or the texts of a label."""
    lists = list(value.values())
    same_length = len(set(map(len, lists))) == 1
    are_texts = all(_is_list_of(items, str) for items in lists)
    has_repeats = any(len({*items}) < len(items) for items in lists)
    if same_length and (has_repeats or not are_texts or any(map(TEXT_KEY.fullmatch, value))):
        if not any(isinstance(t, str) and len(t.split()) > 2 for items in lists for t in items):
            return None  # a single row with words and their tags
        return _rejection("each column is a list", f". as $all | {BY_LIST}", name)
    if same_length and len(lists) > 2 * len(lists[0]):
        return _rejection("each row is a list with a key", f".[] | {_fields(lists)}", name)
    if are_texts and len(lists) > 1:
        program = "to_entries[] | .key as $name | .value[] | {text: ., label: $name}"
        return _rejection("each label has a list of texts", program, name)
    return None


def _are_numbers(value: dict[str, Any]) -> bool:
    return all(key.isdecimal() for key in value)


def _fields(rows: Sequence[Any]) -> str:
    """Return the jq expression that turns rows that are lists into objects."""
    width = len(rows[0])
    names = [f"column_{i}" for i in range(1, width + 1)]
    if width == 2:
        values = {str(row[1]) for row in rows if len(row) == 2}
        names = ["text", "label" if len(values) <= len(rows) / 2 else "text_2"]
    return "{" + ", ".join(f"{name}: .[{i}]" for i, name in enumerate(names)) + "}"
