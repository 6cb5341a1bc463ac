"""Let a language model write on from prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_cli.characters import without_half_character
from lora_cli.recipe.spec import GenerationSpec

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


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
            answers[i] = decode(tokenizer, said, is_cut=len(said) == length)
    return answers


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], is_cut: bool) -> str:
    """Return tokens as text, without special ones.

    A token may be a part of a character only: where the tokens were cut, the part that is left at
    the end is dropped. (What a tokenizer writes for it, U+FFFD, may also be what a model said.)

    Args:
        tokenizer: Of the model.
        ids: The tokens.
        is_cut: Whether they end because there was no room for more.
    """
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if not is_cut:
        return text
    if text.endswith(REPLACEMENT):
        written = tokenizer(REPLACEMENT, add_special_tokens=False)["input_ids"]
        if not written or list(ids[-len(written) :]) != list(written):
            text = text.rstrip(REPLACEMENT)
    return without_half_character(text)


def whole_characters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], cut: int) -> int:
    """Return where to cut tokens at or before `cut` so that no character is divided."""
    if cut >= len(ids):
        return len(ids)
    for end in range(cut, max(cut - 4, 0), -1):  # a character has four bytes at most
        if not str(tokenizer.decode(ids[:end])).endswith(REPLACEMENT):
            return end
    return cut


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
