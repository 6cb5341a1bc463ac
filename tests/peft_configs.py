"""Random PEFT adapters, and what they compute: drawn over every field of PEFT's `LoraConfig`."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import tiny
import torch
from hypothesis import strategies as st
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from torch import Tensor, nn

TOLERANCE = 1e-4  # of the largest output


@dataclass(frozen=True)
class Architecture:
    """A tiny base model, and names of it that a configuration may hold."""

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    expression: str
    in_full: tuple[str, ...]
    layers_pattern: str
    embedding: str
    task_type: str | None


ARCHITECTURES = {
    "llama, tied": Architecture(
        lambda: tiny.llama(tied=True),
        ("q_proj", "v_proj", "o_proj", "up_proj", "1.mlp.down_proj", "embed_tokens", "lm_head",
         "model.layers.0.self_attn.k_proj"),
        r".*layers\.[01]\.(self_attn\.(q|k)_proj|mlp\.down_proj)",
        ("norm", "model.norm", "input_layernorm", "embed_tokens", "lm_head", "mlp"),
        "layers", "embed_tokens", "CAUSAL_LM",
    ),
    "llama, untied": Architecture(
        lambda: tiny.llama(tied=False),
        ("q_proj", "v_proj", "o_proj", "gate_proj", "mlp.down_proj", "embed_tokens", "lm_head"),
        r"model\.layers\.\d\.mlp\..*_proj",
        ("norm", "post_attention_layernorm", "embed_tokens", "lm_head", "1.mlp"),
        "layers", "embed_tokens", "CAUSAL_LM",
    ),
    "bert": Architecture(
        tiny.encoder,
        ("query", "value", "dense", "output.dense", "word_embeddings", "pooler.dense",
         "bert.encoder.layer.0.attention.self.key"),
        r".*layer\.\d\.(output|intermediate)\.dense",
        ("classifier", "pooler", "LayerNorm", "output.LayerNorm", "embeddings"),
        "layer", "word_embeddings", "SEQ_CLS",
    ),
    "gpt2": Architecture(
        tiny.gpt2,
        ("c_attn", "c_proj", "mlp.c_proj", "c_fc", "wte", "wpe", "lm_head"),
        r".*h\.\d\.(attn\.c_attn|mlp\.c_fc)",
        ("ln_f", "ln_1", "wte", "wpe", "lm_head", "1.mlp"),
        "h", "wte", "CAUSAL_LM",
    ),
    "t5": Architecture(
        lambda: tiny.encoder_decoder("t5"),
        ("q", "v", "o", "wi", "wo", "SelfAttention.k", "shared", "lm_head", "embed_tokens"),
        r".*block\.0\.layer\.\d\..*\.(q|v|wo)",
        ("shared", "lm_head", "final_layer_norm", "layer_norm", "embed_tokens",
         "encoder.embed_tokens"),
        "block", "shared", "SEQ_2_SEQ_LM",
    ),
    "convolutions": Architecture(
        tiny.ConvNet,
        ("stem", "point", "grouped", "dilated", "reflect", "line", "classifier"),
        r"(stem|point|line)",
        ("classifier", "norm", "point", "line"),
        "layers", "stem", None,
    ),
}  # fmt: skip


@functools.cache
def base_of(name: str) -> nn.Module:
    """Return the base model of an architecture; not to be changed."""
    return ARCHITECTURES[name].build()


def outputs(model: nn.Module) -> Tensor:
    """Return what a model makes of a fixed input."""
    generator = torch.Generator().manual_seed(5)
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        if isinstance(plain, tiny.ConvNet):
            return plain(torch.randn(3, 3, 12, 12, generator=generator))
        ids = torch.randint(4, 200, (3, 7), generator=generator)
        more = {"decoder_input_ids": ids[:, :4]} if plain.config.is_encoder_decoder else {}
        return plain(input_ids=ids, **more).logits


def difference(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of two models' outputs, as a share of the largest output."""
    a, b = outputs(one), outputs(other)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


# ------------------------------------------------------------------------------------ configuration


def configs(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return what draws the arguments of a `LoraConfig` for an architecture."""
    arch = ARCHITECTURES[name]
    some_targets = st.lists(st.sampled_from(arch.targets), min_size=1, max_size=3, unique=True)
    some_in_full = st.lists(st.sampled_from(arch.in_full), min_size=1, max_size=2, unique=True)
    indices = st.lists(st.integers(4, 60), min_size=1, max_size=3, unique=True)

    def rarely(value: st.SearchStrategy[Any], off: Any, one_in: int) -> st.SearchStrategy[Any]:
        return st.integers(1, one_in).flatmap(lambda i: value if i == 1 else st.just(off))

    plain = {
        "r": st.sampled_from([1, 2, 4, 6]),
        "lora_alpha": st.sampled_from([1, 4, 8, 2.5, 0, -3, 16]),
        "lora_dropout": st.sampled_from([0.0, 0.1, 0.5]),
        "target_modules": st.one_of(
            some_targets,
            some_targets,
            st.sampled_from([arch.expression, "all-linear"]),
        ),
        "exclude_modules": rarely(st.one_of(some_targets, st.just(r".*\.0\..*")), None, 6),
        "use_rslora": st.booleans(),
        "bias": st.sampled_from(["none", "none", "all", "lora_only"]),
        "modules_to_save": rarely(some_in_full, None, 3),
        "fan_in_fan_out": rarely(st.just(True), False, 8),
        "task_type": rarely(st.just(arch.task_type), None, 2),
        "rank_pattern": rarely(
            st.dictionaries(st.sampled_from(arch.targets), st.sampled_from([2, 3, 4]), max_size=2),
            {},
            4,
        ),
        "alpha_pattern": rarely(
            st.dictionaries(st.sampled_from(arch.targets), st.sampled_from([2, 9.5]), max_size=2),
            {},
            4,
        ),
        "layers_to_transform": rarely(st.sampled_from([0, 1, [0], [0, 1]]), None, 6),
        "layers_pattern": rarely(
            st.sampled_from([arch.layers_pattern, [arch.layers_pattern, "blocks"]]), None, 6
        ),
        "init_lora_weights": st.one_of(
            st.booleans(),
            rarely(
                st.sampled_from(
                    ["gaussian", "orthogonal", "mica", "pissa", "pissa_niter_2", "olora", "loftq",
                     "eva"]
                ),
                True,
                2,
            ),
        ),
        "ensure_weight_tying": rarely(st.just(True), False, 5),
    }  # fmt: skip
    variants = {
        "use_dora": st.just(True),
        "lora_bias": st.just(True),
        "use_qalora": st.just(True),
        "alora_invocation_tokens": st.just([5, 6]),
        "target_parameters": st.sampled_from([["q_proj.weight"], ["query.weight"], ["wo.weight"]]),
        "trainable_token_indices": st.one_of(
            indices, indices.map(lambda tokens: {arch.embedding: tokens})
        ),
        "layer_replication": st.just([[0, 1], [0, 2]]),
        "kasa_config": st.builds(KasaConfig),
        "monteclora_config": st.builds(MontecloraConfig),
        "velora_config": st.just(VeloraConfig(num_groups=4)),
        "use_bdlora": st.builds(BdLoraConfig, nblocks=st.just(2)),
        "arrow_config": st.builds(ArrowConfig),
        "loftq_config": st.just({"loftq_bits": 4}),
        "megatron_config": st.just({"hidden_size": 32}),
    }
    variant = st.sampled_from(sorted(variants)).flatmap(
        lambda key: variants[key].map(lambda value: {key: value})
    )
    return st.builds(
        lambda config, more: _possible({**config, **more}),
        st.fixed_dictionaries(plain),
        rarely(variant, {}, 4),
    )


def whole_configs(name: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """Return what draws a type, LOHA or LOKR, and the arguments of its configuration."""
    arch = ARCHITECTURES[name]
    some = st.lists(st.sampled_from(arch.targets), min_size=1, max_size=3, unique=True)
    in_full = st.lists(st.sampled_from(arch.in_full), min_size=1, max_size=2, unique=True)
    ranks = st.dictionaries(st.sampled_from(arch.targets), st.sampled_from([1, 3]), max_size=2)
    alphas = st.dictionaries(st.sampled_from(arch.targets), st.sampled_from([2, 9.5]), max_size=2)
    both = {
        "r": st.sampled_from([1, 2, 4, 6, 40]),
        "alpha": st.sampled_from([1, 8, 2.5, 0, -3]),
        "target_modules": st.one_of(some, some, st.sampled_from([arch.expression, "all-linear"])),
        "rank_dropout": st.sampled_from([0.0, 0.5]),
        "module_dropout": st.sampled_from([0.0, 0.5]),
        "use_effective_conv2d": st.booleans(),
        "init_weights": st.booleans(),
        "rank_pattern": st.one_of(st.just({}), ranks),
        "alpha_pattern": st.one_of(st.just({}), alphas),
        "modules_to_save": st.one_of(st.none(), st.none(), in_full),
        "task_type": st.sampled_from([None, arch.task_type]),
        "layers_to_transform": st.sampled_from([None, None, None, 0, [1], [0, 1]]),
        "layers_pattern": st.sampled_from([None, arch.layers_pattern]),
        "exclude_modules": st.one_of(st.none(), st.none(), some),
    }
    kronecker = {
        "decompose_both": st.booleans(),
        "decompose_factor": st.sampled_from([-1, -1, 1, 2, 3, 4, 8]),
        "rank_dropout_scale": st.booleans(),
        "init_weights": st.sampled_from([True, False, "lycoris"]),
    }
    return st.one_of(
        st.tuples(st.just("LOHA"), st.fixed_dictionaries(both).map(_possible)),
        st.tuples(st.just("LOKR"), st.fixed_dictionaries(both | kronecker).map(_possible)),
    )


def recipes(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return what draws the adapter section of a recipe for an architecture."""
    arch = ARCHITECTURES[name]
    some = st.lists(st.sampled_from(arch.targets), min_size=1, max_size=3, unique=True)
    in_full = st.lists(st.sampled_from(arch.in_full), max_size=2, unique=True)
    return st.fixed_dictionaries(
        {"rank": st.sampled_from([2, 4]), "target_modules": st.one_of(some, st.just("all-linear"))},
        optional={
            "alpha": st.sampled_from([1.0, 4.0, 2.5]),
            "use_rslora": st.booleans(),
            "bias": st.sampled_from(["none", "lora_only", "all"]),
            "exclude_modules": some,
            "layers": st.sampled_from([[0], [1], [0, 1]]),
            "rank_pattern": st.dictionaries(st.sampled_from(arch.targets), st.just(6), max_size=1),
            "alpha_pattern": st.dictionaries(
                st.sampled_from(arch.targets), st.just(9.5), max_size=1
            ),
            "train_modules": in_full,
            "ensure_weight_tying": st.booleans(),
        },
    )


def _possible(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without what PEFT rejects at once, so that few are drawn in vain."""
    if isinstance(config["target_modules"], str):
        config["layers_to_transform"] = None
    if config["layers_to_transform"] is None:
        config["layers_pattern"] = None
    if config.get("lora_bias"):
        config["init_lora_weights"] = True
    if config.get("init_lora_weights") == "loftq":
        config.setdefault("loftq_config", {"loftq_bits": 4})
    if config.get("alora_invocation_tokens") or config.get("arrow_config"):
        config["lora_dropout"] = 0.0
    return config


def save_by_peft(
    folder: Path,
    base: nn.Module,
    config: dict[str, Any],
    seed: int = 0,
    kind: Callable[..., peft.PeftConfig] = peft.LoraConfig,
) -> nn.Module | None:
    """Save an adapter with random weights, and return its model; None if PEFT cannot make one."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.get_peft_model(copy.deepcopy(base), kind(**copy.deepcopy(config)))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=0.2)
            model.save_pretrained(folder)
            outputs(model.eval())
        except Exception:  # whatever PEFT says of what it cannot do
            return None
    return model


def read_by_peft(folder: Path, base: nn.Module) -> nn.Module | None:
    """Return the base with the adapter of a folder, as PEFT reads it; None if it cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
            outputs(model)
        except Exception:  # what it saved itself: `target_parameters` beside a `bias`, for one
            return None
    return model


def config_of(folder: Path) -> dict[str, Any]:
    """Return the configuration of a folder."""
    return dict(json.loads((folder / "adapter_config.json").read_text()))
