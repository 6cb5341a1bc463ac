"""Explain validation errors of a recipe by key, line and the description of the field."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from lora_cli.errors import Problem, counted, did_you_mean, nearest
from lora_cli.recipe.spec import Recipe
from lora_cli.recipe.yaml_reader import KeyPath, dotted

LocatedError = tuple[KeyPath, dict[str, Any]]

EXPECTED = {
    "string_type": "text",
    "string_too_short": "a text that is not empty",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a section with keys",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
}
PATTERNS = {
    r"^\d+(-\d+)?$": "a layer such as 3 or a range such as 0-11",
    r'^[^"\r\n]$': "one character",
    r"^\d+(\.\d+)? ?([kMGT]i?)?B$": "a size with its unit, such as `4GB` or `500MB`; `0B`: nothing",
    r"^pissa_niter_[1-9]\d?$": "`pissa_niter_4` or another number of iterations",
}


def explain(
    error: ValidationError, data: dict[str, Any], places: dict[str, str], invalid_keys: set[str]
) -> list[Problem]:
    """Turn pydantic's errors into problems: one per key, with its line and its description.

    Args:
        error: The errors of validating `data`.
        data: The recipe as it was read.
        places: Where each key was written.
        invalid_keys: Keys whose value the YAML reader has already rejected.
    """
    absent_keys = {key.rsplit(".", 1)[-1] for key in invalid_keys}
    entries = _entries(error, data, absent_keys)
    found = _problems(entries, data, places, invalid_keys)
    # Pydantic only checks for conflicts in a section without other errors. So validate again
    # without the invalid keys, as long as that shows new conflicts.
    paths = [path for path, _ in entries]
    while entries:
        pruned, removed = _without(paths, data)
        try:
            Recipe.model_validate(pruned)
            break
        except ValidationError as remaining:
            entries = _entries(remaining, pruned, absent_keys | removed)
        entries = [(p, entry) for p, entry in entries if entry["type"] == "conflict"]
        entries = [(p, entry) for p, entry in entries if p not in paths]
        paths += [path for path, _ in entries]
        found += _problems(entries, pruned, places, invalid_keys)
    return found


def _entries(error: ValidationError, data: Any, absent_keys: set[str]) -> list[LocatedError]:
    """Return pydantic's errors, each with the key that it is about.

    Conflicts that name an absent key are left out, as its absence may be their only cause.
    """
    entries: list[LocatedError] = []
    for entry in error.errors(include_url=False):
        path = _path_in(data, entry["loc"], entry["type"] == "missing")
        if entry["type"] != "conflict":
            entries.append((path, dict(entry)))
            continue
        for key, what, hint in entry["ctx"]["found"]:
            if not absent_keys & set(re.findall(r"`(?:\w+\.)*(\w+)\b[^`]*`", f"{what} {hint}")):
                where = (*path, *key.split(".")) if key else path
                entries.append((where, {**entry, "msg": what, "hint": hint}))
    return entries


def _path_in(data: Any, location: Sequence[str | int], missing: bool) -> KeyPath:
    """Return pydantic's location without what is not in the recipe: the names of union members."""
    path: list[str | int] = []
    node = data
    for i, part in enumerate(location):
        if (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]  # type: ignore[index]  # narrowed just above
            path.append(part)
        elif missing and i == len(location) - 1:
            path.append(part)
    return tuple(path)


def _without(paths: list[KeyPath], data: Any) -> tuple[Any, set[str]]:
    """Return the recipe without some keys, and the names of the keys and sections removed."""
    pruned = copy.deepcopy(data)
    removed: set[str] = set()
    for path in paths:
        keys = path[: next((i for i, part in enumerate(path) if isinstance(part, int)), None)]
        node = pruned
        for part in keys[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if keys and isinstance(node, dict):
            node.pop(keys[-1], None)
            removed.add(str(keys[-1]))
            if not node and len(keys) > 1:  # the section is only empty because of the removal
                removed.add(str(keys[-2]))
    return pruned, removed


def _problems(
    entries: list[LocatedError], data: Any, places: dict[str, str], invalid_keys: set[str]
) -> list[Problem]:
    by_key: dict[tuple[KeyPath, str], list[dict[str, Any]]] = {}
    for path, entry in entries:
        text = entry["msg"] if entry["type"] == "conflict" else ""
        by_key.setdefault((path, text), []).append(entry)
    # if a value may be a word or a list, only report the invalid item of a list, not the list
    deeper = {path[:i] for path, _ in by_key for i in range(len(path))}
    problems = []
    for (path, conflict), group in by_key.items():
        beginnings = {dotted(path[:i]) for i in range(1, len(path) + 1)}
        if beginnings & invalid_keys or (path in deeper and not conflict and path):
            continue
        key = dotted(path)
        enclosing = (dotted(path[:i]) for i in range(len(path), -1, -1))
        place = next((places[name] for name in enclosing if name in places), None)
        at = f"{key} ({place})" if key and place else key or place
        problems.append(_problem(path, group, data, at))
    return problems


def _problem(path: KeyPath, group: list[dict[str, Any]], data: Any, at: str | None) -> Problem:
    """Return the problem of one key; `group` has an error for each type that its value may have."""
    entry = group[0]
    name = str(path[-1]) if path else ""
    about_key = entry["type"] == "string_pattern_mismatch" and entry["input"] == name
    text = _description(path[:-1] if about_key else path, data)
    match entry["type"]:
        case "extra_forbidden":
            section = _schema_at(path[:-1], data)
            return Problem(f"unknown key `{name}`", at, _unknown_key_hint(path, section))
        case "missing":
            section_name = dotted(path[:-1])
            of = f" from `{section_name}`" if section_name else ""
            about = f": {text[0].lower()}{text[1:].rstrip('.')}" if text else ""
            return Problem(f"`{name}` is missing{of}", at, f"add `{name}:`{about}")
        case "conflict":
            return Problem(entry["msg"], at, entry["hint"])
        case "split":
            return Problem(f"`{_shown(entry['input'])}` is not a split", at, entry["msg"])
        case "union_tag_invalid" | "union_tag_not_found":
            types = list(_field_at(path, data).get("discriminator", {}).get("mapping", {}))
            given = str(entry["ctx"].get("tag", ""))
            what = f"unknown type `{given}`" if given else f"`type` is missing from `{name}`"
            return Problem(what, at, did_you_mean(given, types))
    given = entry["input"]
    if given is None:
        what = f"`{name}`" if isinstance(path[-1], str) else f"item {path[-1] + 1} of `{path[-2]}`"
        return Problem(f"{what} is empty", at, f"give it a value, or leave it out: {text}")
    expected = " or ".join(dict.fromkeys(_expected(one) for one in group))
    what = f"`{_shown(given)}` should be {expected}"
    if isinstance(given, str) and "number" in expected and re.fullmatch(r"[-+.\deE]+", given):
        what += ", without quotation marks"
    elif isinstance(given, bool | int | float) and "text" in expected:
        what += f': if it is a word, write "{_shown(given)}" with its quotation marks'
    choices = [word for one in group for word in _choices(one)]
    if choices and isinstance(given, str) and nearest(given, choices):
        text = f"did you mean `{nearest(given, choices)}`?"
    return Problem(what, at, text)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + "…"


def _choices(entry: dict[str, Any]) -> list[str]:
    if entry["type"] != "literal_error":
        return []
    return re.findall(r"'([^']+)'", entry["ctx"]["expected"])


def _expected(entry: dict[str, Any]) -> str:
    if entry["type"] in ("too_short", "too_long"):
        few = "at least" if entry["type"] == "too_short" else "at most"
        count = entry["ctx"].get("min_length") or entry["ctx"]["max_length"]
        return f"a list of {few} {counted(count, 'item')}"
    if entry["type"] == "literal_error":
        return " or ".join(f"`{choice}`" for choice in _choices(entry))
    message: str = entry["msg"]
    for beginning in ("Input should be ", "Value should be ", "Input should "):
        message = message.removeprefix(beginning)
    if entry["type"] == "string_pattern_mismatch":
        return PATTERNS[entry["ctx"]["pattern"]]
    return EXPECTED.get(entry["type"], message)


# ------------------------------------------------------------------------------- the JSON schema


@functools.cache
def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors. Do not change it, as it is cached."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora recipe",
        **{key: value for key, value in _one_line(schema).items() if key != "title"},
    }


def _one_line(node: Any) -> Any:
    """Join the lines of descriptions, and drop titles, which repeat the key."""
    if isinstance(node, dict):
        return {
            key: " ".join(value.split())
            if key == "description" and isinstance(value, str)
            else _one_line(value)
            for key, value in node.items()
            if key != "title" or isinstance(value, dict)
        }
    return [_one_line(child) for child in node] if isinstance(node, list) else node


def _definition(node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in node:
        return node
    definition: dict[str, Any] = recipe_schema()["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return definition


def _section(node: dict[str, Any], value: Any) -> dict[str, Any]:
    """Return the section that a schema describes; for a union, the member that `type` selects."""
    node = _definition(node)
    members = [_section(member, value) for member in node.get("anyOf", node.get("oneOf", []))]
    members = [m for m in members if m.keys() & {"properties", "additionalProperties"}]
    given = value.get("type") if isinstance(value, dict) else None
    for member in members:
        if member.get("properties", {}).get("type", {}).get("const") == given:
            return member
    return members[0] if members else node


def _schema_at(path: KeyPath, data: Any) -> dict[str, Any]:
    """Return the schema of the section at `path`; empty if there is none."""
    node, value = _section(recipe_schema(), data), data
    for part in path:
        node = _section(_child(node, part), value := _item(value, part))
    return node


def _field_at(path: KeyPath, data: Any) -> dict[str, Any]:
    """Return the schema of the field at `path`, from its section's schema; empty if none."""
    return _child(_schema_at(path[:-1], data), path[-1]) if path else {}


def _item(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) else None


def _child(node: dict[str, Any], part: str | int) -> dict[str, Any]:
    patterns = list(node.get("patternProperties", {}).values())
    child = node.get("properties", {}).get(part) or node.get("additionalProperties")
    child = child or (patterns[0] if patterns else None)
    return child if isinstance(child, dict) else {}


def _description(path: KeyPath, data: Any) -> str | None:
    """Return the description of the field at `path`, or of the closest section around it."""
    for length in range(len(path), 0, -1):
        field = _field_at(path[:length], data)
        # pydantic leaves out a field's description if it equals that of its section
        text = field.get("description") or _definition(field).get("description")
        if text:
            return str(text)
    return None


def _unknown_key_hint(path: KeyPath, section: dict[str, Any]) -> str:
    """Return a hint for an unknown key: the section it belongs to, or the nearest one here."""
    name, here = str(path[-1]), list(section.get("properties", {}))
    kind = section.get("properties", {}).get("type", {}).get("const")
    for known in _all_keys():
        if known == dotted(path):
            return f"it is not for `type: {kind}`; leave it out (known keys: {', '.join(here)})"
        if known.rsplit(".", 1)[-1] == name:
            return f"did you mean `{known}`?"
    if close := nearest(name, here):
        return f"did you mean `{close}`?"
    elsewhere = {path.rsplit(".", 1)[-1]: path for path in reversed(_all_keys())}
    if close := nearest(name, elsewhere, cutoff=0.85):
        return f"did you mean `{elsewhere[close]}`?"
    return "known keys here: " + ", ".join(here)


@functools.cache
def _all_keys() -> tuple[str, ...]:
    def walk(node: dict[str, Any], prefix: str) -> Iterator[str]:
        node = _definition(node)
        for member in node.get("anyOf", node.get("oneOf", [])):
            yield from walk(member, prefix)
        for key, child in node.get("properties", {}).items():
            yield prefix + key
            yield from walk(child, f"{prefix}{key}.")

    return tuple(walk(recipe_schema(), ""))
