"""Create PEFT's `adapter_config.json` for a trained model."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.attach import lora_layers, name_in_base
from lora_cli.adapters.lora import LoRALayer
from lora_cli.adapters.lora_parameter import LoRAParameter
from lora_cli.adapters.parameter_targets import places_of
from lora_cli.adapters.peft_format.peft_rules import base_modules, full_names, peft_reading
from lora_cli.adapters.peft_format.peft_token_rules import written_rows
from lora_cli.adapters.peft_format.peft_types import PEFT_TYPES, RECIPE_TYPES
from lora_cli.adapters.token_rows import token_layers
from lora_cli.models.bundle import is_frozen, part_names
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.recipe import AdapterSpec, AdapterType, Recipe


def adapter_config(model: nn.Module, recipe: Recipe, in_full: list[str]) -> dict[str, Any]:
    """Return PEFT's configuration, without keys of newer versions that have their default."""
    spec, layers = recipe.adapter, lora_layers(model)
    in_full = [n for n in full_names(base_modules(model), in_full) if not is_frozen(model, n)]
    base = {
        "base_model_name_or_path": recipe.model.name,
        "revision": recipe.model.revision,
        "task_type": recipe.task.peft_task_type,
        "modules_to_save": in_full or None,
        "inference_mode": True,
    }
    if not layers:
        # PEFT rejects these types; an empty LoRA it would read as the unchanged base
        return {"peft_type": _peft_type(spec.type), **base}
    modules = {n: layer for n, layer in layers.items() if not isinstance(layer, LoRAParameter)}
    config = {
        "peft_type": "LORA",
        **base,
        **_ranks_and_alphas(spec, layers),
        "lora_dropout": spec.dropout,
        "target_modules": sorted(modules),
        "bias": spec.bias,
        "fan_in_fan_out": any(_stored_transposed(layer.base) for layer in modules.values()),
        "use_rslora": spec.use_rslora,
        "use_dora": False,
        "init_lora_weights": True,
        **next(iter(layers.values())).peft_config,
    }
    if _peft_type(spec.type) != "LORA":
        kind = PEFT_TYPES[_peft_type(spec.type)]
        patterns = {key: config[key] for key in ("rank_pattern", "alpha_pattern")}
        type_keys = {
            "r": spec.rank,
            kind.alpha: _int_if_whole(spec.alpha),
            **dict(kind.defaults),
            **patterns,
        }
        adapted = {"target_modules": sorted(layers)}
        config = {"peft_type": _peft_type(spec.type), **base, **type_keys, **adapted}
    if len(modules) < len(layers):
        config["target_parameters"] = _target_parameters(model, recipe)
    if token_layers(model):
        config["trainable_token_indices"] = written_rows(model)[0]
    if isinstance(spec.target_modules, list):  # the user's suffixes, if they match no other modules
        short = {**config, "target_modules": spec.target_modules}
        reading = peft_reading(model, short)
        is_bundle = bool(part_names(model))  # a part without targets gets no configuration
        in_frozen_parts = {n for n in reading.adapted if is_bundle and is_frozen(model, n)}
        if reading.adapted - in_frozen_parts == set(modules) and not reading.errors:
            return short
    return config


def _peft_type(kind: AdapterType) -> str:
    """Return PEFT's name of a type, or this tool's own name if PEFT has no such type."""
    return next((name for name, recipe_type in RECIPE_TYPES.items() if recipe_type == kind), "LORA")


def _ranks_and_alphas(spec: AdapterSpec, layers: dict[str, LoRALayer]) -> dict[str, Any]:
    """Return PEFT's keys for ranks and alphas: the recipe's, unless `adapter.init` changes them.

    If it does, modules that differ from the most common rank or alpha are named in full.
    """
    ranks = {name: layer.saved_rank for name, layer in layers.items()}
    alphas = {name: _int_if_whole(layer.saved_alpha) for name, layer in layers.items()}
    if spec.init == "default":
        rank, alpha = spec.rank, _int_if_whole(spec.alpha)
        rank_pattern = spec.rank_pattern
        alpha_pattern = {key: _int_if_whole(value) for key, value in spec.alpha_pattern.items()}
    else:
        rank, alpha = _most_common(ranks), _most_common(alphas)
        longest_first = sorted(layers, key=len, reverse=True)  # the first match counts
        rank_pattern = {name: ranks[name] for name in longest_first if ranks[name] != rank}
        alpha_pattern = {name: alphas[name] for name in longest_first if alphas[name] != alpha}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _target_parameters(model: nn.Module, recipe: Recipe) -> list[str]:
    """Return the user's suffixes of adapted parameters, or full names if they match others too."""
    names = {
        f"{name_in_base(name, layers)}.{layer.parameter}"
        for layers in [lora_layers(model)]
        for name, layer in layers.items()
        if isinstance(layer, LoRAParameter)
    }
    short = recipe.adapter.target_parameters
    selected = {f"{module}.{key}" for module, key in places_of(model, short)}
    return short if selected == names else sorted(names)


def _stored_transposed(base: nn.Module) -> bool:
    """Return whether the checkpoint stores a layer's weight as (in, out)."""
    return isinstance(base, Conv1D) or (isinstance(base, QuantizedLinear) and base.transposed)


def _int_if_whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
