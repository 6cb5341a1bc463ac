"""Generate the pages of docs/ that come from the code and its tests.

usage: python scripts/docs.py           (a test checks that the pages are up to date)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- Written by scripts/docs.py: change the docstrings, not this page. -->\n"


def main() -> None:
    """Write all generated pages."""
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")


# --------------------------------------------------------------------------------------- recipe


def recipe_page() -> str:
    """Return the reference of all recipe keys, section by section."""
    from lora_cli.recipe import recipe_schema

    schema = recipe_schema()
    parts = [
        f"{NOTE}\n# Recipe reference\n",
        "Every key, its type and its default. `lora schema` prints the same for editors, "
        "`lora validate RECIPE` checks a recipe. A *step* is an optimizer step, a *micro-batch* "
        "one forward pass.\n",
    ]
    seen: set[str] = set()
    queue = [("", schema)]
    while queue:
        path, section = queue.pop(0)
        parts.append(_section(path, section, schema["$defs"]))
        for name, field in section.get("properties", {}).items():
            for reference in _references(field):
                if reference not in seen:
                    seen.add(reference)
                    child = schema["$defs"][reference]
                    queue.append((_heading(path, name, child), child))
    return "\n".join(parts)


def _heading(path: str, name: str, section: dict[str, Any]) -> str:
    kind = section.get("properties", {}).get("type", {}).get("const")
    return f"{path}.{name}".strip(".") + (f" (`type: {kind}`)" if kind else "")


def _section(path: str, section: dict[str, Any], definitions: dict[str, Any]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    required = section.get("required", [])
    for name, field in section.get("properties", {}).items():
        default = "required" if name in required else _default(field)
        meaning = field.get("description", "")
        if not meaning and "$ref" in field:  # it equals that of the section
            meaning = definitions[field["$ref"].rsplit("/", 1)[-1]].get("description", "")
        cells = (f"`{name}`", _type(field), default, meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    title = f"## {path}\n\n" if path else ""
    description = section.get("description", "")
    return f"{title}{description}\n\n" + "\n".join(rows) + "\n"


def _default(field: dict[str, Any]) -> str:
    if "default" not in field or field["default"] in (None, {}, [], ""):
        return ""
    value = field["default"]
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(field: dict[str, Any]) -> str:
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        return "section"
    members = field.get("anyOf") or field.get("oneOf")
    if members:
        names = [_type(member) for member in members if member.get("type") != "null"]
        return " or ".join(dict.fromkeys(names))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    if field.get("type") == "object":
        inside = field.get("additionalProperties")
        return f"keys with {_type(inside)}" if isinstance(inside, dict) else "section"
    names = {"string": "text", "integer": "whole number", "boolean": "true, false"}
    return names.get(str(field.get("type")), str(field.get("type", "")))


def _references(field: dict[str, Any]) -> list[str]:
    found = [field["$ref"].rsplit("/", 1)[-1]] if "$ref" in field else []
    for key in ("anyOf", "oneOf"):
        for member in field.get(key, []):
            found += _references(member)
    inside = field.get("additionalProperties")
    return found + (_references(inside) if isinstance(inside, dict) else [])


# ------------------------------------------------------------------------------------- commands


def commands_page() -> str:
    """Return the page with the help of every command."""
    os.environ |= {"COLUMNS": "88", "TERM": "dumb", "NO_COLOR": "1"}
    from typer.main import get_command
    from typer.testing import CliRunner

    from lora_cli.cli.app import app

    command: Any = get_command(app)
    parts = [f"{NOTE}\n# Commands\n", "`lora COMMAND --help` prints the same.\n"]
    for name in command.commands:
        output = CliRunner().invoke(app, [name, "--help"], prog_name="lora").output
        text = "\n".join(line.rstrip() for line in output.strip().splitlines())
        parts.append(f"## lora {name}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


# --------------------------------------------------------------------------------------- tests


def tested_page() -> str:
    """Return the page that lists what is tested, and by which tests."""
    import what_is_tested

    return what_is_tested.page(NOTE.replace("the docstrings", "the tests' `proves` marks"))


PAGES = {
    "recipe.md": recipe_page,
    "commands.md": commands_page,
    "what_is_tested.md": tested_page,
}


if __name__ == "__main__":
    main()
