"""Split the adapter of a base with several parts into one PEFT folder per part, and join it again.

    unet/adapter_config.json, adapter_model.safetensors            as if PEFT adapted only the U-Net
    text_encoder/adapter_config.json, adapter_model.safetensors

In memory, the adapter is one configuration and one set of tensors, in which every name begins with
that of its part: `unet.down_blocks.0.…`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lora_cli.adapters.match_names import first_match, matches, pattern_matches
from lora_cli.adapters.peft_format.peft_rules import copied_modules
from lora_cli.adapters.peft_format.peft_types import PEFT_TYPES, alpha_of
from lora_cli.adapters.peft_format.tensor_names import adapted_module, adapted_modules
from lora_cli.errors import LoraError
from lora_cli.patterns import LONGEST

Config = dict[str, Any]
Tensors = Mapping[str, Tensor]

# for parts with only modules trained in full: PEFT rejects a LoRA without low-rank layers
WITHOUT_LAYERS = "HEAD_ONLY"
SHARED_KEYS = ("peft_type", "base_model_name_or_path", "revision", "task_type", "inference_mode")


# ------------------------------------------------------------------------------------------- split


def split_by_part(
    config: Config, tensors: Tensors, parts: Collection[str]
) -> dict[str, tuple[Config, dict[str, Tensor]]]:
    """Return the configuration and the tensors of each part in which something is trained.

    Args:
        config: The configuration of the whole adapter.
        tensors: The tensors by names without PEFT's prefix, beginning with the part's name.
        parts: Names of the base's parts.
    """
    result = {}
    for part in parts:
        prefix = f"{part}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if own:
            result[part] = (_config_of_part(part, config, own, parts), own)
    return result


def _config_of_part(part: str, config: Config, tensors: Tensors, parts: Collection[str]) -> Config:
    """Return the configuration with which PEFT adapts one part by itself."""
    modules = sorted(adapted_modules(tensors))
    result = {**config, "task_type": None}  # the task is that of the whole model
    for key in ("modules_to_save", "target_parameters"):
        if config.get(key):
            result[key] = _entries_of(part, config[key], parts) or None
    if isinstance(rows := config.get("trainable_token_indices"), dict):
        of_part = {n.partition(".")[2]: i for n, i in rows.items() if n.startswith(f"{part}.")}
        result["trainable_token_indices"] = of_part or None
    if not modules and PEFT_TYPES[config["peft_type"]].supported:
        settings = {key: result[key] for key in (*SHARED_KEYS, "modules_to_save") if key in result}
        return {**settings, "peft_type": WITHOUT_LAYERS}
    if "target_modules" in config:
        targets = config["target_modules"]
        entries = _entries_of(part, targets, parts) if isinstance(targets, list) else modules
        result["target_modules"] = [e for e in entries if any(matches([e], m) for m in modules)]
    for key, patterns in (("r", "rank_pattern"), (_alpha_key(config), "alpha_pattern")):
        given, default = config.get(patterns) or {}, config.get(key, 8)
        values = {name: first_match(given, f"{part}.{name}", default) for name in modules}
        if any(first_match(given, name, default) != value for name, value in values.items()):
            result[key], result[patterns] = most_common(values)
        elif given:  # PEFT warns about patterns that match nothing
            used = {k: v for k, v in given.items() if any(pattern_matches(k, m) for m in modules)}
            result[patterns] = used
    return result


def _entries_of(part: str, entries: list[str], parts: Collection[str]) -> list[str]:
    """Return the names and suffixes that apply to a part, without the part's name.

    A suffix matches the same modules in the part and in the whole.
    """
    of_parts = [entry for entry in entries if entry.partition(".")[0] in parts]
    return [
        e.removeprefix(f"{part}.") for e in entries if e not in of_parts or _is_in_part(e, part)
    ]


def _is_in_part(name: str, part: str) -> bool:
    return name.startswith(f"{part}.")


def _alpha_key(config: Config) -> str:
    return PEFT_TYPES[config["peft_type"]].alpha


def most_common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value, and a pattern for each module with another value."""
    common = Counter(values.values()).most_common()[0][0]
    longest_first = sorted(values, key=len, reverse=True)  # the first match counts
    return common, {re.escape(n): values[n] for n in longest_first if values[n] != common}


# -------------------------------------------------------------------------------------------- join


def join_parts(
    parts: Mapping[str, tuple[Config, Tensors]], at: str
) -> tuple[Config, dict[str, Tensor]]:
    """Join the configurations and the tensors of several parts into those of one adapter.

    Args:
        parts: The contents of each part's folder: a configuration that `check_config` accepts, and
            tensors by names without PEFT's prefix.
        at: The folder that contains the parts, for errors.

    Raises:
        LoraError: If the parts have adapters of different kinds.
    """
    configs = {part: config for part, (config, _) in parts.items()}
    low_rank = {p: c for p, c in configs.items() if PEFT_TYPES[c["peft_type"]].supported}
    shared = _shared(low_rank or configs, at)
    tensors = {f"{p}.{name}": t for p, (_, own) in parts.items() for name, t in own.items()}
    result: Config = {
        **shared,
        "task_type": _common([c.get("task_type") for c in configs.values()]),
    }
    result["modules_to_save"] = [
        f"{part}.{name}" for part, of in parts.items() for name in _trained_in_full(*of)
    ] or None
    result["bias"] = (
        _common([config.get("bias") or "none" for config in configs.values()]) or "none"
    )
    for key in ("layers_to_transform", "layers_pattern", "trainable_token_indices"):
        result.pop(key, None)
    rows = {p: c["trainable_token_indices"] for p, c in configs.items()
            if c.get("trainable_token_indices")}  # fmt: skip
    if rows:
        result["trainable_token_indices"] = {
            f"{p}.{n}": ids for p, of in rows.items() for n, ids in _by_module(of, parts[p][1])
        }
    if low_rank:
        result |= _ranks_and_alphas({part: parts[part] for part in low_rank})
        targets = _names_or_expression({part: _targets(*parts[part]) for part in low_rank})
        if len(targets) > LONGEST and isinstance(targets, str):  # too long for a regular expression
            targets = sorted(adapted_modules(tensors))
        result["target_modules"] = targets
        excluded = {part: _excluded(config) for part, config in low_rank.items()}
        result["exclude_modules"] = _names_or_expression(excluded) or None
        named = {part: config.get("target_parameters") or [] for part, config in low_rank.items()}
        result["target_parameters"] = [f"{p}.{e}" for p, of in named.items() for e in of] or None
    return result, tensors


def _shared(configs: Mapping[str, Config], at: str) -> Config:
    """Return the first part's configuration, after checking that all have the same kind of layers.

    Raises:
        LoraError: If a key that decides the kind of layers differs between parts.
    """
    first, *others = configs
    kind = PEFT_TYPES[configs[first]["peft_type"]]
    for key, default in (("peft_type", None), ("use_dora", False), *kind.shaping):
        for other in others:
            first_value, other_value = (
                configs[part].get(key) or default for part in (first, other)
            )
            if first_value != other_value:
                what = f"`{key}` is {first_value} in `{first}` and {other_value} in `{other}`"
                hint = f"use the adapter of one part alone: `{at}/{first}`, or `{at}/{other}`"
                raise LoraError(what, at, hint)
    return dict(configs[first])


def _common(values: list[Any]) -> Any:
    """Return the value that all have in common, or None if they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def _trained_in_full(config: Config, tensors: Tensors) -> list[str]:
    """Return the full names that `modules_to_save` matches in a part, and its unmatched entries."""
    paths = [name.split(".") for name in tensors if adapted_module(name) is None]
    modules = {".".join(path[:depth]) for path in paths for depth in range(1, len(path))}
    copied = copied_modules(modules, config)
    outermost = [
        n for n in sorted(copied) if not any(n.startswith(f"{other}.") for other in copied)
    ]
    entries = config.get("modules_to_save") or []
    return outermost + [entry for entry in entries if not any(n.endswith(entry) for n in copied)]


def _by_module(rows: Any, tensors: Tensors) -> list[tuple[str, list[int]]]:
    """Return the tokens with trained rows by module; a plain list is for the only embedding."""
    if isinstance(rows, dict):
        return list(rows.items())
    names = {name.partition(".token_adapter.")[0] for name in tensors if ".token_adapter." in name}
    return [(name, rows) for name in sorted(names)]


def _ranks_and_alphas(parts: Mapping[str, tuple[Config, Tensors]]) -> Config:
    """Return PEFT's keys for the ranks and alphas of all modules, which keep their values."""
    has_rslora = {part: bool(config.get("use_rslora")) for part, (config, _) in parts.items()}
    is_mixed = len(set(has_rslora.values())) > 1
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    for part, (config, tensors) in parts.items():
        for name in adapted_modules(tensors):
            rank = first_match(config.get("rank_pattern") or {}, name, config.get("r", 8))
            alpha = alpha_of(config, name)
            ranks[f"{part}.{name}"] = rank
            # expresses alpha / sqrt(rank) in the form alpha' / rank
            folded = alpha * math.sqrt(rank) if is_mixed and has_rslora[part] else alpha
            alphas[f"{part}.{name}"] = folded
    result: Config = {}
    key = _alpha_key(next(iter(parts.values()))[0])
    result["r"], result["rank_pattern"] = most_common(ranks)
    result[key], result["alpha_pattern"] = most_common(alphas)
    if any(has_rslora.values()):
        result["use_rslora"] = not is_mixed
    return result


def _targets(config: Config, tensors: Tensors) -> list[str] | str:
    """Return `target_modules`; the tensors' modules if its meaning depends on PEFT's version."""
    targets, modules = config.get("target_modules"), sorted(adapted_modules(tensors))
    if targets in (None, "all-linear") or config.get("layers_to_transform") is not None:
        return modules
    if isinstance(targets, str):
        return targets
    return modules if set(targets) == set(modules) else rf"(?:.*\.)?(?:{_any_of(targets)})"


def _excluded(config: Config) -> list[str] | str:
    """Return `exclude_modules` as a regular expression."""
    names = config.get("exclude_modules") or []
    return rf"(?:.*\.)?(?:{_any_of(names)})" if isinstance(names, list) and names else names


def _any_of(names: Collection[str]) -> str:
    return "|".join(map(re.escape, sorted(names)))


def _names_or_expression(by_part: Mapping[str, list[str] | str]) -> list[str] | str:
    """Join the parts' entries into full names, or into one expression if a part has suffixes.

    A suffix can match many modules of its own part, but must match none of another.
    """
    names = [
        f"{p}.{n}" for p, entries in by_part.items() if isinstance(entries, list) for n in entries
    ]
    if all(isinstance(entries, list) for entries in by_part.values()):
        return names
    pieces = {
        part: entries if isinstance(entries, str) else _any_of(entries)
        for part, entries in by_part.items()
        if entries
    }
    return "|".join(rf"{re.escape(part)}\.(?:{entries})" for part, entries in pieces.items())
