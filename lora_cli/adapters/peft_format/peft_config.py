"""Check PEFT's `adapter_config.json`: the meaning of each key in PEFT 0.21.

There are five kinds of keys:

- supported: the key affects the adapter's output, and is implemented for the values in `CHECKS`;
- a variant (`VARIANTS`): the key changes the adapter's equation, so it must be off, unless it
  identifies a supported type of adapter (`KEYS_OF_TYPES`);
- idle (`IDLE`): the key does not affect the output of a saved adapter;
- an initialisation (`init_lora_weights`): only those that leave the base unchanged are supported;
- unknown: the key belongs to another type of adapter, a newer version of PEFT, or another tool. It
  is reported, and must be off (null, false or empty), unless it is a known remark (`REMARKS`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from lora_cli.adapters.peft_format.peft_types import PEFT_TYPES, RECIPE_TYPES
from lora_cli.adapters.variants import layers_of
from lora_cli.errors import BACKUP, IntegrityError, LoraError, Problem, warn
from lora_cli.patterns import regex_error
from lora_cli.recipe import LOW_RANK_TYPES, AdapterType

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")  # they leave the base unchanged
MAX_ALPHA = 3e38  # the range of float32
SHOWN = 60  # characters of a value in a message
SHOWN_KEYS = 8

CONVERT = "save it in PEFT with `path_initial_model_for_weight_conversion`: a plain LoRA"
MERGE = "merge it in PEFT, which changes the base in the same way when it loads it"
# PEFT recomputes these from the base; the others cannot be recovered from the adapter
CHANGED_BASES = {
    "pissa": f"{CONVERT}; or {MERGE}",
    "olora": f"{CONVERT}; or {MERGE}",
    "loftq": MERGE,
}
MERGE_IN_PEFT = "merge it into its base in PEFT, or train it again without"
VARIANTS = {
    "use_dora": MERGE_IN_PEFT,
    "use_qalora": MERGE_IN_PEFT,
    "use_bdlora": MERGE_IN_PEFT,
    "lora_bias": MERGE_IN_PEFT,
    "kasa_config": MERGE_IN_PEFT,
    "monteclora_config": MERGE_IN_PEFT,
    "velora_config": MERGE_IN_PEFT,
    "layer_replication": "use it in PEFT: it runs layers of the base several times",
    "alora_invocation_tokens": "use it in PEFT: it is active after certain tokens alone",
    "arrow_config": "use it in PEFT: it chooses among several adapters",
    "megatron_config": "use it in Megatron, whose layers it was trained on",
    "enable_lora": "train it again with a PEFT of today: this key is of its first versions",
}
KEYS_OF_TYPES: dict[AdapterType, set[str]] = {
    kind: {key for layer in layers_of(kind) for key in layer.peft_config}
    for kind in LOW_RANK_TYPES
    if kind not in RECIPE_TYPES.values()
}
TYPE_KEYS = set[str]().union(*KEYS_OF_TYPES.values())
IDLE = {
    # origin
    "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    # only for training or initialisation
    "inference_mode", "lora_dropout", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "merge_weights", "lora_magnitude_vector",
    # options of variants
    "qalora_group_size", "megatron_core",
    # the tensors show which modules are adapted, and which of tied ones
    "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying",
    # read from the module itself
    "fan_in_fan_out",
}  # fmt: skip

REMARKS = {  # added by other tools and users
    "unsloth_fixed", "unsloth_version", "transformers_version", "torch_version", "torch_dtype",
    "dtype", "library_name", "license", "tags", "language", "description", "comment", "_comment",
    "notes", "created_at", "_name_or_path",
}  # fmt: skip


def check_config(config: dict[str, Any], where: str) -> None:
    """Reject a configuration that is damaged, or whose adapter needs unimplemented features.

    Args:
        config: The contents of `adapter_config.json`.
        where: Its path, for errors.

    Raises:
        LoraError: If a key asks for an unimplemented feature.
        IntegrityError: If a key has an invalid value.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPES:
        what = f"`{_shown(kind) if kind else kind}` is not a type of adapter that this tool reads"
        supported = [name for name, peft_type in PEFT_TYPES.items() if peft_type.supported]
        reads = f"it reads PEFT's {', '.join(supported[:-1])} and {supported[-1]}"
        raise LoraError(what, where, f"{reads}: merge it into its base in PEFT")
    for key, hint in VARIANTS.items():
        if key not in TYPE_KEYS and not _is_off(config.get(key)):
            hint = f"{hint} it" if hint == MERGE_IN_PEFT else hint
            raise LoraError(f"adapters with `{key}` cannot be read", where, hint)
    _check_init(config.get("init_lora_weights"), where)
    for key, is_valid in {**CHECKS, **LYCORIS_CHECKS}.items():
        if key in config and not is_valid(config[key]):
            what = f"`{key}` {_misfit(key, config[key])}"
            raise IntegrityError(what, where, BACKUP)
    _check_unknown(config, where)


def adapter_type(config: dict[str, Any]) -> AdapterType:
    """Return the recipe's type for a configuration that `check_config` accepts."""
    if config["peft_type"] in RECIPE_TYPES:
        return RECIPE_TYPES[config["peft_type"]]
    active = {key for key in TYPE_KEYS if config.get(key)}
    return next(kind for kind, keys in KEYS_OF_TYPES.items() if keys == active)


def _misfit(key: str, value: Any) -> str:
    """Return why a value is invalid: it has the wrong type, or is out of range."""
    if isinstance(value, str) and key in NUMBERS:
        return f"has to be a number, and is the text {json.dumps(_shown(value))}"
    shown = _shown(value) if not isinstance(value, str) else json.dumps(_shown(value))
    return f"cannot be {shown}"


def _check_init(init: Any, where: str) -> None:
    if isinstance(init, str) and init not in PLAIN_INITS:
        what = f"`{_shown(init)}`, its `init_lora_weights`, changed the weights of the base too"
        raise LoraError(what, where, CHANGED_BASES.get(init, CONVERT))
    if not isinstance(init, bool | str | None):
        raise IntegrityError(f"`init_lora_weights` cannot be {_shown(init)}", where, BACKUP)


def _check_unknown(config: dict[str, Any], where: str) -> None:
    """Warn about unknown keys that are off; reject those that may affect the output."""
    if config["peft_type"] in LYCORIS_TYPES:
        known = LYCORIS_COMMON | LYCORIS_CHECKS.keys() | LYCORIS_IDLE | REMARKS
    else:
        known = CHECKS.keys() | VARIANTS.keys() | IDLE | CHECKED_KEYS | REMARKS
    unknown = sorted(config.keys() - known)
    if active := [key for key in unknown if not _is_off(config[key])]:
        raise LoraError(
            [
                Problem(
                    f"the key `{_shown(key)}` ({_shown(config[key])}) is not known: it may change "
                    "what the adapter computes",
                    where,
                    "if it is only a remark, take it out of the file; else use the adapter in PEFT",
                )
                for key in active[:SHOWN_KEYS]
            ]
        )
    if unknown:
        names = ", ".join(f"`{_shown(key)}`" for key in unknown[:SHOWN_KEYS])
        more = f" and {len(unknown) - SHOWN_KEYS} more" if len(unknown) > SHOWN_KEYS else ""
        warn(f"{where} has keys that this tool does not know, and ignores: {names}{more}")


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, list | dict | str) and not value)


def _shown(value: Any) -> str:
    """Return a value as JSON, truncated if it is long."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except ValueError:  # an integer with thousands of digits
        text = f"a number of {int(math.log10(abs(value)))} digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


# ------------------------------------------------------------------------------- checks of values


def is_rank(value: Any) -> bool:
    """Return whether a value is a valid rank: a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_alpha(value: Any) -> bool:
    """Return whether a value is a number in the range of float32, excluding NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= MAX_ALPHA  # False for NaN; integers of any size compare


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_small_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= 2**31


def _is_probability(value: Any) -> bool:
    return is_alpha(value) and 0 <= value <= 1


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_list_of_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(x, str) for x in value))


def _is_names_or_expression(value: Any) -> bool:
    return _is_list_of_names(value) or (isinstance(value, str) and regex_error(value) is None)


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_token_ids(ids) for name, ids in value.items())
    return value is None or (
        isinstance(value, list)
        and all(type(number) is int and number >= 0 for number in value)
        and len(set(value)) == len(value)
    )


def _is_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(type(number) is int for number in numbers)


def _pattern_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return value is None or (
            isinstance(value, dict)
            and all(is_valid(number) and regex_error(key) is None for key, number in value.items())
        )

    return check


CHECKS: dict[str, Callable[[Any], bool]] = {
    "r": is_rank,
    "lora_alpha": is_alpha,
    "lora_dropout": _is_probability,
    "rank_pattern": _pattern_of(is_rank),
    "alpha_pattern": _pattern_of(is_alpha),
    "use_rslora": _is_flag,
    "fan_in_fan_out": _is_flag,
    "ensure_weight_tying": _is_flag,
    "bias": lambda value: value in (None, "none", "all", "lora_only"),
    "target_modules": _is_names_or_expression,
    "exclude_modules": _is_names_or_expression,
    "modules_to_save": _is_list_of_names,
    "target_parameters": _is_list_of_names,
    "trainable_token_indices": _is_token_ids,
    "layers_to_transform": _is_layers,
    "layers_pattern": lambda value: isinstance(value, str) or _is_list_of_names(value),
    "task_type": _is_text,
    "base_model_name_or_path": _is_text,
    "revision": _is_text,
    **dict.fromkeys(TYPE_KEYS, _is_flag),
}
LYCORIS_TYPES = ("LOHA", "LOKR")
LYCORIS_CHECKS: dict[str, Callable[[Any], bool]] = {
    "alpha": is_alpha,
    "use_effective_conv2d": _is_flag,
    "decompose_both": _is_flag,
    "decompose_factor": _is_small_int,
}
LYCORIS_IDLE = {"rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights"}
LYCORIS_COMMON = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "r", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save",
}  # fmt: skip
NUMBERS = ("r", "lora_alpha", "lora_dropout", "alpha", "decompose_factor")
CHECKED_KEYS = {"peft_type", "init_lora_weights"}
