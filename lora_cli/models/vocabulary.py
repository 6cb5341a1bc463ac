"""New tokens: in the tokenizer, and as rows of the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedTokenizerBase

from lora_cli.errors import LoraError, Problem
from lora_cli.recipe import Recipe

NEW = "n_new_tokens"  # attribute of a tokenizer: how many it was given, the last of its ids
SHOWN = 8  # parts of a text that is no token


def add_tokens(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Give a tokenizer the recipe's `model.add_tokens`; those that it has already stay as they are.

    Raises:
        LoraError: With each that cannot be a token.
    """
    tokens, at, problems = recipe.model.add_tokens, recipe.at("model.add_tokens"), []
    for i, token in enumerate(tokens):
        if token in tokens[:i]:
            problems.append(Problem(f"`{token}` is written twice", at, "write it once"))
        elif token != token.strip():
            what = f"`{token}` begins or ends with white space, which tokenizers treat on its own"
            problems.append(Problem(what, at, "leave the white space out"))
    if problems:
        raise LoraError(problems)
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new])
    setattr(tokenizer, NEW, len(new))
    for token in new:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if ids != [tokenizer.convert_tokens_to_ids(token)]:
            what = f"`{token}` cannot be a token of this tokenizer, which splits it all the same"
            raise LoraError(what, at, "choose another name, such as `<word>`")


def trained_token_ids(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the ids of the tokens whose rows the recipe trains, new ones first.

    Raises:
        LoraError: With each entry of `adapter.train_tokens` that is no token.
    """
    problems: list[Problem] = []
    found: dict[int, str] = {}
    size, at = len(tokenizer), recipe.at("adapter.train_tokens")
    for token in recipe.model.add_tokens:
        found[int(tokenizer.convert_tokens_to_ids(token))] = token
    named: dict[int, Any] = {}
    for entry in recipe.adapter.train_tokens:
        ids = [entry] if isinstance(entry, int) else _ids_of(entry, tokenizer)
        if len(ids) != 1 or not 0 <= ids[0] < size:
            what = f"there is no token {entry}: the ids are 0 to {size - 1:,}"
            hint = "write the token itself"
            if isinstance(entry, str):
                parts = [repr(part) for part in tokenizer.convert_ids_to_tokens(ids)[:SHOWN]]
                what = f"`{entry}` is no token: the tokenizer splits it into {', '.join(parts)}"
                hint = "to make it one, name it in `model.add_tokens`, which trains it too"
            problems.append(Problem(what, at, hint))
        elif ids[0] in named:
            what = f"`{entry}` is written twice"
            if entry != named[ids[0]]:
                what = f"`{entry}` and `{named[ids[0]]}` are the same token"
            problems.append(Problem(what, at, "write it once"))
        else:
            named[ids[0]] = entry
    if problems:
        raise LoraError(problems)
    return list({**found, **named})


def _ids_of(token: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the id of an entry of the vocabulary, or of the tokens that a text becomes."""
    known = tokenizer.get_vocab().get(token)
    return tokenizer.encode(token, add_special_tokens=False) if known is None else [known]


@torch.no_grad()
def grow_vocabulary(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> None:
    """Give a model rows for new tokens: each the mean of the rows of those before.

    The mean depends on nothing drawn, so a model that is loaded again has the same rows.

    Args:
        model: As loaded, or on the meta device; changed in place.
        tokenizer: With the new tokens in it.
        tokens: All that the recipe adds, of which the tokenizer may have had some before.
    """
    if not tokens:
        return
    ids = sorted(int(tokenizer.convert_tokens_to_ids(token)) for token in tokens)
    before = len(tokenizer) - getattr(tokenizer, NEW, 0)
    ids = [i for i in ids if i >= before]
    resizable: Any = model
    rows = resizable.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        with torch.random.fork_rng(devices=[]):  # it draws the new rows, which are set below
            torch.manual_seed(0)
            _resize(resizable, len(tokenizer))
    if not ids:
        return
    for module in {resizable.get_input_embeddings(), resizable.get_output_embeddings()} - {None}:
        for tensor in (module.weight, getattr(module, "bias", None)):
            if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.shape[0] > max(ids):
                mean = tensor[: min(before, rows)].float().mean(0)
                tensor[ids] = mean.to(tensor.dtype)


def _resize(model: Any, size: int) -> None:
    """Give a model an embedding of another size, whose new rows have no particular values.

    Marian's method would draw them around the mean of the others whatever it is asked for, which
    takes a decomposition of their covariance, and fails without weights.
    """
    methods = ("_init_added_embeddings_weights_with_mean", "_init_added_lm_head_weights_with_mean")
    replaced = [name for name in methods if hasattr(model, name)]
    for name in replaced:
        setattr(model, name, lambda *_, **__: None)
    try:
        model.resize_token_embeddings(size, mean_resizing=False)
    finally:
        for name in replaced:
            delattr(model, name)
