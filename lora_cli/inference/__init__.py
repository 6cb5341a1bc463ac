"""A first recipe for a file of rows, with the reasons of its values beside them."""

from __future__ import annotations

from lora_cli.inference.draft import Draft, draft_recipe
from lora_cli.inference.writing import refuse_existing, write_recipe

__all__ = ["Draft", "draft_recipe", "refuse_existing", "write_recipe"]
