"""Add new tokens to the tokenizer, and rows for them to the embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedTokenizerBase

from lora_cli.errors import LoraError, Problem
from lora_cli.recipe import Recipe

N_NEW_TOKENS = "n_new_tokens"  # attribute of a tokenizer; the new tokens have the last ids
MAX_SHOWN = 8  # tokens in a message on a text that is not a single token


def add_tokens(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Add the recipe's `model.add_tokens` to a tokenizer, except those that it already has.

    Raises:
        LoraError: With each entry that cannot be a token.
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
    setattr(tokenizer, N_NEW_TOKENS, len(new))
    for token in new:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if ids != [tokenizer.convert_tokens_to_ids(token)]:
            what = f"`{token}` cannot be a token of this tokenizer, which splits it all the same"
            raise LoraError(what, at, "choose another name, such as `<word>`")


def trained_token_ids(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the ids of the tokens whose rows the recipe trains, new ones first.

    Raises:
        LoraError: With each entry of `adapter.train_tokens` that is not a token.
    """
    problems: list[Problem] = []
    new_tokens: dict[int, str] = {}
    size, at = len(tokenizer), recipe.at("adapter.train_tokens")
    for token in recipe.model.add_tokens:
        new_tokens[int(tokenizer.convert_tokens_to_ids(token))] = token
    token_entries: dict[int, Any] = {}
    for entry in recipe.adapter.train_tokens:
        ids = [entry] if isinstance(entry, int) else _ids_of(entry, tokenizer)
        if len(ids) != 1 or not 0 <= ids[0] < size:
            what = f"there is no token {entry}: the ids are 0 to {size - 1:,}"
            hint = "write the token itself"
            if isinstance(entry, str):
                parts = [repr(part) for part in tokenizer.convert_ids_to_tokens(ids)[:MAX_SHOWN]]
                what = f"`{entry}` is no token: the tokenizer splits it into {', '.join(parts)}"
                hint = "to make it one, name it in `model.add_tokens`, which trains it too"
            problems.append(Problem(what, at, hint))
        elif ids[0] in token_entries:
            what = f"`{entry}` is written twice"
            if entry != token_entries[ids[0]]:
                what = f"`{entry}` and `{token_entries[ids[0]]}` are the same token"
            problems.append(Problem(what, at, "write it once"))
        else:
            token_entries[ids[0]] = entry
    if problems:
        raise LoraError(problems)
    return list({**new_tokens, **token_entries})


def _ids_of(token: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the id of a token of the vocabulary, or the ids of the tokens of another text."""
    token_id = tokenizer.get_vocab().get(token)
    return tokenizer.encode(token, add_special_tokens=False) if token_id is None else [token_id]


@torch.no_grad()
def grow_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Add rows for new tokens to a model's embeddings, each the mean of the old rows.

    The mean does not depend on random numbers, so a reloaded model has the same rows.

    Args:
        model: The loaded model, or a model on the meta device; changed in place.
        tokenizer: The tokenizer, with the new tokens.
        recipe: Its `model.add_tokens` are the new tokens, of which the base may have some already.

    Raises:
        LoraError: If resizing would replace an embedding by another one.
    """
    tokens = recipe.model.add_tokens
    if not tokens:
        return
    ids = sorted(int(tokenizer.convert_tokens_to_ids(token)) for token in tokens)
    n_old = len(tokenizer) - getattr(tokenizer, N_NEW_TOKENS, 0)
    ids = [i for i in ids if i >= n_old]
    resizable: Any = model
    rows = resizable.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        weights = _embedding_weights(model)
        with torch.random.fork_rng(devices=[]):  # resizing initialises the rows at random
            torch.manual_seed(0)
            _resize(resizable, len(tokenizer))
        if replaced := _replaced(weights, _embedding_weights(model)):
            name, other = replaced
            what = f"with more tokens, transformers would replace `{name}` by `{other}`"
            hint = "this base has an embedding for each of its sides: leave `add_tokens` out"
            raise LoraError(what, recipe.at("model.add_tokens"), hint)
    if not ids:
        return
    for module in {resizable.get_input_embeddings(), resizable.get_output_embeddings()} - {None}:
        for tensor in (module.weight, getattr(module, "bias", None)):
            if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.shape[0] > max(ids):
                mean = tensor[: min(n_old, rows)].float().mean(0)
                tensor[ids] = mean.to(tensor.dtype)


def _embedding_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model's embeddings, by each of their names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module.weight for name, module in named if isinstance(module, nn.Embedding)}


def _replaced(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[str, str] | None:
    """Return two embeddings that had weights of their own before and are one now, or None."""
    for name, weight in after.items():
        for other, other_weight in after.items():
            if name == other:
                break
            if weight is other_weight and before[name] is not before[other]:
                return name, other
    return None


def _resize(model: Any, size: int) -> None:
    """Resize a model's embeddings; the values of new rows are arbitrary.

    Marian ignores `mean_resizing=False` and samples new rows around the mean of the others. This
    needs a decomposition of their covariance, and fails on the meta device.
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
