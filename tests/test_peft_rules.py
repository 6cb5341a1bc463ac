"""PEFT's rules as implemented here, compared with PEFT: what it adapts, copies and rejects."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_experts
import torch
from closeness import assert_close
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    WavLMConfig,
    WavLMForCTC,
)

from lora_cli.adapters.attach import attach, lora_layers
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.peft_format import peft_rules
from lora_cli.adapters.peft_format.adapter_folder import (
    differences_in_peft,
    read_adapter,
    save_adapter,
)
from lora_cli.adapters.peft_format.peft_rules import (
    base_modules,
    convolution_difference,
    copied_modules,
    full_names,
    modules_to_save,
    parameter_layers,
    peft_differences,
    peft_reading,
)
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.files import write_manifest

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 1, "num_key_value_heads": 1}
MODELS: dict[str, dict[str, Any]] = {
    "glm4_moe": {
        **EXPERTS, "n_routed_experts": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "head_dim": 8,
    },
    "ernie4_5_moe": {
        **EXPERTS, "moe_num_experts": 2, "moe_num_shared_experts": 1, "moe_k": 1,
        "moe_layer_start_index": 1, "moe_layer_end_index": 1, "head_dim": 8,
    },
    "deepseek_v3": {
        **EXPERTS, "n_routed_experts": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 4, "kv_lora_rank": 4,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 2,
    },
    "qwen3_next": {
        **EXPERTS, "num_experts": 2, "shared_expert_intermediate_size": 8, "head_dim": 8,
        "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 4,
        "linear_value_head_dim": 4, "layer_types": ["linear_attention", "full_attention"],
    },
    "qwen3_moe": {**EXPERTS, "num_experts": 2, "head_dim": 8},
    "mixtral": {"num_local_experts": 2, "num_key_value_heads": 1},
    "mamba": {"state_size": 4, "time_step_rank": 2},
    "llama": {"num_key_value_heads": 1},
}  # fmt: skip


@functools.cache
def base_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "distilbert":
        small = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
        config = AutoConfig.for_model("distilbert", **small)
        return AutoModelForSequenceClassification.from_config(config)
    if name == "bert":
        return tiny.encoder()
    config = AutoConfig.for_model(name, **{**SMALL, **MODELS[name]})
    return AutoModelForCausalLM.from_config(config).eval()


def by_peft(base: nn.Module, config: dict[str, Any]) -> tuple[set[str], set[str]] | None:
    """Return what PEFT adapts and copies, or None if it raises."""
    given = {key: value for key, value in config.items() if key != "peft_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**given))
        except ValueError:
            return None
    copied = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    return set(model.base_model.targeted_module_names), copied


CAUSAL, CLASSIFY = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_CLS"}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {"target_modules": ["q_proj", "0.mlp.up_proj"], **CAUSAL}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"], **CAUSAL}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"], **CAUSAL}),
        ("llama", {"target_modules": ["q_proj", "mlp"], **CAUSAL}),
        ("llama", {"target_modules": r".*\.(q|v)_proj", **CAUSAL}),
        ("bert", {"target_modules": ["dense", "query"], **CLASSIFY}),
        ("bert", {"target_modules": ["dense"], "modules_to_save": ["pooler"], **CLASSIFY}),
        ("distilbert", {"target_modules": ["q_lin"], **CLASSIFY}),
        ("mamba", {"target_modules": ["in_proj", "x_proj"], **CAUSAL}),
        ("mamba", {"target_modules": ["in_proj", "out_proj"], **CAUSAL}),
        ("mamba", {"target_modules": ["conv1d"], **CAUSAL}),
        *(
            (name, {"target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]})
            for name in ("glm4_moe", "ernie4_5_moe", "qwen3_next", "qwen3_moe")
        ),
        ("deepseek_v3", {"target_modules": ["kv_b_proj", "gate_proj", "up_proj", "down_proj"]}),
        ("glm4_moe", {"target_modules": ["q_proj", "down_proj"]}),
        ("mixtral", {"target_modules": ["q_proj", "k_proj"]}),
    ],
    ids=str,
)
def test_what_peft_adapts_and_copies(name: str, config: dict[str, Any]) -> None:
    reading = peft_reading(base_of(name), {"peft_type": "LORA", **config})
    theirs = by_peft(base_of(name), config)
    if theirs is None:
        assert reading.errors
        return
    assert not reading.errors
    assert (reading.adapted, reading.copied) == theirs


def adapted(name: str, head: list[str], **adapter: Any) -> tuple[nn.Module, Any]:
    model = copy.deepcopy(base_of(name))
    recipe = tiny.recipe_of("sequence_classification" if head else "causal_lm", **adapter)
    attach(model, recipe, head)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model.eval(), recipe


def loaded_by_peft(name: str, folder: Path) -> nn.Module | None:
    """Return the base with a folder's adapter as PEFT reads it, or None if it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return peft.PeftModel.from_pretrained(copy.deepcopy(base_of(name)), folder).eval()
        except (ValueError, KeyError):
            return None


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12)[None]).logits


@pytest.mark.parametrize(
    ("name", "head", "adapter", "said"),
    [
        ("llama", [], {"target_modules": "all-linear"}, None),
        ("llama", [], {"target_modules": ["q_proj"], "train_modules": ["norm"]}, None),
        ("llama", [], {"target_modules": ["q_proj"], "train_modules": ["input_layernorm"]}, None),
        ("bert", ["classifier"], {"target_modules": ["query"], "bias": "all"}, None),
        ("distilbert", ["pre_classifier", "classifier"], {"target_modules": ["q_lin"]}, None),
        ("distilbert", ["classifier"], {"target_modules": ["q_lin"]}, "pre_classifier"),
        ("mamba", [], {"target_modules": "all-linear"}, None),
        ("glm4_moe", [], {"target_modules": "all-linear"}, "shared_experts"),
        ("ernie4_5_moe", [], {"target_modules": "all-linear"}, "shared_experts"),
        ("deepseek_v3", [], {"target_modules": "all-linear"}, "shared_experts"),
        ("qwen3_next", [], {"target_modules": "all-linear"}, "shared_expert"),
        ("qwen3_moe", [], {"target_modules": "all-linear"}, None),
        ("mixtral", [], {"target_modules": "all-linear"}, None),
    ],
    ids=str,
)
def test_differences_are_reported_exactly_if_peft_differs(
    name: str, head: list[str], adapter: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    """There is a message exactly if PEFT's outputs differ."""
    model, recipe = adapted(name, head, rank=2, **adapter)
    in_full = [*head, *recipe.adapter.train_modules]
    save_adapter(tmp_path, model, recipe, in_full)
    before = differences_in_peft(model, recipe, in_full)
    assert before == differences_in_peft(model, recipe, in_full, tmp_path)
    theirs = loaded_by_peft(name, tmp_path)
    if said is None:
        assert not before
        assert theirs is not None
        assert_close(logits(theirs), logits(model))
        return
    assert said in " ".join(before)
    assert theirs is None or not torch.allclose(logits(theirs), logits(model), atol=1e-3)


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_next"])
def test_the_remedy_works(name: str, tmp_path: Path) -> None:
    model, recipe = adapted(name, [], rank=2, target_modules="all-linear")
    (said,) = differences_in_peft(model, recipe, [])
    excluded = said.partition("exclude_modules=[")[2].partition("]")[0].split(", ")
    model, recipe = adapted(name, [], rank=2, target_modules="all-linear", exclude_modules=excluded)
    assert differences_in_peft(model, recipe, []) == []
    save_adapter(tmp_path, model, recipe, [])
    theirs = loaded_by_peft(name, tmp_path)
    assert theirs is not None
    assert_close(logits(theirs), logits(model))


def test_layers_that_mamba_s_kernels_read_get_no_adapter() -> None:
    model, _ = adapted("mamba", [], target_modules="all-linear")
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {
        "in_proj", "x_proj",
    }  # fmt: skip
    for name in ("out_proj", "dt_proj"):
        with pytest.raises(LoraError, match="whose weight the model reads without a call"):
            adapted("mamba", [], target_modules=["in_proj", name])
    adapted("mamba", [], target_modules="all-linear", exclude_modules=["out_proj", "dt_proj"])


@pytest.mark.parametrize("trained", [True, False])
def test_an_update_of_a_layer_that_is_never_called_is_rejected_unless_it_is_zero(
    trained: bool, tmp_path: Path
) -> None:
    config = peft.LoraConfig(target_modules=["in_proj", "dt_proj"], r=2, **CAUSAL)
    model = peft.get_peft_model(copy.deepcopy(base_of("mamba")), config).eval()
    before = logits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and ("dt_proj" in name) == trained:
                parameter.normal_()
    assert torch.equal(logits(model), before) == trained  # it has no effect in PEFT
    model.save_pretrained(tmp_path)
    ours = copy.deepcopy(base_of("mamba"))
    if trained:
        with pytest.raises(LoraError, match="reads without a call"):
            load_adapter(ours, read_adapter(tmp_path), [])
        return
    load_adapter(ours, read_adapter(tmp_path), [])
    assert_close(logits(ours), logits(model))


def wavlm() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)}
    others = {
        "intermediate_size": 24,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    torch.manual_seed(0)
    return WavLMForCTC(WavLMConfig(**sizes, **convolutions, **others)).eval()


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj", "output_dense"])
def test_wavlm_s_attention_gets_no_adapter_since_it_would_have_no_effect(
    name: str, tmp_path: Path
) -> None:
    model = peft.get_peft_model(wavlm(), peft.LoraConfig(target_modules=[name], r=2))
    recording = torch.randn(1, 400)
    with torch.no_grad():
        before = model(recording).logits
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_()
        after = model(recording).logits
    has_effect = not torch.equal(after, before)
    assert has_effect == (name == "output_dense")
    model.save_pretrained(tmp_path)
    ours = wavlm()
    if not has_effect:
        with pytest.raises(LoraError, match="reads without a call"):
            load_adapter(ours, read_adapter(tmp_path), [])
        return
    load_adapter(ours, read_adapter(tmp_path), [])
    with torch.no_grad():
        torch.testing.assert_close(ours(recording).logits, after)


def test_modules_trained_in_full_are_saved_by_their_full_names(tmp_path: Path) -> None:
    model, recipe = adapted("llama", [], target_modules=["q_proj"], train_modules=["norm", "1.mlp"])
    save_adapter(tmp_path, model, recipe, recipe.adapter.train_modules)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm", "model.layers.1.mlp"]


def test_only_the_outermost_of_nested_names_is_kept() -> None:
    names = ["a", "a.norm", "b.norm", "b.prenorm"]
    assert full_names(names, ["norm", "a"]) == ["b.norm", "a"]


@pytest.mark.parametrize("layer", ["dilated", "reflect"])
def test_convolutions_that_peft_computes_differently_are_reported_and_rejected(
    layer: str, tmp_path: Path
) -> None:
    """PEFT's A has neither the dilation nor the padding mode of its base."""
    recipe = tiny.recipe_of("causal_lm", target_modules=["stem", layer], rank=2)
    model = tiny.ConvNet()
    attach(model, recipe)
    save_adapter(tmp_path, model, recipe, [])
    assert any(f"`{layer}`" in d for d in differences_in_peft(model, recipe, [], tmp_path))
    with pytest.raises(IntegrityError, match=f"`{layer}` .*and PEFT's update of it"):
        load_adapter(tiny.ConvNet(), read_adapter(tmp_path), [])
    write_manifest(tmp_path)  # like a folder of this tool, whose updates are computed like the base
    load_adapter(tiny.ConvNet(), read_adapter(tmp_path), [])


def test_base_modules_are_those_before_attaching() -> None:
    model = tiny.encoder(2)
    expected = {name: module for name, module in model.named_modules() if name}
    assert base_modules(model) == expected
    attach(model, tiny.recipe_of(rank=2, target_modules=["query", "dense"]), ["classifier"])
    assert len(lora_layers(model)) > 2
    assert base_modules(model) == expected


# ------------------------------------------------------------------------ one value at a time


def test_layers_on_parameters_have_peft_s_names() -> None:
    """Of two parameters of a module the last is the outer layer, and the others are inside it."""
    model, entries = tiny_experts.model("mixtral"), tiny_experts.EXPERTS
    found = parameter_layers(model, entries)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=entries)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    named = {
        name.removeprefix("base_model.model."): module.parameter_name
        for name, module in theirs.named_modules()
        if isinstance(module, ParamWrapper)
    }
    assert {name: key for name, (_, key) in found.items()} == named
    assert {module for module, _ in found.values()} == {
        f"model.layers.{i}.mlp.experts" for i in (0, 1)
    }
    assert len(found) == 4
    assert parameter_layers(model, None) == parameter_layers(model, []) == {}


@pytest.mark.parametrize(
    ("layer", "config", "said"),
    [
        (nn.Conv2d(2, 2, 3), "LORA", ""),
        (nn.Conv2d(2, 2, 3, dilation=(1, 3)), "LORA", "has a dilation of 3, and"),
        (nn.Conv2d(2, 2, (3, 1), dilation=(1, 3)), "LORA", ""),  # dilation has no effect at size 1
        (nn.Conv2d(2, 2, (1, 3), dilation=(1, 2)), "LORA", "has a dilation of 2, and"),
        (nn.Conv1d(2, 2, 2, dilation=2), "LORA", "has a dilation of 2, and"),
        (nn.Conv1d(2, 2, 2, dilation=2), "LOHA", ""),
        (nn.Conv1d(2, 2, 3, padding_mode="circular"), "LOHA", "pads with `circular`, and"),
        (nn.Linear(2, 2), "LORA", ""),
    ],
)
def test_differences_of_a_convolution(layer: nn.Module, config: str, said: str) -> None:
    found = convolution_difference(layer, {"peft_type": config})
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_modules_trained_in_full_for_classification() -> None:
    names = ["score", "x.score", "xscore", "norm", "a.prenorm", "other", "classifier.dense"]
    for config, entries, copied in (
        ({"task_type": "SEQ_CLS"}, ["classifier", "score"], ["score", "x.score", "xscore"]),
        ({"task_type": "TOKEN_CLS", "modules_to_save": ["norm"]}, ["norm", "classifier", "score"],
         ["score", "x.score", "xscore", "norm", "a.prenorm"]),
        ({"task_type": "CAUSAL_LM", "modules_to_save": ["norm"]}, ["norm"], ["norm", "a.prenorm"]),
        ({"modules_to_save": None}, [], []),
    ):  # fmt: skip
        assert modules_to_save(config) == entries
        assert copied_modules(names, config) == set(copied)


def test_names_that_peft_takes_for_experts_depend_on_the_family() -> None:
    for name, experts in (
        ("mixtral", ("gate", "w1", "w3", "w2")), ("llama", ()),
        ("qwen3_moe", ("gate", "gate_proj", "up_proj", "down_proj")),
    ):  # fmt: skip
        assert peft_rules._expert_names(base_of(name)) == experts
    assert peft_rules._expert_names(nn.Linear(1, 1)) == ()


def test_lost_experts_are_reported_with_a_remedy() -> None:
    reading = peft_rules.PeftReading(experts={"a.0.mlp.up", "a.0.mlp.down", "b.gate", "c.up"})
    ours = {"a.0.mlp.up", "a.0.mlp.down", "b.gate", "a.0.q"}
    (said,) = peft_rules._lost_experts(reading, ours)
    assert said.startswith(
        "PEFT would not adapt `a.0.mlp.down`, `a.0.mlp.up`, `b.gate`, 3 of 4 modules: in models of "
        "this type it takes `down`, `gate`, `up` for parts"
    )
    assert "adapter.exclude_modules=[b.gate, mlp.down, mlp.up]'" in said
    assert peft_rules._lost_experts(reading, {"a.0.q"}) == []
    assert peft_rules.listed(["a", "b", "c"]) == "`a`, `b`, `c`"
    assert peft_rules.listed(["a", "b", "c", "d", "e"]) == "`a`, `b`, `c` and 2 more"


def test_differences_are_reported_for_each_kind_of_module() -> None:
    model = base_of("llama")
    q = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    k = q[0].replace("q_proj", "k_proj")

    def said(targets: list[str], adapted: list[str], kind: str = "LORA", **more: Any) -> list[str]:
        config = {"peft_type": kind, "target_modules": targets, **more}
        tensors = {f"{name}.lora_{side}.weight" for name in adapted for side in "AB"}
        return peft_differences(model, config, tensors | more_tensors)

    more_tensors: set[str] = set()
    assert said(["q_proj"], q) == []
    (found,) = said(["q_proj"], [*q, k])
    assert found.startswith(f"PEFT would not adapt `{k}`: by its name")
    (found,) = said(["q_proj"], q[:1])
    assert found.startswith(f"PEFT would adapt `{q[1]}` too, whose name ends")
    (found,) = said(["q_proj"], q, modules_to_save=["norm"])
    assert found.startswith("PEFT would look for weights of `model.layers.0.input_layernorm`, ")
    assert said(["q_proj"], q, modules_to_save=["model.norm"])
    more_tensors = {"model.norm.weight"}
    assert said(["q_proj"], q, modules_to_save=["model.norm"]) == []
    assert said(["mlp"], [], "HEAD_ONLY") == []
    (found,) = said(["0.mlp"], [])
    assert "is a LlamaMLP, which it does not adapt" in found


@pytest.mark.parametrize("tied", [True, False])
def test_a_missing_copy_is_reported_even_if_its_weight_is_shared(tied: bool) -> None:
    model = tiny.llama(tied)
    config = {
        "peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]
    }  # fmt: skip
    tensors = [
        f"{name}.lora_{side}.weight"
        for name, _ in model.named_modules()
        if name.endswith("q_proj")
        for side in "AB"
    ]
    (said,) = peft_differences(model, config, tensors)
    assert said.startswith("PEFT would look for weights of `lm_head` too")
    assert peft_differences(model, config, [*tensors, "lm_head.weight"]) == []
