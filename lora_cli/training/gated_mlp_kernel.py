"""Kernels for the gate of an MLP, forward and backward, with the low-rank updates around it.

The MLP of Llama, and of most decoders since, computes `down(act(gate(x)) * up(x))`. With the
outputs G and U (tokens, n) of the frozen layers gate and up, and updates of rank r, this is

    g = G + h_g B_g^T,    u = U + h_u B_u^T,    y = act(g) u,    h = y A_d^T

where h_g and h_u (tokens, r) are s A x of the layers gate and up, and A_d is the A of down.
As separate operations, the updates, g and u are matrices of n columns, which are written to memory
and read again. Here each program adds the updates to its block of G and U, and writes only y.

In the backward pass, a program loops over many tokens of some columns. It recomputes the blocks of
g and u, adds the gradient that comes through h, and sums the gradients of B_g, B_u and A_d over its
tokens. So y need not be written again, and the gradients of G and U are read once less. The kernels
are limited by memory bandwidth, so a program loads its large blocks before it multiplies anything.

Both activations are g times a sigmoid: SiLU is g sigmoid(g), and the GELU of Gemma and others, by
its usual approximation, g sigmoid(z) with z = sqrt(8 / pi) (g + 0.044715 g^3).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_cli.training.kernel_blocks import block_rank, matrix_block, store_block
from lora_cli.training.lora_dropout_kernel import (
    dropped,
    products_with_dropout,
    random_numbers,
    threshold_of,
)

TOKENS, COLUMNS = 64, 64  # of a block; a program of the forward pass computes one block
FORWARD_WARPS, BACKWARD_WARPS = 8, 4
SEGMENT = 1024  # tokens over which a program of the backward pass sums
# it loads blocks ahead if its shared memory is large enough for them, as on an A100 and later
STAGES, SHARED_BYTES = 3, 160_000


@triton.jit  # type: ignore[untyped-decorator]
def _sigmoid_and_slope(g, IS_GELU: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Return the sigmoid that g is multiplied by, and the derivative of its argument by g."""
    if IS_GELU:
        z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * g * g)
    else:
        z, slope = g, 1.0
    return tl.sigmoid(z), slope


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    gate, up, gate_h, up_h, gate_b, up_b, y,
    n_tokens, n_columns, gate_rank, up_rank,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
    GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, IS_GELU: tl.constexpr,  # noqa: N803
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    g = matrix_block(gate, tokens, columns, n_tokens, n_columns)
    u = matrix_block(up, tokens, columns, n_tokens, n_columns)
    if GATE_RANK:
        ranks = tl.arange(0, GATE_RANK)
        g_h = matrix_block(gate_h, tokens, ranks, n_tokens, gate_rank)
        g_b = matrix_block(gate_b, columns, ranks, n_columns, gate_rank)
    if UP_RANK:
        ranks = tl.arange(0, UP_RANK)
        u_h = matrix_block(up_h, tokens, ranks, n_tokens, up_rank)
        u_b = matrix_block(up_b, columns, ranks, n_columns, up_rank)
    g, u = g.to(tl.float32), u.to(tl.float32)
    if GATE_RANK:
        g += tl.dot(g_h, tl.trans(g_b))
    if UP_RANK:
        u += tl.dot(u_h, tl.trans(u_b))
    share, _ = _sigmoid_and_slope(g, IS_GELU)
    store_block(y, g * share * u, tokens, columns, n_tokens, n_columns)


@triton.jit(do_not_specialize=["threshold"])  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    gate, up, gate_h, up_h, gate_b, up_b, down_a, dy, dh, dgate, dup, dgate_b, dup_b, ddown_a,
    down_seed, n_tokens, n_columns, gate_rank, up_rank, down_rank, scale, threshold, n_blocks,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,  # noqa: N803
    GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, DOWN_RANK: tl.constexpr,  # noqa: N803
    IS_GELU: tl.constexpr, DROPOUT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    segment = tl.program_id(1)
    if GATE_RANK:
        g_ranks = tl.arange(0, GATE_RANK)
        g_b = tl.trans(matrix_block(gate_b, columns, g_ranks, n_columns, gate_rank))
        sum_gate = tl.zeros((COLUMNS, GATE_RANK), tl.float32)
    if UP_RANK:
        u_ranks = tl.arange(0, UP_RANK)
        u_b = tl.trans(matrix_block(up_b, columns, u_ranks, n_columns, up_rank))
        sum_up = tl.zeros((COLUMNS, UP_RANK), tl.float32)
    if DOWN_RANK:
        d_ranks = tl.arange(0, DOWN_RANK)
        d_a = matrix_block(down_a, d_ranks, columns, down_rank, n_columns)
        sum_down = tl.zeros((DOWN_RANK, COLUMNS), tl.float32)
    for block in tl.range(0, n_blocks, num_stages=STAGES):
        tokens = (segment * n_blocks + block) * TOKENS + tl.arange(0, TOKENS)
        g = matrix_block(gate, tokens, columns, n_tokens, n_columns).to(tl.float32)
        u = matrix_block(up, tokens, columns, n_tokens, n_columns).to(tl.float32)
        slope = matrix_block(dy, tokens, columns, n_tokens, n_columns).to(tl.float32)
        if GATE_RANK:
            g_h = matrix_block(gate_h, tokens, g_ranks, n_tokens, gate_rank)
            g += tl.dot(g_h, g_b)
        if UP_RANK:
            u_h = matrix_block(up_h, tokens, u_ranks, n_tokens, up_rank)
            u += tl.dot(u_h, u_b)
        if DOWN_RANK:
            d_h = matrix_block(dh, tokens, d_ranks, n_tokens, down_rank)
            slope_of_y = tl.dot(d_h, d_a)
            if DROPOUT:
                numbers = random_numbers(down_seed, tokens, columns)
                slope_of_y = dropped(slope_of_y * scale, numbers, threshold)
            slope += slope_of_y
        share, inner = _sigmoid_and_slope(g, IS_GELU)
        dg = (slope * u * share * (1 + g * (1 - share) * inner)).to(dgate.dtype.element_ty)
        du = (slope * g * share).to(dg.dtype)
        store_block(dgate, dg, tokens, columns, n_tokens, n_columns)
        store_block(dup, du, tokens, columns, n_tokens, n_columns)
        if GATE_RANK:
            sum_gate += tl.dot(tl.trans(dg), g_h)
        if UP_RANK:
            sum_up += tl.dot(tl.trans(du), u_h)
        if DOWN_RANK:
            y = g * share * u
            if DROPOUT:
                y = dropped(y * scale, numbers, threshold)
            sum_down += tl.dot(tl.trans(d_h), y.to(dg.dtype))
    n_sums = segment.to(tl.int64) * n_columns  # those of earlier segments, for each rank
    if GATE_RANK:
        store_block(dgate_b + n_sums * gate_rank, sum_gate, columns, g_ranks, n_columns, gate_rank)
    if UP_RANK:
        store_block(dup_b + n_sums * up_rank, sum_up, columns, u_ranks, n_columns, up_rank)
    if DOWN_RANK:
        store_block(ddown_a + n_sums * down_rank, sum_down, d_ranks, columns, down_rank, n_columns)


def _block_ranks(*ranks: int) -> dict[str, int]:
    """Return the ranks of a program's blocks.

    Args:
        ranks: The ranks of gate, up and, in the backward pass, down; 0 if there is no update.
    """
    names = ("GATE_RANK", "UP_RANK", "DOWN_RANK")
    return dict(zip(names, map(block_rank, ranks), strict=False))


@functools.cache
def _stages(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return STAGES if properties.shared_memory_per_block_optin >= SHARED_BYTES else 1


@torch.library.custom_op("lora_cli::gated_product", mutates_args=())
def gated_product(
    gate: Tensor,
    up: Tensor,
    gate_h: Tensor,
    up_h: Tensor,
    gate_b: Tensor,
    up_b: Tensor,
    down_a: Tensor | None,
    down_seed: Tensor | None,
    down_p: float,
    is_gelu: bool,
) -> tuple[Tensor, Tensor]:
    """Return y = act(g) u and h = y A_d^T, as the equations above say.

    With dropout in down, h is that of `products_with_dropout`.

    All tensors have one dtype, of 16 bits on a GPU. No rank may be larger than 64.

    Args:
        gate: The output of the frozen layer gate, G (..., n).
        up: The output of the frozen layer up, U (..., n).
        gate_h: s A x of gate, (..., rank); of rank 0 if G is the whole output of gate.
        up_h: s A x of up, (..., rank), likewise.
        gate_b: The B of gate, (n, rank).
        up_b: The B of up, (n, rank).
        down_a: The A of down, (rank, n); None if down has no plain LoRA.
        down_seed: The seed of the mask of down's dropout, (1,), in int64; None without dropout.
        down_p: The probability of dropout in down.
        is_gelu: Whether the activation is GELU (its tanh approximation); otherwise it is SiLU.

    Returns:
        y (..., n) and h (..., rank); h is empty without `down_a`.
    """
    parts = [part.contiguous() for part in (gate, up, gate_h, up_h, gate_b, up_b)]
    y, ranks = torch.empty_like(parts[0]), (gate_b.shape[1], up_b.shape[1])
    n_columns = gate.shape[-1]
    if gate.numel():  # an expert may get no token
        with torch.cuda.device(gate.device):
            n_tokens = gate.numel() // n_columns
            _forward[triton.cdiv(n_columns, COLUMNS), triton.cdiv(n_tokens, TOKENS)](
                *parts, y, n_tokens, n_columns, *ranks, TOKENS=TOKENS, COLUMNS=COLUMNS,
                IS_GELU=is_gelu, num_warps=FORWARD_WARPS, **_block_ranks(*ranks),
            )  # fmt: skip
    if down_a is None:
        return y, gate.new_empty(0)
    if down_seed is None:
        return y, y @ down_a.T
    return y, products_with_dropout(y, down_a[None], down_seed, down_p).squeeze(-2)


@gated_product.register_fake
def _(gate: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    down_a = others[5]
    return y, gate.new_empty(0 if down_a is None else (*gate.shape[:-1], len(down_a)))


@torch.library.custom_op("lora_cli::gated_product_backward", mutates_args=())
def _gradients(
    dy: Tensor, dh: Tensor | None, gate: Tensor, up: Tensor, gate_h: Tensor, up_h: Tensor,
    gate_b: Tensor, up_b: Tensor, down_a: Tensor | None, down_seed: Tensor | None,
    down_p: float, is_gelu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of G and U (..., n), of B_g and B_u (n, rank), and of A_d (rank, n).

    The last is of rank 0 if A_d, or the gradient `dh` that comes through h, is None.
    """
    parts = [part.contiguous() for part in (gate, up, gate_h, up_h, gate_b, up_b)]
    a, through_h = gate.new_empty(0, gate.shape[-1]), gate
    if down_a is not None and dh is not None:
        a, through_h = down_a.contiguous(), dh.contiguous()
    ranks = gate_b.shape[1], up_b.shape[1], len(a)
    n_columns = gate.shape[-1]
    n_tokens = gate.numel() // n_columns
    # a large rank, and the numbers for a mask, need registers
    tokens = TOKENS if max(ranks) <= 16 else TOKENS // 2
    columns = COLUMNS if down_seed is None else COLUMNS // 2
    n_segments = triton.cdiv(n_tokens, SEGMENT)
    n_blocks = triton.cdiv(n_tokens, max(n_segments, 1) * tokens)
    dgate, dup = torch.empty_like(parts[0]), torch.empty_like(parts[0])
    sums = [
        torch.empty(n_segments, *factor.shape, device=gate.device) for factor in (gate_b, up_b, a)
    ]
    if n_tokens:
        with torch.cuda.device(gate.device):
            _backward[triton.cdiv(n_columns, columns), n_segments](
                *parts, a, dy.contiguous(), through_h, dgate, dup, *sums, down_seed,
                n_tokens, n_columns, *ranks, 1 / (1 - down_p), threshold_of(down_p), n_blocks,
                TOKENS=tokens, COLUMNS=columns, STAGES=_stages(gate.device), IS_GELU=is_gelu,
                DROPOUT=down_seed is not None and len(a) > 0,
                num_warps=BACKWARD_WARPS, **_block_ranks(*ranks),
            )  # fmt: skip
    dgate_b, dup_b, ddown_a = (part.sum(0).to(gate.dtype) for part in sums)
    return dgate, dup, dgate_b, dup_b, ddown_a


@_gradients.register_fake
def _(
    dy: Tensor, dh: Any, gate: Tensor, up: Tensor, gate_h: Tensor, up_h: Tensor,
    gate_b: Tensor, up_b: Tensor, down_a: Any, down_seed: Any, down_p: float, is_gelu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_g, of_u = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    rank = 0 if down_a is None or dh is None else len(down_a)
    factors = (gate_b.shape, up_b.shape, (rank, gate.shape[-1]))
    return (of_g, of_u, *(gate.new_empty(shape) for shape in factors))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.down_p, ctx.is_gelu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_of(ctx: Any, dy: Tensor, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    *_, gate_b, up_b, down_a, _ = ctx.saved_tensors
    gradients = _gradients(dy, dh, *ctx.saved_tensors, ctx.down_p, ctx.is_gelu)
    dgate, dup, dgate_b, dup_b, ddown_a = gradients
    of_a = None if down_a is None or dh is None else ddown_a
    return dgate, dup, dgate @ gate_b, dup @ up_b, dgate_b, dup_b, of_a, None, None, None


gated_product.register_autograd(_backward_of, setup_context=_keep)
