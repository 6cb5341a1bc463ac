"""Let transformers' models use a special attention kernel for short rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.training.short_attention_kernel import HEAD_DIMS, MAX_TOKENS, short_attention

MAX_SEED = 2**31 - 1  # exclusive, for the random seeds of dropout


@contextmanager
def short_attention_in_use(attention: Callable[..., Any] | None = None) -> Iterator[None]:
    """Within the context, let models with `sdpa` attention use the kernel if it supports a row.

    Args:
        attention: The function to use instead.
    """
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention or _attention  # overrides transformers' entry
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@torch.no_grad()
def uses_short_attention(compute: Callable[[], Any]) -> bool:
    """Return whether the kernel supports an attention layer of a forward pass.

    Args:
        compute: Runs the forward pass, by layers that are not compiled.
    """
    supported: list[bool] = []

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        is_causal = _is_causal(module, options.get("is_causal"))
        supported.append(_is_supported(query, key, value, mask, is_causal, options))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    with short_attention_in_use(attention):
        compute()
    return any(supported)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the outputs of attention (B, T, H, D), by the interface of transformers.

    Args:
        module: The attention layer.
        query: Queries (B, H, T, D).
        key: Keys (B, H or fewer, T, D).
        value: Values, like the keys.
        attention_mask: Added to the scores, (B or 1, H or 1, T or 1, T).
        dropout: The probability of dropout.
        scaling: The factor of the scores; None for 1 / sqrt(D).
        is_causal: Whether attention is causal, if there is no mask.
        options: Further arguments of some models.
    """
    is_causal = _is_causal(module, is_causal)
    if not _is_supported(query, key, value, attention_mask, is_causal, options):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    seeds = torch.randint(MAX_SEED, (2,), dtype=torch.int32, device=query.device)
    outputs, _ = short_attention(query, key, value, attention_mask, seeds, scale, float(dropout))
    return outputs, None


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _is_supported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    options: dict[str, Any],
) -> bool:
    """Return whether the kernel supports these inputs and options."""
    n_tokens, head_dim = query.shape[2:]
    sizes_fit = n_tokens <= MAX_TOKENS and head_dim in HEAD_DIMS
    uniform = query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    in_16_bits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    dense = all(x.stride(-1) == 1 for x in (query, key, value))
    has_extras = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    if mask is None:
        mask_fits = not is_causal
    else:  # the kernel does not compute the gradient of a trained mask
        mask_fits = mask.is_floating_point() and mask.ndim == 4 and not mask.requires_grad
        mask_fits = mask_fits and mask.shape[-1] == n_tokens
    return sizes_fit and uniform and in_16_bits and dense and mask_fits and not has_extras
