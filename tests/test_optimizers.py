"""Tests of learning rates, parameter groups and optimizers, against torch's optimizers."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from pydantic import ValidationError
from torch import nn

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.adapters.describe_trained import rates_in_words
from lora_cli.adapters.lora import LoRALayer
from lora_cli.adapters.parameter_groups import parameter_groups
from lora_cli.errors import LoraError
from lora_cli.recipe import OptimizerSpec, Recipe
from lora_cli.training.learning_rate import set_learning_rate
from lora_cli.training.optimizers import build_optimizer

Json = dict[str, Any]


def assert_same_steps(
    model: nn.Module, ours: Any, copies: dict[str, nn.Parameter], theirs: Any
) -> None:
    """Check that two optimizers update a model and the copies of its parameters equally."""
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            copies[name].grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, copies[name], rtol=1e-6, atol=1e-7)


def groups(model: nn.Module, recipe: Recipe, in_full: list[str]) -> dict[str, tuple[float, float]]:
    """Return the learning rate and weight decay of each parameter."""
    found = parameter_groups(model, recipe, in_full)
    for group in found:
        named = dict(model.named_parameters())
        pairs = zip(group["names"], group["params"], strict=True)
        assert all(named[name] is p for name, p in pairs)
    return {name: (g["lr"], g["weight_decay"]) for g in found for name in g["names"]}


def with_optimizer(kind: str = "lora", **optimizer: Any) -> Recipe:
    recipe = tiny.recipe_of(type=kind, rank=2, target_modules=["query", "value"], bias="lora_only")
    settings = {"learning_rate": 0.1, "weight_decay": 0.5, **optimizer}
    return recipe.with_values({"train.optimizer": OptimizerSpec.model_validate(settings)})


def test_groups_of_parameters_have_their_own_settings() -> None:
    model = tiny.encoder(2)
    recipe = with_optimizer(
        lora_plus_ratio=16.0,
        groups={
            "head": {"learning_rate": 0.01},
            "adapter": {"learning_rate": 0.02, "weight_decay": 0.25},
            "layers": {"1": {"learning_rate": 0.03}},
        },
    )
    attach(model, recipe, ["classifier"])
    found = groups(model, recipe, ["classifier"])
    assert found.keys() == trainable_parameters(model).keys()
    layer = "bert.encoder.layer.{}.attention.self.query.{}"
    assert found["classifier.weight"] == (0.01, 0.5)
    assert found["classifier.bias"] == (0.01, 0.0)  # biases do not decay
    assert found[layer.format(0, "lora_A")] == (0.02, 0.25)
    assert found[layer.format(0, "lora_B")] == (pytest.approx(0.32), 0.25)
    assert found[layer.format(0, "base.bias")] == (0.1, 0.0)  # neither the head nor a matrix
    assert found[layer.format(1, "lora_A")] == (0.03, 0.5)
    assert found[layer.format(1, "lora_B")] == (pytest.approx(0.48), 0.5)


def test_the_head_group_of_full_fine_tuning_is_only_the_head() -> None:
    model = tiny.encoder(2)
    recipe = with_optimizer("full", groups={"head": {"learning_rate": 0.01}})
    attach(model, recipe, ["classifier"])
    found = groups(model, recipe, ["classifier"])
    heads = {name for name, (rate, _) in found.items() if rate == 0.01}
    assert heads == {"classifier.weight", "classifier.bias"}
    norms = [name for name in found if "LayerNorm" in name]
    assert norms
    assert all(found[name] == (0.1, 0.0) for name in norms)


def test_layer_decay_equals_torch_groups_with_explicit_rates() -> None:
    model = tiny.encoder(2, layers=3)
    recipe = with_optimizer("full", learning_rate=0.01, weight_decay=0.3, layer_decay=0.5)
    attach(model, recipe, ["classifier"])
    ours = build_optimizer(model, recipe, ["classifier"])
    copies = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    rates = {"bert.embeddings": 0.01 / 16, "bert.pooler": 0.01, "classifier": 0.01}
    rates |= {f"bert.encoder.layer.{i}": 0.01 / 2 ** (3 - i) for i in range(3)}
    theirs = torch.optim.AdamW(
        [
            {
                "params": [copies[name]],
                "lr": next(rate for top, rate in rates.items() if name.startswith(f"{top}.")),
                "weight_decay": 0.3 if copies[name].ndim > 1 else 0.0,
            }
            for name in copies
        ]
    )
    set_learning_rate(ours, 0.5)  # the schedule scales each group's own rate
    for group in theirs.param_groups:
        group["lr"] *= 0.5
    assert_same_steps(model, ours, copies, theirs)
    assert rates_in_words(ours.param_groups, model) == {
        "bert.embeddings": pytest.approx(0.01 / 16),
        "bert.encoder.layer.0": pytest.approx(0.01 / 8),
        "bert.encoder.layer.1": pytest.approx(0.01 / 4),
        "bert.encoder.layer.2": pytest.approx(0.01 / 2),
        "bert.pooler, classifier": pytest.approx(0.01),
    }


def test_adapters_decay_by_layer_and_explicit_rates_do_not() -> None:
    model = tiny.encoder(2)
    recipe = with_optimizer(
        layer_decay=0.5,
        lora_plus_ratio=4.0,
        groups={
            "head": {"learning_rate": 0.01},
            "adapter": {"learning_rate": 0.2},
            "layers": {"1": {"weight_decay": 0.25}},
            "modules": {
                "layer.0.attention.self.value": {"learning_rate": 0.03},
                "value": {"learning_rate": 7.0, "weight_decay": 0.75},
            },
        },
    )
    attach(model, recipe, ["classifier"])
    found = groups(model, recipe, ["classifier"])
    layer = "bert.encoder.layer.{}.attention.self.{}"
    assert found["classifier.weight"] == (0.01, 0.5)
    assert found[layer.format(0, "query.lora_A")] == (pytest.approx(0.05), 0.5)
    assert found[layer.format(0, "query.lora_B")] == (pytest.approx(0.2), 0.5)
    # the group of the layer comes before the group of adapters, and sets no rate
    assert found[layer.format(1, "query.lora_A")] == (pytest.approx(0.05), 0.25)
    assert found[layer.format(0, "value.lora_A")] == (0.03, 0.5)  # the first matching name
    assert found[layer.format(1, "value.lora_A")] == (7.0, 0.75)
    assert found[layer.format(1, "value.lora_B")] == (28.0, 0.75)


@pytest.mark.parametrize(
    ("settings", "kind", "what", "hint"),
    [
        (
            {"groups": {"modules": {"valeu": {"learning_rate": 1.0}}}},
            "lora",
            "`valeu` matches no module of the model",
            "did you mean `value`",
        ),
        (
            {"groups": {"modules": {"pooler": {"learning_rate": 1.0}}}},
            "lora",
            "nothing is trained in `pooler`",
            "trained are",
        ),
        ({"layer_decay": 0.9}, "none", "nothing is trained in a numbered layer", "leave"),
    ],
)
def test_a_rate_for_frozen_parameters_is_an_error(
    settings: Json, kind: str, what: str, hint: str
) -> None:
    model = tiny.encoder(2)
    recipe = with_optimizer(kind, **settings)
    attach(model, recipe, ["classifier"])
    with pytest.raises(LoraError) as caught:
        build_optimizer(model, recipe, ["classifier"])
    assert what in caught.value.problems[0].what
    assert hint in (caught.value.problems[0].hint or "")


@pytest.mark.parametrize(
    ("ranges", "which"),
    [
        (["0-5", "3-8"], "`0-5` and `3-8`"), (["7", "0-9"], "`0-9` and `7`"),
        (["4", "4-4"], "`4` and `4-4`"), (["0-2", "3", "4-10"], ""),
    ],
)  # fmt: skip
def test_ranges_of_layers_must_not_overlap(ranges: list[str], which: str) -> None:
    layers = {name: {"learning_rate": 0.1} for name in ranges}
    if not which:
        with_optimizer(groups={"layers": layers})
        return
    with pytest.raises(ValidationError, match=f"the ranges of layers {which} overlap"):
        with_optimizer(groups={"layers": layers})


def test_a_group_of_frozen_layers_is_rejected() -> None:
    model = tiny.encoder(2)
    recipe = with_optimizer(groups={"layers": {"2-5": {"learning_rate": 0.03}}})
    attach(model, recipe, ["classifier"])
    with pytest.raises(LoraError, match="nothing is trained in layers 2-5"):
        build_optimizer(model, recipe, ["classifier"])


def test_a_ratio_for_an_adapter_without_b_is_rejected() -> None:
    model = tiny.encoder(2)
    attach(model, with_optimizer(), ["classifier"])
    parameter_groups(model, with_optimizer(lora_plus_ratio=4.0), ["classifier"])
    parameter_groups(tiny.encoder(2), with_optimizer("none", lora_plus_ratio=4.0))  # a baseline
    for module in model.modules():  # as in an adapter from `adapter.from`
        if isinstance(module, LoRALayer):
            del module.lora_B
    with pytest.raises(LoraError, match="nothing that is trained has a `lora_B`"):
        parameter_groups(model, with_optimizer(lora_plus_ratio=4.0), ["classifier"])
    parameter_groups(model, with_optimizer(), ["classifier"])


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_ratio_for_adapters_with_other_factors_is_rejected(kind: str) -> None:
    values = {
        "model": {"name": "m"},
        "task": {"type": "sequence_classification"},
        "data": {"path": "data.csv"},
        "adapter": {"type": kind},
        "train": {"optimizer": {"lora_plus_ratio": 4.0}},
    }
    with pytest.raises(ValueError, match=f"`adapter.type: {kind}` has no `lora_B`"):
        Recipe.model_validate(values)
    Recipe.model_validate({**values, "adapter": {"type": "dora"}})


def test_adamw_is_only_fused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda _, **options: given.append(options["fused"]))
    model = tiny.encoder(2)
    build_optimizer(model, with_optimizer("full"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    build_optimizer(model, with_optimizer("full"))
    assert given == [None, True]


SETTINGS = [
    (
        {"type": "adamw", "betas": [0.8, 0.95], "eps": 1e-5},
        lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-5),
    ),
    ({"type": "sgd", "momentum": 0.7}, lambda groups: torch.optim.SGD(groups, momentum=0.7)),
    ({"type": "adafactor"}, torch.optim.Adafactor),
]


@pytest.mark.parametrize(("optimizer", "plain"), SETTINGS)
def test_steps_equal_those_of_torch_s_optimizer(optimizer: Json, plain: Any) -> None:
    model = tiny.encoder(2)
    recipe = with_optimizer("full", learning_rate=0.01, weight_decay=0.3, **optimizer)
    attach(model, recipe, ["classifier"])
    ours = build_optimizer(model, recipe, ["classifier"])
    copies = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    matrices = [p for p in copies.values() if p.ndim > 1]
    others = [p for p in copies.values() if p.ndim < 2]
    theirs = plain(
        [
            {"params": matrices, "lr": 0.01, "weight_decay": 0.3},
            {"params": others, "lr": 0.01, "weight_decay": 0.0},
        ]
    )
    assert_same_steps(model, ours, copies, theirs)


def test_bitsandbytes_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    optim = SimpleNamespace(AdamW8bit=lambda groups, **options: given.extend((groups, options)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    model = tiny.encoder(2)
    recipe = with_optimizer("full", type="adamw_8bit", betas=[0.8, 0.95], eps=1e-5)
    attach(model, recipe, ["classifier"])
    build_optimizer(model, recipe, ["classifier"])
    groups, options = given
    assert sum(len(group["params"]) for group in groups) == len(trainable_parameters(model))
    assert options == {"betas": (0.8, 0.95), "eps": 1e-5}
