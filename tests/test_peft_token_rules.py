"""Which modules get trained rows of tokens: the rules implemented here, compared with PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_translators as translators
import torch
from closeness import assert_close, assert_different
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForSequenceClassification,
)

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.merge_proof import expected_weights
from lora_cli.adapters.peft_format.adapter_folder import (
    differences_in_peft,
    read_adapter,
    read_tensors,
    restore,
    save_adapter,
)
from lora_cli.adapters.peft_format.peft_token_rules import token_differences, token_reading
from lora_cli.errors import LoraError

IDS = [5, 9, 30]
SIZES = {
    "vocab_size": 100, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 32, "dropout": 0.0, "pad_token_id": 1,
    "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip
PHI = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "pad_token_id": 1,
}  # fmt: skip
T5_SIZES = {
    "vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
    "dropout_rate": 0.0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip


def two_vocabularies() -> nn.Module:
    """Return a translator whose encoder and decoder have a vocabulary each."""
    own = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 90}
    return MarianMTModel(MarianConfig(**SIZES, **own))


BASES: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: translators.model(kind) for kind in ("bart", "t5", "marian")},
    "marian, scaled": lambda: MarianMTModel(MarianConfig(**SIZES, scale_embedding=True)),
    "marian, untied": lambda: MarianMTModel(MarianConfig(**SIZES, tie_word_embeddings=False)),
    "marian, two vocabularies": two_vocabularies,
    "bart, classifying": lambda: BartForSequenceClassification(BartConfig(**SIZES, num_labels=3)),
    "t5, classifying": lambda: T5ForSequenceClassification(T5Config(**T5_SIZES, num_labels=3)),
    "llama": lambda: tiny.llama(tied=True),
}
HEADS = {"bart, classifying": ["classification_head"], "t5, classifying": ["classification_head"]}


def base_of(kind: str, larger: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model: Any = tiny.enliven(BASES[kind](), 0)
    if larger:
        model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
    return model


def recipe(kind: str) -> Any:
    task = "sequence_classification" if "classifying" in kind else "causal_lm"
    targets = ["q"] if kind.startswith("t5") else ["q_proj"]
    return tiny.recipe_of(task, rank=2, target_modules=targets)


def outputs(model: nn.Module, kind: str) -> Tensor:
    """Return a model's outputs on tokens, some of which have trained rows."""
    ids = torch.tensor([[9, 50, 5, 60, 30, 9, 2], [5, 5, 71, 30, 8, 9, 2]])
    inputs = {"input_ids": ids}
    if kind != "llama" and "classifying" not in kind:
        inputs["decoder_input_ids"] = ids.flip(1)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.task_type = None  # else it passes on arguments of that task only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), config=config)


@pytest.mark.parametrize(
    ("kind", "larger"),
    [(kind, False) for kind in BASES if kind not in ("bart", "t5", "llama")]
    + [(kind, True) for kind in ("bart", "t5", "marian", "marian, untied")],
)
def test_peft_computes_what_is_written(kind: str, larger: bool, tmp_path: Path) -> None:
    base, head = base_of(kind, larger), HEADS.get(kind, [])
    ids = [*IDS, 101] if larger and kind != "t5" else IDS

    def adapted() -> nn.Module:
        model = copy.deepcopy(base)
        attach(model, recipe(kind), head, token_ids=ids)
        return model

    model = adapted()
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(std=0.3)
    found = outputs(model, kind)
    assert_different(found, outputs(base, kind))
    save_adapter(tmp_path, model, recipe(kind), head)
    assert differences_in_peft(model, recipe(kind), head, tmp_path) == []
    assert_close(outputs(in_peft(base, tmp_path), kind), found, 1e-5)

    again, fresh, saved = copy.deepcopy(base), adapted(), read_adapter(tmp_path)
    load_adapter(again, saved, head)
    assert_close(outputs(again, kind), found, 1e-5)
    restore(fresh, read_tensors(tmp_path))
    assert_close(outputs(fresh, kind), found, 1e-5)
    count = sum(p.numel() for p in trainable_parameters(model).values())
    assert sum(p.numel() for p in trainable_parameters(fresh).values()) == count

    expected = expected_weights(base, saved.tensors, saved.config)
    assert not merge(again)
    assert expected.disagreement(again) is None
    assert_close(outputs(again, kind), found, 1e-5)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in base.named_parameters()]


def by_peft(base: nn.Module, kind: str, indices: Any, **options: Any) -> tuple[Any, Any]:
    config = peft.LoraConfig(
        r=2,
        target_modules=recipe(kind).adapter.target_modules,
        trainable_token_indices=indices,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(base), config), config


@pytest.mark.parametrize(
    ("kind", "larger", "indices", "ensured"),
    [(kind, False, IDS, False) for kind in BASES]
    + [(kind, True, IDS, False) for kind in ("bart", "t5", "marian", "llama")]
    + [
        ("marian", True, {"encoder.embed_tokens": IDS}, False),
        ("marian", True, {"encoder.embed_tokens": IDS, "lm_head": [7]}, False),
        ("marian", False, {"shared": IDS}, False),
        ("bart", False, {"shared": IDS, "lm_head": IDS}, False),
        ("bart", False, {"shared": IDS, "lm_head": [7]}, False),
        ("bart", False, {"embed_tokens": IDS}, False),
        ("bart", False, {"shared": IDS, "embed_tokens": [8]}, False),
        ("llama", False, {"embed_tokens": IDS}, False),
        ("llama", False, {"lm_head": IDS}, False),
        ("llama", False, {"embed_tokens": IDS, "lm_head": IDS}, True),
        ("marian, untied", False, {"encoder.embed_tokens": IDS, "lm_head": IDS}, True),
        ("marian, two vocabularies", False, {"embed_tokens": IDS, "lm_head": IDS}, False),
    ],
)
def test_the_same_modules_get_rows_as_in_peft(
    kind: str, larger: bool, indices: Any, ensured: bool
) -> None:
    base = base_of(kind, larger)
    model, config = by_peft(base, kind, indices, ensure_weight_tying=ensured)
    wrapped = {
        name: module.token_adapter
        for name, module in model.base_model.model.named_modules(remove_duplicate=False)
        if isinstance(module, TrainableTokensWrapper)
    }
    own = {n: a.token_indices["default"] for n, a in wrapped.items() if a.tied_adapter is None}
    reading = token_reading(base, config.to_dict())
    assert reading.ids == own
    tied = {n: a.tied_adapter for n, a in wrapped.items() if a.tied_adapter is not None}
    unused = {n for n in reading.followers if n.endswith("shared")}
    assert {
        n: wrapped[source] for n, source in reading.followers.items() if n not in unused
    } == tied


@pytest.mark.parametrize("kind", ["bart, classifying", "t5, classifying", "marian"])
def test_rows_that_peft_does_not_share_are_not_shared_here(kind: str, tmp_path: Path) -> None:
    base = base_of(kind, larger=kind == "marian")
    model, _ = by_peft(base, kind, IDS)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    again = copy.deepcopy(base)
    load_adapter(again, read_adapter(tmp_path), [])
    assert_close(outputs(again, kind), outputs(model, kind), 1e-5)


class Normed(nn.Embedding):
    """An embedding that computes more than a row and a factor."""

    def forward(self, input: Tensor) -> Tensor:
        """Return rows of length 1."""
        return nn.functional.normalize(super().forward(input), dim=-1)


class Scaled(nn.Embedding):
    """An embedding with a factor, as many models have it."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        """Return rows times the factor."""
        return super().forward(input) * self.embed_scale


def test_rows_that_peft_trained_of_an_embedding_of_another_kind_are_rejected(
    tmp_path: Path,
) -> None:
    base: Any = PhiForCausalLM(PhiConfig(**PHI))
    base.set_input_embeddings(Normed(100, 16))
    model, _ = by_peft(base, "llama", {"embed_tokens": IDS})
    model.save_pretrained(tmp_path)
    with pytest.raises(LoraError, match="is a Normed"):
        load_adapter(base, read_adapter(tmp_path), [])


def test_rows_of_an_output_layer_that_shares_them_and_has_a_bias_are_rejected(
    tmp_path: Path,
) -> None:
    base = PhiForCausalLM(PhiConfig(**PHI, tie_word_embeddings=True)).eval()
    torch.nn.init.normal_(base.lm_head.bias)
    before = outputs(base, "llama")
    model, _ = by_peft(base, "llama", IDS)
    assert_different(outputs(model.eval(), "llama"), before)  # untrained: PEFT leaves out the bias
    model.save_pretrained(tmp_path)
    with pytest.raises(LoraError, match="`lm_head` has a bias"):
        load_adapter(base, read_adapter(tmp_path), [])


@pytest.mark.parametrize(
    ("kind", "message"),
    [("bias", "leave out the bias of `lm_head`"), ("normed", "it is a Normed"), ("scaled", None)],
)
def test_layers_that_peft_computes_differently_are_reported(kind: str, message: str | None) -> None:
    for device in ("cpu", "meta"):
        with torch.device(device):
            base: Any = PhiForCausalLM(PhiConfig(**PHI))
            if kind != "bias":
                base.lm_head = nn.Linear(16, 100, bias=False)
                base.set_input_embeddings({"normed": Normed, "scaled": Scaled}[kind](100, 16))
        attach(base, recipe("llama"), [], token_ids=IDS)
        said = differences_in_peft(base, recipe("llama"), [])
        assert len(said) == (message is not None), said
        assert message is None or message in said[0]


def test_rows_that_peft_would_not_use_are_reported() -> None:
    model = base_of("llama")
    attach(model, recipe("llama"), [], token_ids=IDS)
    (said,) = token_differences(model, {"trainable_token_indices": {"lm_head": IDS}})
    assert "rows of tokens in `model.embed_tokens`: to use" in said


def test_without_a_configuration_nothing_is_tied() -> None:
    class Bare(nn.Module):
        _tied_weights_keys = {"head.weight": "embed_tokens.weight"}

        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed_tokens.weight

        def get_input_embeddings(self) -> nn.Module:
            return self.embed_tokens

    model = Bare()
    reading = token_reading(model, {"trainable_token_indices": [1, 2]})
    assert (reading.ids, reading.followers) == ({"embed_tokens": [1, 2]}, {})
    model.config = type("Config", (), {"tie_word_embeddings": True})()  # type: ignore[assignment]
    reading = token_reading(model, {"trainable_token_indices": [1, 2]})
    assert (reading.ids, reading.followers) == ({"embed_tokens": [1, 2]}, {"head": "embed_tokens"})
