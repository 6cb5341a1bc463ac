"""Generates text from prompts with a causal language model, by the recipe's settings alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from lora_cli.characters import without_half_character
from lora_cli.models.full_precision import full_precision
from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.finite_scores import FiniteScores
from lora_cli.tasks.texts.padding import (
    MOST_NOISE,
    Padding,
    fill,
    longest_with_equal_positions,
    mask_of,
    tolerance,
)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

LEFT = Padding("left")
TRIAL_TOKENS = 3  # the first is computed from the prompt, the others from the cache
SHORT_PROMPT = 16  # a prompt with fewer tokens may lie within the window of a convolution
Batching = Literal["any", "same length", "none"]
# for each model, which prompts it can answer in one batch, and the shortest and longest ones tried
_TRIALS: WeakKeyDictionary[nn.Module, tuple[Batching, int, int]] = WeakKeyDictionary()

# keys of a generation config that change no token, or that the recipe sets
NEUTRAL_KEYS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length",
    "max_new_tokens", "use_cache", "cache_implementation", "cache_config", "compile_config",
    "disable_compile", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "transformers_version", "_from_model_config",
    "return_legacy_cache", "remove_invalid_values",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The answer of a model to a prompt.

    Args:
        text: The answer as text.
        is_cut: Whether the answer was cut because the model has no more positions.
        has_ended: Whether the model ended the answer itself.
    """

    text: str
    is_cut: bool
    has_ended: bool = True


def stop_ids(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, others: Collection[int] = ()
) -> list[int]:
    """Return the tokens that end an answer: those of the tokenizer and of the model, and others.

    A model may have several: Llama 3 uses different tokens to end a turn and to end a text.
    """
    eos_ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or ())
    return sorted({int(tokenizer.eos_token_id), *others, *(i for i in ids if isinstance(i, int))})


def stop_note(
    tokenizer: PreTrainedTokenizerBase, stops: Collection[int], usual: Collection[int]
) -> str:
    """Return a note of the tokens that end an answer, if some of them are unusual; else empty.

    Args:
        tokenizer: The model's tokenizer.
        stops: The tokens that `stop_ids` returned.
        usual: The tokenizer's end-of-text token, and the chat template's end-of-turn token.
    """
    if set(stops) <= set(usual):
        return ""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    names = {i: tokenizer.convert_ids_to_tokens(i) for i in stops}
    shown = ", ".join(f"`{name}` ({i})" for i, name in names.items())
    note = f"answers end at {shown}"
    if words := [f"`{name}`" for i, name in names.items() if i not in special]:
        verb = "is an ordinary word" if len(words) == 1 else "are ordinary words"
        note += (
            f": {', '.join(words)} {verb} of the tokenizer; is `eos_token_id` of the base right?"
        )
    return note


def base_generation_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings in the base's generation config that would change the generated text."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return {}
    usual = GenerationConfig().to_dict()
    return {
        key: value
        for key, value in sorted(config.to_dict().items())
        if key not in NEUTRAL_KEYS and value is not None and value != usual.get(key)
    }


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    options: GenerationSpec,
    pad_id: int,
    positions: int | None,
    stops: Collection[int],
    streamer: Any = None,
) -> list[Answer]:
    """Return the model's answer to each prompt, which does not depend on the other prompts.

    Args:
        model: The model, in eval mode.
        prompts: The token ids of each prompt; each leaves room for at least one more token.
        tokenizer: The model's tokenizer.
        options: The maximum length, and the settings of sampling and beam search.
        pad_id: The token id for padding.
        positions: The number of positions of the model; None if it is not limited.
        stops: The tokens that end an answer, which are not part of it.
        streamer: A streamer of transformers, which receives the tokens as they are generated. It
            works with a single prompt only.
    """
    n_positions = positions or 10**9
    # prompts in one group have the same maximum length of answers, and can be answered in one batch
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    batching = _find_batching(model, prompts, pad_id, n_positions)
    longest = max(map(len, prompts), default=0) + options.max_new_tokens
    if batching == "any" and longest > longest_with_equal_positions(model):
        batching = "same length"
    for i, prompt in enumerate(prompts):
        assert 0 < len(prompt) < n_positions
        length = min(options.max_new_tokens, n_positions - len(prompt))
        group = {"any": 0, "same length": len(prompt), "none": -1 - i}[batching]
        groups[length, group].append(i)
    answers: dict[int, Answer] = {}
    for (length, _), members in groups.items():
        ids = [prompts[i] for i in members]
        for i, row in zip(
            members, _continue(model, ids, length, stops, pad_id, options, streamer), strict=True
        ):
            answer_ids = before_stop(row, stops)
            has_ended = len(answer_ids) < length
            text = decode(tokenizer, answer_ids, is_cut=not has_ended)
            answers[i] = Answer(text, not has_ended and length < options.max_new_tokens)
    return [answers[i] for i in range(len(prompts))]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], is_cut: bool) -> str:
    """Return tokens as text, without special tokens.

    A token may be only a part of a character. If the tokens were cut, an incomplete character at
    the end is removed. Tokenizers decode it as U+FFFD, which is kept if the model generated exactly
    that character.

    Args:
        tokenizer: The model's tokenizer.
        ids: The token ids.
        is_cut: Whether the tokens end because there was no room for more.
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
    """Return the last position at or before `cut` at which no character is divided."""
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
    """Return the tokens that the model generates for each prompt, padded to the same length."""
    inputs = _padded_left(model, prompts, pad_id)
    width = inputs["input_ids"].shape[1]
    sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        # top_k 0: transformers' own default would keep 50 tokens
        sampling |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=list(stops),
        use_cache=can_cache(model),
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        **sampling,
    )
    is_late = (
        streamer is not None and options.num_beams > 1
    )  # the best beam is known only at the end
    with prepared_for_generation(model):
        output = model.generate(  # type: ignore[operator]  # transformers' generation mix-in
            **inputs,
            generation_config=config,
            logits_processor=LogitsProcessorList([FiniteScores(model)]),
            streamer=None if is_late else streamer,
        )
    if is_late:
        streamer.put(output[0, :width])
        streamer.put(output[0, width:])
        streamer.end()
    tokens: list[list[int]] = output[:, width:].tolist()
    return tokens


def _padded_left(
    model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int
) -> dict[str, torch.Tensor]:
    """Return prompts as one batch (B, T), padded on the left so that all answers start together."""
    device, rows = next(model.parameters()).device, [list(prompt) for prompt in prompts]
    return {
        "input_ids": fill(rows, pad_id, 1, LEFT).to(device),
        "attention_mask": mask_of(rows, 1, LEFT).to(device),
    }


def _find_batching(
    model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, n_positions: int
) -> Batching:
    """Return which prompts can share a batch without changing each other's answers.

    This is tried on the shortest and the longest prompt, and again when a batch has a longer prompt
    than all before it, or a much shorter one. BART's decoder counts positions from the start of the
    row, including padding; RWKV mixes the rows of a batch even without padding.

    Args:
        model: The model.
        prompts: The token ids of each prompt.
        pad_id: The token id for padding.
        n_positions: The number of positions of the model.
    """
    if len(prompts) < 2:
        return "any"
    rows = sorted(map(list, prompts), key=len)
    short, long = rows[0], rows[-1]
    n_tokens = min(TRIAL_TOKENS, n_positions - len(long))
    batching, least, most = _TRIALS.get(model, ("any", len(short), len(short)))
    if model not in _TRIALS:
        others = (row[-len(short) :] for row in (*rows, short[::-1]))
        other = next((ids for ids in others if ids != short), short)
        if other == short:  # a copy of the prompt could not change its answer
            return "none"
        if not _is_unaffected_by(model, short, other, pad_id, n_tokens):
            batching = "none"
    # batches are sorted by falling length, so a trial for each shorter prompt would be too many
    is_wider = len(short) < (least if len(short) < SHORT_PROMPT else least / 2) or len(long) > most
    if (
        batching == "any"
        and is_wider
        and not _is_unaffected_by(model, short, long, pad_id, n_tokens)
    ):
        batching = "same length"
    tried = (min(least, len(short)), max(most, len(long))) if is_wider else (least, most)
    _TRIALS[model] = batching, *tried
    return batching


def _is_unaffected_by(
    model: nn.Module, short: Sequence[int], other: Sequence[int], pad_id: int, n_tokens: int
) -> bool:
    """Return whether another prompt in the batch leaves the logits after a short one unchanged.

    Rounding may depend on the size of the batch. A batch with a copy of the short prompt shows by
    how much.
    """
    batches = [short], [short, short], [short, other]
    with full_precision(model) as dtype:
        alone, copies, padded = (_greedy(model, batch, pad_id, n_tokens) for batch in batches)
    for (token, a), (copied, b), (other_token, c) in zip(alone, copies, padded, strict=True):
        noise, scale = float((a - b).abs().max()), float(a.abs().max())
        if not float((a - c).abs().max()) <= min(tolerance(a, noise, dtype), MOST_NOISE * scale):
            return False
        if not token == copied == other_token:  # a tie, after which the texts differ
            break
    return True


@torch.no_grad()
def _greedy(
    model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, n_tokens: int
) -> list[tuple[int, torch.Tensor]]:
    """Return the most likely tokens after the first prompt, each with its logits (V,)."""
    config = GenerationConfig(
        max_new_tokens=n_tokens, do_sample=False, pad_token_id=pad_id, output_logits=True,
        return_dict_in_generate=True, use_cache=can_cache(model),
    )  # fmt: skip
    with prepared_for_generation(model):
        output = model.generate(  # type: ignore[operator]  # transformers' generation mix-in
            **_padded_left(model, prompts, pad_id), generation_config=config
        )
    return [(int(logits[0].argmax()), logits[0].float()) for logits in output.logits]


def can_cache(model: nn.Module) -> bool:
    """Return whether the cache that transformers creates has an entry for each decoder layer.

    transformers reads the number of layers from `num_hidden_layers`. In the configurations of BART
    and similar models, this is the number of encoder layers. Without a cache, the answers are the
    same, but take longer.
    """
    config: Any = getattr(model, "config", None)
    n_layers = getattr(config, "num_hidden_layers", None)
    n_decoder_layers = getattr(config, "decoder_layers", None) or getattr(
        config, "num_decoder_layers", None
    )
    return not (
        isinstance(n_decoder_layers, int)
        and isinstance(n_layers, int)
        and n_decoder_layers > n_layers
    )


@contextmanager
def prepared_for_generation(model: nn.Module) -> Iterator[None]:
    """Prepare a model for `generate` within the context, and restore it afterwards.

    The model's generation config is replaced by an empty one, since `generate` takes from it what
    another config leaves open, such as penalties, beams and forced tokens. cuDNN's attention is
    turned off, since it plans each new length first, and each token of an answer is a new length.
    """
    generation_config, cuda = model.generation_config, torch.backends.cuda
    uses_cudnn: bool = cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig()
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        model.generation_config = generation_config
        cuda.enable_cudnn_sdp(uses_cudnn)


def before_stop(ids: Sequence[int], stops: Collection[int]) -> list[int]:
    """Return the tokens before the first stop token."""
    return list(takewhile(lambda i: i not in stops, ids))
