"""Which layers are adapted if a recipe names none."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.default_targets import (
    default_convolutions,
    default_targets,
    output_embedding_name,
)


def tree(**layers: nn.Module) -> nn.Module:
    """Return a model with these layers; `__` in a name stands for a dot."""
    model = nn.Module()
    for name, layer in layers.items():
        *above, last = name.split("__")
        place: Any = model
        for part in above:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, layer)
    return model


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Embedding
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def linear() -> nn.Linear:
    return nn.Linear(2, 2)


ENCODER = {"a__query": linear(), "a__key": linear(), "a__value": linear(), "b__query": linear()}


def test_attention_means_query_and_value_projections() -> None:
    model = tree(**ENCODER, embed=nn.Embedding(2, 2), stem=nn.Conv2d(1, 1, 1))
    found = default_targets(model, "attention", adaptable(model))
    assert found == (["query", "value"], ["a.query", "a.value", "b.query"])
    # GPT-2's layers are of another class; those of other names are all adapted
    model = tree(h__c_attn=Conv1D(6, 2), h__c_proj=Conv1D(2, 2), v=nn.Embedding(2, 2))
    found = default_targets(model, "attention", adaptable(model))
    assert found == (["c_attn"], ["h.c_attn"])
    model = tree(h__mixer=linear(), h__out=linear(), query=nn.Embedding(2, 2))
    found = default_targets(model, "attention", adaptable(model))
    assert found == ("all-linear", ["h.mixer", "h.out"])


def test_in_a_language_model_all_linear_layers_but_the_last_are_adapted_as_in_peft() -> None:
    model = tiny.llama()
    found, names = default_targets(model, "attention", adaptable(model))
    assert found == "all-linear"
    assert output_embedding_name(model) == "lm_head"
    theirs = get_peft_model(
        tiny.llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    prefix = "base_model.model."
    expected = {
        name.removeprefix(prefix).rpartition(".lora_A.default")[0]
        for name, _ in theirs.named_modules()
        if name.endswith("lora_A.default")
    }
    assert set(names) == expected
    assert len(names) == len(expected)


def test_names_without_linear_layers_are_ignored() -> None:
    model = tree(**ENCODER, to_out=nn.Conv2d(1, 1, 1))
    found = default_targets(model, ("value", "to_out", "to_q"), adaptable(model))
    assert found == (["value"], ["a.value"])
    found = default_targets(model, ("to_q",), adaptable(model))
    assert found == ("all-linear", ["a.query", "a.key", "a.value", "b.query"])


def test_layers_means_linear_layers_or_otherwise_convolutions() -> None:
    model = tree(stem=nn.Conv2d(3, 4, 3), head=linear())
    assert default_targets(model, "layers", adaptable(model)) == ("all-linear", ["head"])
    model = tree(stem=nn.Conv2d(3, 4, 3), next=nn.Conv1d(4, 4, 1), embed=nn.Embedding(2, 2))
    assert default_targets(model, "layers", adaptable(model)) == (["stem", "next"],) * 2
    model = tree(embed=nn.Embedding(2, 2))
    assert default_targets(model, "layers", adaptable(model)) == ("all-linear", [])


def test_among_grouped_convolutions_those_that_mix_channels_are_adapted() -> None:
    layers = {
        "stem": nn.Conv2d(3, 4, 3), "a__expand": nn.Conv2d(4, 8, 1),
        "a__depthwise": nn.Conv2d(8, 8, 3, groups=8), "a__se__reduce": nn.Conv2d(8, 2, 1),
        "a__squeeze_excite__fc": nn.Conv2d(8, 2, 1), "a__chase": nn.Conv1d(8, 4, 1),
        "b__uneven": nn.Conv2d(4, 4, (1, 3)), "b__head": linear(),
    }  # fmt: skip
    assert default_convolutions(adaptable(tree(**layers))) == ["a.expand", "a.chase"]
    del layers["a__depthwise"]
    expected = [name.replace("__", ".") for name in layers if name != "b__head"]
    assert default_convolutions(adaptable(tree(**layers))) == expected


@pytest.mark.parametrize("found", [None, "missing"])
def test_a_model_may_have_no_layer_that_maps_to_a_vocabulary(found: str | None) -> None:
    model: Any = tree(**ENCODER)
    assert output_embedding_name(model) is None
    model.get_output_embeddings = lambda: found and linear()
    assert output_embedding_name(model) is None
    model.get_output_embeddings = lambda: model.b.query
    assert output_embedding_name(model) == "b.query"
    names = ["a.query", "a.key", "a.value"]
    assert default_targets(model, "attention", adaptable(model)) == ("all-linear", names)
