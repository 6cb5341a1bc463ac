"""Let a language model write on from prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_cli.recipe.spec import GenerationSpec


def stop_ids(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, more: Collection[int] = ()
) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, the model's own, and others.

    A model may be published with several: Llama 3 ends a turn by another token than a text.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {int(tokenizer.eos_token_id), *more}
    return sorted(ends | ({own} if isinstance(own, int) else set(own or ())))


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    options: GenerationSpec,
    pad_id: int,
    positions: int | None,
    stops: Collection[int],
    streamer: Any = None,
) -> list[str]:
    """Return what the model says after each prompt; what stands beside it makes no difference.

    Args:
        model: The model, in eval mode.
        prompts: Token ids of each prompt. One that leaves no room is cut at its beginning.
        tokenizer: Of the model.
        options: How long, and how it is sampled.
        pad_id: What fills the rows.
        positions: How many tokens the model has positions for; None if that is not limited.
        stops: The tokens that end an answer, and are no part of it.
        streamer: Is given the tokens of a single prompt's answer as they come.
    """
    room = positions or 10**9
    prompts = [prompt[-(room - 1) :] for prompt in prompts]
    groups: dict[int, list[int]] = defaultdict(list)  # prompts by the length of their answers
    for i, prompt in enumerate(prompts):
        groups[min(options.max_new_tokens, room - len(prompt))].append(i)
    answers = [""] * len(prompts)
    for length, members in groups.items():
        ids = [prompts[i] for i in members]
        made = _continue(model, ids, length, stops, pad_id, options, streamer)
        for i, said in zip(members, made, strict=True):
            answers[i] = str(tokenizer.decode(said, skip_special_tokens=True))
    return answers


@torch.no_grad()
def _continue(
    model: nn.Module,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    stops: Collection[int],
    pad_id: int,
    options: GenerationSpec,
    streamer: Any = None,
) -> list[list[int]]:
    """Return the tokens that the model adds to each prompt, up to the first that ends it."""
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # on the left, so that every answer starts at once
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    sampling: dict[str, Any] = {"do_sample": options.temperature > 0, "top_k": 0}
    if options.temperature > 0:
        sampling |= {"temperature": options.temperature, "top_p": options.top_p}
    output = model.generate(  # type: ignore[operator]  # transformers' generation mix-in
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=list(stops),
        streamer=streamer,
        **sampling,
    )
    # cut by hand, as what fills a row after its end need not be a special token
    return [until_stop(row, stops) for row in output[:, width:].tolist()]


def until_stop(ids: Sequence[int], stops: Collection[int]) -> list[int]:
    """Return the tokens before the first that ends an answer."""
    return list(takewhile(lambda i: i not in stops, ids))
