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
    Writing,
    decoder_inputs,
    first_token,
    write_heard,
    write_targets,
)
from lora_cli.tasks.texts.padding import NONE, RIGHT

SOURCES = [[5, 60, 61, 62, 2], [9, 70, 2], [44, 45, 46, 47, 48, 49, 2]]


@pytest.fixture(scope="module")
def model() -> Any:
    made = translators.model("bart", seed=3).eval()
    made.generation_config = GenerationConfig()  # BART's own would force an end
    return made


@pytest.fixture(scope="module")
def how() -> Writing:
    tokenizer = translators.tokenizer("bart")
    return Writing(tokenizer, (), (tiny.EOS,), tiny.PAD, RIGHT, None, {tiny.EOS})


def by_transformers(model: Any, how: Writing, begin: tuple[int, ...], most: int) -> list[str]:
    """Return what transformers writes for each source by itself, behind some first tokens."""
    start = model.config.decoder_start_token_id
    config = GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD,
        suppress_tokens=[tiny.PAD], decoder_start_token_id=start,
    )  # fmt: skip
    found = []
    for source in SOURCES:
        output = model.generate(
            input_ids=torch.tensor([source]),
            decoder_input_ids=torch.tensor([[start, *begin]]),
            generation_config=config,
        )
        ids = [i for i in output[0, 1 + len(begin) :].tolist() if i != tiny.EOS]
        said = how.tokenizer.decode(ids)
        found.append(said.rstrip("\N{REPLACEMENT CHARACTER}").strip())
    return found


@pytest.mark.parametrize("padding", [RIGHT, NONE], ids=str)
@pytest.mark.parametrize("begin", [(), (300,), (300, 301), (300, 301, 302)])
def test_answers_follow_what_every_target_begins_with(
    begin: tuple[int, ...], padding: Any, model: Any, how: Writing
) -> None:
    written = replace(how, begin=begin, padding=padding)
    options = GenerationSpec(max_new_tokens=9)
    found = write_targets(model, SOURCES, options, written)
    # of one token it is written by the model, which is made to; of several it is given
    most = 9 - len(begin)
    wanted = by_transformers(model, how, begin, most)
    assert [answer.text for answer in found] == wanted
    assert len(set(wanted)) > 1  # there is something to differ in
    assert not any(answer.is_cut for answer in found)


@pytest.mark.parametrize("begin", [(), (300, 301)])
def test_answers_fit_into_the_positions_of_the_decoder(
    begin: tuple[int, ...], model: Any, how: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    generate = type(model).generate

    def noting(self: Any, **options: Any) -> Any:
        asked.append(options["generation_config"].max_new_tokens)
        return generate(self, **options)

    monkeypatch.setattr(type(model), "generate", noting)
    endless = replace(how, begin=begin, stops={299})
    for positions in (8, 2, 1):
        written = replace(endless, positions=positions)
        found = write_targets(model, SOURCES, GenerationSpec(max_new_tokens=20), written)
        assert all(answer.is_cut for answer in found)
    # the start token takes a position, and an answer has at least one
    assert asked == [max(n - 1 - len(begin), 1) for n in (8, 2, 1)]
    found = write_targets(model, SOURCES, GenerationSpec(max_new_tokens=5), endless)
    assert asked[-1] == 5 - len(begin)
    assert not any(answer.is_cut for answer in found)  # as long as was asked for
    for positions, is_cut in ((5, True), (6, False)):
        written = replace(endless, positions=positions)
        found = write_targets(model, SOURCES, GenerationSpec(max_new_tokens=5), written)
        assert [answer.is_cut for answer in found] == [is_cut] * len(SOURCES)


class Shifting(torch.nn.Module):
    """A model as M2M100, whose class has no method that shifts targets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = type("Config", (), {"decoder_start_token_id": 7, "pad_token_id": 1})()


def test_from_outputs_of_the_encoder_the_same_is_written_as_from_its_inputs(
    model: Any, how: Writing
) -> None:
    options = GenerationSpec(max_new_tokens=6)
    for source in SOURCES:
        heard = model.get_encoder()(input_ids=torch.tensor([source])).last_hidden_state
        wanted = write_targets(model, [source], options, how)
        assert write_heard(model, heard, options, how) == wanted


def test_the_decoder_reads_targets_one_place_to_the_right(model: Any) -> None:
    labels = torch.tensor([[5, 6, 2], [8, 2, IGNORED], [9, IGNORED, IGNORED]])
    wanted = torch.tensor([[7, 5, 6], [7, 8, 2], [7, 9, 1]])
    shifting = Shifting()
    assert torch.equal(decoder_inputs(shifting, labels), wanted)
    assert first_token(shifting, [5, 2]) == 7
    theirs: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
    assert torch.equal(decoder_inputs(model, labels), theirs)
    assert first_token(model, [5, 2]) == model.config.decoder_start_token_id


def test_sampling_keeps_every_token_that_the_recipe_does_not_leave_out(
    model: Any, how: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[GenerationConfig] = []
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, **options: given.append(options["generation_config"]) or torch.tensor([[2]]),
    )
    for options in (
        GenerationSpec(temperature=0.7, top_p=0.9),
        GenerationSpec(num_beams=3, length_penalty=0.5, no_repeat_ngram_size=2),
    ):
        write_targets(model, SOURCES[:1], options, how)
    sampled, searched = given
    assert (sampled.do_sample, sampled.temperature, sampled.top_p) == (True, 0.7, 0.9)
    assert sampled.top_k == 0
    assert not searched.do_sample
    assert (searched.num_beams, searched.length_penalty) == (3, 0.5)
    assert searched.no_repeat_ngram_size == 2
    assert searched.suppress_tokens == [tiny.PAD]
    write_targets(model, SOURCES[:1], GenerationSpec(), replace(how, stops={tiny.PAD}))
    assert given[-1].suppress_tokens is None  # what ends a text may be written
    assert given[-1].eos_token_id == [tiny.PAD]
