"""Adapters of experts that used to be separate layers, and of routers, in the current format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_experts
import torch
from torch import Tensor, nn

from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder
from lora_cli.adapters.peft_format.peft_experts import (
    check_parameter,
    target_names,
    with_current_names,
)
from lora_cli.errors import LoraError

TOP = "model.layers.0"
EXPERTS = f"{TOP}.mlp.experts"
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
WIDTH, INNER, COUNT = 16, 24, 4


def folder(tensors: dict[str, Tensor], **config: Any) -> AdapterFolder:
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    return AdapterFolder(Path("adapter"), values, tensors, verified=False)


def old(
    kind: str, *layers: str, rank: int = 2, count: int = COUNT, **ranks: int
) -> dict[str, Tensor]:
    """Return tensors of each expert's layers, as of transformers 4.

    Args:
        kind: The family.
        layers: Those that are adapted; none: all three.
        rank: Of each update.
        count: How many experts.
        ranks: Other ranks of some layers.
    """
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in layers or NAMES[kind]:
        n_out, n_in = (WIDTH, INNER) if layer in ("w2", "down_proj") else (INNER, WIDTH)
        own = ranks.get(layer, rank)
        for expert in range(count):
            name = f"{TOP}.{block}.experts.{expert}.{layer}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(own, n_in, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(n_out, own, generator=generator)
    return tensors


def update_of(tensors: dict[str, Tensor], layer: str, expert: int) -> Tensor:
    """Return B A of one old layer."""
    (name,) = {n.partition(".lora_")[0] for n in tensors if f"experts.{expert}.{layer}." in n}
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


def as_peft_computes(a: Tensor, b: Tensor) -> Tensor:
    """Return B A of each expert (experts, out, in), of PEFT's tensors."""
    rank = len(a) // COUNT
    of_a = a.reshape(COUNT, rank, a.shape[-1])
    of_b = b.reshape(len(b), rank, COUNT)
    return torch.einsum("ore,eri->eoi", of_b, of_a)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [{}, {"w3": 5, "up_proj": 5}])
def test_all_experts_become_one_update(kind: str, rslora: bool, ranks: dict[str, int]) -> None:
    """Two of an expert's layers are one parameter, stacked by rows."""
    first, second, third = NAMES[kind]
    tensors = old(kind, **ranks)
    other_rank = 5 if ranks else 2
    # all have one scale, 3 / 2, or 3 / sqrt(2)
    scale = 3 / (math.sqrt(2) if rslora else 2)
    alpha = scale * (math.sqrt(other_rank) if rslora else other_rank)
    adapter = folder(tensors, use_rslora=rslora, alpha_pattern={second: alpha})
    found = with_current_names(adapter, tiny_experts.model(kind))
    pair = {"gate_up_proj": f"{EXPERTS}.base_layer", "down_proj": EXPERTS}
    assert found.tensors.keys() == {
        f"{module}.lora_{side}.weight" for module in pair.values() for side in "AB"
    }
    assert found.config["target_parameters"] == [
        f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj",
    ]  # fmt: skip
    assert "target_parameters" not in adapter.config  # it is not changed
    for key, layers in (("gate_up_proj", (first, second)), ("down_proj", (third,))):
        a, b = (found.tensors[f"{pair[key]}.lora_{side}.weight"] for side in "AB")
        pattern = f"{EXPERTS}.{key}".replace(".", r"\.")
        assert (a.ndim, b.ndim) == (2, 2)
        rank = found.config["rank_pattern"][pattern]
        assert rank == (2 + other_rank if key == "gate_up_proj" else 2) == len(a) // COUNT
        scaled = found.config["alpha_pattern"][pattern] / (math.sqrt(rank) if rslora else rank)
        assert scaled == pytest.approx(scale)
        expected = torch.stack(
            [torch.cat([update_of(tensors, one, e) for one in layers]) for e in range(COUNT)]
        )
        torch.testing.assert_close(as_peft_computes(a, b), expected)


def test_without_an_alpha_the_scale_is_that_of_peft() -> None:
    adapter = folder(old("mixtral", "w2"))
    del adapter.config["lora_alpha"]
    found = with_current_names(adapter, tiny_experts.model("mixtral"))
    assert list(found.config["alpha_pattern"].values()) == [8.0]
    assert list(found.config["rank_pattern"].values()) == [2]


def test_existing_patterns_and_parameters_of_the_configuration_stay() -> None:
    given = {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 9},
             "target_parameters": ["a.b"]}  # fmt: skip
    adapter = folder(old("mixtral", "w2"), **given)
    found = with_current_names(adapter, tiny_experts.model("mixtral"))
    assert found.config["target_parameters"] == ["a.b", f"{EXPERTS}.down_proj"]
    assert found.config["rank_pattern"]["q_proj"] == 7
    assert list(found.config["rank_pattern"])[-1] == "q_proj"  # the first match counts
    assert list(found.config["alpha_pattern"])[-1] == "q_proj"
    assert given["target_parameters"] == ["a.b"]


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_a_current_adapter_is_returned_unchanged(model: str) -> None:
    base = tiny.llama() if model == "llama" else tiny_experts.model(model)
    tensors = {f"{TOP}.self_attn.q_proj.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    adapter = folder(tensors)
    assert with_current_names(adapter, base) is adapter


def test_names_stay_in_a_model_without_joined_experts() -> None:
    adapter = folder(old("mixtral"))
    for base in (tiny.llama(), nn.Linear(2, 2)):
        assert with_current_names(adapter, base) is adapter
    model = tiny_experts.model("mixtral")
    del model.model.layers[0].mlp.experts.gate_up_proj
    model.model.layers[0].mlp.experts.gate_up_proj = nn.Linear(2, 2)  # no parameter of its own
    found = with_current_names(folder(old("mixtral", "w1", "w3")), model)
    assert set(found.tensors) == set(old("mixtral", "w1", "w3"))


# ---------------------------------------------------------------------------------------- routers


def router(name: str) -> dict[str, Tensor]:
    return {f"{TOP}.{name}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}


def test_an_old_router_is_renamed_and_becomes_a_parameter() -> None:
    adapter = folder(router("block_sparse_moe.gate"), target_parameters=["x.y"])
    found = with_current_names(adapter, tiny_experts.model("mixtral"))
    assert found.tensors.keys() == router("mlp.gate").keys()
    assert found.config["target_parameters"] == ["x.y", f"{TOP}.mlp.gate.weight"]
    found = with_current_names(folder(router("mlp.gate")), tiny_experts.model("qwen3_moe"))
    assert found.config["target_parameters"] == [f"{TOP}.mlp.gate.weight"]


def test_a_router_that_is_named_as_a_parameter_is_not_named_again() -> None:
    adapter = folder(router("mlp.gate"), target_parameters=["mlp.gate.weight"])
    assert with_current_names(adapter, tiny_experts.model("qwen3_moe")) is adapter


def test_a_router_that_is_a_linear_layer_stays_one() -> None:
    model = tiny_experts.model("mixtral")
    model.model.layers[0].mlp.gate = nn.Linear(WIDTH, COUNT)
    found = with_current_names(folder(router("block_sparse_moe.gate")), model)
    assert found.tensors.keys() == router("mlp.gate").keys()
    assert not found.config.get("target_parameters")
    adapter = folder(router("mlp.gate"))
    assert with_current_names(adapter, model) is adapter


def test_a_router_that_the_model_lacks_keeps_its_name() -> None:
    adapter = folder(router("block_sparse_moe.gate"))
    assert with_current_names(adapter, tiny.llama()) is adapter
    other = {n.replace("lora_A.weight", "lora_B.other"): t for n, t in router("mlp.gate").items()}
    assert with_current_names(folder(other), tiny_experts.model("qwen3_moe")).tensors == other


# ------------------------------------------------------------------------ what cannot be one update


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def narrower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t[:1] if ".2.w1.lora_A" in n else t[:, :1] if ".2.w1.lora_B" in n else t)
            for n, t in tensors.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (old("mixtral", "w1"), {}, "have an adapter on `w1` and none on `w3`"),
        (old("mixtral", "w3"), {}, "have an adapter on `w3` and none on `w1`"),
        (old("mixtral", count=3), {}, "has 4 experts, and the adapter is not for `w1` of each"),
        (old("mixtral", count=5), {}, "has 4 experts, and the adapter is not for `w1` of each"),
        (without(old("mixtral"), "1.w2.lora_B"), {}, "the adapter is not for `w2` of each"),
        (without(old("mixtral"), "1.w2.lora_A"), {}, "the adapter is not for `w2` of each"),
        (narrower(old("mixtral")), {}, "differ in rank"),
        (old("mixtral", w3=4), {}, "have several scales"),
        (old("mixtral"), {"alpha_pattern": {"experts.1.w3": 9}}, "have several scales"),
    ],
)
def test_what_one_update_cannot_express_is_rejected(
    tensors: dict[str, Tensor], config: dict[str, Any], said: str
) -> None:
    with pytest.raises(LoraError) as caught:
        with_current_names(folder(tensors, **config), tiny_experts.model("mixtral"))
    (problem,) = caught.value.problems
    assert said in problem.what
    assert f"`{EXPERTS}`" in problem.what
    assert problem.at == "adapter"


def test_transposed_experts_are_rejected() -> None:
    with pytest.raises(LoraError, match="stores its experts otherwise than the adapter"):
        with_current_names(folder(old("qwen3_moe")), tiny_experts.model("gpt_oss"))


# ----------------------------------------------------------------------------- a parameter's update


@pytest.mark.parametrize(
    ("config", "rank", "alpha"),
    [
        ({"r": 3, "lora_alpha": 5}, 3, 5),
        ({"r": None, "lora_alpha": None}, 8, 8),
        ({"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 7}}, 2, 7),
    ],
)
def test_rank_and_alpha_are_those_of_the_configuration(
    config: dict[str, Any], rank: int, alpha: float
) -> None:
    adapter = folder({}, **config)
    adapter.config = {key: value for key, value in adapter.config.items() if value is not None}
    model = tiny_experts.model("mixtral")
    fitting = {"lora_A": torch.zeros(COUNT * rank, INNER),
               "lora_B": torch.zeros(WIDTH, COUNT * rank)}  # fmt: skip
    problems, target = check_parameter((EXPERTS, "down_proj"), fitting, model, adapter)
    assert problems == []
    assert target is not None
    assert (target.name, target.rank, target.alpha, target.parameter) == (
        EXPERTS, rank, alpha, "down_proj",
    )  # fmt: skip
    wrong = {**fitting, "lora_B": fitting["lora_B"][:-1]}
    problems, _ = check_parameter((EXPERTS, "down_proj"), wrong, model, adapter)
    assert [problem.what for problem in problems] == [
        f"lora_B of `{EXPERTS}.down_proj` is {(WIDTH - 1, COUNT * rank)}, the model needs "
        f"{(WIDTH, COUNT * rank)}"
    ]


def test_a_parameter_that_fits_no_update_has_no_target() -> None:
    norm = f"{TOP}.input_layernorm"
    found = check_parameter((norm, "weight"), {}, tiny_experts.model("mixtral"), folder({}))
    assert found[1] is None
    assert found[0][0].what.startswith(f"the adapter is for `{norm}.weight`, which has 1 dimension")


def test_modules_and_parameters_of_an_adapter_are_distinguished() -> None:
    tensors = {f"{name}.lora_{side}.weight": torch.ones(1, 1) for side in "AB" for name in (
        EXPERTS, f"{EXPERTS}.base_layer", f"{TOP}.self_attn.v_proj", f"{TOP}.self_attn.o_proj",
    )}  # fmt: skip
    adapter = folder(tensors, target_parameters=tiny_experts.EXPERTS)
    assert target_names(adapter, tiny_experts.model("mixtral")) == (
        [f"{TOP}.self_attn.o_proj", f"{TOP}.self_attn.v_proj"],
        [f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"],
    )
