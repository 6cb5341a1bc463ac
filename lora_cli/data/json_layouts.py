"""JSON that holds its rows in another way than as objects, one a line or in a list.

pandas alone writes five such ways. Each is named, with the command that writes the rows as lines.
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

LEAST_TEXTS = 5  # of an object whose keys are texts, and whose values are their labels
NOT_BLANK = re.compile(r"\S")
TEXT_KEY = re.compile(r"(?i)(.*[_\W])?(text|sentence|content|question|prompt|input|body|query)s?")
BY_COLUMN = "first(.[]) | keys_unsorted[] as $i | $all | map_values(.[$i])"
BY_LIST = "range(first(.[]) | length) as $i | $all | map_values(.[$i])"
NAMED_ONCE = ".columns as $names | .data[] | [$names, .] | transpose | map({(.[0]): .[1]}) | add"

Found = tuple[str, str]  # what is wrong, and a hint


def reject_whole(value: dict[str, Any], path: Path) -> None:
    """Reject an object that holds all rows of a file, and is no row.

    Raises:
        LoraError: If it is such a one; its hint writes the rows.
    """
    _reject(_rows_in_object(value, path.name), path)


def reject_lists(rows: Sequence[Any], path: Path, is_list: bool) -> None:
    """Reject rows of which none is an object.

    Args:
        rows: The rows.
        path: The file.
        is_list: They stand in one list; else each is a line.

    Raises:
        LoraError: If they are such; its hint names their fields.
    """
    _reject(_rows_in_lists(rows, path.name, is_list), path)


def reject_over_lines(text: str, path: Path) -> None:
    """Reject objects that follow each other, each over several lines.

    Raises:
        LoraError: If they are such; its hint writes each as a line.
    """
    _reject(_objects_over_lines(text, path.name), path)


def _reject(found: Found | None, path: Path) -> None:
    if found is not None:
        raise LoraError(found[0], str(path), found[1])


def _rows_in_object(value: dict[str, Any], name: str) -> Found | None:
    """Return in which way one object holds all rows of a file, and a hint; None for a row."""
    items = list(value.values())
    if _is_list_of(value.get("columns"), str) and _is_list_of(value.get("data"), list):
        return _found("the names of the columns stand apart from the rows", NAMED_ONCE, name)
    if "schema" in value and _is_list_of(value.get("data"), dict):
        return _found("the rows stand inside `data`", ".data[]", name)
    if (found := _splits(value, name)) is not None:
        return found
    if len(items) > 1 and all(isinstance(item, dict) and item for item in items):
        return _of_objects(value, name)
    if len(items) > 1 and all(_is_list_of(item, str, int, float, bool) for item in items):
        return _of_lists(value, name)
    texts = sum(len(key.split()) > 1 for key in value)
    plain = all(isinstance(item, str | int | float) for item in items)
    if plain and texts >= LEAST_TEXTS and texts > 0.8 * len(items):
        how = "to_entries[] | {text: .key, label: .value}"
        return _found("each key is a text, and its value the label", how, name)
    return None


def _rows_in_lists(rows: Sequence[Any], name: str, is_list: bool) -> Found | None:
    start = ".[] | " if is_list else ""
    if rows and all(isinstance(row, str) for row in rows):
        return _found("the rows are texts, and not objects", f"{start}{{text: .}}", name)
    if not _is_list_of(rows, list) or not all(rows):
        return None
    fields = _fields(rows)
    return _found("the rows are lists, and not objects with names", f"{start}{fields}", name)


def _objects_over_lines(text: str, name: str) -> Found | None:
    decoder, at, count = json.JSONDecoder(), 0, 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        count += isinstance(value, dict)
        if rest := NOT_BLANK.search(text, at):
            at = rest.start()
        else:
            break
    if count < 2:
        return None
    return _found("each object goes over several lines", ".", name)


def _found(what: str, how: str, name: str) -> Found:
    return what, f"write each row as a line: {jq_command(how, name, 'rows.jsonl')}"


def _is_list_of(value: Any, *kinds: type) -> bool:
    """Return whether a value is a list of several things of some kinds."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 1
        and all(isinstance(item, kinds) or item is None for item in value)
        and any(item is not None for item in value)
    )


def _splits(value: dict[str, Any], name: str) -> Found | None:
    """Return the hint of an object that has a list of rows for each split."""
    lists = [key for key, item in value.items() if _is_list_of(item, dict, list)]
    train = next((key for key in lists if names_split(key, ["train"])), None)
    if train is None or len(lists) < 2 or len(lists) < len(value):
        return None
    first = value[train][0]
    how = f"{field(train)}[]"
    if isinstance(first, list):
        how += f" | {_fields(value[train])}"
    others = ", ".join(f"`{key}`" for key in lists if key != train)
    what = "the file holds a list of rows for each split"
    return what, f"write each as a file: {jq_command(how, name, 'train.jsonl')}; so too {others}"


def _of_objects(value: dict[str, Any], name: str) -> Found | None:
    """Return the hint of an object of objects: of columns, or of rows that have a name each."""
    items = list(value.values())
    same = all(item.keys() == items[0].keys() for item in items)
    outer, inner = _are_numbers(value), _are_numbers(items[0])
    if same and not outer and (inner or len(items[0]) > len(items)):
        return _found("each column is an object", f". as $all | {BY_COLUMN}", name)
    if outer or len(items) > max(map(len, items)):
        return _found("each row has a key", ".[]", name)
    return None


def _of_lists(value: dict[str, Any], name: str) -> Found | None:
    """Return the hint of an object of lists: of columns, or of the texts of each label."""
    lists = list(value.values())
    same = len(set(map(len, lists))) == 1
    are_texts = all(_is_list_of(items, str) for items in lists)
    repeat = any(len({*items}) < len(items) for items in lists)
    if same and (repeat or not are_texts or any(map(TEXT_KEY.fullmatch, value))):
        if not any(isinstance(t, str) and len(t.split()) > 2 for items in lists for t in items):
            return None  # one row of words and their tags
        return _found("each column is a list", f". as $all | {BY_LIST}", name)
    if same and len(lists) > 2 * len(lists[0]):
        return _found("each row is a list with a key", f".[] | {_fields(lists)}", name)
    if are_texts and len(lists) > 1:
        how = "to_entries[] | .key as $name | .value[] | {text: ., label: $name}"
        return _found("each label has a list of texts", how, name)
    return None


def _are_numbers(value: dict[str, Any]) -> bool:
    return all(key.isdecimal() for key in value)


def _fields(rows: Sequence[Any]) -> str:
    """Return the expression that names the fields of rows that are lists."""
    width = len(rows[0])
    names = [f"column_{i}" for i in range(1, width + 1)]
    if width == 2:
        values = {str(row[1]) for row in rows if len(row) == 2}
        names = ["text", "label" if len(values) <= len(rows) / 2 else "text_2"]
    return "{" + ", ".join(f"{name}: .[{i}]" for i, name in enumerate(names)) + "}"
