"""The loss of tokens, computed for some of them at a time, is the loss of all."""

from __future__ import annotations

from types import SimpleNamespace
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
from lora_cli.tasks.generation.output_head import HiddenStates, find_logit_transform, hidden_states

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CAPPED = {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
DECODERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "llama": (SMALL, "_unchanged"),
    "gpt2": ({"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}, "_unchanged"),
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


def test_small_logits_are_compared_as_closely_as_large_ones() -> None:
    model = decoder("granite", DECODERS["granite"][0])
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-7)
    found = find_logit_transform(model, scores_of(model))
    assert found is not None
    assert found.__name__ == "_divided"


@pytest.mark.parametrize("name", DECODERS)
def test_the_logit_transform_of_a_model_is_found(name: str) -> None:
    settings, wanted = DECODERS[name]
    model = decoder(name, settings)
    transform = find_logit_transform(model, scores_of(model))
    assert (transform and transform.__name__) == wanted


@pytest.mark.parametrize("name", TRANSLATORS)
def test_the_logit_transform_of_an_encoder_decoder_is_found(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **TRANSLATORS[name]))
    if name == "bart":
        model.final_logits_bias.normal_()
    compute = scores_of(model.eval(), decoder_input_ids=IDS)
    transform = find_logit_transform(model, compute)
    assert transform is not None
    assert transform.__name__ == ("_with_bias" if name == "bart" else "_unchanged")
    found = hidden_states(model.requires_grad_(False), transform, compute)
    assert isinstance(found, HiddenStates)
    torch.testing.assert_close(found.logits(found.states), compute())


@pytest.mark.parametrize("name", [name for name, (_, transform) in DECODERS.items() if transform])
def test_losses_and_gradients_equal_those_of_all_logits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "MAX_LOGITS", 0)
    model = decoder(name, DECODERS[name][0]).double()
    head = output_head.head_of(model)
    assert head is not None
    compute = scores_of(model)
    transform = find_logit_transform(model, compute)
    model.requires_grad_(False)
    table = model.get_input_embeddings().weight
    if head.weight is table:  # a head that is trained is given all scores
        head.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
    table.requires_grad_(True)
    positions, wanted = torch.tensor([0, 1, 4, 7, 8, 10]), torch.tensor([6, 7, 10, 13, 14, 16])
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0, 1.0], dtype=torch.float64)
    found = hidden_states(model, transform, compute)
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
    monkeypatch.setattr(output_head, "MAX_LOGITS", 300 * 8)
    assert output_head.MIN_ROWS == 256
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


def test_a_trained_or_float16_head_computes_all_logits() -> None:
    model = decoder("llama", SMALL)
    transform = find_logit_transform(model, scores_of(model))
    assert isinstance(hidden_states(model, transform, scores_of(model)), Tensor)
    model.requires_grad_(False)
    assert isinstance(hidden_states(model, transform, scores_of(model)), HiddenStates)
    model.half()
    assert isinstance(hidden_states(model, transform, scores_of(model)), Tensor)
    assert isinstance(hidden_states(model, None, scores_of(model)), Tensor)


def test_a_small_bias_is_found_next_to_scaled_logits() -> None:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **TRANSLATORS["bart"]))
    model.final_logits_bias.fill_(0.0)[0, 3] = 3e-4
    transform = find_logit_transform(model.eval(), scores_of(model, decoder_input_ids=IDS))
    assert transform is not None
    assert transform.__name__ == "_with_bias"


def test_too_few_tokens_for_a_trial_give_no_transform() -> None:
    model = decoder("gemma2", DECODERS["gemma2"][0])
    assert (
        find_logit_transform(model, lambda: model(input_ids=IDS[:, :2], use_cache=False).logits)
        is None
    )


def test_the_model_is_restored_afterwards() -> None:
    model = decoder("gemma2", DECODERS["gemma2"][0]).requires_grad_(False)
    compute = scores_of(model)
    before = compute()
    found = hidden_states(model, find_logit_transform(model, compute), compute)
    assert isinstance(found, HiddenStates)
    assert torch.equal(compute(), before)


@pytest.mark.parametrize(
    ("at_once", "parts"), [(300 * 8, [256, 300, 300, 44]), (8 * 8, [256, 256, 256, 132])]
)
def test_logits_in_memory_are_limited(
    at_once: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "MAX_LOGITS", at_once)
    sizes: list[int] = []

    def scores(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return states[:, :1].expand(-1, 8)

    places = torch.arange(900)
    HiddenStates(torch.ones(1, 900, 4), scores).losses(places, torch.zeros_like(places))
    assert sizes == parts


class Decoder(nn.Module):
    """A last layer, with something before it and something behind it, as a test wants them."""

    def __init__(self, size: float = 1.0, bias: float = 0.0, **settings: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight.data = torch.randn(6, 4, generator=generator) * size
        self.inputs = torch.randn(2, 5, 4, generator=generator)
        self.final_logits_bias = torch.zeros(6)
        self.final_logits_bias[3] = bias
        text = SimpleNamespace(**settings)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self) -> Tensor:
        scores: Tensor = self.head(self.inputs) + self.final_logits_bias
        return scores


def test_a_cap_far_above_the_usual_logits_is_found() -> None:
    """Recurrent Gemma's key, where scores as small as these do not show the cap."""
    model = Decoder(0.002, logits_soft_cap=30.0)
    compute = lambda: torch.tanh(model() / 30.0) * 30.0  # noqa: E731
    transform = find_logit_transform(model, compute)
    assert transform is not None
    assert transform.__name__ == "_capped"


def test_a_bias_is_found_next_to_logits_of_any_size() -> None:
    model = Decoder(1e-3, bias=5e-6)
    transform = find_logit_transform(model, model.forward)
    assert transform is not None
    assert transform.__name__ == "_with_bias"


def test_a_head_with_zero_outputs_is_unchanged() -> None:
    model = Decoder(0.0)
    transform = find_logit_transform(model, model.forward)
    assert transform is not None
    assert transform.__name__ == "_unchanged"


def test_three_tokens_are_enough_for_a_trial() -> None:
    model = Decoder()
    model.inputs = model.inputs[:, :3]
    assert find_logit_transform(model, model.forward) is not None
    model.inputs = model.inputs[:, :2]
    assert find_logit_transform(model, model.forward) is None


def test_a_head_that_is_used_in_another_way_gives_no_transform() -> None:
    model = Decoder()
    head = model.head
    for compute in (
        lambda: model.inputs @ head.weight.T,  # not at all
        lambda: head(model.inputs) + head(model.inputs),  # twice
        lambda: head(model.inputs[None])[0],  # as one of several
        lambda: F.pad(head(model.inputs), (0, 0, 0, 1)),  # with a token more
        lambda: head(model.inputs)[:, -1:],  # of the last token alone
    ):
        assert find_logit_transform(model, compute) is None
    assert find_logit_transform(nn.Linear(1, 1), model.forward) is None


def test_without_a_head_or_a_transform_all_logits_are_computed() -> None:
    model = Decoder().requires_grad_(False)
    transform = find_logit_transform(model, model.forward)
    assert isinstance(hidden_states(model, transform, model.forward), HiddenStates)
    assert torch.equal(hidden_states(model, None, model.forward), model())  # type: ignore[arg-type]
    other = nn.Linear(1, 1).requires_grad_(False)
    assert torch.equal(hidden_states(other, transform, model.forward), model())  # type: ignore[arg-type]
