"""Write the best adapter so far, with its processor, into the output folder itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_cli.adapters.peft_format.adapter_folder import read_tensors, restore, save_adapter
from lora_cli.adapters.peft_format.write_diffusion_file import write_diffusers_file
from lora_cli.files import STAGING, publish
from lora_cli.models.base_facts import write_computation
from lora_cli.models.bundle import Bundle, part_names
from lora_cli.models.fingerprint import Fingerprint
from lora_cli.models.older_config_names import add_older_names
from lora_cli.recipe import Recipe

SaveProcessor = Callable[[Path, dict[str, Any] | None], None]


def publish_adapter(
    output: Path,
    model: nn.Module,
    recipe: Recipe,
    in_full: list[str],
    base: Fingerprint | None,
    save_processor: SaveProcessor | None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write the adapter, or with full fine-tuning the model, into the output folder.

    It replaces the one that was published before, completely or not at all.

    Args:
        output: The output folder of the run.
        model: The model.
        recipe: The recipe.
        in_full: The names of the modules that are trained in full.
        base: The fingerprint of the base.
        save_processor: Writes the tokenizer or other processor, and the probe, into a folder.
        facts: The facts of the base that affect outputs besides its tensors.
    """
    staging = output / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    if recipe.adapter.type == "full":
        assert isinstance(model, PreTrainedModel | Bundle)
        model.save_pretrained(staging)
        add_older_names(staging, {})
    else:
        save_adapter(staging, model, recipe, in_full, base)
        if part_names(model):  # diffusers reads another file format
            write_diffusers_file(staging)
    if save_processor is not None:
        save_processor(staging, facts)
    if facts is not None:
        write_computation(staging, recipe, facts)
    publish(staging, output)


def restore_published(output: Path, model: nn.Module, recipe: Recipe) -> None:
    """Load the adapter or model that `publish_adapter` wrote into the model."""
    if recipe.adapter.type == "full":
        for name, part in model.parts.items() if isinstance(model, Bundle) else [("", model)]:
            kind: Any = type(part)
            key = "dtype" if isinstance(part, PreTrainedModel) else "torch_dtype"
            # the library that saved it may have split the file, or renamed tensors
            saved = kind.from_pretrained(output / name, **{key: torch.float32})
            part.load_state_dict(saved.state_dict())
    else:
        restore(model, read_tensors(output))
