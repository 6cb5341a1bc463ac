"""A recipe that is being drafted: its values, and the reasons of them."""

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
    """A recipe, with the reasons of its values.

    Args:
        values: The recipe, section by section.
        why: By key with dots, what says so; a comment in the file.
        findings: What was inferred and from what, to print: (name, finding).
        extra_files: Files that the recipe names, by name, to be written next to it.
        memory: What training takes, in words.
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
