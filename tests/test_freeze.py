"""What `adapter.freeze` freezes, the depth of layers, and descriptions of parameters."""

from __future__ import annotations

import pytest
import tiny
import tiny_pictures
import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.adapters.describe_trained import frozen_in_words, in_modules, trained_in_words
from lora_cli.adapters.freeze import depths, embedding_modules
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe


def deberta() -> nn.Module:
    """Return a tiny DeBERTa, whose layers share an embedding of relative positions."""
    config = DebertaV2Config(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=8, relative_attention=True, position_buckets=4,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config)


MODELS = {
    "bert": (lambda: tiny.encoder(2, layers=3), ["classifier"]),
    "gpt2": (tiny.gpt2, []),
    "llama": (lambda: tiny.llama(tied=False), []),
    "bart": (tiny.encoder_decoder, []),
    "t5": (lambda: tiny.encoder_decoder("t5"), []),
    "vit": (lambda: tiny_pictures.model("vit"), ["classifier"]),
    "resnet": (lambda: tiny_pictures.model("resnet"), ["classifier"]),
    "deberta": (deberta, ["classifier"]),
}


def frozen(kind: str, *entries: str | int, type_: str = "full") -> tuple[nn.Module, str]:
    """Return a model that is partly frozen, and a description of the frozen part."""
    build, head = MODELS[kind]
    model = build()
    attach(model, tiny.recipe_of(type=type_, freeze=list(entries)), head)
    return model, frozen_in_words(model)


@pytest.mark.parametrize(
    ("kind", "entries", "expected"),
    [
        ("bert", ["embeddings"], "bert.embeddings"),
        ("bert", ["embeddings", "0-1"], "bert.embeddings, bert.encoder.layer.0-1"),
        ("bert", [0, 2], "bert.encoder.layer.0, bert.encoder.layer.2"),
        ("bert", ["1"], "bert.encoder.layer.1"),
        ("bert", ["bert"], "bert"),
        ("bert", ["pooler", "layer.0.attention"], "bert.encoder.layer.0.attention, bert.pooler"),
        ("bert", ["word_embeddings.weight"], "bert.embeddings.word_embeddings"),
        ("gpt2", ["embeddings", "0"], "transformer.wte, transformer.wpe, transformer.h.0"),
        ("llama", ["embeddings"], "model.embed_tokens"),
        ("llama", ["lm_head"], "lm_head"),
        (
            "bart",
            ["embeddings"],
            "model.shared, model.encoder.embed_positions, model.encoder.layernorm_embedding, "
            "model.decoder.embed_positions, model.decoder.layernorm_embedding",
        ),
        ("bart", ["encoder"], "model.shared, model.encoder"),
        ("t5", ["embeddings"], "shared"),
        ("t5", ["0"], "encoder.block, decoder.block"),
        ("vit", ["embeddings"], "vit.embeddings"),
        ("resnet", ["embeddings", 0], "resnet.embedder, resnet.encoder.stages.0"),
        ("deberta", ["embeddings"], "deberta.embeddings, deberta.encoder.rel_embeddings"),
    ],
)
def test_named_modules_are_frozen_and_all_others_trained(
    kind: str, entries: list[str | int], expected: str
) -> None:
    model, words = frozen(kind, *entries)
    assert words == expected
    parts = [part.split("-")[0] for part in words.split(", ")]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert any(name.startswith(part.rstrip("0123456789")) for part in parts), name


def test_the_parameters_of_a_range_of_layers_are_those_with_its_numbers() -> None:
    model, _ = frozen("bert", "0-1")
    by_hand = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("bert.encoder.layer.0.", "bert.encoder.layer.1."))
    }
    assert by_hand
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == by_hand


def test_a_tied_weight_is_frozen_under_both_of_its_names() -> None:
    model, _ = frozen("gpt2", "embeddings")
    assert not model.get_parameter("lm_head.weight").requires_grad
    model, _ = frozen("gpt2", "lm_head")
    assert not model.get_parameter("transformer.wte.weight").requires_grad


def test_new_modules_are_trained_though_a_name_matches_them_too() -> None:
    model, _ = frozen("bert", "bert", "weight")
    assert set(trainable_parameters(model)) == {"classifier.weight", "classifier.bias"}


def test_biases_of_frozen_layers_stay_frozen() -> None:
    model, _ = frozen("bert", "embeddings", "0-1", type_="bitfit")
    trained = {n for n in trainable_parameters(model) if not n.startswith("classifier")}
    assert trained
    assert all(n.endswith(".bias") for n in trained)
    assert {n.split(".")[3] for n in trained if "layer" in n} == {"2"}


@pytest.mark.parametrize(
    ("entries", "what", "hint"),
    [
        (["embedings"], "`embedings` matches no module", "did you mean `embeddings`"),
        (["quer"], "`quer` matches no module", "did you mean `query`"),
        (["3-7"], "there are no layers 3 to 7", "layers 0 to 2"),
        ([9], "there is no layer 9", "layers 0 to 2"),
        (["2-1"], "`2-1` names no layer", "the lower number first"),
        (["dropout"], "has no parameters to freeze", "leave it out"),
        (["classifier"], "`classifier` alone, which is new and", "leave it out"),
        (["bert.classifier"], "matches no module", "the model has"),
    ],
)
def test_an_entry_that_freezes_nothing_is_an_error(
    entries: list[str | int], what: str, hint: str
) -> None:
    with pytest.raises(LoraError) as caught:
        frozen("bert", *entries)
    (problem,) = caught.value.problems
    assert what in problem.what
    assert hint in (problem.hint or "")


def test_all_wrong_entries_are_reported_together_and_the_model_stays_unchanged() -> None:
    model = tiny.encoder(2)
    with pytest.raises(LoraError) as caught:
        attach(model, tiny.recipe_of(type="full", freeze=["poler", "0", 7]), ["classifier"])
    assert len(caught.value.problems) == 2
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_freezing_absent_embeddings_or_everything_is_an_error() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(LoraError, match="the model has no embeddings outside its layers"):
        attach(plain, tiny.recipe_of(type="full", freeze="embeddings"))
    with pytest.raises(LoraError, match=r"`adapter\.freeze` leaves nothing to train"):
        attach(tiny.gpt2(), tiny.recipe_of(type="full", freeze="transformer"))


@pytest.mark.parametrize("type_", ["lora", "dora", "loha", "lokr", "none"])
def test_types_that_train_no_module_of_the_base_reject_it(type_: str) -> None:
    with pytest.raises(ValueError, match="already frozen"):
        tiny.recipe_of(type=type_, freeze="embeddings")
    assert isinstance(tiny.recipe_of(type=type_, freeze=[]), Recipe)


# ------------------------------------------------------------------------------------- depths


def test_layers_are_counted_from_the_top_of_their_own_stack() -> None:
    found = depths(tiny.encoder(2, layers=3), ["classifier"])
    by_hand = {"classifier": 0, "bert.pooler": 0, "bert.embeddings": 4}
    by_hand |= {f"bert.encoder.layer.{i}": 3 - i for i in range(3)}
    for name, depth in found.items():
        assert depth == by_hand[next(top for top in by_hand if name.startswith(f"{top}."))], name
    found = depths(tiny.encoder_decoder("t5"))
    assert found["shared.weight"] == 2
    assert {d for n, d in found.items() if ".block.0." in n} == {1}
    assert found["encoder.final_layer_norm.weight"] == 0


def test_a_number_in_the_head_is_not_a_layer() -> None:
    found = depths(tiny_pictures.model("resnet"), ["classifier"])
    assert {depth for name, depth in found.items() if name.startswith("classifier")} == {0}


def test_convolutions_before_the_layers_count_as_embeddings() -> None:
    model = nn.Module()
    model.conv1, model.layers = nn.Conv1d(2, 2, 3), nn.ModuleList([nn.Linear(2, 2)])
    model.conv2 = nn.Conv1d(2, 2, 3)
    assert embedding_modules(model) == ["conv1"]
    model = nn.Module()
    model.first = nn.ModuleList([nn.Linear(2, 2, bias=False)])
    model.conv, model.second = nn.Conv1d(2, 2, 3), nn.ModuleList([nn.Linear(2, 2)])
    assert embedding_modules(model) == [], "it is between two layers"


def test_bare_parameters_that_embed_are_found_and_no_others() -> None:
    model = nn.Module()
    model.layers, model.pos_embed = nn.ModuleList([nn.Linear(2, 2)]), nn.Parameter(torch.ones(2))
    model.scale = nn.Parameter(torch.ones(1))
    model.head = nn.Module()  # beside the layers, and not above them
    model.head.embedded = nn.Parameter(torch.ones(2))
    assert embedding_modules(model) == ["pos_embed"]


def test_a_parameter_with_two_names_is_an_embedding_under_both() -> None:
    model = nn.Module()
    model.layers, model.embed = nn.ModuleList([nn.Linear(2, 2)]), nn.Parameter(torch.ones(2))
    model.register_parameter("shared_emb", model.embed)
    assert embedding_modules(model) == ["embed", "shared_emb"]


# -------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"a.0.w", "a.0.b", "a.1.w", "a.1.b", "c.w"}, "a.0-1, c"),
        ({"a.0.w", "a.0.b", "a.1.w", "a.1.b", "a.2.w", "a.2.b"}, "a"),
        ({"a.0.w", "a.2.w", "a.2.b"}, "a.0.w, a.2"),
        (set(), ""),
    ],
)
def test_parameters_are_described_by_the_fewest_modules(chosen: set[str], expected: str) -> None:
    every = [f"a.{i}.{last}" for i in range(3) for last in "wb"] + ["c.w"]
    assert in_modules(chosen, every) == expected


def test_the_line_counts_what_is_trained() -> None:
    model, _ = frozen("bert", "bert")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert trained_in_words(model) == (
        f"trained: 66 of {total:,} parameters ({6600 / total:.2f} %): classifier"
    )
    model.requires_grad_(True)
    assert trained_in_words(model) == f"trained: {total:,} of {total:,} parameters (100.00 %)"


def test_names_that_differ_in_numbers_are_joined_in_long_lists() -> None:
    every = [name for name, _ in tiny.encoder(2, layers=5).named_parameters()]
    scales = {name for name in every if name.endswith("LayerNorm.weight")}
    assert in_modules(scales, every) == (
        "bert.embeddings.LayerNorm.weight, "
        "bert.encoder.layer.0-4.attention.output.LayerNorm.weight, "
        "bert.encoder.layer.0-4.output.LayerNorm.weight"
    )
    assert in_modules(set(every), every) == "bert, classifier"


def stack(count: int, shared: nn.Embedding | None = None) -> nn.Module:
    """Return an embedding and some layers, like one side of an encoder-decoder."""
    side = nn.Module()
    side.embed_tokens = nn.Embedding(5, 2)
    if shared is not None:
        side.embed_tokens.weight = shared.weight
    side.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(count))
    return side


def test_each_side_of_an_encoder_decoder_is_counted_from_its_own_top() -> None:
    model = nn.Module()
    model.encoder = stack(3)
    model.decoder = stack(2, model.encoder.embed_tokens)  # one weight under two names
    model.head = nn.Linear(2, 5, bias=False)
    assert depths(model, ["head"]) == {
        "encoder.embed_tokens.weight": 4,
        **{f"encoder.layers.{i}.weight": 3 - i for i in range(3)},
        "decoder.embed_tokens.weight": 3,
        **{f"decoder.layers.{i}.weight": 2 - i for i in range(2)},
        "head.weight": 0,
    }


def test_a_convolution_precedes_the_layers_or_is_part_of_one() -> None:
    model = nn.Module()
    model.conv = nn.Conv1d(2, 2, 3, bias=False)
    model.layers = nn.ModuleList(nn.Sequential(nn.Conv1d(2, 2, 3), nn.ReLU()) for _ in range(2))
    model.last = nn.Conv1d(2, 2, 3)
    assert embedding_modules(model) == ["conv"]
    layers = {
        f"{name}.{end}": depth
        for name, depth in (("layers.0.0", 2), ("layers.1.0", 1), ("last", 0))
        for end in ("weight", "bias")
    }
    assert depths(model) == {"conv.weight": 3, **layers}
