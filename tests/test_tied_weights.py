"""Tied weights: finding them, and untying them when one of them is trained."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from lora_cli.adapters.attach import attach
from lora_cli.adapters.tied_weights import (
    tied_groups,
    untie,
    untie_differing,
    untie_trained,
)
from lora_cli.errors import LoraError

TIE = ["model.embed_tokens.weight", "lm_head.weight"]


def shared(model: nn.Module, names: list[str]) -> bool:
    """Return whether all of these names are of one parameter."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return len({id(parameters[name]) for name in names}) == 1


class Twice(nn.Module):
    """A module that stands in two places, next to one that stands in one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"inner": nn.Linear(2, 2)})
        self.second = self.first["inner"]
        self.other = nn.Linear(2, 2)


def test_only_parameters_with_several_names_are_tied() -> None:
    assert tied_groups(tiny.llama(tied=True)) == [TIE]
    assert tied_groups(tiny.llama(tied=False)) == []
    places = ["first.inner", "second"]
    assert tied_groups(Twice()) == [
        [f"{place}.{last}" for place in places] for last in ("weight", "bias")
    ]


def test_a_named_parameter_becomes_an_equal_separate_one() -> None:
    model = tiny.llama(tied=True)
    module, before = model.lm_head, model.lm_head.weight
    before.requires_grad_(False)
    untie(model, ["lm_head.weight"])
    assert model.lm_head is module  # it stands in one place, so it needs no copy
    assert model.model.embed_tokens.weight is before
    assert model.lm_head.weight is not before
    assert torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight.data_ptr() != before.data_ptr()
    assert not model.lm_head.weight.requires_grad


@pytest.mark.parametrize("name", ["first.inner.weight", "second.weight"])
def test_a_module_with_two_names_is_copied_for_the_named_one(name: str) -> None:
    model = Twice()
    inner, second, other = model.first["inner"], model.second, model.other
    untie(model, [name])
    assert model.other is other
    assert (model.first["inner"] is inner) == (name != "first.inner.weight")
    assert (model.second is second) == (name != "second.weight")
    assert torch.equal(model.first["inner"].weight, model.second.weight)
    assert not shared(model, ["first.inner.weight", "second.weight"])


def test_ties_that_ended_are_untied_fully_and_others_stay() -> None:
    model = Twice()
    weights, biases = tied_groups(model)
    model.second = nn.Linear(2, 2)
    model.second.bias = model.first["inner"].bias
    assert untie_differing(model, [weights, biases]) == weights
    assert shared(model, biases)
    assert not shared(model, weights)


def recipe(**adapter: Any) -> Any:
    return tiny.recipe_of("causal_lm", rank=2, target_modules=["q_proj"], **adapter)


@pytest.mark.parametrize(
    ("in_full", "named", "other"),
    [
        (["lm_head"], "lm_head", "model.embed_tokens"),
        (["model.embed_tokens"], "model.embed_tokens", "lm_head"),
        (["model"], "model.embed_tokens", "lm_head"),  # a module that holds it
    ],
)
def test_training_one_of_two_tied_weights_is_rejected_with_both_names(
    in_full: list[str], named: str, other: str
) -> None:
    model = tiny.llama(tied=True)
    with pytest.raises(LoraError, match=f"`{named}` shares its weight with `{other}`"):
        untie_trained(model, in_full, recipe())
    assert shared(model, TIE)


@pytest.mark.parametrize("in_full", [[], ["lm_head", "model.embed_tokens"], ["model.norm"]])
@pytest.mark.parametrize("kept", [True, False])
def test_ties_trained_fully_or_not_at_all_stay_unless_weights_may_differ(
    in_full: list[str], kept: bool
) -> None:
    model = tiny.llama(tied=True)
    untie_trained(model, in_full, recipe(ensure_weight_tying=kept))
    assert shared(model, TIE) == (kept or "lm_head" not in in_full)


def test_one_tied_weight_is_trained_as_a_copy_if_the_recipe_allows_it() -> None:
    model = tiny.llama(tied=True)
    before = model.lm_head.weight.detach().clone()
    attach(model, recipe(train_modules=["lm_head"], ensure_weight_tying=False))
    assert not shared(model, TIE)
    assert torch.equal(model.lm_head.weight, before)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert model.lm_head.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad
