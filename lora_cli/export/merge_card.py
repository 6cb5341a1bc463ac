"""Write the origin of a merged model: `merge.json` for programs, `README.md` for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_cli import __version__
from lora_cli.adapters.find_adapter import shown_name
from lora_cli.adapters.peft_format.adapter_folder import weights_sha256
from lora_cli.export.adapter_changes import WeightedAdapter
from lora_cli.files import write_atomically, write_json
from lora_cli.models.fingerprint import Fingerprint
from lora_cli.recipe import Recipe
from lora_cli.reporting.model_card import code_span, plain_text
from lora_cli.reporting.report import goal_of, is_hub_id, short_name


def write_origin(
    folder: Path,
    adapters: Sequence[WeightedAdapter],
    base: Fingerprint | None,
    recipe: Recipe,
    head: Path | None,
    proof: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `merge.json` and the model card of a merged model.

    Args:
        folder: The folder of the merged model.
        adapters: The adapters that were merged.
        base: The fingerprint of the base, if it has one.
        recipe: The recipe, which names the base and the task.
        head: The adapter whose modules trained in full were used, if the user named one.
        proof: The results of the comparisons, for `merge.json`.
        extra: Further entries of `merge.json`.
    """
    sources = [
        {
            "folder": shown_name(adapter.saved.path),
            "weight": adapter.weight,
            "sha256": weights_sha256(adapter.saved.path),
        }
        for adapter in adapters
    ]
    facts: dict[str, Any] = {"lora_version": __version__, "adapters": sources}
    if len(adapters) == 1:
        facts["adapter"] = sources[0]["folder"]
    if head is not None:
        facts["head"] = shown_name(head)
    base_entry = {} if base is None else {"base": base.facts}
    write_json(folder / "merge.json", facts | base_entry | {"proof": proof} | (extra or {}))
    write_atomically(folder / "README.md", _card(recipe, sources, facts.get("head")))


def _card(recipe: Recipe, sources: list[dict[str, Any]], head: str | None) -> str:
    """Return the model card of a merged model."""
    name, goal = recipe.model.name, goal_of(recipe.task.type)
    front = {
        "base_model": name if is_hub_id(name) else None,  # the Hub rejects paths
        "library_name": "diffusers" if recipe.task.generates_images else "transformers",
        "pipeline_tag": recipe.task.pipeline_tag,
        "tags": ["lora-cli"],
    }
    base = f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else code_span(name)
    rows = [
        f"- {code_span(one['folder'])}, weight {one['weight']:g}, SHA-256 `{one['sha256']}`"
        for one in sources
    ]
    head_note = f" Head and other modules trained in full from {code_span(head)}." if head else ""
    parts = [
        f"---\n{yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False)}---",
        f"# {plain_text(short_name(name))} for {goal}",
        f"{base} with adapters merged into its weights by `lora` {__version__}: an ordinary model "
        "folder, which computes as fast as the base.",
        f"## Made of\n\nW0 + the sum of weight x update, in float32, rounded once.{head_note}",
        "\n".join(rows),
        "What was compared is in `merge.json`.",
    ]
    return "\n\n".join(parts) + "\n"
