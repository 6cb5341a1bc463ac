"""Write a recipe as YAML, with the reason for a value as a comment after or above it."""

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
        values: Sections and their keys; nested values are written on one line.
        why: Comments by dotted key. A mapping whose keys have comments is written as a block.
        head: Comment lines at the top.
    """
    lines = [f"# {line}" for line in head]
    for name, section in values.items():
        lines += _entry(name, section, (name,), why)
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, path: tuple[str, ...], why: dict[str, str]) -> list[str]:
    indent = "  " * (len(path) - 1)
    dotted = ".".join(path)
    comment = one_line(why.get(dotted, ""))
    has_nested_comments = any(other.startswith(f"{dotted}.") for other in why)
    if isinstance(value, dict) and (
        has_nested_comments or (len(path) == 1 and len(value) > 1 and not comment)
    ):
        lines = [f"{indent}{key}:"]
        for name, item in value.items():
            lines += _entry(name, item, (*path, name), why)
        return _with_comment(lines, comment, indent)
    lines = [f"{indent}{line}" for line in _flow({key: value}).splitlines()]
    return _with_comment(lines, comment, indent)


def _with_comment(lines: list[str], comment: str, indent: str) -> list[str]:
    if not comment:
        return lines
    same_line = f"{lines[0]}  # {comment}"
    if len(lines) == 1 and len(same_line) <= WIDTH:
        return [same_line]
    return [f"{indent}# {comment}", *lines]


def _flow(entry: dict[str, Any]) -> str:
    """Return a key with its value in YAML flow style."""
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
    first, *following = text.removesuffix("...\n").rstrip("\n").splitlines()
    return "\n".join([f"{key}: {first}", *(f"  {line.strip()}" for line in following)])


def one_line(text: str) -> str:
    """Return a text as one printable line, for a comment."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(line.split())


def write_recipe(target: Path, text: str, extra_files: dict[str, str]) -> None:
    """Write a recipe, the schema for editors, and the files that the recipe refers to.

    Existing files are left unchanged, except for a schema written by `lora`, which is updated.

    Raises:
        LoraError: If the recipe exists already, or its folder does not.
    """
    reject_existing(target)
    schema = target.parent / SCHEMA
    if not schema.exists() or _is_recipe_schema(schema):
        write_atomically(schema, json.dumps(recipe_schema(), indent=1))
    for name, content in extra_files.items():
        file = target.parent / name
        if not file.exists():
            write_atomically(file, content)
    write_atomically(target, text)


def _is_recipe_schema(file: Path) -> bool:
    """Return whether a file is a recipe schema of this or another version."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    title = recipe_schema()["title"]
    return isinstance(content, dict) and content.get("title") == title and "$defs" in content


def reject_existing(target: Path) -> None:
    """Raise an error if the recipe file exists, or its folder does not."""
    if target.exists():
        hint = "name another file with `-o FILE`, or remove this one first"
        raise LoraError(f"{target} exists already, and is not overwritten", "-o", hint)
    if not target.absolute().parent.is_dir():
        raise LoraError(f"there is no folder {target.parent}", "-o", f"mkdir -p {target.parent}")
