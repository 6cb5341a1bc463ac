"""Translate module names of other tools and other versions of transformers to the model's names.

`torch.compile`, data parallelism and checkpointing wrap modules, and the wrappers' names end up in
the file: `_orig_mod.`, `module.`. Transformers moved the language model in vision-language models
from `language_model.model.` to `model.language_model.`, and a model without a head lacks the prefix
of its body, such as `bert.`. Names are translated if exactly one module of the model matches. If
PEFT saved the adapter of a single part of a base, the name of the part is added.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from lora_cli.adapters.match_names import first_match
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder
from lora_cli.adapters.peft_format.diffusion_file import translated
from lora_cli.adapters.peft_format.part_folders import join_parts
from lora_cli.adapters.peft_format.tensor_names import adapted_module, adapted_modules
from lora_cli.errors import warn
from lora_cli.models.bundle import part_names

PREFIXES = ("", "module.", "model.", "language_model.", "model.language_model.",
          "language_model.model.")  # fmt: skip
COPIES = re.compile(r"\.(?:modules_to_save|original_module|base_layer)\.")


def use_names_of(model: nn.Module, adapter: AdapterFolder) -> None:
    """Rename an adapter's tensors and configuration entries to the model's names.

    Args:
        model: The base model.
        adapter: The adapter, as `read_adapter` returns it; changed in place if names differ.
    """
    if adapter.file is not None:
        adapter.config, adapter.tensors, adapter.parts = translated(adapter.file, model)
        adapter.file = None
    modules = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    if (part := _part_of(model, adapter, modules)) is not None:
        warn(f"{adapter.path}: its names are those of the base's `{part}`, which it is used for")
        only = {part: (adapter.config, adapter.tensors)}
        adapter.config, adapter.tensors = join_parts(only, str(adapter.path))
    body = str(getattr(model, "base_model_prefix", "") or "")
    starts = (*PREFIXES, f"{body}.") if body else PREFIXES
    renamed: dict[str, str] = {}
    for owner in {_owner(name) for name in adapter.tensors}:
        new_name = _name_in_model(owner, modules, starts)
        if new_name is not None:
            renamed[owner] = new_name
    if not renamed:
        return
    old, new = next(iter(sorted(renamed.items())))
    warn(
        f"{adapter.path}: the model has `{new}` where the adapter has `{old}`; {len(renamed)} such"
    )
    config = dict(adapter.config)
    for key, default in (("rank_pattern", config.get("r", 8)), ("alpha_pattern", None)):
        # a pattern may contain an old name, so the new patterns are full module names
        patterns, alpha = config.get(key) or {}, config.get("lora_alpha", config.get("alpha", 8))
        if patterns:
            config[key] = {
                re.escape(renamed.get(module, module)): first_match(
                    patterns, module, alpha if default is None else default
                )
                for module in sorted(adapted_modules(adapter.tensors))
            }
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = [
                ("." in n and _name_in_model(n, modules, starts)) or n for n in config[key]
            ]
    if isinstance(config.get("target_modules"), str):  # an expression for the old names
        adapted = adapted_modules(adapter.tensors)
        config["target_modules"] = sorted(renamed.get(name, name) for name in adapted)
    tensors = {
        renamed.get(owner := _owner(name), owner) + name[len(owner) :]: tensor
        for name, tensor in adapter.tensors.items()
    }
    if len(tensors) == len(adapter.tensors):
        adapter.config, adapter.tensors = config, tensors


def _part_of(model: nn.Module, adapter: AdapterFolder, modules: Collection[str]) -> str | None:
    """Return the part of a base to which an adapter belongs whose names lack the part.

    If several parts fit, such as two text encoders, return the one that the folder is named after.
    """
    owners = {_owner(name) for name in adapter.tensors}
    if not part_names(model) or all(owner in modules for owner in owners):
        return None
    fitting = [p for p in part_names(model) if all(f"{p}.{name}" in modules for name in owners)]
    same_name = [part for part in fitting if part == adapter.path.name]
    return next(iter(same_name or fitting)) if len(same_name or fitting) == 1 else None


def _owner(name: str) -> str:
    """Return the module that a tensor belongs to."""
    if (module := adapted_module(name)) is not None:
        return module
    match = COPIES.search(name)
    return name[: match.start()] if match else name.rpartition(".")[0]


def _name_in_model(name: str, modules: Collection[str], starts: Collection[str]) -> str | None:
    """Return the only module that matches a wrong name; None if the name is right or ambiguous."""
    if name in modules:
        return None
    candidates = {
        new + name.removeprefix(old)
        for old in starts
        if name.startswith(old)
        for new in starts
        if new + name.removeprefix(old) in modules
    }
    return candidates.pop() if len(candidates) == 1 else None
