"""Attention over rows of at most 128 tokens on a GPU: one kernel forward, one backward.

For each head, with queries Q, keys K and values V (T, D), an additive mask M, and dropout:

    S = s Q K^T + M,    P = softmax(S),    O = (P * keep / (1 - p)) V

The kernels of cuDNN and FlashAttention are designed for thousands of tokens: they loop over blocks
of keys, and launch additional kernels for the backward pass. A row of 128 tokens is a single block,
so here a program holds all keys and values of a head, and computes its whole gradient. The order of
summation is fixed, so results are deterministic, bit for bit.

The dropout mask is not stored: it is a hash of a random seed for the call and of the position.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOKENS = 128  # of a row
HEAD_DIMS = (16, 32, 64)
WARPS = 8
LOG2_E = tl.constexpr(1.4426950408889634)  # GPUs have an instruction for powers of 2


@triton.jit
def _keep_mask(seeds, head, queries, keys, drop):  # type: ignore[no-untyped-def]
    """Return the dropout mask of a head's attention probabilities (true: kept)."""
    first = tl.load(seeds).to(tl.uint32, bitcast=True)
    second = tl.load(seeds + 1).to(tl.uint32, bitcast=True)
    position = ((head * 128 + queries[:, None]) * 128 + keys[None, :]).to(tl.uint32)
    bits = (position ^ first) * 0x9E3779B1 + second
    # the finaliser of MurmurHash3, after which each bit depends on all input bits
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = bits ^ (bits >> 16)
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 >= drop  # 2^-24


@triton.jit  # type: ignore[untyped-decorator]
def _scores(q, k, mask, m_token, m_key, tokens, n_tokens, scale, HAS_MASK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Return the scores of all queries and keys, divided by log 2; -inf beyond the last key."""
    scores = tl.dot(q, tl.trans(k)) * (scale * LOG2_E)
    inside = tokens[None, :] < n_tokens
    if HAS_MASK:
        addresses = mask + tokens[:, None] * m_token + tokens[None, :] * m_key
        bias = tl.load(addresses, (tokens[:, None] < n_tokens) & inside, other=0.0).to(tl.float32)
        # the minimum of bfloat16 would overflow to -inf, and a row of only -inf gives NaN
        scores += tl.maximum(bias * LOG2_E, -1e38)
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def _addresses(x, row, head, tokens, d, x_row, x_head, x_token):  # type: ignore[no-untyped-def]
    """Return the addresses of a head's values for each token of a row."""
    return x + (row * x_row + head * x_head + tokens[:, None] * x_token + d[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, mask, seeds, o, log_sums,
    n_heads, n_tokens, scale, drop,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    m_row, m_head, m_token, m_key,
    HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr, D: tl.constexpr,  # noqa: N803
):  # fmt: skip
    program = tl.program_id(0)
    row, head = (program // n_heads).to(tl.int64), (program % n_heads).to(tl.int64)
    tokens, d = tl.arange(0, TOKENS), tl.arange(0, D)
    inside = tokens[:, None] < n_tokens
    q = _addresses(q, row, head, tokens, d, q_row, q_head, q_token)
    k = _addresses(k, row, head, tokens, d, k_row, k_head, k_token)
    v = _addresses(v, row, head, tokens, d, v_row, v_head, v_token)
    mask += row * m_row + head * m_head
    queries, keys = tl.load(q, inside, other=0.0), tl.load(k, inside, other=0.0)
    scores = _scores(queries, keys, mask, m_token, m_key, tokens, n_tokens, scale, HAS_MASK)
    largest = tl.max(scores, 1)
    p = tl.exp2(scores - largest[:, None])
    total = tl.sum(p, 1)
    factor = 1 / total
    if HAS_DROPOUT:
        p = tl.where(_keep_mask(seeds, program, tokens, tokens, drop), p, 0.0)
        factor /= 1 - drop
    values = tl.load(v, inside, other=0.0)
    out = tl.dot(p.to(values.dtype), values) * factor[:, None]
    place = ((row * n_tokens + tokens[:, None]) * n_heads + head) * D + d[None, :]
    tl.store(o + place, out.to(o.dtype.element_ty), inside)
    places = program.to(tl.int64) * n_tokens + tokens
    tl.store(log_sums + places, largest + tl.log2(total), tokens < n_tokens)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    q, k, v, mask, seeds, o, log_sums, do, dq, dk, dv,
    n_heads, n_tokens, scale, drop,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    m_row, m_head, m_token, m_key, do_row, do_head, do_token,
    HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr, D: tl.constexpr,  # noqa: N803
):  # fmt: skip
    program = tl.program_id(0)
    row, head = (program // n_heads).to(tl.int64), (program % n_heads).to(tl.int64)
    tokens, d = tl.arange(0, TOKENS), tl.arange(0, D)
    inside = tokens[:, None] < n_tokens
    q = _addresses(q, row, head, tokens, d, q_row, q_head, q_token)
    k = _addresses(k, row, head, tokens, d, k_row, k_head, k_token)
    v = _addresses(v, row, head, tokens, d, v_row, v_head, v_token)
    do = _addresses(do, row, head, tokens, d, do_row, do_head, do_token)
    mask += row * m_row + head * m_head
    place = ((row * n_tokens + tokens[:, None]) * n_heads + head) * D + d[None, :]
    places = program.to(tl.int64) * n_tokens + tokens
    queries, keys = tl.load(q, inside, other=0.0), tl.load(k, inside, other=0.0)
    values, d_out = tl.load(v, inside, other=0.0), tl.load(do, inside, other=0.0)
    out = tl.load(o + place, inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    log_sum = tl.load(log_sums + places, tokens < n_tokens, other=0.0)
    scores = _scores(queries, keys, mask, m_token, m_key, tokens, n_tokens, scale, HAS_MASK)
    p = tl.exp2(scores - log_sum[:, None])
    dp = tl.dot(d_out, tl.trans(values))
    dropped, factor = p, 1.0
    if HAS_DROPOUT:
        keep = _keep_mask(seeds, program, tokens, tokens, drop)
        factor = 1 / (1 - drop)
        dropped, dp = tl.where(keep, p, 0.0), tl.where(keep, dp * factor, 0.0)
    dv_sum = tl.dot(tl.trans(dropped.to(d_out.dtype)), d_out) * factor
    tl.store(dv + place, dv_sum.to(dv.dtype.element_ty), inside)
    ds = (p * (dp - delta[:, None]) * scale).to(keys.dtype)
    tl.store(dq + place, tl.dot(ds, keys).to(dq.dtype.element_ty), inside)
    tl.store(dk + place, tl.dot(tl.trans(ds), queries).to(dk.dtype.element_ty), inside)


def _sizes(q: Tensor) -> dict[str, int]:
    """Return the block sizes and compile options of a kernel."""
    tokens = max(triton.next_power_of_2(q.shape[2]), 16)
    return {"TOKENS": tokens, "D": q.shape[3], "num_warps": WARPS, "num_stages": 1}


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the GPU of a tensor."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _mask_strides(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a mask expanded to a shape, 0 for broadcast dimensions."""
    return (0, 0, 0, 0) if mask is None else mask.expand(shape).stride()


@torch.library.custom_op("lora_cli::short_attention", mutates_args=())
def short_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seeds: Tensor, scale: float, drop: float
) -> tuple[Tensor, Tensor]:
    """Return the outputs of attention, and the base-2 log-sum-exp of the scores.

    Args:
        q: Queries (B, H, T, D), in 16 bits on a GPU, with T <= MAX_TOKENS and D in HEAD_DIMS; the
            last dimension is contiguous.
        k: Keys, like the queries.
        v: Values, like the queries.
        mask: Added to the scores, (B or 1, H or 1, T or 1, T).
        seeds: Two random int32, which determine the dropout mask.
        scale: The factor s of the scores.
        drop: The probability p of dropout.

    Returns:
        The outputs (B, T, H, D), and the log-sum-exp in float32 (B, H, T).
    """
    n_rows, n_heads, n_tokens, head_dim = q.shape
    o = q.new_empty(n_rows, n_tokens, n_heads, head_dim)
    log_sums = q.new_empty(n_rows, n_heads, n_tokens, dtype=torch.float32)
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    strides += _mask_strides(mask, (n_rows, n_heads, n_tokens, n_tokens))
    with _device_of(q):
        _forward[(n_rows * n_heads,)](
            q, k, v, q if mask is None else mask, seeds, o, log_sums,
            n_heads, n_tokens, scale, drop, *strides,
            HAS_MASK=mask is not None, HAS_DROPOUT=drop > 0, **_sizes(q),
        )  # fmt: skip
    return o, log_sums


@torch.library.custom_op("lora_cli::short_attention_backward", mutates_args=())
def _gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seeds: Tensor, o: Tensor,
    log_sums: Tensor, scale: float, drop: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries, keys and values, each (B, T, H, D)."""
    n_rows, n_heads, n_tokens, _ = q.shape
    dq, dk, dv = torch.empty_like(o), torch.empty_like(o), torch.empty_like(o)
    do = do if do.stride(-1) == 1 else do.contiguous()
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    strides += _mask_strides(mask, (n_rows, n_heads, n_tokens, n_tokens))
    strides += [do.stride(0), do.stride(2), do.stride(1)]
    with _device_of(q):
        _backward[(n_rows * n_heads,)](
            q, k, v, q if mask is None else mask, seeds, o, log_sums, do, dq, dk, dv,
            n_heads, n_tokens, scale, drop, *strides,
            HAS_MASK=mask is not None, HAS_DROPOUT=drop > 0, **_sizes(q),
        )  # fmt: skip
    return dq, dk, dv


@short_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n_rows, n_heads, n_tokens, head_dim = q.shape
    log_sums = q.new_empty(n_rows, n_heads, n_tokens, dtype=torch.float32)
    return q.new_empty(n_rows, n_tokens, n_heads, head_dim), log_sums


@_gradients.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, seeds: Any, o: Tensor, *_: Any
) -> Any:
    return torch.empty_like(o), torch.empty_like(o), torch.empty_like(o)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.drop = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward_of(ctx: Any, do: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    gradients = _gradients(do, *ctx.saved_tensors, ctx.scale, ctx.drop)
    return (*(gradient.transpose(1, 2) for gradient in gradients), None, None, None, None)


short_attention.register_autograd(_backward_of, setup_context=_save_for_backward)
