"""Explain why a model or its tokenizer cannot be loaded: a reason, a location, and a hint.

Libraries raise all kinds of exceptions for damaged model files (a `KeyError` for an unknown
activation, a `ZeroDivisionError` for no attention heads). Every exception that is raised while a
model's files are read is converted to a `LoraError` here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from lora_cli.characters import shortened
from lora_cli.errors import LoraError, Problem, ResourceError, nearest
from lora_cli.git_lfs import FETCH, POINTS, is_pointer
from lora_cli.recipe import Recipe
from lora_cli.unexpected_errors import own_words

CONFIG_FILE = "config.json"
REPAIR = "correct config.json, or download it again"
# keys that must be positive integers, in every architecture that has them
SIZES = re.compile(
    r"hidden_size|d_model|n_embd|embed_dim|intermediate_size|vocab_size|max_position_embeddings|"
    r"n_positions|(num_|n_|encoder_|decoder_)?(attention_|hidden_|key_value_)?(heads?|layers?)|"
    r"num_hidden_layers|num_attention_heads|num_key_value_heads|n_head|n_layer|d_kv|d_ff|"
    r"(encoder|decoder)_(layers|attention_heads|ffn_dim)"
)
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "ff_activation")
# keys of a config.json, and the largest accepted value: ten times that of any published model
MAX_VALUES = {
    r"(layers?|blocks?|experts?|heads?|stages?|depths?|groups|repeats?)$": 10_000,
    r"(size|dim|dims|embd|inner|ctx|model|ff|kv|rank|channels?|positions?|embeddings?|length|"
    r"features|state|labels?)$": 100_000_000,
}
MAX_LAYERS = 2000  # the deepest known models have about 200; each takes time to build
PACKAGES = {  # names of packages in error messages, and for pip
    "sentencepiece": "sentencepiece", "protobuf": "protobuf", "tiktoken": "tiktoken",
    "timm": "timm", "sacremoses": "sacremoses", "mamba_ssm": "mamba-ssm", "einops": "einops",
    "causal_conv1d": "causal-conv1d", "rjieba": "rjieba", "fugashi": "fugashi",
    "pythainlp": "pythainlp", "nltk": "nltk", "torchvision": "torchvision", "blobfile": "blobfile",
}  # fmt: skip
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


@contextlib.contextmanager
def explained(
    recipe: Recipe, what: str, find_cause: Callable[[Exception], object] | None = None
) -> Iterator[None]:
    """Convert any exception that is raised while a part of the model is loaded to a `LoraError`.

    Args:
        recipe: Names the model.
        what: The part: `configuration`, `tokenizer`, `architecture` or `weights`.
        find_cause: Called with an error that concerns neither a file nor a package. Raises a
            `LoraError` if the cause is in something that was loaded before.
    """
    level = transformers_logging.get_verbosity()
    if level != transformers_logging.ERROR:  # setting it is slow, as it walks through all loggers
        transformers_logging.set_verbosity_error()
    try:
        yield
    except LoraError:
        raise
    except Exception as error:
        if (location_error := place_error(error)) is not None:
            raise location_error from error
        if _is_resource(error):
            raise
        if find_cause is not None and not isinstance(error, OSError | ImportError):
            find_cause(error)
        raise _load_error(recipe, what, error) from error
    finally:
        if level != transformers_logging.get_verbosity():
            transformers_logging.set_verbosity(level)


def place_error(error: BaseException) -> ResourceError | None:
    """Return the error for a Hub cache that is full or cannot be read or written, or None."""
    cause: BaseException | None = error
    while cause is not None:
        error_number = cause.errno if isinstance(cause, OSError) else None
        if error_number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            from huggingface_hub import constants

            path = str(getattr(cause, "filename", None) or constants.HF_HUB_CACHE)
            reason = os.strerror(error_number).lower()
            what = f"a file of the model cannot be read or stored: {reason}"
            hint = "make room, let the place be read and written, or name another: `HF_HOME=DIR`"
            return ResourceError(what, path, hint)
        cause = cause.__cause__ or cause.__context__
    return None


def _is_resource(error: Exception) -> bool:
    """Return whether memory is full, which is not the fault of the model's files."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error).lower() for words in OUT_OF_MEMORY)


def _load_error(recipe: Recipe, what: str, error: Exception) -> LoraError:
    """Return the `LoraError` for an exception that a library raised while loading a part."""
    name, text = recipe.model.name, str(error)
    at = recipe.at("model.name")
    is_readable = isinstance(error, OSError | ValueError | ImportError)
    reason = text.strip().splitlines()[0] if is_readable and text.strip() else own_words(error)
    is_local = Path(name).is_absolute() or name.startswith("package:")
    if is_local and (pointers := [f for f in sorted(Path(name).glob("*.*")) if is_pointer(f)]):
        reason, hint = f"{pointers[0].name} is {POINTS}", FETCH
    elif "trust_remote_code" in text:
        reason = "it comes with Python code of its own"
        hint = "read that code; then `--set model.trust_remote_code=true`"
    elif (package := _missing_package(error)) is not None:
        reason = f"it needs the Python package `{package}`, which is not installed"
        hint = f"pip install {package}"
    elif "does not recognize this architecture" in text:
        reason = reason.partition(" This could be")[0]
        hint = "is `model_type` in config.json right? A newer transformers may know it"
    elif match := re.search(r"field '(\w+)'[\s\S]*?(expected .*)", text):
        reason = f"`{match[1]}` in {CONFIG_FILE}: {match[2].splitlines()[0]}"
        hint = REPAIR
    elif "Class validation error for validator" in text:
        reason, hint = f"{CONFIG_FILE}: {_reason(error)}", REPAIR
    elif is_local:
        hint = {
            "configuration": REPAIR,
            "architecture": f"{CONFIG_FILE} asks for what cannot be built: {REPAIR}",
            "image processor": "copy preprocessor_config.json into the model's folder",
            "tokenizer": "copy or download the tokenizer's files again (tokenizer.json and "
            "tokenizer_config.json)",
        }.get(what, "are the folder's files complete? Copy or download them again")
    elif "/" not in name and not Path(name).exists():
        hint = "a local folder is written with a slash: `./my-model`"
    else:
        hint = "is the name right, and can the Hub be reached? `hf download NAME` fetches it before"
    return LoraError(f"cannot load the {what} of `{name}`: {reason}", at, hint)


def _missing_package(error: Exception) -> str | None:
    """Return the package that is missing according to an error, or None."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return PACKAGES.get(package, package)
    asks = r"(?i)not (?:be )?(?:found|installed|available)|is required|requires|need to install"
    if not isinstance(error, ImportError | ValueError) or not re.search(
        asks + "|pip install", text
    ):
        return None
    match = re.search(r"pip install (?:-\S+ )*['\"`]?([A-Za-z][\w-]+)", text)
    known = next((pip for word, pip in PACKAGES.items() if word in text.lower()), None)
    if known is None and match and match[1].lower() != "transformers":
        return match[1]
    return known


def require_kind(auto_class: Any, config: PretrainedConfig, recipe: Recipe) -> None:
    """Reject an architecture that the task does not support.

    (transformers' own check imports all of its architectures, to list them in its error.)

    Raises:
        LoraError: If the architecture is none of those that `auto_class` can build.
    """
    mapping = auto_class._model_mapping
    if type(config) in mapping or getattr(config, "auto_map", None):
        return
    kind = type(config).__name__.removesuffix("Config")
    what = f"a {kind} model cannot be used for `{recipe.task.type}`"
    raise LoraError(what, recipe.at("task.type"), recipe.task.suitable_models)


def check_config(config: PretrainedConfig, recipe: Recipe) -> None:
    """Check the requirements of every architecture: positive sizes, and known activations.

    Raises:
        LoraError: With every key of config.json whose value is invalid.
    """
    if (too_large := _too_large(config.to_dict())) is not None:
        name, count, limit = too_large
        what = f"{CONFIG_FILE} says `{name}: {count:,}`, and no model has more than {limit:,}"
        hint = "copy or download the model again, or ask who made it"
        raise LoraError(what, recipe.at("model.name"), hint)
    problems = []
    parts = {id(c): c for c in (config, config.get_text_config())}.values()
    # defaults of a class are valid for it: -1 layers, or an activation of its own
    values = {
        key: value
        for part in parts
        for key, value in vars(part).items()
        if getattr(type(part), key, None) != value
    }
    at = recipe.at("model.name")
    for key, value in values.items():
        if SIZES.fullmatch(key) and isinstance(value, int | float) and not _is_size(value, key):
            at_most = f", {MAX_LAYERS} at most" if "layer" in key and value > 0 else ""
            what = f"`{key}` in {CONFIG_FILE} is {value}: it is a positive whole number{at_most}"
            problems.append(Problem(what, at, REPAIR))
        elif key in ACTIVATIONS and isinstance(value, str) and not _is_activation(value):
            close = nearest(value, ACT2FN)
            suggestion = f"did you mean `{close}`? " if close else ""
            what = f"`{key}` in {CONFIG_FILE} is `{value}`, which is no activation"
            problems.append(Problem(what, at, f"{suggestion}{REPAIR}"))
    if (method := _quantized_by(config)) is not None:
        what = f"the weights of `{recipe.model.name}` are stored quantised, by {method}"
        hint = (
            "name the checkpoint that it was made from, and set `model.quantization: nf4` (or "
            "`int8`): it is quantised while it is read"
        )
        problems.append(Problem(what, at, hint))
    if problems:
        raise LoraError(problems)


def reject_wrong_keys(values: dict[str, Any], error: Exception, recipe: Recipe) -> None:
    """Find the keys of a config.json for which transformers cannot build a configuration.

    A key is the cause if the configuration can be built without it. (The libraries' own errors
    rarely name it: `'list' object has no attribute 'items'`.)

    Args:
        values: The content of config.json.
        error: The exception that transformers raised.
        recipe: Names the model.

    Raises:
        LoraError: With every such key; nothing is raised if there is none.
    """
    at, reason = recipe.at("model.name"), _reason(error)
    problems = []
    for key in values:
        if key != "model_type" and _makes_config({k: v for k, v in values.items() if k != key}):
            written = shortened(json.dumps(values[key], ensure_ascii=False), 60)
            what = f"`{key}` in {CONFIG_FILE} is `{written}`: {reason}"
            problems.append(Problem(what, at, REPAIR))
    if problems:
        raise LoraError(problems)


def _makes_config(values: dict[str, Any]) -> bool:
    try:
        AutoConfig.for_model(**values)
    except Exception:  # libraries raise anything
        return False
    return True


def _reason(error: Exception) -> str:
    """Return the reason why a configuration was rejected, in one line and without the key."""
    text = str(error)
    if match := re.search(r"(?i)field '\w+'[\s\S]*?(expected .*)", text):
        return match[1].splitlines()[0].partition(" (value: ")[0]
    if match := re.search(r"Class validation error for validator '\w+':\s*(.+)", text):
        return match[1]
    return own_words(error)


def _too_large(values: Any, key: str = "") -> tuple[str, int, int] | None:
    """Return the first count or size that would take too much time or memory: key, value, limit."""
    if isinstance(values, dict):
        inside = [(str(name), value) for name, value in values.items()]
    elif isinstance(values, list | tuple):
        inside = [(key, value) for value in values]
    else:
        is_integer = isinstance(values, int) and not isinstance(values, bool)
        limits = (limit for pattern, limit in MAX_VALUES.items() if re.search(pattern, key))
        limit = next(limits, None) if is_integer else None
        return (key, values, limit) if limit is not None and abs(values) > limit else None
    return next((over for name, value in inside if (over := _too_large(value, name))), None)


def _quantized_by(config: PretrainedConfig) -> str | None:
    """Return the method that a checkpoint was quantised with (GPTQ, AWQ, …), or None."""
    quantization = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, dict) else vars(quantization)
    method = values.get("quant_method", "a method that it does not name")
    return str(getattr(method, "value", method))


def _is_size(value: Any, key: str) -> bool:
    if isinstance(value, bool) or value != int(value):
        return False
    if key in ("max_position_embeddings", "n_positions") and value == -1:
        return True  # in DeBERTa: no absolute positions
    return value > 0 and ("layer" not in key or value <= MAX_LAYERS)


def _is_activation(value: str) -> bool:
    names = {"gelu_accurate", "gelu-approximate", "geglu", "reglu", "glu", "identity", "none"}
    return value in ACT2FN or value in names
