"""A drafted recipe: its values, and the reason for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_cli.data.folder_files import SCHEMA
from lora_cli.recipe_draft.commented_yaml import commented_yaml

HEAD = [
    f"yaml-language-server: $schema={SCHEMA}",
    "Written by `lora init`; each comment says what a value was inferred from.",
]


@dataclass
class Draft:
    """A drafted recipe, with the reason for each value.

    Args:
        values: The recipe, section by section.
        why: The reason for a value, by dotted key; written as a comment.
        findings: The inferred values and their reasons to print, as (name, finding).
        extra_files: Contents of files to write next to the recipe, by name.
        memory: The memory that training needs, in words.
    """

    values: dict[str, Any]
    why: dict[str, str]
    findings: list[tuple[str, str]] = field(default_factory=list)
    extra_files: dict[str, str] = field(default_factory=dict)
    memory: str = ""

    def text(self) -> str:
        """Return the recipe as YAML with comments."""
        return commented_yaml(self.values, self.why, HEAD)

    def put(self, section: str, key: str, value: Any, why: str = "") -> None:
        """Set a key of a section."""
        self.values.setdefault(section, {})[key] = value
        if why:
            self.why[f"{section}.{key}"] = why
