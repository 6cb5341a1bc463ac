"""How targets are written: what they begin with, how long they get, and that each stands alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_translators as translators
import torch
from torch import Tensor
from transformers import GenerationConfig

from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.examples import IGNORED
from lora_cli.tasks.generation.seq2seq_generation import (
    DecodingSetup,
    decoder_inputs,
    first_decoder_token,
    generate_from_states,
    generate_targets,
)
from lora_cli.tasks.texts.padding import NONE, RIGHT

SOURCES = [[5, 60, 61, 62, 2], [9, 70, 2], [44, 45, 46, 47, 48, 49, 2]]


@pytest.fixture(scope="module")
def model() -> Any:
    model = translators.model("bart", seed=3).eval()
    model.generation_config = GenerationConfig()  # BART's own would force an end
    return model


@pytest.fixture(scope="module")
def setup() -> DecodingSetup:
    tokenizer = translators.tokenizer("bart")
    return DecodingSetup(tokenizer, (), (tiny.EOS,), tiny.PAD, RIGHT, None, {tiny.EOS})


def by_transformers(
    model: Any, setup: DecodingSetup, begin: tuple[int, ...], max_new_tokens: int
) -> list[str]:
    """Return what transformers writes for each source by itself, behind some first tokens."""
    start = model.config.decoder_start_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, decoder_start_token_id=start,
        eos_token_id=tiny.EOS, pad_token_id=tiny.PAD, suppress_tokens=[tiny.PAD],
    )  # fmt: skip
    texts = []
    for source in SOURCES:
        output = model.generate(
            input_ids=torch.tensor([source]),
            decoder_input_ids=torch.tensor([[start, *begin]]),
            generation_config=config,
        )
        ids = [i for i in output[0, 1 + len(begin) :].tolist() if i != tiny.EOS]
        text = setup.tokenizer.decode(ids)
        texts.append(text.rstrip("\N{REPLACEMENT CHARACTER}").strip())
    return texts


@pytest.mark.parametrize("padding", [RIGHT, NONE], ids=str)
@pytest.mark.parametrize("begin", [(), (300,), (300, 301), (300, 301, 302)])
def test_answers_follow_what_every_target_begins_with(
    begin: tuple[int, ...], padding: Any, model: Any, setup: DecodingSetup
) -> None:
    prefixed = replace(setup, begin=begin, padding=padding)
    options = GenerationSpec(max_new_tokens=9)
    answers = generate_targets(model, SOURCES, options, prefixed)
    # of one token it is written by the model, which is made to; of several it is given
    max_new_tokens = 9 - len(begin)
    expected = by_transformers(model, setup, begin, max_new_tokens)
    assert [answer.text for answer in answers] == expected
    assert len(set(expected)) > 1  # there is something to differ in
    assert not any(answer.is_cut for answer in answers)


@pytest.mark.parametrize("begin", [(), (300, 301)])
def test_answers_fit_into_the_positions_of_the_decoder(
    begin: tuple[int, ...], model: Any, setup: DecodingSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    generate = type(model).generate

    def record(self: Any, **options: Any) -> Any:
        lengths.append(options["generation_config"].max_new_tokens)
        return generate(self, **options)

    monkeypatch.setattr(type(model), "generate", record)
    endless = replace(setup, begin=begin, stops={299})
    for positions in (8, 2, 1):
        limited = replace(endless, positions=positions)
        answers = generate_targets(model, SOURCES, GenerationSpec(max_new_tokens=20), limited)
        assert all(answer.is_cut for answer in answers)
    # the start token takes a position, and an answer has at least one
    assert lengths == [max(n - 1 - len(begin), 1) for n in (8, 2, 1)]
    answers = generate_targets(model, SOURCES, GenerationSpec(max_new_tokens=5), endless)
    assert lengths[-1] == 5 - len(begin)
    assert not any(answer.is_cut for answer in answers)  # as long as was asked for
    for positions, is_cut in ((5, True), (6, False)):
        limited = replace(endless, positions=positions)
        answers = generate_targets(model, SOURCES, GenerationSpec(max_new_tokens=5), limited)
        assert [answer.is_cut for answer in answers] == [is_cut] * len(SOURCES)


class Shifting(torch.nn.Module):
    """A model as M2M100, whose class has no method that shifts targets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = type("Config", (), {"decoder_start_token_id": 7, "pad_token_id": 1})()


def test_from_outputs_of_the_encoder_the_same_is_written_as_from_its_inputs(
    model: Any, setup: DecodingSetup
) -> None:
    options = GenerationSpec(max_new_tokens=6)
    for source in SOURCES:
        states = model.get_encoder()(input_ids=torch.tensor([source])).last_hidden_state
        expected = generate_targets(model, [source], options, setup)
        assert generate_from_states(model, states, options, setup) == expected


def test_the_decoder_reads_targets_one_place_to_the_right(model: Any) -> None:
    labels = torch.tensor([[5, 6, 2], [8, 2, IGNORED], [9, IGNORED, IGNORED]])
    expected = torch.tensor([[7, 5, 6], [7, 8, 2], [7, 9, 1]])
    shifting = Shifting()
    assert torch.equal(decoder_inputs(shifting, labels), expected)
    assert first_decoder_token(shifting, [5, 2]) == 7
    by_model: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
    assert torch.equal(decoder_inputs(model, labels), by_model)
    assert first_decoder_token(model, [5, 2]) == model.config.decoder_start_token_id


def test_sampling_keeps_every_token_that_the_recipe_does_not_leave_out(
    model: Any, setup: DecodingSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[GenerationConfig] = []
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, **options: configs.append(options["generation_config"]) or torch.tensor([[2]]),
    )
    for options in (
        GenerationSpec(temperature=0.7, top_p=0.9),
        GenerationSpec(num_beams=3, length_penalty=0.5, no_repeat_ngram_size=2),
    ):
        generate_targets(model, SOURCES[:1], options, setup)
    sampled, searched = configs
    assert (sampled.do_sample, sampled.temperature, sampled.top_p) == (True, 0.7, 0.9)
    assert sampled.top_k == 0
    assert not searched.do_sample
    assert (searched.num_beams, searched.length_penalty) == (3, 0.5)
    assert searched.no_repeat_ngram_size == 2
    assert searched.suppress_tokens == [tiny.PAD]
    generate_targets(model, SOURCES[:1], GenerationSpec(), replace(setup, stops={tiny.PAD}))
    assert configs[-1].suppress_tokens is None  # what ends a text may be written
    assert configs[-1].eos_token_id == [tiny.PAD]
