"""Which single parameters get an adapter, and which experts stay frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_experts
import torch
from torch import nn

from lora_cli.adapters.attach import attach
from lora_cli.adapters.lora_parameter import LoRAParameter, uses_torch_products
from lora_cli.adapters.low_rank_sum import LowRankSum
from lora_cli.adapters.parameter_targets import (
    frozen_experts_note,
    places_of,
    resolve_parameters,
    short_names,
)
from lora_cli.errors import Problem


class Experts(nn.Module):
    """Experts as a mixture stores them: a three-dimensional tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))
        self.table = nn.Parameter(torch.zeros(3, 5, 4, dtype=torch.int8), requires_grad=False)

    def forward(self) -> Any:
        return self.up


class Model(nn.Module):
    """Two layers, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(2, 2))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(4, 4), "experts": Experts()}) for _ in range(2)
        )
        self.head = nn.Linear(4, 2)


def recipe(**adapter: Any) -> Any:
    return tiny.recipe_of("causal_lm", **{"target_modules": [], **adapter})


def test_entries_are_names_or_ends_of_names_at_a_dot() -> None:
    model = Model()
    both = [(f"layers.{i}.experts", "up") for i in range(2)]
    assert places_of(model, ["up"]) == both  # the model's own parameter belongs to no module
    assert places_of(model, ["layers.1.experts.up"]) == both[1:]
    assert places_of(model, ["experts.up", "head.weight"]) == [*both, ("head", "weight")]
    assert places_of(model, ["perts.up", "p", ""]) == []
    assert places_of(model, []) == []


def test_in_an_adapted_model_each_parameter_is_found_once() -> None:
    model = Model()
    attach(model, recipe(rank=2, target_modules=["proj"], target_parameters=["experts.up"]))
    places = [(f"layers.{i}.experts", "up") for i in range(2)]
    assert places_of(model, ["up"]) == places
    assert places_of(model, ["proj.weight"]) == [(f"layers.{i}.proj", "weight") for i in range(2)]
    assert places_of(model, ["lora_A"]) == []


def problems(
    entries: list[str],
    adapted: tuple[str, ...] = (),
    in_full: Callable[[str], bool] = lambda _: False,
) -> list[Problem]:
    return resolve_parameters(Model(), recipe(target_parameters=entries), adapted, in_full)[1]


def test_entries_that_fit_are_resolved_in_the_model_s_order() -> None:
    asked = recipe(target_parameters=["head.weight", "layers.1.experts.up"])
    places, found = resolve_parameters(Model(), asked, ["layers.0.experts"], lambda _: False)
    assert places == [("layers.1.experts", "up"), ("head", "weight")]
    assert found == []


@pytest.mark.parametrize(
    ("entries", "said", "hint"),
    [
        (["experts.upp"], "`experts.upp` matches no parameter", "did you mean `experts.up`?"),
        (["head.bias"], "`head.bias` matches head.bias, which has 1 dimension, and only parameters "
         "of 2 or 3 can be adapted", "the model's experts are experts.up"),
        (["experts.table"], "`experts.table` matches layers.0.experts.table, which does not hold "
         "floating-point numbers", "the model's experts are experts.up"),
        (["experts.up", "head.weight", "experts.up"], "`experts.up` is written twice",
         "write it once"),
    ],
)  # fmt: skip
def test_an_entry_that_fits_nothing_is_reported(entries: list[str], said: str, hint: str) -> None:
    (problem,) = problems(entries)
    assert problem.what == said
    assert hint in str(problem.hint)
    assert problem.at.startswith("adapter.target_parameters")


def test_modules_that_are_adapted_or_trained_in_full_are_not_adapted_again() -> None:
    (problem,) = problems(["head.weight"], ("head",))
    assert "belongs to a module that `target_modules` adapts" in problem.what
    assert "`target_modules: []`" in str(problem.hint)
    (problem,) = problems(["head.weight"], (), lambda name: name == "head")
    assert problem.what.endswith("which is trained in full")
    (problem,) = problems(["head.weight"], ("head",), lambda _: True)  # the first reason counts
    assert "`target_modules` adapts" in problem.what
    (problem,) = problems(["head.bias"], ("head",), lambda _: True)
    assert "has 1 dimension" in problem.what


def test_without_experts_matrices_are_suggested() -> None:
    model = tiny.llama()
    asked = recipe(target_parameters=["self_attn.q_proj.wight"])
    _, (problem,) = resolve_parameters(model, asked, [], lambda _: False)
    assert "did you mean `self_attn.q_proj.weight`?" in str(problem.hint)
    asked = recipe(target_parameters=["zzz"])
    _, (problem,) = resolve_parameters(model, asked, [], lambda _: False)
    assert "the model has no experts stored as one tensor; it has" in str(problem.hint)
    assert "layernorm" not in str(problem.hint)  # vectors cannot be adapted
    model.kernel = nn.Conv1d(3, 3, 2)  # three dimensions
    asked = recipe(target_parameters=["kernl.weight"])
    _, (problem,) = resolve_parameters(model, asked, [], lambda _: False)
    assert "did you mean `kernel.weight`?" in str(problem.hint)
    model.patch = nn.Conv2d(3, 3, 2)  # four
    asked = recipe(target_parameters=["pach.weight"])
    _, (problem,) = resolve_parameters(model, asked, [], lambda _: False)
    assert "`patch.weight`" not in str(problem.hint)


def test_names_are_shortened_to_the_parts_after_the_last_number() -> None:
    names = ["model.layers.0.mlp.up", "model.layers.11.mlp.up", "a.0.b.1.c", "head.weight", "x"]
    assert short_names(names) == ["mlp.up", "c", "head.weight", "x"]


# ------------------------------------------------------------------------------ what stays frozen


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def test_the_note_says_how_much_stays_frozen() -> None:
    base = frozen(tiny_experts.model("qwen3_moe"))
    total = sum(p.numel() for p in base.parameters())
    experts = sum(p.numel() for n, p in base.named_parameters() if ".mlp.experts." in n)
    assert frozen_experts_note(base, tiny.recipe_of("causal_lm")) == (
        f"`all-linear` leaves the experts frozen, {experts / total:.0%} of the parameters: they "
        "are no linear layers; to adapt them too: `--set 'adapter.target_parameters="
        "[mlp.experts.gate_up_proj, mlp.experts.down_proj]'`"
    )
    note = frozen_experts_note(base, tiny.recipe_of("causal_lm", dropout=0.1))
    assert "`--set adapter.dropout=0 --set 'adapter.target" in str(note)
    note = frozen_experts_note(base, tiny.recipe_of("causal_lm", init="olora"))
    assert "`--set adapter.init=default --set 'adapter.target" in str(note)


@pytest.mark.parametrize(
    ("adapter", "notes"),
    [
        ({}, True),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": ["q_proj"]}, False),
        ({"type": "dora"}, False),  # it cannot adapt them
        ({"type": "full"}, False),
        ({"target_parameters": ["down_proj"]}, False),
        ({"target_parameters": ["down_proj"], "target_modules": "all-linear"}, False),
    ],
)
def test_the_note_is_only_for_recipes_that_adapt_all_linear_layers(
    adapter: dict[str, Any], notes: bool
) -> None:
    base = frozen(tiny_experts.model("mixtral"))
    assert (frozen_experts_note(base, tiny.recipe_of("causal_lm", **adapter)) is not None) == notes


def test_trained_experts_are_not_called_frozen() -> None:
    base = frozen(tiny_experts.model("mixtral"))
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".mlp.experts." in name)
    assert frozen_experts_note(base, tiny.recipe_of("causal_lm")) is None
    base.get_parameter("model.layers.1.mlp.experts.down_proj").requires_grad_(False)
    note = str(frozen_experts_note(base, tiny.recipe_of("causal_lm")))
    assert "[mlp.experts.down_proj]" in note
    assert frozen_experts_note(frozen(tiny.llama()), tiny.recipe_of("causal_lm")) is None


def test_without_an_output_layer_the_default_is_not_all_linear_layers() -> None:
    base = frozen(Model())
    assert frozen_experts_note(base, tiny.recipe_of("causal_lm")) is None
    all_linear = tiny.recipe_of("causal_lm", target_modules="all-linear")
    assert frozen_experts_note(base, all_linear) is not None


# ------------------------------------------------------------------------------ how it is computed


@pytest.mark.parametrize(
    ("how", "by_torch"),
    [(None, True), ("eager", True), ("batched_mm", True), ("grouped_mm", True), ("sonic", False)],
)
def test_experts_with_custom_kernels_get_a_plain_tensor(how: str | None, by_torch: bool) -> None:
    base = Experts()
    base.config = type("Config", (), {"_experts_implementation": how})()  # type: ignore[assignment]
    assert uses_torch_products(base) == by_torch
    assert uses_torch_products(Experts())
    model = nn.ModuleDict({"experts": base})
    attach(model, recipe(rank=2, target_parameters=["experts.up"]))
    layer = model["experts"]
    assert isinstance(layer, LoRAParameter)
    with torch.no_grad():
        layer.lora_B.normal_()
    seen = layer()
    assert isinstance(seen, LowRankSum) == by_torch
    whole = seen.total if isinstance(seen, LowRankSum) else seen
    expected = base.up + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(layer.delta_weight(), (expected - base.up).detach())
    layer.enabled = False
    assert layer() is base.up
    assert layer.weight is base.up
    assert layer.bias is None
    assert layer.table is base.table
