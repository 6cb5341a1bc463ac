"""YAML with comments: a section a block, a key a line, what says so behind it or above it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_cli.data.folder_files import SCHEMA
from lora_cli.errors import LoraError
from lora_cli.files import write_atomically
from lora_cli.recipe import recipe_schema
from lora_cli.recipe.yaml_reader import YamlDumper

WIDTH = 100


def commented_yaml(values: dict[str, Any], why: dict[str, str], head: Sequence[str]) -> str:
    """Return a mapping of sections as YAML.

    Args:
        values: Sections and their keys; what lies deeper is written in one line.
        why: Comments, by key with dots. A mapping with comments of its own is written as a block.
        head: The first lines, which are comments.
    """
    lines = [f"# {line}" for line in head]
    for name, section in values.items():
        lines += _entry(name, section, (name,), why)
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, path: tuple[str, ...], why: dict[str, str]) -> list[str]:
    indent = "  " * (len(path) - 1)
    dotted = ".".join(path)
    comment = plain(why.get(dotted, ""))
    inside = any(other.startswith(f"{dotted}.") for other in why)
    if isinstance(value, dict) and (inside or (len(path) == 1 and len(value) > 1 and not comment)):
        lines = [f"{indent}{key}:"]
        for name, item in value.items():
            lines += _entry(name, item, (*path, name), why)
        return _with_comment(lines, comment, indent)
    lines = [f"{indent}{line}" for line in _flow({key: value}).splitlines()]
    return _with_comment(lines, comment, indent)


def _with_comment(lines: list[str], comment: str, indent: str) -> list[str]:
    if not comment:
        return lines
    behind = f"{lines[0]}  # {comment}"
    if len(lines) == 1 and len(behind) <= WIDTH:
        return [behind]
    return [f"{indent}# {comment}", *lines]


def _flow(entry: dict[str, Any]) -> str:
    """Return one key with its value: mappings and lists in brackets, words without."""
    key, value = next(iter(entry.items()))
    width = WIDTH - 10 if isinstance(value, list) else 10_000
    text = yaml.dump(
        value,
        Dumper=YamlDumper,
        default_flow_style=True,
        default_style='"' if isinstance(value, str) and not value.isprintable() else None,
        sort_keys=False,
        allow_unicode=True,
        width=width,
    )
    first, *more = text.removesuffix("...\n").rstrip("\n").splitlines()
    return "\n".join([f"{key}: {first}", *(f"  {line.strip()}" for line in more)])


def plain(text: str) -> str:
    """Return a text as one line that may stand in a comment."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(line.split())


def write_recipe(target: Path, text: str, extra_files: dict[str, str]) -> None:
    """Write a recipe, its schema for editors, and the files that it names.

    Files that are there already stay as they are; a schema that this program wrote is renewed.

    Raises:
        LoraError: If the recipe exists already, or its folder does not.
    """
    reject_existing(target)
    schema = target.parent / SCHEMA
    if not schema.exists() or _is_our_schema(schema):
        write_atomically(schema, json.dumps(recipe_schema(), indent=1))
    for name, content in extra_files.items():
        file = target.parent / name
        if not file.exists():
            write_atomically(file, content)
    write_atomically(target, text)


def _is_our_schema(file: Path) -> bool:
    """Return whether a file is the schema of recipes, perhaps that of another version."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    title = recipe_schema()["title"]
    return isinstance(found, dict) and found.get("title") == title and "$defs" in found


def reject_existing(target: Path) -> None:
    """Check that nothing is there yet, and that the folder exists."""
    if target.exists():
        hint = "name another file with `-o FILE`, or remove this one first"
        raise LoraError(f"{target} exists already, and is not overwritten", "-o", hint)
    if not target.absolute().parent.is_dir():
        raise LoraError(f"there is no folder {target.parent}", "-o", f"mkdir -p {target.parent}")
