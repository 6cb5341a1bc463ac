"""Generates targets from sources with an encoder-decoder, by the recipe's settings alone."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.examples import IGNORED
from lora_cli.tasks.finite_scores import FiniteScores
from lora_cli.tasks.generation.text_generation import (
    Answer,
    before_stop,
    can_cache,
    decode,
    prepared_for_generation,
)
from lora_cli.tasks.texts.padding import Padding, fill, mask_of


@dataclass(frozen=True)
class DecodingSetup:
    """What is needed to generate targets, besides the model and the recipe's settings.

    Args:
        tokenizer: The model's tokenizer.
        begin: The tokens that begin every target, as in training, such as a language code.
        end: The tokens that end every target.
        pad: The token id for padding, which is never generated unless it is a stop token.
        padding: How sources are padded.
        positions: The number of positions of the decoder; None if it is not limited.
        stops: The tokens that end an answer.
        suppressed: More tokens that are never generated.
    """

    tokenizer: PreTrainedTokenizerBase
    begin: tuple[int, ...]
    end: tuple[int, ...]
    pad: int
    padding: Padding
    positions: int | None
    stops: Collection[int]
    suppressed: tuple[int, ...] = ()


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Return the inputs of the decoder in training: the targets, shifted right by one (B, T).

    Args:
        model: The encoder-decoder, which determines the first token.
        labels: The tokens of the targets (B, T), padded with `IGNORED`.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        # a copy, since FSMT changes its argument
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels.clone())
        return shifted
    # M2M100, NLLB and Blenderbot have no such method, but do the same in `forward`
    first = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    shifted_labels = torch.cat([first, labels[:, :-1]], dim=1)
    return shifted_labels.masked_fill(shifted_labels == IGNORED, model.config.pad_token_id)


def first_decoder_token(model: Any, target: Sequence[int]) -> int:
    """Return the first input token of the decoder; for some models, it is the target's last one."""
    device = next(model.parameters()).device
    return int(decoder_inputs(model, torch.tensor([list(target)], device=device))[0, 0])


@torch.no_grad()
def generate_targets(
    model: nn.Module,
    sources: Sequence[Sequence[int]],
    options: GenerationSpec,
    setup: DecodingSetup,
) -> list[Answer]:
    """Return the model's target for each source, which does not depend on the other sources.

    Args:
        model: The model, in eval mode.
        sources: The token ids of each source.
        options: The maximum length, and the settings of sampling and beam search.
        setup: The first and last tokens, padding and limits.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, source in enumerate(sources):
        groups[len(source) if setup.padding.side == "none" else 0].append(i)
    answers: dict[int, Answer] = {}
    device = next(model.parameters()).device
    for members in groups.values():
        rows = [list(sources[i]) for i in members]
        encoder_inputs = {
            "input_ids": fill(rows, setup.pad, 1, setup.padding).to(device),
            "attention_mask": mask_of(rows, 1, setup.padding).to(device),
        }
        generate: Any = model.generate
        written = _generate_answers(model, generate, encoder_inputs, len(members), options, setup)
        answers |= dict(zip(members, written, strict=True))
    return [answers[i] for i in range(len(sources))]


@torch.no_grad()
def generate_from_states(
    model: nn.Module, encoder_states: Tensor, options: GenerationSpec, setup: DecodingSetup
) -> list[Answer]:
    """Return the model's target for each row of encoder outputs, such as transcripts of recordings.

    Whisper's own `generate` follows the model's generation config, splits recordings, and tries
    again at other temperatures. Here, the method that all models share is used instead, so only the
    recipe's settings matter.

    Args:
        model: The model, in eval mode.
        encoder_states: The outputs of the encoder (B, T, D).
        options: The maximum length, and the settings of sampling and beam search.
        setup: The first and last tokens, padding and limits.
    """
    generate = functools.partial(GenerationMixin.generate, model)
    encoder_inputs = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=encoder_states),
        "attention_mask": torch.ones(
            encoder_states.shape[:2], dtype=torch.long, device=encoder_states.device
        ),
    }
    return _generate_answers(model, generate, encoder_inputs, len(encoder_states), options, setup)


def _generate_answers(
    model: Any,
    generate: Callable[..., Any],
    encoder_inputs: dict[str, Any],
    n_sources: int,
    options: GenerationSpec,
    setup: DecodingSetup,
) -> list[Answer]:
    """Return the model's target for each source of one batch.

    Args:
        model: The model.
        generate: The method of the model that generates tokens.
        encoder_inputs: The inputs of the encoder, or its outputs.
        n_sources: The number of sources.
        options: The maximum length, and the settings of sampling and beam search.
        setup: The first and last tokens, padding and limits.
    """
    answers = []
    positions = setup.positions
    is_short = positions is not None and positions - 1 < options.max_new_tokens
    for ids in _generate_tokens(model, generate, encoder_inputs, n_sources, options, setup):
        answer_ids = before_stop(ids, setup.stops)
        has_ended = len(answer_ids) < len(ids)
        text = decode(setup.tokenizer, answer_ids, is_cut=not has_ended)
        answers.append(Answer(text.strip(), is_short and not has_ended, has_ended))
    return answers


def _generate_tokens(
    model: Any,
    generate: Callable[..., Any],
    encoder_inputs: dict[str, Any],
    n_sources: int,
    options: GenerationSpec,
    setup: DecodingSetup,
) -> list[list[int]]:
    """Return the generated tokens of each target, without those that begin every target."""
    device = next(model.parameters()).device
    start = first_decoder_token(model, [*setup.begin, *setup.end])
    max_new_tokens = options.max_new_tokens
    if setup.positions is not None:
        max_new_tokens = max(min(max_new_tokens, setup.positions - 1), 1)
    extra_options: dict[str, Any] = {}
    n_given = 1 + len(
        setup.begin
    )  # removed here, since not all tokenizers treat language codes as special
    if len(setup.begin) == 1:
        extra_options["forced_bos_token_id"] = setup.begin[0]
    elif setup.begin:
        row = torch.tensor([[start, *setup.begin]], device=device)
        extra_options["decoder_input_ids"] = row.expand(n_sources, -1)
        max_new_tokens = max(max_new_tokens - len(setup.begin), 1)
    if options.temperature > 0:
        # top_k 0: transformers' own default would keep 50 tokens
        extra_options |= {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
        }
        extra_options["top_k"] = 0
    inputs = {key: extra_options.pop(key) for key in ["decoder_input_ids"] if key in extra_options}
    suppressed = [*setup.suppressed, *([] if setup.pad in setup.stops else [setup.pad])]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        decoder_start_token_id=start,
        pad_token_id=setup.pad,
        eos_token_id=list(setup.stops),
        suppress_tokens=suppressed or None,
        use_cache=can_cache(model),
        **extra_options,
    )
    with prepared_for_generation(model):
        output = generate(
            **encoder_inputs,
            generation_config=config,
            logits_processor=LogitsProcessorList([FiniteScores(model)]),
            **inputs,
        )
    found: list[list[int]] = output[:, n_given:].tolist()
    return found
