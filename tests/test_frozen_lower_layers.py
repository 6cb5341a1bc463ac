"""The frozen layers below the first trained one: found in any architecture, skipped exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_pictures
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_cli.adapters import frozen_lower_layers
from lora_cli.adapters.attach import attach, training_mode
from lora_cli.adapters.frozen_lower_layers import FrozenLayers, find_frozen_layers

IDS = torch.tensor([[5, 6, 7, 8, 9, 4], [9, 8, 7, 6, 3, 2]])
SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16,
    "num_hidden_layers": 3,
}  # fmt: skip
DROPS: dict[str, Any] = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
BOTH: dict[str, Any] = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 3, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "dropout": 0.5, "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip


def whisper() -> nn.Module:
    config = WhisperConfig(**BOTH, num_mel_bins=4, max_source_positions=8, max_target_positions=8)
    return WhisperForConditionalGeneration(config)


def gemma() -> nn.Module:
    config = Gemma3TextConfig(
        **SMALL, head_dim=8, num_key_value_heads=1, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


Inputs = dict[str, Tensor]
TEXT = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
PAIR = {**TEXT, "decoder_input_ids": IDS[:, :4]}
PICTURE = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
SOUND = {
    "input_features": torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)),
    "decoder_input_ids": IDS[:, :4],
}
LOWER = ["embeddings", "0-1"]

# the model's builder, what is frozen, its inputs, and the modules whose states are recorded
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Inputs, list[str]]] = {
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**SMALL, **DROPS)),
        {"type": "full", "freeze": LOWER}, TEXT, ["bert.encoder.layer.1"],
    ),
    "bert, adapters": (
        lambda: BertForSequenceClassification(BertConfig(**SMALL, **DROPS)),
        {"layers": [2], "dropout": 0.5}, TEXT, ["bert.encoder.layer.1"],
    ),
    "bert, head": (
        lambda: BertForSequenceClassification(BertConfig(**SMALL, **DROPS)),
        {"type": "none"}, TEXT, ["classifier"],
    ),
    "roberta, head": (lambda: tiny.encoder(2, "roberta"), {"type": "none"}, TEXT,
        ["classifier.dense"]),
    "modernbert": (
        lambda: ModernBertForSequenceClassification(
            ModernBertConfig(**SMALL, pad_token_id=0, embedding_dropout=0.5)),
        {"type": "full", "freeze": LOWER}, TEXT, ["model.layers.1"],
    ),
    "deberta": (
        lambda: DebertaV2ForSequenceClassification(
            DebertaV2Config(**SMALL, **DROPS, relative_attention=True, position_buckets=4)),
        {"layers": [2], "target_modules": ["query_proj"]}, TEXT, ["deberta.encoder.layer.1"],
    ),
    "gpt2": (tiny.gpt2, {"type": "full", "freeze": ["embeddings", 0]}, TEXT, ["transformer.h.0"]),
    "llama": (tiny.llama, {"layers": [1]}, TEXT, ["model.layers.0"]),
    "gemma": (gemma, {"layers": [2]}, TEXT, ["model.layers.1"]),
    "bart": (
        lambda: BartForConditionalGeneration(BartConfig(**BOTH)),
        {"type": "full", "freeze": ["embeddings", "encoder", "decoder.layers.0"]}, PAIR,
        ["model.encoder.layers.2", "model.decoder.layers.0"],
    ),
    "bart, upper half of the encoder": (
        lambda: BartForConditionalGeneration(BartConfig(**BOTH)),
        {"type": "lora", "target_modules": r".*(encoder\.layers\.2|decoder).*q_proj"}, PAIR,
        ["model.encoder.layers.1"],
    ),
    "t5, decoder": (
        lambda: T5ForConditionalGeneration(T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)),
        {"target_modules": r"decoder\..*\.q"}, PAIR, ["encoder.block.1"],
    ),
    "whisper": (whisper, {"target_modules": r".*decoder.*q_proj"}, SOUND,
        ["model.encoder.layers.2"]),
    "vit": (
        lambda: ViTForImageClassification(ViTConfig(
            hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=3,
            image_size=16, patch_size=8, **DROPS)),
        {"type": "full", "freeze": LOWER}, PICTURE, ["vit.layers.1"],
    ),
    "vit, head": (lambda: tiny_pictures.model("vit"), {"type": "none"}, {}, ["classifier"]),
    "resnet": (lambda: tiny_pictures.model("resnet"), {"type": "full", "freeze": ["embeddings", 0]},
        {}, ["resnet.encoder.stages.0"]),
}  # fmt: skip


def opened(name: str) -> tuple[nn.Module, Inputs, FrozenLayers | None]:
    build, adapter, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model = build()
    if not inputs:  # a tiny model whose configuration gives the size of its images
        size = getattr(model.config, "image_size", 32)
        inputs = {"pixel_values": torch.randn(2, 3, size, size)}
    attach(model, tiny.recipe_of(**{"rank": 2, **adapter}), head_of(model))
    tiny.wake(model)
    return model, inputs, find_frozen_layers(model, lambda: model(**inputs))


def head_of(model: nn.Module) -> list[str]:
    return ["classifier"] if hasattr(model, "classifier") else []


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


class Calls:
    """Counts the calls of some modules."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.count = 0
        for name in names:
            # inside a layer, since a skipped layer is still called and returns its input
            for module in list(model.get_submodule(name).modules())[1:]:
                module.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.slow_after(6)
@pytest.mark.parametrize("name", CASES)
def test_a_model_computes_the_same_bits_without_its_frozen_layers(name: str) -> None:
    model, inputs, layers = opened(name)
    assert layers is not None
    assert list(layers.recorded) == CASES[name][3]
    training_mode(model, layers)
    torch.manual_seed(1)
    calls = Calls(model, layers.frozen)
    with layers.recording() as states:
        whole = logits(model, inputs)
    assert calls.count > 0
    calls.count = 0
    torch.manual_seed(1)
    with layers.skipping(dict(states)):
        upper = logits(model, inputs)
    assert calls.count == 0
    assert torch.equal(whole, upper)
    gradients = []
    for output in (whole, upper):
        model.zero_grad()
        output.square().sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append({n: g.clone() for n, g in trained.items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    assert all(torch.equal(gradient, gradients[1][n]) for n, gradient in gradients[0].items())
    # and afterwards the layers are restored
    assert all("forward" not in module.__dict__ for module in model.modules())
    calls.count = 0
    logits(model, inputs)
    assert calls.count > 0


@pytest.mark.parametrize("name", CASES)
def test_what_enters_the_first_trained_layer_is_the_same_in_training_and_evaluation(
    name: str,
) -> None:
    model, inputs, layers = opened(name)
    assert layers is not None
    model.eval()
    with torch.no_grad(), layers.recording() as still:
        logits(model, inputs)
    training_mode(model, layers)
    for _ in range(2):
        with layers.recording() as states:
            logits(model, inputs)
        assert states.keys() == still.keys()
        assert all(torch.equal(state, still[key]) for key, state in states.items())
        assert not any(state.requires_grad for state in states.values())


def test_trained_modules_and_those_above_stay_in_training_mode() -> None:
    model, inputs, layers = opened("bert")
    training_mode(model, layers)
    upper = model.get_submodule("bert.encoder.layer.2")
    assert all(module.training for module in upper.modules())
    assert all(not m.training for m in model.get_submodule("bert.encoder.layer.1").modules())
    assert model.get_submodule("dropout").training
    assert model.training
    assert not torch.equal(logits(model, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    "adapter",
    [
        {"type": "lora"},
        {"type": "full"},
        {"type": "full", "freeze": "0-1"},  # the embeddings are trained
        {"type": "full", "freeze": ["embeddings", 1]},
        {"type": "bitfit"},
        {"layers": [2], "bias": "all"},
    ],
)
def test_nothing_is_skipped_if_a_layer_below_is_trained(adapter: dict[str, Any]) -> None:
    model = BertForSequenceClassification(BertConfig(**SMALL, **DROPS))
    attach(model, tiny.recipe_of(**adapter), ["classifier"])
    assert find_frozen_layers(model, lambda: model(**TEXT)) is None


def test_a_layer_that_runs_several_times_is_not_skipped() -> None:
    config = AlbertConfig(**{**SMALL, "embedding_size": 16})
    model = AlbertForSequenceClassification(config)
    attach(model, tiny.recipe_of(type="none"), ["classifier"])
    assert find_frozen_layers(model, lambda: model(**TEXT)) is None


def test_layers_that_pass_on_more_than_hidden_states_are_computed_without_dropout() -> None:
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.5
    )
    model = T5ForConditionalGeneration(config)
    attach(model, tiny.recipe_of(target_modules=r"(encoder\.block\.1|decoder)\..*\.q"))
    layers = find_frozen_layers(model, lambda: model(**PAIR))
    assert layers is not None
    assert layers.recorded == ()
    training_mode(model, layers)
    found = []
    for _ in range(2):
        block = model.get_submodule("encoder.block.0")
        handle = block.register_forward_hook(lambda _m, _a, output: found.append(output[0]))
        logits(model, PAIR)
        handle.remove()
    assert torch.equal(*found)


def test_a_decoder_after_a_trained_encoder_has_no_frozen_layers() -> None:
    model = BartForConditionalGeneration(BartConfig(**BOTH))
    attach(model, tiny.recipe_of(target_modules=r".*encoder\.layers\.0.*q_proj"))
    assert find_frozen_layers(model, lambda: model(**PAIR)) is None


# ------------------------------------------------------------------------------ any architecture


class Layer(nn.Module):
    """A layer whose output has the given form."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(4, 4), form

    def forward(self, x: Tensor) -> Any:
        found = torch.tanh(self.linear(x))
        outputs = {"tensor": found, "one": (found,), "none": (found, None), "more": (found, x),
                   "three": (found, None, None),
                   "odd": [found], "empty": ()}  # fmt: skip
        return outputs[self.form]


def first_of(output: Any, x: Tensor) -> Tensor:
    found: Tensor = (
        (output[0] if len(output) else x) if isinstance(output, tuple | list) else output
    )
    return found


class Stack(nn.Module):
    """Layers with a given order and number of calls, and a head."""

    def __init__(
        self, *forms: str, order: list[int] | None = None, heads: int = 1, named: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.named = heads, named
        torch.manual_seed(0)
        self.before, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.layers = nn.ModuleList(Layer(form) for form in forms)
        self.order = list(range(len(forms))) if order is None else order
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.before(x))
        for i in self.order:
            x = first_of(self.layers[i](x), x)
        x = self.norm(x)
        found: Tensor = self.head(input=x) if self.named else self.head(x)
        return found if self.heads == 1 else found + self.head(2 * x)


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


def found_in(model: Stack, *trained: str) -> FrozenLayers | None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(f"{top}.") for top in trained))
    training = model.training
    found = find_frozen_layers(model, lambda: model(X))
    assert model.training == training
    return found


@pytest.mark.parametrize(
    ("forms", "order", "trained", "frozen", "last", "first"),
    [
        (["tensor"], None, ["head"], 1, ["layers.0"], "head"),
        (["tensor"] * 3, None, ["head"], 3, ["layers.2"], "head"),
        (["tensor"] * 3, None, ["layers.2"], 2, ["layers.1"], None),
        (["tensor"] * 3, None, ["layers.1", "head"], 1, ["layers.0"], None),
        (["one", "none", "tensor"], None, ["layers.2"], 2, ["layers.1"], None),
        (["tensor", "three", "tensor"], None, ["layers.2"], 2, ["layers.1"], None),
        # further outputs of a last layer are not read by another layer
        (["tensor", "more"], None, ["head"], 2, ["layers.1"], "head"),
        (["more", "tensor"], None, ["head"], 2, ["layers.1"], "head"),
        (["more", "tensor"], None, ["layers.1"], 1, [], None),
        # a layer whose output has no form, that runs again, or too early, ends the frozen layers
        (["tensor", "odd", "tensor"], None, ["head"], 1, ["layers.0"], "head"),
        (["tensor", "empty", "tensor"], None, ["head"], 1, ["layers.0"], "head"),
        (["tensor"] * 3, [0, 1, 1, 2], ["head"], 1, ["layers.0"], "head"),
        (["tensor"] * 3, [1, 0, 2], ["head"], 1, ["layers.0"], "head"),
        (["tensor"] * 3, [0, 2], ["head"], 1, ["layers.0"], "head"),
    ],
)
def test_layers_that_run_once_in_order_before_trained_modules_are_frozen(
    forms: list[str],
    order: list[int] | None,
    trained: list[str],
    frozen: int,
    last: list[str],
    first: str | None,
) -> None:
    model = Stack(*forms, order=order)
    found = found_in(model, *trained)
    assert found is not None
    assert found.frozen == tuple(f"layers.{i}" for i in range(frozen))
    assert found.last == tuple(last)
    assert found.first == first
    assert found.recorded == (tuple(last) if first is None else (first,))
    assert found.recording_last().recorded == tuple(last)
    assert set(found.skipped) == (set(found.frozen) if last else set())
    kinds = {"tensor": None, "one": 1, "none": 2, "more": 2, "three": 3}
    assert dict(found.skipped) == {name: kinds[forms[int(name[-1])]] for name in found.skipped}
    # modules before are in evaluation mode, trained ones are not
    assert {"before", "drop"} <= set(found.below)
    assert {f"layers.{i}.linear" for i in range(frozen)} <= set(found.below)
    tops = {name.partition(".")[0] if name == "head" else name for name in trained}
    assert not any(name in tops or name.startswith(tuple(f"{t}." for t in tops))
                   for name in found.below)  # fmt: skip
    model.train()
    found.evaluate()
    for name, module in model.named_modules():
        assert module.training == (name not in found.below)
    # and the states replace the frozen layers
    with torch.no_grad(), found.recording() as states:
        whole = model.eval()(X)
    assert set(states) == set(found.recorded)
    if last:
        with torch.no_grad(), found.skipping(states):
            assert torch.equal(model(X), whole)
        other = {name: state + 1 for name, state in states.items()}
        with torch.no_grad(), found.skipping(other):
            assert not torch.equal(model(X), whole)
    assert torch.equal(model(X), whole)


@pytest.mark.parametrize("named", [True, False])
def test_the_input_of_the_head_or_the_last_layers_output_can_be_given(named: bool) -> None:
    model = Stack("tensor", "none", named=named).eval()
    found = found_in(model, "head")
    assert found is not None
    assert found.first == "head"
    with torch.no_grad():
        with found.recording() as of_first, found.recording_last().recording() as last:
            whole = model(X)
        assert (list(of_first), list(last)) == (["head"], ["layers.1"])
        assert not torch.equal(of_first["head"], last["layers.1"])
        wider = torch.cat([X, X], 1)  # a batch with padded rows
        for states in (of_first, last):
            with found.skipping(states):
                assert torch.equal(model(X), whole)
                assert torch.equal(model(wider)[:, :3], whole)
                assert model(wider).shape == (2, 6, 2)


def test_an_output_of_three_values_is_restored() -> None:
    skipping = frozen_lower_layers._skipping
    assert skipping(None, None)(X) is X
    assert skipping(None, 1)(X) == (X,)
    found = skipping(2 * X, 3)(X)
    assert torch.equal(found[0], 2 * X)
    assert found[1:] == (None, None)


def test_the_input_of_a_head_that_runs_twice_is_not_recorded() -> None:
    found = found_in(Stack("tensor", heads=2), "head")
    assert found is not None
    assert found.first is None
    assert found.recorded == ("layers.0",)


def test_a_module_without_a_tensor_input_is_not_recorded() -> None:
    first_after_layers = frozen_lower_layers._first_after_layers
    for args, kwargs, expected in (
        ((X,), {}, "head"), ((), {"x": X}, "head"), ((3, X), {}, None), ((), {"x": 3}, None),
        ((), {}, None),
    ):  # fmt: skip
        trace = frozen_lower_layers._Trace(
            began={"layers.0": [1], "head": [3]}, ended={"layers.0": [2], "head": [4]},
            inputs={"head": (args, kwargs)},
        )  # fmt: skip
        assert first_after_layers(trace, 3, {"layers": ["layers.0"]}) == expected
    trace.ended["layers.0"] = [2, 9]  # a layer that runs again afterwards
    trace.inputs["head"] = ((X,), {})
    assert first_after_layers(trace, 3, {"layers": ["layers.0"]}) is None
    trace.began = {"": [3]}
    trace.inputs[""] = ((X,), {})
    trace.ended["layers.0"] = [2]
    assert first_after_layers(trace, 3, {"layers": ["layers.0"]}) is None  # the model itself


@pytest.mark.parametrize("trained", [["before"], ["layers.0"], ["before", "head"]])
def test_nothing_is_frozen_above_trained_modules(trained: list[str]) -> None:
    assert found_in(Stack("tensor", "tensor"), *trained) is None


def test_a_first_layer_that_cannot_be_skipped_leaves_none() -> None:
    assert found_in(Stack("odd", "tensor"), "head") is None
    assert found_in(Stack("tensor", "tensor", order=[0, 1, 0]), "head") is None


def test_stacks_are_the_outermost_lists_of_layers_with_weights() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(1, 1)])})])
    model.one = nn.ModuleList([nn.Linear(1, 1)])
    model.empty = nn.ModuleList()
    model.mixed = nn.ModuleList([nn.Linear(1, 1), nn.Dropout()])
    model.alike = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model.row = nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1))
    model.outer = nn.Module()
    model.outer.layers = nn.ModuleList([nn.Linear(1, 1), nn.LayerNorm(1)])
    assert frozen_lower_layers._stacks(model) == {
        "layers": ["layers.0"], "one": ["one.0"], "alike": ["alike.0", "alike.1"],
        "outer.layers": ["outer.layers.0", "outer.layers.1"],
    }  # fmt: skip
    assert frozen_lower_layers._stacks(nn.ModuleList([nn.Linear(1, 1)])) == {"": ["0"]}


@pytest.mark.parametrize(
    ("state", "like", "expected"),
    [((2, 3, 4), (2, 5, 4), (2, 5, 4)), ((2, 3, 4), (2, 3, 4), (2, 3, 4)),
     ((2, 5, 4), (2, 3, 4), (2, 5, 4)), ((2, 4), (2, 5, 4), (2, 4)),
     ((2, 3, 4, 4), (2, 5, 4, 4), (2, 3, 4, 4)), ((2, 3, 4), (2, 5), (2, 3, 4))],
)  # fmt: skip
def test_states_of_tokens_are_padded_with_zeros_at_the_end(
    state: tuple[int, ...], like: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    ones = torch.ones(state)
    found = frozen_lower_layers._padded(ones, torch.zeros(like))
    assert tuple(found.shape) == expected
    assert float(found.sum()) == float(ones.sum())
    if expected != state:
        assert torch.equal(found[:, : state[1]], ones)


def test_the_first_tensor_of_arguments_or_of_a_tuple_is_the_state() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    first = frozen_lower_layers._first_tensor
    assert first((None, a, b), {}) is a
    assert first((None,), {"x": None, "y": b}) is b
    assert first(((a, b),), {}) is a
    assert first((3,), {"x": a}) is a


def test_a_parameter_read_without_a_call_is_read_when_its_owner_begins() -> None:
    trace = frozen_lower_layers._Trace(began={"a": [3, 9], "a.b": [4], "c": [7]})
    assert frozen_lower_layers._start_of_training({"a.b.c.d"}, trace) == 4
    assert frozen_lower_layers._start_of_training({"a.x", "c"}, trace) == 3
    assert frozen_lower_layers._start_of_training({"c"}, trace) == 7
    assert frozen_lower_layers._start_of_training({"z"}, trace) == 0
    assert frozen_lower_layers._start_of_training(set(), trace) == 0


@pytest.mark.parametrize("layer", [nn.Linear, GradientCheckpointingLayer])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_modules_with_their_own_checkpointing_stay_in_training_mode(
    layer: type[nn.Module], checkpoints: bool
) -> None:
    model, outer = nn.Module(), nn.Module()
    outer.layers = nn.ModuleList([layer(1, 1) if layer is nn.Linear else layer()])
    outer.gradient_checkpointing = checkpoints  # type: ignore[assignment]
    model.outer = outer
    around = frozen_lower_layers._around(model, ["outer.layers"])
    own = layer is nn.Linear
    assert around == (["outer.layers"] if own and checkpoints else ["outer.layers", "outer"])
