"""The loss of tokens, computed for some of them at a time, is the loss of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from lora_cli.tasks.generation import output_head
from lora_cli.tasks.generation.output_head import HiddenStates, find_finish, hidden_states

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CAPPED = {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
DECODERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "llama": (SMALL, "_as_they_are"),
    "gpt2": ({"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}, "_as_they_are"),
    "gemma2": ({**SMALL, **CAPPED}, "_capped"),
    "granite": ({**SMALL, "logits_scaling": 8.0}, "_divided"),
    "cohere": ({**SMALL, "logit_scale": 0.0625}, "_multiplied"),
    "falcon_h1": ({**SMALL, "lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2,
                   "mamba_d_head": 8, "mamba_d_state": 4}, None),
}  # fmt: skip
TRANSLATORS = {
    "bart": {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
             "decoder_ffn_dim": 16, "max_position_embeddings": 32, "pad_token_id": 0},
    "t5": {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1,
           "num_heads": 2},
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def decoder(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def scores_of(model: PreTrainedModel, **more: Tensor) -> Any:
    return lambda: model(input_ids=IDS, use_cache=False, **more).logits


@pytest.mark.parametrize("name", DECODERS)
def test_what_a_model_does_to_its_scores_is_found(name: str) -> None:
    settings, wanted = DECODERS[name]
    model = decoder(name, settings)
    finish = find_finish(model, scores_of(model))
    assert (finish and finish.__name__) == wanted


@pytest.mark.parametrize("name", TRANSLATORS)
def test_what_a_translator_does_to_its_scores_is_found(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **TRANSLATORS[name]))
    if name == "bart":
        model.final_logits_bias.normal_()
    compute = scores_of(model.eval(), decoder_input_ids=IDS)
    finish = find_finish(model, compute)
    assert finish is not None
    assert finish.__name__ == ("_with_bias" if name == "bart" else "_as_they_are")
    found = hidden_states(model.requires_grad_(False), finish, compute)
    assert isinstance(found, HiddenStates)
    torch.testing.assert_close(found.scores(found.states), compute())


@pytest.mark.parametrize("name", [name for name, (_, finish) in DECODERS.items() if finish])
def test_losses_and_gradients_are_those_of_all_scores(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "SCORES_AT_ONCE", 0)
    model = decoder(name, DECODERS[name][0]).double()
    head = output_head.head_of(model)
    assert head is not None
    compute = scores_of(model)
    finish = find_finish(model, compute)
    model.requires_grad_(False)
    table = model.get_input_embeddings().weight
    if head.weight is table:  # a head that is trained is given all scores
        head.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
    table.requires_grad_(True)
    positions, wanted = torch.tensor([0, 1, 4, 7, 8, 10]), torch.tensor([6, 7, 10, 13, 14, 16])
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0, 1.0], dtype=torch.float64)
    found = hidden_states(model, finish, compute)
    assert isinstance(found, HiddenStates)
    losses = found.losses(positions, wanted)
    (gradient,) = torch.autograd.grad(losses @ weights.to(losses.dtype), table)
    scores = compute().flatten(0, 1)[positions]
    plain = F.cross_entropy(scores.float(), wanted, reduction="none")
    (reference,) = torch.autograd.grad(plain @ weights.to(plain.dtype), table)
    torch.testing.assert_close(losses, plain)
    scale = float(reference.abs().max())  # the losses are computed in float32
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 700])
def test_any_number_of_tokens_has_a_loss(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_head, "SCORES_AT_ONCE", 300 * 8)
    torch.manual_seed(0)
    weight = torch.randn(8, 4)
    states = torch.randn(1, 1 + rows, 4, requires_grad=True)
    positions, wanted = torch.randperm(1 + rows)[:rows], torch.randint(0, 8, (rows,))
    outer = torch.rand(rows)
    losses = HiddenStates(states, lambda some: some @ weight.T).losses(positions, wanted)
    (gradient,) = torch.autograd.grad(losses @ outer, states)
    scores = (states[0] @ weight.T)[positions]
    plain = F.cross_entropy(scores, wanted, reduction="none")
    (reference,) = torch.autograd.grad(plain @ outer, states)
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(gradient, reference)


def test_a_head_that_is_trained_or_of_float16_computes_all_scores() -> None:
    model = decoder("llama", SMALL)
    finish = find_finish(model, scores_of(model))
    assert isinstance(hidden_states(model, finish, scores_of(model)), Tensor)
    model.requires_grad_(False)
    assert isinstance(hidden_states(model, finish, scores_of(model)), HiddenStates)
    model.half()
    assert isinstance(hidden_states(model, finish, scores_of(model)), Tensor)
    assert isinstance(hidden_states(model, None, scores_of(model)), Tensor)


def test_a_small_bias_is_not_lost_beside_stretched_scores() -> None:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **TRANSLATORS["bart"]))
    model.final_logits_bias.fill_(0.0)[0, 3] = 3e-4
    finish = find_finish(model.eval(), scores_of(model, decoder_input_ids=IDS))
    assert finish is not None
    assert finish.__name__ == "_with_bias"


def test_too_few_tokens_to_try_it_on_are_computed_as_they_are() -> None:
    model = decoder("gemma2", DECODERS["gemma2"][0])
    assert find_finish(model, lambda: model(input_ids=IDS[:, :2], use_cache=False).logits) is None


def test_the_model_is_afterwards_as_it_was() -> None:
    model = decoder("gemma2", DECODERS["gemma2"][0]).requires_grad_(False)
    compute = scores_of(model)
    before = compute()
    found = hidden_states(model, find_finish(model, compute), compute)
    assert isinstance(found, HiddenStates)
    assert torch.equal(compute(), before)
