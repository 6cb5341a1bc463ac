"""Names that other tools, and other versions of transformers, give to the modules of a model.

`torch.compile`, data parallelism and checkpointing wrap modules, and their names go into the file:
`_orig_mod.`, `module.`. Transformers moved the language model of picture models from
`language_model.model.` to `model.language_model.`, and a model without a head lacks the name of its
body, as `bert.`. Such names are put right if that makes each of them one that the model has. The
adapter of one part of a base, as PEFT saves it, lacks the name of the part: it gets it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from lora_cli.adapters.match_names import first_match
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder
from lora_cli.adapters.peft_format.diffusion_file import translated
from lora_cli.adapters.peft_format.part_folders import joined
from lora_cli.adapters.peft_format.tensor_names import adapted_module, adapted_modules
from lora_cli.errors import warn
from lora_cli.models.bundle import part_names

STARTS = ("", "module.", "model.", "language_model.", "model.language_model.",
          "language_model.model.")  # fmt: skip
COPIES = re.compile(r"\.(?:modules_to_save|original_module|base_layer)\.")


def use_names_of(model: nn.Module, adapter: AdapterFolder) -> None:
    """Rename an adapter's tensors, and what its configuration names, as the model calls them.

    Args:
        model: The base model.
        adapter: What `read_adapter` returned; changed in place where its names are others.
    """
    if adapter.file is not None:
        adapter.config, adapter.tensors, adapter.parts = translated(adapter.file, model)
        adapter.file = None
    modules = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    if (part := _its_part(model, adapter, modules)) is not None:
        warn(f"{adapter.path}: its names are those of the base's `{part}`, which it is used for")
        only = {part: (adapter.config, adapter.tensors)}
        adapter.config, adapter.tensors = joined(only, str(adapter.path))
    body = str(getattr(model, "base_model_prefix", "") or "")
    starts = (*STARTS, f"{body}.") if body else STARTS
    moved: dict[str, str] = {}
    for owner in {_owner(name) for name in adapter.tensors}:
        other = _other_name(owner, modules, starts)
        if other is not None:
            moved[owner] = other
    if not moved:
        return
    old, new = next(iter(sorted(moved.items())))
    warn(f"{adapter.path}: the model has `{new}` where the adapter has `{old}`; {len(moved)} such")
    config = dict(adapter.config)
    for key, default in (("rank_pattern", config.get("r", 8)), ("alpha_pattern", None)):
        # a pattern may contain the old name, so each module gets its value by its own
        patterns, alpha = config.get(key) or {}, config.get("lora_alpha", config.get("alpha", 8))
        if patterns:
            config[key] = {
                re.escape(moved.get(module, module)): first_match(
                    patterns, module, alpha if default is None else default
                )
                for module in sorted(adapted_modules(adapter.tensors))
            }
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = [("." in n and _other_name(n, modules, starts)) or n for n in config[key]]
    if isinstance(config.get("target_modules"), str):  # an expression over the old names
        adapted = adapted_modules(adapter.tensors)
        config["target_modules"] = sorted(moved.get(name, name) for name in adapted)
    tensors = {
        moved.get(owner := _owner(name), owner) + name[len(owner) :]: tensor
        for name, tensor in adapter.tensors.items()
    }
    if len(tensors) == len(adapter.tensors):
        adapter.config, adapter.tensors = config, tensors


def _its_part(model: nn.Module, adapter: AdapterFolder, modules: Collection[str]) -> str | None:
    """Return the part of a base that has all the modules of an adapter whose names lack it.

    Of several, as two text encoders are, it is the one that the folder is named as.
    """
    owners = {_owner(name) for name in adapter.tensors}
    if not part_names(model) or all(owner in modules for owner in owners):
        return None
    fitting = [p for p in part_names(model) if all(f"{p}.{name}" in modules for name in owners)]
    named = [part for part in fitting if part == adapter.path.name]
    return next(iter(named or fitting)) if len(named or fitting) == 1 else None


def _owner(name: str) -> str:
    """Return the module that a tensor belongs to."""
    if (module := adapted_module(name)) is not None:
        return module
    found = COPIES.search(name)
    return name[: found.start()] if found else name.rpartition(".")[0]


def _other_name(name: str, modules: Collection[str], starts: Collection[str]) -> str | None:
    """Return the one module that a name must mean; None if it is one itself, or means several."""
    if name in modules:
        return None
    meant = {
        new + name.removeprefix(old)
        for old in starts
        if name.startswith(old)
        for new in starts
        if new + name.removeprefix(old) in modules
    }
    return meant.pop() if len(meant) == 1 else None
