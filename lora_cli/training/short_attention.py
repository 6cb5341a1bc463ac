"""Let transformers' models compute attention over short rows with the kernel made for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.training.short_attention_kernel import HEADS, LONGEST, short_attention

SEEDS = 2**31 - 1  # numbers that a seed of dropout is drawn from


@contextmanager
def short_attention_in_use() -> Iterator[None]:
    """Let models that use `sdpa` use the kernel instead, for rows that it can compute."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention  # in this process, before the one of transformers
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the outputs of attention (B, T, H, D), as transformers asks for them.

    Args:
        module: The layer of attention.
        query: (B, H, T, D).
        key: (B, H, T, D), of as many heads as queries, or of fewer.
        value: As the keys.
        attention_mask: What is added to the scores, (B or 1, H or 1, T or 1, T).
        dropout: The probability of dropout.
        scaling: The factor of the scores; None: 1 / sqrt(D).
        is_causal: Whether a token sees those before it only, if there is no mask.
        others: What some models give too.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not _suits(query, key, value, attention_mask, bool(is_causal), others):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return found
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    seeds = torch.randint(SEEDS, (2,), dtype=torch.int32, device=query.device)
    outputs, _ = short_attention(query, key, value, attention_mask, seeds, scale, float(dropout))
    return outputs, None


def _suits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    others: dict[str, Any],
) -> bool:
    """Return whether the kernel computes what is asked for."""
    n_tokens, n_numbers = query.shape[2:]
    sizes_fit = n_tokens <= LONGEST and n_numbers in HEADS
    alike = query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    in_16_bits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    dense = all(x.stride(-1) == 1 for x in (query, key, value))
    asks_more = any(others.get(name) is not None for name in ("position_bias", "softcap"))
    if mask is None:
        mask_fits = not is_causal
    else:  # one that is trained needs a gradient, which the kernel does not compute
        mask_fits = mask.is_floating_point() and mask.ndim == 4 and not mask.requires_grad
        mask_fits = mask_fits and mask.shape[-1] == n_tokens
    return sizes_fit and alike and in_16_bits and dense and mask_fits and not asks_more
