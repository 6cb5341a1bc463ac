"""The adapter of a base of several parts: one PEFT folder for each part, and one adapter in memory.

    unet/adapter_config.json, adapter_model.safetensors            as PEFT adapts the U-Net alone
    text_encoder/adapter_config.json, adapter_model.safetensors

In memory it is one configuration and one set of tensors, in which every name begins with that of
its part: `unet.down_blocks.0.…`. Only this module divides by parts, and joins them again.
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

# of a part that has modules trained in full alone: PEFT rejects a LoRA without low-rank layers
WITHOUT_LAYERS = "HEAD_ONLY"
BOTH = ("peft_type", "base_model_name_or_path", "revision", "task_type", "inference_mode")


# ------------------------------------------------------------------------------------------ divide


def divided(
    config: Config, tensors: Tensors, parts: Collection[str]
) -> dict[str, tuple[Config, dict[str, Tensor]]]:
    """Return what belongs into the folder of each part of which something is trained.

    Args:
        config: Of the whole adapter.
        tensors: By names without PEFT's prefix, which begin with the part's.
        parts: Names of the base's parts.
    """
    found = {}
    for part in parts:
        start = f"{part}."
        own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        if own:
            found[part] = (_config_of_part(part, config, own, parts), own)
    return found


def _config_of_part(part: str, config: Config, tensors: Tensors, parts: Collection[str]) -> Config:
    """Return the configuration by which PEFT adapts one part alone."""
    modules = sorted(adapted_modules(tensors))
    result = {**config, "task_type": None}  # which is that of the whole
    for key in ("modules_to_save", "target_parameters"):
        if config.get(key):
            result[key] = _entries_of(part, config[key], parts) or None
    if isinstance(rows := config.get("trainable_token_indices"), dict):
        of_part = {n.partition(".")[2]: i for n, i in rows.items() if n.startswith(f"{part}.")}
        result["trainable_token_indices"] = of_part or None
    if not modules and PEFT_TYPES[config["peft_type"]].supported:
        kept = {key: result[key] for key in (*BOTH, "modules_to_save") if key in result}
        return {**kept, "peft_type": WITHOUT_LAYERS}
    if "target_modules" in config:
        targets = config["target_modules"]
        entries = _entries_of(part, targets, parts) if isinstance(targets, list) else modules
        result["target_modules"] = [e for e in entries if any(matches([e], m) for m in modules)]
    for key, patterns in (("r", "rank_pattern"), (_alpha_key(config), "alpha_pattern")):
        given, default = config.get(patterns) or {}, config.get(key, 8)
        values = {name: first_match(given, f"{part}.{name}", default) for name in modules}
        if any(first_match(given, name, default) != value for name, value in values.items()):
            result[key], result[patterns] = most_common(values)
        elif given:  # PEFT warns of those that match nothing
            used = {k: v for k, v in given.items() if any(pattern_matches(k, m) for m in modules)}
            result[patterns] = used
    return result


def _entries_of(part: str, entries: list[str], parts: Collection[str]) -> list[str]:
    """Return the names and ends of names that mean something in a part, as they are called there.

    The end of a name means the same in the part and in the whole.
    """
    of_parts = [entry for entry in entries if entry.partition(".")[0] in parts]
    return [e.removeprefix(f"{part}.") for e in entries if e not in of_parts or _is_of(e, part)]


def _is_of(name: str, part: str) -> bool:
    return name.startswith(f"{part}.")


def _alpha_key(config: Config) -> str:
    return PEFT_TYPES[config["peft_type"]].alpha


def most_common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent of the modules' values, and a pattern for each other module."""
    usual = Counter(values.values()).most_common()[0][0]
    longest_first = sorted(values, key=len, reverse=True)  # the first that fits counts
    return usual, {re.escape(n): values[n] for n in longest_first if values[n] != usual}


# -------------------------------------------------------------------------------------------- join


def joined(
    parts: Mapping[str, tuple[Config, Tensors]], at: str
) -> tuple[Config, dict[str, Tensor]]:
    """Return one configuration and one set of tensors for an adapter of several parts.

    Args:
        parts: What the folder of each part holds: a configuration that `check_config` accepts, and
            tensors by names without PEFT's prefix.
        at: The folder of all, for an error.

    Raises:
        LoraError: If the parts have adapters of different kinds.
    """
    configs = {part: config for part, (config, _) in parts.items()}
    low_rank = {p: c for p, c in configs.items() if PEFT_TYPES[c["peft_type"]].supported}
    same = _what_is_the_same(low_rank or configs, at)
    tensors = {f"{p}.{name}": t for p, (_, own) in parts.items() for name, t in own.items()}
    result: Config = {**same, "task_type": _only([c.get("task_type") for c in configs.values()])}
    result["modules_to_save"] = [
        f"{part}.{name}" for part, of in parts.items() for name in _trained_in_full(*of)
    ] or None
    result["bias"] = _only([config.get("bias") or "none" for config in configs.values()]) or "none"
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
        if len(targets) > LONGEST and isinstance(targets, str):  # too long for an expression
            targets = sorted(adapted_modules(tensors))
        result["target_modules"] = targets
        excluded = {part: _excluded(config) for part, config in low_rank.items()}
        result["exclude_modules"] = _names_or_expression(excluded) or None
        named = {part: config.get("target_parameters") or [] for part, config in low_rank.items()}
        result["target_parameters"] = [f"{p}.{e}" for p, of in named.items() for e in of] or None
    return result, tensors


def _what_is_the_same(configs: Mapping[str, Config], at: str) -> Config:
    """Return the keys of the first part; what decides the kind of layers is equal in all.

    Raises:
        LoraError: If it is not.
    """
    first, *others = configs
    kind = PEFT_TYPES[configs[first]["peft_type"]]
    for key, default in (("peft_type", None), ("use_dora", False), *kind.shaping):
        for other in others:
            ours, theirs = (configs[part].get(key) or default for part in (first, other))
            if ours != theirs:
                what = f"`{key}` is {ours} in `{first}` and {theirs} in `{other}`"
                hint = f"use the adapter of one part alone: `{at}/{first}`, or `{at}/{other}`"
                raise LoraError(what, at, hint)
    return dict(configs[first])


def _only(values: list[Any]) -> Any:
    """Return a value that all have; None if they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def _trained_in_full(config: Config, tensors: Tensors) -> list[str]:
    """Return the full names that `modules_to_save` means in a part, and what it names in vain."""
    plain = [name.split(".") for name in tensors if adapted_module(name) is None]
    modules = {".".join(way[:depth]) for way in plain for depth in range(1, len(way))}
    found = copied_modules(modules, config)
    outer = [n for n in sorted(found) if not any(n.startswith(f"{other}.") for other in found)]
    entries = config.get("modules_to_save") or []
    return outer + [entry for entry in entries if not any(n.endswith(entry) for n in found)]


def _by_module(rows: Any, tensors: Tensors) -> list[tuple[str, list[int]]]:
    """Return the modules whose rows of tokens are trained; a list is of the only embedding."""
    if isinstance(rows, dict):
        return list(rows.items())
    names = {name.partition(".token_adapter.")[0] for name in tensors if ".token_adapter." in name}
    return [(name, rows) for name in sorted(names)]


def _ranks_and_alphas(parts: Mapping[str, tuple[Config, Tensors]]) -> Config:
    """Return PEFT's keys of rank and alpha for all modules, each of which keeps its own."""
    has_rslora = {part: bool(config.get("use_rslora")) for part, (config, _) in parts.items()}
    is_mixed = len(set(has_rslora.values())) > 1
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    for part, (config, tensors) in parts.items():
        for name in adapted_modules(tensors):
            rank = first_match(config.get("rank_pattern") or {}, name, config.get("r", 8))
            alpha = alpha_of(config, name)
            ranks[f"{part}.{name}"] = rank
            # alpha / sqrt(rank), written as rank-wise scaling is
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
    """Return what `target_modules` says; what the tensors say where its meaning has changed."""
    targets, modules = config.get("target_modules"), sorted(adapted_modules(tensors))
    if targets in (None, "all-linear") or config.get("layers_to_transform") is not None:
        return modules
    if isinstance(targets, str):
        return targets
    return modules if set(targets) == set(modules) else rf"(?:.*\.)?(?:{_any_of(targets)})"


def _excluded(config: Config) -> list[str] | str:
    """Return what `exclude_modules` says, as an expression."""
    names = config.get("exclude_modules") or []
    return rf"(?:.*\.)?(?:{_any_of(names)})" if isinstance(names, list) and names else names


def _any_of(names: Collection[str]) -> str:
    return "|".join(map(re.escape, sorted(names)))


def _names_or_expression(by_part: Mapping[str, list[str] | str]) -> list[str] | str:
    """Return what parts name as full names, or as one expression if one of them has ends of names.

    An end, which may mean many modules of its part, must mean none of another.
    """
    names = [f"{p}.{n}" for p, of in by_part.items() if isinstance(of, list) for n in of]
    if all(isinstance(of, list) for of in by_part.values()):
        return names
    pieces = {
        part: of if isinstance(of, str) else _any_of(of) for part, of in by_part.items() if of
    }
    return "|".join(rf"{re.escape(part)}\.(?:{of})" for part, of in pieces.items())
