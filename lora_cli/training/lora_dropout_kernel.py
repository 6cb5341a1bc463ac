"""Kernels for A x of LoRA layers with dropout, forward and backward.

Layers with the same input x (tokens, n), such as query, key and value, drop other elements of it:

    h_i = A_i (m_i * x) / (1 - p)        m_i (tokens, n) is 0 with probability p, otherwise 1

As separate operations, each layer writes its mask and its copy of x to memory, keeps them for the
backward pass, and reads them again. Here the masks are never written. Each element of a mask is a
hash of a seed, the row, the column and the number of the layer, which takes less time to compute
than to read.

A program of the forward pass sums over some columns of a block of rows. A program of the backward
pass loops over many rows of some columns: it writes the gradient of x, summed over the layers, and
sums the gradient of each A.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_cli.training.kernel_blocks import block_rank, matrix_block, store_block

ROWS, COLUMNS = 64, 64  # of a block
COLUMN_SEGMENT, ROW_SEGMENT = 1024, 1024  # over which a program sums, forward and backward
WARPS, STAGES = 4, 3


@triton.jit
def _mixed(x):  # type: ignore[no-untyped-def]
    """Return a hash of 32 bits (the constants come from https://github.com/skeeto/hash-prospector).

    A change of any bit of x changes each bit of the result with a probability close to one half.
    """
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_numbers(seed, rows, columns):  # type: ignore[no-untyped-def]
    """Return a number of 32 bits for each element of a block.

    Args:
        seed: A pointer to a seed of 64 bits.
        rows: The numbers of the rows.
        columns: The numbers of the columns.
    """
    seed = tl.load(seed)
    row = _mixed(rows.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32))
    column = _mixed(columns.to(tl.uint32) * 0x85EBCA77 + (seed >> 32).to(tl.uint32))
    return next_numbers(row[:, None] + column[None, :])


@triton.jit
def next_numbers(x):  # type: ignore[no-untyped-def]
    """Return the numbers for the mask of the next layer."""
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
def dropped(x, numbers, threshold):  # type: ignore[no-untyped-def]
    """Return a block of a matrix whose elements are 0 where the numbers are below a threshold."""
    return tl.where(numbers.to(tl.int32, bitcast=True) >= threshold, x, 0.0)


def threshold_of(p: float) -> int:
    """Return the signed number of 32 bits below which a share p of all such numbers lies."""
    return min(int(p * 2**32), 2**32 - 1) - 2**31


@triton.jit
def _store_sum(h, total, layer, rows, ranks, n_rows, n_layers, rank):  # type: ignore[no-untyped-def]
    """Write one layer's products of a block of rows, into a matrix (n_rows, n_layers, rank)."""
    place = h + rows[:, None].to(tl.int64) * n_layers * rank + layer * rank + ranks[None, :]
    tl.store(place, total, (rows[:, None] < n_rows) & (ranks[None, :] < rank))


@triton.jit(do_not_specialize=["threshold"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x, a, seed, h, n_rows, n_columns, rank, scale, threshold, n_blocks,
    LAYERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
    RANK: tl.constexpr, STAGES: tl.constexpr,  # noqa: N803
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    segment = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    size = rank * n_columns
    sum_0 = tl.zeros((ROWS, RANK), tl.float32)
    if LAYERS > 1:
        sum_1 = tl.zeros((ROWS, RANK), tl.float32)
    if LAYERS > 2:
        sum_2 = tl.zeros((ROWS, RANK), tl.float32)
    for block in tl.range(0, n_blocks, num_stages=STAGES):
        columns = (segment * n_blocks + block) * COLUMNS + tl.arange(0, COLUMNS)
        x_block = matrix_block(x, rows, columns, n_rows, n_columns)
        a_0 = matrix_block(a, ranks, columns, rank, n_columns)
        if LAYERS > 1:
            a_1 = matrix_block(a + size, ranks, columns, rank, n_columns)
        if LAYERS > 2:
            a_2 = matrix_block(a + 2 * size, ranks, columns, rank, n_columns)
        numbers = random_numbers(seed, rows, columns)
        sum_0 += tl.dot(dropped(x_block, numbers, threshold), tl.trans(a_0))
        if LAYERS > 1:
            numbers = next_numbers(numbers)
            sum_1 += tl.dot(dropped(x_block, numbers, threshold), tl.trans(a_1))
        if LAYERS > 2:
            numbers = next_numbers(numbers)
            sum_2 += tl.dot(dropped(x_block, numbers, threshold), tl.trans(a_2))
    h += segment.to(tl.int64) * n_rows * LAYERS * rank
    _store_sum(h, sum_0 * scale, 0, rows, ranks, n_rows, LAYERS, rank)
    if LAYERS > 1:
        _store_sum(h, sum_1 * scale, 1, rows, ranks, n_rows, LAYERS, rank)
    if LAYERS > 2:
        _store_sum(h, sum_2 * scale, 2, rows, ranks, n_rows, LAYERS, rank)


@triton.jit
def _add_layer(  # type: ignore[no-untyped-def]
    dx, da, x, a, dh, layer, numbers, rows, ranks, n_rows, n_layers, rank, threshold
):
    """Add one layer's part to a block of the gradient of x, and to the gradient of its A."""
    place = dh + rows[:, None].to(tl.int64) * n_layers * rank + layer * rank + ranks[None, :]
    slope = tl.load(place, (rows[:, None] < n_rows) & (ranks[None, :] < rank), other=0.0)
    dx += dropped(tl.dot(slope, a), numbers, threshold)
    da += tl.dot(tl.trans(slope), dropped(x, numbers, threshold))
    return dx, da


@triton.jit(do_not_specialize=["threshold"])  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    x, a, seed, dh, dx, da, n_rows, n_columns, rank, scale, threshold, n_blocks,
    LAYERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
    RANK: tl.constexpr, STAGES: tl.constexpr,  # noqa: N803
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    segment = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    size = rank * n_columns
    a_0 = matrix_block(a, ranks, columns, rank, n_columns)
    da_0 = tl.zeros((RANK, COLUMNS), tl.float32)
    if LAYERS > 1:
        a_1 = matrix_block(a + size, ranks, columns, rank, n_columns)
        da_1 = tl.zeros((RANK, COLUMNS), tl.float32)
    if LAYERS > 2:
        a_2 = matrix_block(a + 2 * size, ranks, columns, rank, n_columns)
        da_2 = tl.zeros((RANK, COLUMNS), tl.float32)
    for block in tl.range(0, n_blocks, num_stages=STAGES):
        rows = (segment * n_blocks + block) * ROWS + tl.arange(0, ROWS)
        x_block = matrix_block(x, rows, columns, n_rows, n_columns)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        numbers = random_numbers(seed, rows, columns)
        total, da_0 = _add_layer(
            total, da_0, x_block, a_0, dh, 0, numbers, rows, ranks, n_rows, LAYERS, rank, threshold
        )
        if LAYERS > 1:
            numbers = next_numbers(numbers)
            total, da_1 = _add_layer(
                total, da_1, x_block, a_1, dh, 1, numbers, rows, ranks, n_rows, LAYERS, rank,
                threshold,
            )  # fmt: skip
        if LAYERS > 2:
            numbers = next_numbers(numbers)
            total, da_2 = _add_layer(
                total, da_2, x_block, a_2, dh, 2, numbers, rows, ranks, n_rows, LAYERS, rank,
                threshold,
            )  # fmt: skip
        store_block(dx, total * scale, rows, columns, n_rows, n_columns)
    da += segment.to(tl.int64) * LAYERS * size
    store_block(da, da_0 * scale, ranks, columns, rank, n_columns)
    if LAYERS > 1:
        store_block(da + size, da_1 * scale, ranks, columns, rank, n_columns)
    if LAYERS > 2:
        store_block(da + 2 * size, da_2 * scale, ranks, columns, rank, n_columns)


@torch.library.custom_op("lora_cli::products_with_dropout", mutates_args=())
def products_with_dropout(x: Tensor, a: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return A_i (m_i * x) / (1 - p) of layers with the same input.

    Args:
        x: Their input (..., n), in 16 bits, on a GPU.
        a: Their A (layers, rank, n), for at most three layers, in the same dtype.
        seed: Determines the masks, (1,), in int64.
        p: The probability of dropout, below 1.

    Returns:
        The products (..., layers, rank).
    """
    x, a = x.contiguous(), a.contiguous()
    n_layers, rank, n_columns = a.shape
    n_rows = x.numel() // n_columns
    n_segments = triton.cdiv(n_columns, COLUMN_SEGMENT)
    n_blocks = triton.cdiv(n_columns, n_segments * COLUMNS)
    sums = torch.empty(n_segments, n_rows, n_layers, rank, device=x.device)
    if n_rows:
        with torch.cuda.device(x.device):
            _forward[triton.cdiv(n_rows, ROWS), n_segments](
                x, a, seed, sums, n_rows, n_columns, rank,
                1 / (1 - p), threshold_of(p), n_blocks, LAYERS=n_layers,
                ROWS=ROWS, COLUMNS=COLUMNS, RANK=block_rank(rank), STAGES=STAGES, num_warps=WARPS,
            )  # fmt: skip
    return sums.sum(0).to(x.dtype).view(*x.shape[:-1], n_layers, rank)


@products_with_dropout.register_fake
def _(x: Tensor, a: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], *a.shape[:2])


@torch.library.custom_op("lora_cli::products_with_dropout_backward", mutates_args=())
def _gradients(dh: Tensor, x: Tensor, a: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (..., n) and of all A (layers, rank, n)."""
    dh, x, a = dh.contiguous(), x.contiguous(), a.contiguous()
    n_layers, rank, n_columns = a.shape
    n_rows = x.numel() // n_columns
    n_segments = triton.cdiv(n_rows, ROW_SEGMENT)
    n_blocks = triton.cdiv(n_rows, max(n_segments, 1) * ROWS)
    dx, sums = torch.empty_like(x), torch.empty(n_segments, *a.shape, device=x.device)
    if n_rows:
        with torch.cuda.device(x.device):
            _backward[triton.cdiv(n_columns, COLUMNS), n_segments](
                x, a, seed, dh, dx, sums, n_rows, n_columns, rank,
                1 / (1 - p), threshold_of(p), n_blocks, LAYERS=n_layers,
                ROWS=ROWS, COLUMNS=COLUMNS, RANK=block_rank(rank), STAGES=STAGES, num_warps=WARPS,
            )  # fmt: skip
    return dx, sums.sum(0).to(a.dtype)


@_gradients.register_fake
def _(dh: Tensor, x: Tensor, a: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(a, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.p = inputs
    ctx.save_for_backward(*tensors)


def _backward_of(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    dx, da = _gradients(dh, *ctx.saved_tensors, ctx.p)
    return dx, da, None, None


products_with_dropout.register_autograd(_backward_of, setup_context=_save)
