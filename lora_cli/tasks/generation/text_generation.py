"""Let a language model write on from prompts, as the recipe asks and in no other way."""

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
from lora_cli.tasks.texts.padding import MOST_NOISE, Padding, fill, mask_of, tolerance

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

LEFT = Padding("left")
TRIAL_TOKENS = 3  # the first comes from the prompt, the others from what the model keeps of it
FEW_TOKENS = 16  # a convolution over so many tokens reads all of a prompt
Together = Literal["any", "same length", "none"]
# which prompts each model can answer together, and the shortest and longest that showed it
_TRIED: WeakKeyDictionary[nn.Module, tuple[Together, int, int]] = WeakKeyDictionary()

# keys of a generation config that change no token: ids, limits that the recipe sets, formats
NEUTRAL = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length",
    "max_new_tokens", "use_cache", "cache_implementation", "cache_config", "compile_config",
    "disable_compile", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "transformers_version", "_from_model_config",
    "return_legacy_cache", "remove_invalid_values",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Args:
        text: Its words.
        is_cut: The model has no position for another token, and it had not ended.
        has_ended: It ended by itself.
    """

    text: str
    is_cut: bool
    has_ended: bool = True


def stop_ids(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, more: Collection[int] = ()
) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, the model's own, and others.

    A model may be published with several: Llama 3 ends a turn by another token than a text.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [own] if isinstance(own, int) else list(own or ())
    return sorted({int(tokenizer.eos_token_id), *more, *(i for i in ids if isinstance(i, int))})


def stop_note(
    tokenizer: PreTrainedTokenizerBase, stops: Collection[int], usual: Collection[int]
) -> str:
    """Return which tokens end an answer, if the base's files name others than the usual ones.

    Args:
        tokenizer: Of the model.
        stops: What `stop_ids` returned.
        usual: The tokenizer's end of a text, and what the chat template ends a turn with.
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
    """Return what the base's generation config asks for that would change what is written."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return {}
    usual = GenerationConfig().to_dict()
    return {
        key: value
        for key, value in sorted(config.to_dict().items())
        if key not in NEUTRAL and value is not None and value != usual.get(key)
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
    """Return what the model says after each prompt; the other prompts make no difference to it.

    Args:
        model: The model, in eval mode.
        prompts: Token ids of each prompt; each leaves room for at least one token.
        tokenizer: Of the model.
        options: How long, and how it is sampled.
        pad_id: What fills the rows.
        positions: How many tokens the model has positions for; None if that is not limited.
        stops: The tokens that end an answer, and are no part of it.
        streamer: Is given the tokens of a single prompt's answer as they come.
    """
    room = positions or 10**9
    # prompts by the length of their answers, and by what the model can answer together
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    together = _answered_together(model, prompts, pad_id, room)
    longest = max(map(len, prompts), default=0) + options.max_new_tokens
    if together == "any" and longest > _same_positions(model):
        together = "same length"
    for i, prompt in enumerate(prompts):
        assert 0 < len(prompt) < room
        length = min(options.max_new_tokens, room - len(prompt))
        own = {"any": 0, "same length": len(prompt), "none": -1 - i}[together]
        groups[length, own].append(i)
    answers: dict[int, Answer] = {}
    for (length, _), members in groups.items():
        ids = [prompts[i] for i in members]
        for i, row in zip(
            members, _continue(model, ids, length, stops, pad_id, options, streamer), strict=True
        ):
            said = until_stop(row, stops)
            has_ended = len(said) < length
            text = decode(tokenizer, said, is_cut=not has_ended)
            answers[i] = Answer(text, not has_ended and length < options.max_new_tokens)
    return [answers[i] for i in range(len(prompts))]


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
    """Return the tokens that the model adds to each prompt, and what fills the row behind them."""
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
    is_late = streamer is not None and options.num_beams > 1  # which beam wins is known at the end
    with while_generating(model):
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
    """Return prompts as one batch, padded on the left so that all answers start together."""
    device, rows = next(model.parameters()).device, [list(prompt) for prompt in prompts]
    return {
        "input_ids": fill(rows, pad_id, 1, LEFT).to(device),
        "attention_mask": mask_of(rows, 1, LEFT).to(device),
    }


def _same_positions(model: nn.Module) -> int:
    """Return up to how many tokens in a row all rows of a batch have the positions they have alone.

    LongRoPE scales the positions of the whole batch otherwise once its longest row has more.
    """
    config: Any = getattr(model, "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    rope = rope if isinstance(rope, dict) else {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return 10**9
    own = rope.get("original_max_position_embeddings")
    own = own or getattr(config, "original_max_position_embeddings", None)
    return int(own) if own else 0


def _answered_together(
    model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, room: int
) -> Together:
    """Return which prompts the model answers in one batch as it answers each alone.

    It is tried on the shortest and the longest prompt, and again when a batch has a longer one than
    any before, or a much shorter one. BART's decoder counts positions from the start of the row,
    padded or not; RWKV mixes the rows of a batch even without padding.

    Args:
        model: The model.
        prompts: Token ids of each prompt.
        pad_id: What pads the rows.
        room: Tokens that the model has positions for.
    """
    if len(prompts) < 2:
        return "any"
    rows = sorted(map(list, prompts), key=len)
    short, long = rows[0], rows[-1]
    n_tokens = min(TRIAL_TOKENS, room - len(long))
    together, least, most = _TRIED.get(model, ("any", len(short), len(short)))
    if model not in _TRIED:
        others = (row[-len(short) :] for row in (*rows, short[::-1]))
        other = next((ids for ids in others if ids != short), short)
        if other == short:  # the same prompt again: it shows nothing
            return "none"
        if not _is_same_next_to(model, short, other, pad_id, n_tokens):
            together = "none"
    # batches come from the longest rows to the shortest: not each of them is tried
    is_wider = len(short) < (least if len(short) < FEW_TOKENS else least / 2) or len(long) > most
    if (
        together == "any"
        and is_wider
        and not _is_same_next_to(model, short, long, pad_id, n_tokens)
    ):
        together = "same length"
    tried = (min(least, len(short)), max(most, len(long))) if is_wider else (least, most)
    _TRIED[model] = together, *tried
    return together


def _is_same_next_to(
    model: nn.Module, short: Sequence[int], other: Sequence[int], pad_id: int, n_tokens: int
) -> bool:
    """Return whether the logits after a short prompt do not depend on another one next to it.

    Rounding may differ with the size of a batch: a copy of the short prompt shows by how much.
    """
    batches = [short], [short, short], [short, other]
    with full_precision(model) as dtype:
        alone, copies, padded = (_greedy(model, batch, pad_id, n_tokens) for batch in batches)
    for (token, a), (copied, b), (found, c) in zip(alone, copies, padded, strict=True):
        noise, scale = float((a - b).abs().max()), float(a.abs().max())
        if not float((a - c).abs().max()) <= min(tolerance(a, noise, dtype), MOST_NOISE * scale):
            return False
        if not token == copied == found:  # a tie: what follows is another text
            break
    return True


@torch.no_grad()
def _greedy(
    model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, n_tokens: int
) -> list[tuple[int, torch.Tensor]]:
    """Return the likeliest tokens after the first prompt, each with the logits (V,) it is from."""
    config = GenerationConfig(
        max_new_tokens=n_tokens, do_sample=False, pad_token_id=pad_id, output_logits=True,
        return_dict_in_generate=True, use_cache=can_cache(model),
    )  # fmt: skip
    with while_generating(model):
        output = model.generate(  # type: ignore[operator]  # transformers' generation mix-in
            **_padded_left(model, prompts, pad_id), generation_config=config
        )
    return [(int(logits[0].argmax()), logits[0].float()) for logits in output.logits]


def can_cache(model: nn.Module) -> bool:
    """Return whether transformers makes a cache with a place for each layer that fills one.

    It counts a decoder's layers by `num_hidden_layers`, which in the configurations of BART and its
    relatives is the number of the encoder's. Without a cache, answers are the same, and slower.
    """
    config: Any = getattr(model, "config", None)
    counted = getattr(config, "num_hidden_layers", None)
    own = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
    return not (isinstance(own, int) and isinstance(counted, int) and own > counted)


@contextmanager
def while_generating(model: nn.Module) -> Iterator[None]:
    """Prepare a model for `generate`, and leave it as it was.

    Its own generation config is taken away: `generate` fills what another config leaves open with
    it, such as penalties, beams and forced tokens. Attention is not computed by cuDNN, which plans
    anew for each length that it has not seen, and an answer has a new length with each token.
    """
    own, attention = model.generation_config, torch.backends.cuda
    planned: bool = attention.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig()
    attention.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        model.generation_config = own
        attention.enable_cudnn_sdp(planned)


def until_stop(ids: Sequence[int], stops: Collection[int]) -> list[int]:
    """Return the tokens before the first that ends an answer."""
    return list(takewhile(lambda i: i not in stops, ids))
