"""Draft a recipe for a data file, with the reason for each value as a comment."""

from __future__ import annotations

from lora_cli.recipe_draft.commented_yaml import reject_existing, write_recipe
from lora_cli.recipe_draft.draft import draft_recipe
from lora_cli.recipe_draft.draft_values import Draft

__all__ = ["Draft", "draft_recipe", "reject_existing", "write_recipe"]
