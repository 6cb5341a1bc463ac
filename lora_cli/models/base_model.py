"""Load a base model: its configuration, its tokenizer, and its weights in the right precision."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from lora_cli.errors import LoraError, counted, warn
from lora_cli.models.find_base import checkpoint_files, source_of
from lora_cli.models.fp8 import has_fp8_products
from lora_cli.models.generation_config import check_generation_config
from lora_cli.models.load_errors import (
    check_config,
    explained,
    reject_wrong_keys,
    require_kind,
)
from lora_cli.models.vocabulary import add_tokens
from lora_cli.recipe import Recipe
from lora_cli.tensorfile import read_header

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHUNK_SIZE_KEY = "chunk_size_feed_forward"  # positions that a feed-forward layer computes at once
MISMATCH_HINT = "config.json and the weights do not belong together: copy or download both again"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYER_NUMBER = re.compile(r"\.\d+\.")  # in the name of a tensor


def mixed_precision(recipe: Recipe) -> str:
    """Return the precision that Accelerate's autocast should use: `no`, `fp16` or `bf16`.

    A base that is stored in bf16 computes in bf16 without autocast. Autocast would convert to
    float32 and back at every normalisation, which makes small models a third slower. fp16 needs
    autocast, since normalisations would overflow.
    """
    precision = recipe.train.precision
    native = recipe.adapter.type != "full" and storage_dtype(recipe) == torch.bfloat16
    return "no" if precision == "fp32" or (precision == "bf16" and native) else precision


def storage_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype in which the frozen base is stored."""
    if recipe.model.dtype is not None:
        return DTYPES[recipe.model.dtype]
    if recipe.adapter.type == "full":
        return torch.float32  # nothing is frozen, and optimizers need float32
    return PRECISIONS[recipe.train.precision]


def config_as_written(recipe: Recipe) -> dict[str, Any]:
    """Return the content of the base's config.json, without defaults."""
    config: dict[str, Any] = PretrainedConfig.get_config_dict(**source_of(recipe))[0]
    return config


def load_config(recipe: Recipe, **changes: Any) -> PretrainedConfig:
    """Return the base's configuration, with changes such as the labels."""

    def find_cause(error: Exception) -> None:
        values, _ = PretrainedConfig.get_config_dict(**source_of(recipe))
        reject_wrong_keys(values, error, recipe)

    with explained(recipe, "configuration", find_cause):
        config: PretrainedConfig = AutoConfig.from_pretrained(**source_of(recipe), **changes)
        check_config(config, recipe)
    for part in (config, config.get_text_config()):
        if getattr(part, CHUNK_SIZE_KEY, None):
            # chunking changes no result, but fails for lengths that are not a multiple of its size
            setattr(part, CHUNK_SIZE_KEY, 0)
    return config


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer, with the tokens that the recipe adds."""
    # the cause of an error may be config.json, which transformers reads for the tokenizer too
    with explained(recipe, "tokenizer", lambda _: load_config(recipe)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source_of(recipe))
    # if its files are missing, transformers silently returns a tokenizer without words
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        hint = "copy tokenizer.json (or vocab.txt, or tokenizer.model) into the model's folder"
        what = f"`{recipe.model.name}` has no tokenizer: its files are missing"
        raise LoraError(what, recipe.at("model.name"), hint)
    add_tokens(tokenizer, recipe)
    return tokenizer


def build_empty(auto_class: Any, recipe: Recipe, config: PretrainedConfig) -> nn.Module:
    """Return the model on the meta device: all names and shapes, but no weights."""
    require_kind(auto_class, config, recipe)
    with explained(recipe, "architecture"), torch.device("meta"):
        model: nn.Module = auto_class.from_config(
            config, trust_remote_code=recipe.model.trust_remote_code
        )
    check_generation_config(auto_class, config, recipe)
    return model


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
        recipe: The `model` section names the base and its storage format.
        config: The configuration, with the task's changes.
        device: The device for the weights.
        dtype: The dtype to store the weights in, instead of the recipe's; `auto` keeps that of the
            checkpoint.
        has_head: Whether the task adds a head, whose parameters may be missing in the checkpoint.

    Returns:
        The model, in eval mode, and the names of parameters that are missing in the checkpoint or
        have another shape there. These are initialised from torch's global random generator.

    Raises:
        LoraError: If the checkpoint does not fit the model.
        IntegrityError: If a file of the checkpoint is damaged.
    """
    require_kind(auto_class, config, recipe)
    options: dict[str, Any] = {"dtype": dtype or storage_dtype(recipe)}
    if recipe.model.attention is not None:
        options["attn_implementation"] = recipe.model.attention
    for file in checkpoint_files(recipe):
        read_header(file)
    check_generation_config(auto_class, config, recipe)
    if recipe.model.quantization is not None:
        options |= _quantization_options(auto_class, recipe, config, device, has_head)
    with explained(recipe, "weights", lambda _: build_empty(auto_class, recipe, config)):
        model, info = auto_class.from_pretrained(
            **source_of(recipe),
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # only allowed for a head; others are rejected below
            **options,
        )
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    parameters = {name for name, _ in model.named_parameters()}
    if recipe.model.quantization is not None:
        model.hf_quantizer.remove_quantization_config(
            model
        )  # so that a saved config matches the base's
    missing = (set(info["missing_keys"]) | mismatched) & parameters
    _reject_misfits(model, mismatched, missing, recipe, has_head)
    _warn_of_unused_layers(info["unexpected_keys"], parameters, recipe)
    disable_wrong_attention(model)
    return model.to(device), missing


def _warn_of_unused_layers(
    unused: Collection[str], parameters: Collection[str], recipe: Recipe
) -> None:
    """Warn if the checkpoint has more layers than config.json says.

    Unused tensors of other heads, or of other kinds of layers, cause no warning, as in
    transformers.
    """
    patterns = {LAYER_NUMBER.sub(".0.", name, count=1) for name in parameters}
    layers = sorted(name for name in unused if LAYER_NUMBER.sub(".0.", name, count=1) in patterns)
    if layers:
        warn(
            f"the checkpoint of `{recipe.model.name}` has more layers than config.json says: "
            f"{counted(len(layers), 'tensor')} such as `{layers[0]}` are left out"
        )


def disable_wrong_attention(model: nn.Module) -> None:
    """Disable torch's memory-efficient attention for models for which its outputs are wrong.

    They are wrong on a GPU if all heads share one key and have a head dimension above 128, as in
    Gemma 3 270M: in float32 with and without a mask, in bfloat16 with a mask (torch 2.11 on an
    H200, compared with float64). With a key for each head, or a dimension of 128, they are right.
    """
    for layer in model.modules():
        heads_per_key = getattr(layer, "num_key_value_groups", 1)  # transformers' names
        width = getattr(layer, "head_dim", 0)
        config: Any = getattr(layer, "config", None)
        if heads_per_key > 1 and width > 128 and heads_per_key == config.num_attention_heads:
            torch.backends.cuda.enable_mem_efficient_sdp(False)


def _quantization_options(
    auto_class: Any,
    recipe: Recipe,
    config: PretrainedConfig,
    device: torch.device,
    has_head: bool,
) -> dict[str, Any]:
    """Return the options with which `from_pretrained` quantises the weights as it reads them.

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
    if kind == "fp8" and (recipe.train.precision == "fp32" or not has_fp8_products(device)):
        reason = "this device does not multiply in fp8"
        if has_fp8_products(device):
            reason = "`train.precision: fp32` rounds nothing to fp8"
        warn(f"`quantization: fp8`: {reason}, so the weights are dequantised for each product")
    from lora_cli.models.quantize_on_load import QuantizeOnLoad

    heads = new_modules(build_empty(auto_class, recipe, config)) if has_head else []
    # a pooler that is missing in the checkpoint is new, and so not quantised
    unquantized = [*heads, "pooler", *recipe.adapter.train_modules]
    return {"quantization_config": QuantizeOnLoad(kind, unquantized), "device_map": {"": device}}


def _reject_misfits(
    model: nn.Module, mismatched: set[str], missing: set[str], recipe: Recipe, has_head: bool
) -> None:
    """Reject a checkpoint that lacks weights, except those of the task's new head."""
    heads = tuple(f"{head}." for head in new_modules(model)) if has_head else ()
    at = recipe.at("model.name")
    for name in sorted(mismatched):
        if not name.startswith(heads):
            what = f"`{name}` of the checkpoint has another shape than config.json says"
            raise LoraError(what, at, MISMATCH_HINT)
    # checkpoints of language models lack a classifier's pooler, which is new too
    absent = sorted(
        name for name in missing if not name.startswith(heads) and ".pooler." not in f".{name}"
    )
    if absent:
        others = f", nor for {len(absent) - 1} others" if len(absent) > 1 else ""
        what = f"the checkpoint holds no weights for `{absent[0]}`{others}"
        saved, needed = getattr(model.config, "architectures", None) or [], type(model).__name__
        if saved and needed not in saved and not has_head:
            what += f": it is one of {saved[0]}, and `{recipe.task.type}` needs {needed}"
            raise LoraError(what, at, recipe.task.suitable_models)
        raise LoraError(what, at, MISMATCH_HINT)


def new_modules(model: nn.Module, missing: Collection[str] = ()) -> list[str]:
    """Return the names of the modules that the task adds to the pretrained model.

    These are the children outside the pretrained part (`classifier`, `score`), and modules inside
    it that are missing in the checkpoint.

    Args:
        model: The model.
        missing: The names of parameters that are missing in the checkpoint.
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
