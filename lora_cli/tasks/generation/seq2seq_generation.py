"""Let an encoder-decoder write the targets of sources, as the recipe asks and in no other way."""

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
    can_cache,
    decode,
    until_stop,
    while_generating,
)
from lora_cli.tasks.texts.padding import Padding, fill, mask_of


@dataclass(frozen=True)
class Writing:
    """How targets are written.

    Args:
        tokenizer: Of the model.
        begin: The tokens that every target begins with, as in training: the code of a language.
        end: Those that end it.
        pad: What fills the rows, and is never written.
        padding: On which side sources are filled.
        positions: How many tokens the decoder has positions for; None if that is not limited.
        stops: The tokens that end an answer.
        never: Tokens that are never written, besides what fills the rows.
    """

    tokenizer: PreTrainedTokenizerBase
    begin: tuple[int, ...]
    end: tuple[int, ...]
    pad: int
    padding: Padding
    positions: int | None
    stops: Collection[int]
    never: tuple[int, ...] = ()


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Return what the decoder reads while it learns targets: these, one place to the right.

    Args:
        model: The encoder-decoder; its architecture says what the first token is.
        labels: Tokens of the targets (B, T), filled with `IGNORED`.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        # a copy, as FSMT fills what it is given
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels.clone())
        return shifted
    # M2M100, NLLB and Blenderbot do it so in their `forward`, and have no method for it
    first = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    moved = torch.cat([first, labels[:, :-1]], dim=1)
    return moved.masked_fill(moved == IGNORED, model.config.pad_token_id)


def first_token(model: Any, target: Sequence[int]) -> int:
    """Return what the decoder reads first; some models put there what ends a target."""
    device = next(model.parameters()).device
    return int(decoder_inputs(model, torch.tensor([list(target)], device=device))[0, 0])


@torch.no_grad()
def write_targets(
    model: nn.Module, sources: Sequence[Sequence[int]], options: GenerationSpec, how: Writing
) -> list[Answer]:
    """Return what the model writes for each source; the other sources make no difference to it.

    Args:
        model: The model, in eval mode.
        sources: Tokens of the sources.
        options: How long, and how it is searched or sampled.
        how: What it begins and ends with.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, source in enumerate(sources):
        groups[len(source) if how.padding.side == "none" else 0].append(i)
    answers: dict[int, Answer] = {}
    device = next(model.parameters()).device
    for members in groups.values():
        rows = [list(sources[i]) for i in members]
        read = {
            "input_ids": fill(rows, how.pad, 1, how.padding).to(device),
            "attention_mask": mask_of(rows, 1, how.padding).to(device),
        }
        written = _answers(model, model.generate, read, len(members), options, how)  # type: ignore[arg-type]
        answers |= dict(zip(members, written, strict=True))
    return [answers[i] for i in range(len(sources))]


@torch.no_grad()
def write_heard(
    model: nn.Module, heard: Tensor, options: GenerationSpec, how: Writing
) -> list[Answer]:
    """Return what a model of speech writes for each recording.

    Whisper's own `generate` reads its configuration, divides recordings and tries again at other
    temperatures; here it is the one that all models have, as the recipe asks and in no other way.

    Args:
        model: The model, in eval mode.
        heard: What its encoder made of the recordings (B, T, D).
        options: How long, and how it is searched or sampled.
        how: What it begins and ends with.
    """
    generate = functools.partial(GenerationMixin.generate, model)
    read = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=heard),
        "attention_mask": torch.ones(heard.shape[:2], dtype=torch.long, device=heard.device),
    }
    return _answers(model, generate, read, len(heard), options, how)


def _answers(
    model: Any,
    generate: Callable[..., Any],
    read: dict[str, Any],
    count: int,
    options: GenerationSpec,
    how: Writing,
) -> list[Answer]:
    """Return what a model writes for so many sources.

    Args:
        model: The model.
        generate: Its method.
        read: What its encoder reads, or has made of it.
        count: How many sources there are.
        options: How long, and how it is searched or sampled.
        how: What it begins and ends with.
    """
    answers = []
    positions = how.positions
    is_short = positions is not None and positions - 1 < options.max_new_tokens
    for ids in _written(model, generate, read, count, options, how):
        said = until_stop(ids, how.stops)
        has_ended = len(said) < len(ids)
        text = decode(how.tokenizer, said, is_cut=not has_ended)
        answers.append(Answer(text.strip(), is_short and not has_ended, has_ended))
    return answers


def _written(
    model: Any,
    generate: Callable[..., Any],
    read: dict[str, Any],
    count: int,
    options: GenerationSpec,
    how: Writing,
) -> list[list[int]]:
    """Return the tokens that follow those that every target begins with."""
    device = next(model.parameters()).device
    start = first_token(model, [*how.begin, *how.end])
    room = options.max_new_tokens
    if how.positions is not None:
        room = max(min(room, how.positions - 1), 1)
    first: dict[str, Any] = {}
    given = 1 + len(how.begin)  # which are no words: some tokenizers do not know that of a code
    if len(how.begin) == 1:
        first["forced_bos_token_id"] = how.begin[0]
    elif how.begin:
        row = torch.tensor([[start, *how.begin]], device=device)
        first["decoder_input_ids"] = row.expand(count, -1)
        room = max(room - len(how.begin), 1)
    if options.temperature > 0:
        # top_k 0: transformers' own default would keep 50 tokens
        first |= {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
        first["top_k"] = 0
    inputs = {key: first.pop(key) for key in ["decoder_input_ids"] if key in first}
    never = [*how.never, *([] if how.pad in how.stops else [how.pad])]
    config = GenerationConfig(
        max_new_tokens=room,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        decoder_start_token_id=start,
        pad_token_id=how.pad,
        eos_token_id=list(how.stops),
        suppress_tokens=never or None,
        use_cache=can_cache(model),
        **first,
    )
    with while_generating(model):
        output = generate(
            **read,
            generation_config=config,
            logits_processor=LogitsProcessorList([FiniteScores(model)]),
            **inputs,
        )
    found: list[list[int]] = output[:, given:].tolist()
    return found
