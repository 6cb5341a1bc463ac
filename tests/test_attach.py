"""Which modules are adapted, which parameters are trained, merging of tied weights, and counts."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from closeness import assert_close
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from lora_cli.adapters.attach import (
    _token_embeddings,
    adapter_parameters,
    add_layer,
    attach,
    disabled,
    lora_layers,
    name_in_base,
    remove_layers,
    trainable_parameters,
    training_mode,
)
from lora_cli.adapters.count_parameters import ParameterRow, group_rows, parameter_table
from lora_cli.adapters.match_names import first_match, matches, parse_layers
from lora_cli.adapters.merge_layers import merge, merge_and_untie
from lora_cli.adapters.targets import Target, resolve_targets
from lora_cli.adapters.token_rows import token_layers
from lora_cli.errors import LoraError, Problem
from lora_cli.models.bundle import Bundle
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.patterns import regex_error
from lora_cli.recipe import load_recipe

ATTENTION = "bert.encoder.layer.{}.attention.self.{}"


def names_of(model: nn.Module, head: list[str] | None = None, **adapter: Any) -> list[str]:
    return [t.name for t in resolve_targets(model, tiny.recipe_of(**adapter), head or [])]


def problems_of(model: nn.Module, head: list[str] | None = None, **adapter: Any) -> list[Problem]:
    """Return the problems, after checking that `attach` leaves the model unchanged."""
    before = copy.deepcopy(model)
    with pytest.raises(LoraError) as caught:
        attach(model, tiny.recipe_of(**adapter), head or [])
    assert_untouched(model, before)
    return caught.value.problems


def assert_untouched(model: nn.Module, before: nn.Module) -> None:
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in before.named_modules()
    }
    ours, theirs = dict(model.named_parameters()), dict(before.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        assert parameter.dtype == theirs[name].dtype, name
        assert parameter.requires_grad == theirs[name].requires_grad, name


def expand(*patterns: str, layers: int = 2) -> set[str]:
    return {pattern.replace("*", str(i)) for pattern in patterns for i in range(layers)}


# ------------------------------------------------------------------------------ what is adapted


def test_a_suffix_matches_whole_parts_of_a_name() -> None:
    model = tiny.encoder()
    assert set(names_of(model, target_modules=["query"])) == expand(
        "bert.encoder.layer.*.attention.self.query"
    )
    assert {n.rpartition(".")[2] for n in names_of(model, target_modules=["dense"])} == {"dense"}
    assert "uery" in problems_of(model, target_modules=["uery"])[0].what  # not part of a word


def test_a_dotted_suffix_narrows() -> None:
    model = tiny.encoder()
    both = expand(
        "bert.encoder.layer.*.attention.output.dense", "bert.encoder.layer.*.output.dense"
    )
    assert set(names_of(model, target_modules=["output.dense"])) == both
    narrow = names_of(model, target_modules=["attention.output.dense"])
    assert set(narrow) == expand("bert.encoder.layer.*.attention.output.dense")
    assert names_of(model, target_modules=["bert.pooler.dense"]) == ["bert.pooler.dense"]


def test_a_regular_expression_matches_the_whole_name() -> None:
    model = tiny.encoder()
    found = names_of(model, target_modules=r".*layer\.1\..*(query|key)")
    assert found == [ATTENTION.format(1, "query"), ATTENTION.format(1, "key")]
    problem = problems_of(model, target_modules=r"layer\.1\..*query")[0]
    assert "has to match the whole name" in problem.hint


def test_all_linear_leaves_out_the_output_layer_and_the_head() -> None:
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for tied in (True, False):
        found = names_of(tiny.llama(tied), target_modules="all-linear")
        assert len(found) == 14
        assert {name.rpartition(".")[2] for name in found} == linear
    assert set(names_of(tiny.gpt2(), target_modules="all-linear")) == expand(
        "transformer.h.*.attn.c_attn", "transformer.h.*.attn.c_proj",
        "transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj",
    )  # fmt: skip
    model = tiny.encoder(kind="roberta")
    every = names_of(model, target_modules="all-linear")
    assert {"classifier.dense", "classifier.out_proj"} < set(every)
    assert set(names_of(model, ["classifier"], target_modules="all-linear")) == {
        name for name in every if not name.startswith("classifier")
    }


def test_nothing_that_is_trained_in_full_is_adapted() -> None:
    found = names_of(
        tiny.encoder(kind="roberta"),
        ["classifier"],
        target_modules=["dense"],
        train_modules=["layer.1"],
    )
    assert set(found) == {
        "roberta.encoder.layer.0.attention.output.dense",
        "roberta.encoder.layer.0.intermediate.dense",
        "roberta.encoder.layer.0.output.dense",
    }


def test_defaults_are_query_and_value_for_encoders_and_all_linear_for_language_models() -> None:
    assert set(names_of(tiny.encoder(kind="roberta"), ["classifier"])) == expand(
        "roberta.encoder.layer.*.attention.self.query",
        "roberta.encoder.layer.*.attention.self.value",
    )
    for model in (tiny.llama(), tiny.gpt2()):
        assert names_of(model) == names_of(model, target_modules="all-linear")
    # unknown names: all of them except the head
    assert names_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), ["2"]) == ["0"]


def test_exclude_modules_subtracts() -> None:
    model = tiny.encoder()
    targets = ["query", "value", "dense"]
    found = names_of(model, target_modules=targets, exclude_modules=["dense", "self.value"])
    assert found == [ATTENTION.format(i, "query") for i in range(2)]
    found = names_of(model, target_modules="all-linear", exclude_modules=r".*layer\.\d\..*")
    assert found == ["bert.pooler.dense", "classifier"]


def test_layers_limit() -> None:
    model = tiny.encoder()
    for layers in ([1], "1-1"):
        assert names_of(model, target_modules=["query"], layers=layers) == [
            ATTENTION.format(1, "query")
        ]
    for layers in ([0, 1], "0-1"):
        assert len(names_of(model, target_modules=["query", "pooler.dense"], layers=layers)) == 2
    assert list(parse_layers("3-5")) == [3, 4, 5]
    assert list(parse_layers("7")) == [7]
    problem = problems_of(model, target_modules=["query"], layers="1-3")
    assert [p.what for p in problem] == ["there are no layers 2 to 3"]
    assert problem[0].hint == "the model has layers 0 to 1"


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("0-99999999999", "there are no layers 2 to 99999999999"),
        ("5-" + "9" * 5000, "there are no layers 5 to " + "9" * 15),
        ("99999999999-99999999999", "there is no layer 99999999999"),
        ("1-0", "`1-0` names no layer"),
        ([1, 2, 9], "there are no layers 2, 9"),
    ],
)
def test_missing_layers_are_reported_together(layers: Any, said: str) -> None:
    problems = problems_of(tiny.encoder(), target_modules=["query"], layers=layers)
    assert problems[0].what == said


def test_patterns_refine_rank_and_alpha_and_the_first_match_wins() -> None:
    recipe = tiny.recipe_of(
        rank=4,
        alpha=6.0,
        target_modules=["query", "key", "value"],
        rank_pattern={r"layer\.1\..*key": 3, "key": 2, "self.query": 5},
        alpha_pattern={"key": 1.5},
    )
    found = {t.name: (t.rank, t.alpha) for t in resolve_targets(tiny.encoder(), recipe)}
    assert found == {
        ATTENTION.format(0, "query"): (5, 6.0),
        ATTENTION.format(1, "query"): (5, 6.0),
        ATTENTION.format(0, "key"): (2, 1.5),
        ATTENTION.format(1, "key"): (3, 1.5),
        ATTENTION.format(0, "value"): (4, 6.0),
        ATTENTION.format(1, "value"): (4, 6.0),
    }


def test_the_layers_that_are_attached_have_the_recipe_s_settings() -> None:
    model = tiny.ConvNet()
    attach(
        model,
        tiny.recipe_of(
            rank=4,
            dropout=0.25,
            use_rslora=True,
            target_modules=["stem", "classifier"],
            rank_pattern={"stem": 2},
            alpha_pattern={"stem": 8.0},
        ),
    )
    layers = lora_layers(model)
    assert list(layers) == ["stem", "classifier"]
    assert (layers["stem"].rank, layers["stem"].alpha) == (2, 8.0)
    assert layers["stem"].scaling == pytest.approx(8 / 2**0.5)
    assert layers["classifier"].scaling == 3.0
    assert {layer.dropout.p for layer in layers.values()} == {0.25}


# --------------------------------------------------------------------------- what matches nothing


def test_every_entry_that_matches_nothing_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tiny.recipe(
        "base",
        tmp_path,
        adapter={
            "target_modules": ["query", "qurey", "attention.self"],
            "exclude_modules": ["valeu"],
            "layers": [0, 7],
            "rank_pattern": {"quary": 2},
            "alpha_pattern": {"key": 2},
            "train_modules": ["poler"],
        },
    )
    lines = path.read_text().splitlines()

    def at(key: str) -> str:
        name = key.rpartition(".")[2]
        number = next(i for i, line in enumerate(lines, 1) if line.strip().startswith(f"{name}:"))
        return f"{key} ({path}:{number})"

    model = tiny.encoder()
    before = copy.deepcopy(model)
    with pytest.raises(LoraError) as caught:
        attach(model, load_recipe(path))
    assert_untouched(model, before)
    found = [(p.what, p.at, p.hint.split(",")[0]) for p in caught.value.problems]
    assert found == [
        (
            "`qurey` matches no module of the model",
            at("adapter.target_modules"),
            "did you mean `query`? (the model has word_embeddings",
        ),
        (
            "`attention.self` matches bert.encoder.layer.0.attention.self (BertSelfAttention), "
            "which no adapter fits",
            at("adapter.target_modules"),
            "inside it are query",
        ),
        (
            "`valeu` matches no module of the model",
            at("adapter.exclude_modules"),
            "did you mean `value`? (the model has word_embeddings",
        ),
        (
            "there is no layer 7",
            at("adapter.layers"),
            "the model has layers 0 to 1",
        ),
        (
            "`quary` matches no adapted module",
            at("adapter.rank_pattern.quary"),
            "did you mean `query`? (adapted are query)",
        ),
        (
            "`key` matches no adapted module",
            at("adapter.alpha_pattern.key"),
            "adapted are query",
        ),
        (
            "`poler` matches no module of the model",
            at("adapter.train_modules"),
            "did you mean `pooler`? (the model has bert",
        ),
    ]
    assert caught.value.problems[1].hint == "inside it are query, key, value"


def test_for_a_module_with_nothing_to_adapt_inside_other_names_are_suggested() -> None:
    problem = problems_of(tiny.encoder(), target_modules=["LayerNorm"])[0]
    assert problem.what.endswith("LayerNorm (LayerNorm), which no adapter fits")
    assert str(problem.hint).startswith("adapters fit word_embeddings, ")


def test_a_target_that_is_trained_in_full_is_reported_as_such() -> None:
    problem = problems_of(tiny.encoder(), ["classifier"], target_modules=["classifier"])[0]
    assert "`classifier` matches classifier, which is trained in full" in problem.what


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_broken_regular_expression_is_explained(key: str) -> None:
    problems = problems_of(tiny.encoder(), **{"target_modules": ["query"], key: "que(ry"})
    assert len(problems) == 1
    assert "`que(ry` is not a regular expression: missing )" in problems[0].what
    assert problems[0].at == f"adapter.{key}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("(?:(?:(?:a{1000}){1000,}){,1000})", "its counts multiply to more than 10,000"),
        ("a{%s}" % ("9" * 5000), "Exceeds the limit"),
        ("|".join(["a" * 50] * 20_000), "longer than 10,000 characters"),
        ("(?:" * 3000, "recursion"),
        ("(?au)a", "incompatible"),
    ],
    ids=["copies", "a number", "length", "depth", "flags"],
)
def test_an_expression_that_would_take_all_memory_is_not_tried(pattern: str, error: str) -> None:
    assert error in str(regex_error(pattern))
    assert not matches(pattern, "encoder.query")
    assert first_match({pattern: 1}, "encoder.query", 0) == 0


def test_common_expressions_are_accepted() -> None:
    name = "model.layers.17.self_attn.q_proj"
    for pattern in (
        r"(?!.*visual).*\.(q|v)_proj",
        r".*layers\.(\d|1\d{1,2})\..*q_proj",
        r"(?:model\.)?layers\.(?:16|17)\.(?:self_attn|mlp)\.(?:q_proj|k_proj)|model.*q_proj",
    ):
        assert matches(pattern, name)
    assert first_match({"(?x) q_proj  # a remark": 1}, name, 0) == 0


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_broken_pattern_is_explained(key: str) -> None:
    problems = problems_of(tiny.encoder(), target_modules=["query"], **{key: {"que(ry": 2}})
    assert len(problems) == 1
    assert "`que(ry` is not a regular expression: missing )" in problems[0].what


def test_all_linear_cannot_be_excluded() -> None:
    """It would silently match nothing."""
    problems = problems_of(tiny.encoder(), target_modules=["query"], exclude_modules="all-linear")
    assert "`all-linear` matches no module" in problems[0].what


@pytest.mark.parametrize("kind", ["lora", "none", "bitfit"])
def test_a_train_module_that_matches_nothing_is_reported_by_every_type(kind: str) -> None:
    problems = problems_of(
        tiny.encoder(), type=kind, target_modules=["query"], train_modules=["poler"]
    )
    assert [p.what for p in problems] == ["`poler` matches no module of the model"]


def test_a_weight_that_is_used_without_its_module_gets_no_adapter() -> None:
    """An adapter on `out_proj` has no effect: nn.MultiheadAttention reads the weight itself."""
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert names_of(model, target_modules="all-linear") == ["1"]
    problem = problems_of(model, target_modules=["out_proj"])[0]
    assert "(NonDynamicallyQuantizableLinear), which no adapter fits" in problem.what


def test_nothing_left_to_adapt_is_an_error() -> None:
    what = "no module is left to adapt"
    model = tiny.encoder()
    for adapter in (
        {"target_modules": ["query"], "exclude_modules": ["self.query"]},
        {"target_modules": ["pooler.dense"], "layers": "0-1"},
        {"target_modules": ["query"], "layers": "0-0", "exclude_modules": ["query"]},
    ):
        assert [p.what for p in problems_of(model, **adapter)] == [what]
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv1d(4, 4, 1))
    (problem,) = problems_of(convolutions, target_modules="all-linear")
    assert problem.what == what
    assert "no linear layers" in str(problem.hint)
    assert "the model has 0, 1" in str(problem.hint)
    (problem,) = problems_of(model, target_modules=[])
    assert problem.what == "`target_modules` names no module"
    assert "exclude_modules" not in str(problem.hint)


def test_a_rank_that_is_no_multiple_of_the_groups_is_rejected_before_the_model_changes() -> None:
    problems = problems_of(tiny.ConvNet(), rank=3, target_modules=["stem", "grouped", "dilated"])
    assert [p.what for p in problems] == [
        "rank 3 cannot be divided among the 2 groups of a convolution"
    ]
    assert "grouped" in problems[0].at
    assert "2 divides" in problems[0].hint


# ------------------------------------------------------------------------------- what is trained

LOW_RANK = {
    f"bert.encoder.layer.{i}.attention.self.query.{matrix}"
    for i in range(2)
    for matrix in ("lora_A", "lora_B")
}
HEAD = {"classifier.weight", "classifier.bias"}
POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def biases(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith("bias")}


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("kind", ["lora", "full", "none", "bitfit"])
@pytest.mark.parametrize("more", [[], ["pooler"]], ids=["", "pooler"])
def test_exactly_this_is_trained(kind: str, bias: str, more: list[str]) -> None:
    base = tiny.encoder()
    model = copy.deepcopy(base)
    recipe = tiny.recipe_of(type=kind, bias=bias, target_modules=["query"], train_modules=more)
    attach(model, recipe, ["classifier"])
    trained = set(trainable_parameters(model))
    in_full = HEAD | (POOLER if more else set())
    if kind == "full":
        assert trained == {name for name, _ in base.named_parameters()}
    elif kind == "none":
        assert trained == in_full
    elif kind == "bitfit":
        assert trained == in_full | biases(base)
        assert len(biases(base)) == 19
    else:
        of_adapted = expand("bert.encoder.layer.*.attention.self.query.base.bias")
        renamed = {n.replace(".query.bias", ".query.base.bias") for n in biases(base)}
        extra = {"none": set(), "lora_only": of_adapted, "all": renamed}[bias]
        assert trained == in_full | LOW_RANK | extra
    assert bool(lora_layers(model)) == (kind == "lora")


@pytest.mark.parametrize(
    "adapter",
    [
        {"type": "lora", "bias": "all", "train_modules": ["pooler"]},
        {"type": "lora", "bias": "lora_only"},
        {"type": "bitfit"},
        {"type": "none"},
        {"type": "full"},
    ],
    ids=lambda adapter: "-".join(str(v) for v in adapter.values()),
)
@pytest.mark.parametrize("autocast", [True, False])
def test_all_trained_parameters_are_float32_on_a_bfloat16_base(
    adapter: dict[str, Any], autocast: bool
) -> None:
    model = tiny.encoder().bfloat16()
    before = copy.deepcopy(model)
    attach(model, tiny.recipe_of(**adapter), ["classifier"])
    trained = set(trainable_parameters(model))
    for name, parameter in model.named_parameters():
        # torch requires the same dtype for the weight and the bias of a normalisation
        norm = "LayerNorm" in name and name.replace("weight", "bias") in trained
        wanted = torch.float32 if name in trained or norm else torch.bfloat16
        assert parameter.dtype == wanted, name
    ids = torch.randint(4, 200, (3, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=torch.tensor([0, 1, 0])).loss
        plain = before(input_ids=ids, labels=torch.tensor([0, 1, 0])).loss
    assert loss.item() == pytest.approx(plain.item(), abs=0.02)
    loss.backward()
    reached = {n for n, p in trainable_parameters(model).items() if p.grad is not None}
    assert reached == set(trainable_parameters(model))
    assert all(p.dtype == torch.float32 for p in trainable_parameters(model).values())


def test_a_copy_of_a_bfloat16_model_has_biases_of_its_own() -> None:
    model = tiny.encoder().bfloat16()
    attach(model, tiny.recipe_of(type="bitfit"), ["classifier"])
    ids = torch.randint(4, 200, (3, 8))
    copied, before = copy.deepcopy(model), model(input_ids=ids).logits
    with torch.no_grad():
        for parameter in trainable_parameters(copied).values():
            parameter.add_(1.0)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.allclose(copied(input_ids=ids).logits, before, atol=0.1)


@pytest.mark.parametrize("kind", ["gpt2", "conv"])
def test_other_layers_with_a_trained_bias_compute_in_bfloat16(kind: str) -> None:
    model = (tiny.gpt2() if kind == "gpt2" else tiny.ConvNet()).bfloat16()
    before = copy.deepcopy(model)
    attach(model, tiny.recipe_of(rank=2, target_modules="all-linear", bias="all"))
    x = torch.randint(4, 200, (2, 8)) if kind == "gpt2" else torch.randn(2, 3, 12, 12).bfloat16()
    ours, plain = (getattr(m(x), "logits", m(x)) for m in (model, before))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=0.0, atol=0.05)


def test_batch_normalisation_does_not_drift_in_training() -> None:
    model, x = tiny.ConvNet(), torch.randn(4, 3, 12, 12)
    attach(model, tiny.recipe_of(rank=4, target_modules=["stem"]), ["classifier"])
    before = model.norm.running_mean.clone()
    training_mode(model)
    model(x)
    assert torch.equal(model.norm.running_mean, before)
    assert all(m.training for m in model.modules() if m is not model.norm)
    model = tiny.ConvNet()
    # nor if its weight is trained: folders hold no statistics, and micro-batches must not matter
    attach(model, tiny.recipe_of(target_modules=["stem"], train_modules=["norm"]))
    training_mode(model)
    model(x)
    assert torch.equal(model.norm.running_mean, before)


def test_the_seed_decides_the_initial_values() -> None:
    def drawn() -> dict[str, Tensor]:
        model = tiny.encoder()
        torch.manual_seed(7)
        attach(model, tiny.recipe_of(target_modules=["query"]))
        return {name: p.clone() for name, p in trainable_parameters(model).items()}

    first, second = drawn(), drawn()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize("half", ["embed_tokens", "lm_head"])
def test_only_one_of_two_tied_weights_cannot_be_trained(half: str) -> None:
    problems = problems_of(tiny.llama(tied=True), train_modules=[half])
    other = {"embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}[half]
    assert half in problems[0].what
    assert f"shares its weight with `{other}`" in problems[0].what
    assert problems[0].at == "adapter.train_modules"


def test_tied_weights_that_are_both_trained_stay_tied() -> None:
    model = tiny.llama(tied=True)
    attach(model, tiny.recipe_of(train_modules=["embed_tokens", "lm_head"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    untied = tiny.llama(tied=False)
    attach(untied, tiny.recipe_of(train_modules=["lm_head"]))
    in_full = {name for name in trainable_parameters(untied) if "lora_" not in name}
    assert in_full == {"lm_head.weight"}


def test_merging_an_adapted_tied_embedding_unties_it() -> None:
    model, ids = tiny.llama(tied=True), torch.randint(4, 200, (2, 6))
    attach(model, tiny.recipe_of(target_modules=["embed_tokens", "q_proj"]))
    tiny.wake(model)
    shared = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        unmerged = model(input_ids=ids).logits
        assert set(merge(model)) == {"model.embed_tokens", "lm_head"}
        assert_close(model(input_ids=ids).logits, unmerged)
    assert torch.equal(model.lm_head.weight, shared)
    assert not torch.allclose(model.model.embed_tokens.weight, shared, atol=1e-2)


def test_merging_keeps_ties_of_weights_that_are_not_adapted() -> None:
    model = tiny.llama(tied=True)
    attach(model, tiny.recipe_of(target_modules=["q_proj"]))
    tiny.wake(model)
    assert merge(model) == []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not lora_layers(model)


def test_a_failed_merge_leaves_the_model_unchanged() -> None:
    model = tiny.ConvNet()
    attach(model, tiny.recipe_of(rank=4, target_modules=["stem", "grouped"]))
    tiny.wake(model)
    model.grouped.lora_A = nn.Parameter(torch.randn(4, 8, 3, 3))
    before = copy.deepcopy(model)
    with pytest.raises(LoraError, match="cannot be merged"):
        merge(model)
    assert_untouched(model, before)


def test_a_merged_weight_keeps_the_dtype_of_the_base() -> None:
    model = tiny.encoder().bfloat16()
    attach(model, tiny.recipe_of(target_modules=["query"]))
    tiny.wake(model)
    layer = next(iter(lora_layers(model).values()))
    expected = (layer.base.weight.float() + layer.delta_weight()).bfloat16()
    merge(model)
    assert torch.equal(model.bert.encoder.layer[0].attention.self.query.weight, expected)


def test_a_layer_in_a_list_is_replaced_in_its_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    layer = add_layer(model, Target("2", 2, 4.0))
    assert model[2] is layer
    assert len(model) == 3


# ---------------------------------------------------------------------------------------- counts


def test_roberta_base_has_the_published_counts() -> None:
    with torch.device("meta"):
        model = RobertaForSequenceClassification(
            RobertaConfig(
                vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2
            )
        )
    attach(model, tiny.recipe_of(rank=4, target_modules=["query", "output.dense"]), ["classifier"])
    rows = parameter_table(model)
    assert sum(row.count for row in rows) == 124_978_946
    assert sum(row.count for row in rows if row.trainable) == 923_906
    assert len(lora_layers(model)) == 36
    groups = {(name, trainable): (n, total) for name, n, trainable, total in group_rows(rows)}
    assert groups["roberta.encoder.layer.*.output.dense.lora_A", True] == (12, 12 * 4 * 3072)
    assert groups["roberta.encoder.layer.*.output.dense.base.weight", False][0] == 12
    assert groups["classifier.dense.weight", True] == (1, 768 * 768)
    assert sum(total for _, total in groups.values()) == 124_978_946


def test_a_shared_parameter_is_counted_once() -> None:
    tied, untied = (parameter_table(tiny.llama(tied)) for tied in (True, False))
    head = {row.name: row.count for row in untied}["lm_head.weight"]
    assert sum(r.count for r in untied) - sum(r.count for r in tied) == head == 32 * 319


def test_rows_that_differ_in_the_layer_s_number_are_joined() -> None:
    rows = [
        ParameterRow("layers.0.q.weight", (4, 3), False),
        ParameterRow("layers.0.q2.weight", (5,), True),
        ParameterRow("layers.1.q.weight", (4, 3), False),
        ParameterRow("layers.10.q.weight", (4, 3), True),
        ParameterRow("7", (2,), True),
        ParameterRow("scale.3", (), True),
    ]
    assert group_rows(rows) == [
        ("layers.*.q.weight", 2, False, 24),
        ("layers.*.q2.weight", 1, True, 5),
        ("layers.*.q.weight", 1, True, 12),
        ("7", 1, True, 2),
        ("scale.*", 1, True, 1),
    ]


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_keeps_the_mode_of_its_base_and_is_found_by_its_name(training: bool) -> None:
    model = tiny.encoder().train(training)
    targets = resolve_targets(model, tiny.recipe_of(target_modules=["query"]))
    layer = add_layer(model, targets[0], dropout=0.1)
    assert layer.training == layer.dropout.training == training
    assert lora_layers(model) == {"bert.encoder.layer.0.attention.self.query": layer}
    assert "rank=8, alpha=6, scaling=0.75" in repr(layer)


# ------------------------------------------------------------------------ one value at a time


class TwoParts(nn.Module):
    """A model with a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(2, 2)
        self.trained = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3, bias=False), nn.Linear(3, 1))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    module = sys.modules["lora_cli.adapters.attach"]
    monkeypatch.setattr(module, "is_frozen", lambda _, name: name.startswith("used"))
    monkeypatch.setattr(module, "frozen_parameters", lambda *_: {"trained.1.weight"})
    return TwoParts()


def test_full_training_leaves_out_frozen_parts(parts: nn.Module) -> None:
    parts.half()
    attach(parts, tiny.recipe_of(type="full"))
    wanted = {"trained.0.weight", "trained.0.bias", "trained.2.weight", "trained.2.bias"}
    assert set(trainable_parameters(parts)) == wanted
    for name, parameter in parts.named_parameters():
        assert parameter.dtype == (torch.float32 if name in wanted else torch.float16)


@pytest.mark.parametrize(
    ("adapter", "biases"),
    [
        ({"type": "bitfit"}, {"trained.0.bias", "trained.2.bias"}),
        ({"type": "lora", "bias": "all"}, {"trained.0.base.bias", "trained.2.bias"}),
        ({"type": "lora", "bias": "lora_only"}, {"trained.0.base.bias"}),
        ({"type": "lora", "bias": "none"}, set()),
    ],
)
def test_which_biases_are_trained(
    adapter: dict[str, Any], biases: set[str], parts: nn.Module
) -> None:
    if adapter["type"] == "lora":
        adapter = {**adapter, "target_modules": [r"trained.0"]}
    attach(parts, tiny.recipe_of(rank=1, **adapter))
    assert {n for n in trainable_parameters(parts) if n.endswith("bias")} == biases


def test_names_without_the_bases_of_layers() -> None:
    layers = ["a", "b", "b.base"]
    for name, plain in (
        ("a.base", "a"), ("b.base.base", "b"), ("b.base", "b"), ("a", "a"), ("c.base", "c.base"),
        ("a.base.x", "a.base.x"), ("a.x", "a.x"),
    ):  # fmt: skip
        assert name_in_base(name, layers) == plain


def test_layers_are_disabled_within_the_context_and_restored_afterwards() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for i, enabled in enumerate((True, False)):
        add_layer(model, Target(str(i), 1, 1.0)).enabled = enabled
    with disabled(model):
        assert [layer.enabled for layer in lora_layers(model).values()] == [False, False]
    assert [layer.enabled for layer in lora_layers(model).values()] == [True, False]
    assert list(adapter_parameters(model)) == ["0.lora_A", "0.lora_B", "1.lora_A", "1.lora_B"]
    remove_layers(model)
    assert all(type(layer) is nn.Linear for layer in model)


def test_a_layer_is_added_with_the_given_settings() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    found = add_layer(model, Target("0", 4, 6.0), dropout=0.25, use_rslora=True)
    assert (found.rank, found.scaling, found.training) == (4, 3.0, False)
    assert found is model[0]
    plain = add_layer(model.train(), Target("1", 4, 6.0))
    assert (plain.scaling, plain.training) == (1.5, True)


def test_a_merged_model_is_not_trained_and_only_sharers_part() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    before = [layer.weight.detach().clone() for layer in model]
    for i in (0, 1):
        layer = add_layer(model, Target(str(i), 1, 1.0))
        nn.init.ones_(layer.get_parameter("lora_A"))
        nn.init.ones_(layer.get_parameter("lora_B"))
    assert merge(model) == ["1", "2"]
    for layer, weight, more in zip(model, before, (1.0, 1.0, 0.0), strict=True):
        assert_close(layer.weight.detach(), weight + more)
    assert not model[0].weight.requires_grad
    assert not model[1].weight.requires_grad


def test_the_table_counts_the_original_weights_of_a_quantised_layer() -> None:
    codes = QuantizedLinear(4, 3, nn.Parameter(torch.zeros(3)), "int8")
    codes.set_weight(torch.randn(3, 4))
    model = nn.Sequential(codes, nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    rows = {row.name: (row.shape, row.trainable, row.count) for row in parameter_table(model)}
    assert rows["1.weight"] == ((2, 3), False, 6)
    assert rows["1.bias"] == ((2,), True, 2)
    assert rows["0.weight"][0] == (3, 4)
    assert rows["0.bias"] == ((3,), True, 3)
    assert set(rows) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("kind", "lacking"),
    [("bitfit", "the model has no bias"), ("none", "the model has no new head")],
)
def test_the_error_says_why_nothing_can_be_trained(kind: str, lacking: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(LoraError, match=f"nothing is trained: {lacking}"):
        attach(model, tiny.recipe_of(type=kind))


def test_rows_of_tokens_are_those_of_the_vocabulary() -> None:
    model = tiny.llama(tied=False)
    size = len(model.get_input_embeddings().weight)
    recipe = tiny.recipe_of("causal_lm", target_modules=["q_proj"])
    with pytest.raises(LoraError, match=f"has rows for {size} tokens, and none for {size}"):
        attach(model, recipe, token_ids=[3, size])
    attach(model, recipe, token_ids=[3, size - 1])
    layers = token_layers(model)
    assert [list(layer.token_ids) for layer in layers.values()] == [[3, size - 1]] * 2


@pytest.mark.parametrize("restored", [True, False])
def test_initial_values_are_computed_unless_a_checkpoint_is_loaded_afterwards(
    restored: bool,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    recipe = tiny.recipe_of("causal_lm", init="orthogonal", rank=2, target_modules=["0"])
    attach(model, recipe, restored=restored)
    # by default B is zero; orthogonal matrices are not
    assert bool(lora_layers(model)["0"].lora_B.any()) is not restored


def test_a_tie_ends_only_in_its_own_part_of_a_model() -> None:
    parts = {name: tiny.llama(tied=True) for name in ("unet", "text_encoder")}
    model = Bundle(parts, ())
    layer = add_layer(model, Target("text_encoder.lm_head", 1, 1.0))
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.ones_(parameter)
    untied = merge_and_untie(model, [])
    assert "text_encoder.lm_head" in untied
    assert not any(name.startswith("unet") for name in untied)
    ties = {name: part.config.tie_word_embeddings for name, part in parts.items()}
    assert ties == {"unet": True, "text_encoder": False}


def test_rows_of_new_tokens_are_trained_with_an_embedding_that_is_trained_whole() -> None:
    whole = ["model.embed_tokens"]
    new = tiny.recipe_of("causal_lm")
    assert _token_embeddings(tiny.llama(tied=False), new, [], whole, [7]) == ["lm_head"]
    named = tiny.recipe_of("causal_lm", train_tokens=[7])
    assert "lm_head" in _token_embeddings(tiny.llama(tied=False), named, [], [], [7])
    with pytest.raises(LoraError, match=r"`model\.embed_tokens` is trained in full"):
        _token_embeddings(tiny.llama(tied=False), named, [], whole, [7])
