"""What a GPU does around a product of fp8 matrices: rounding rows, and exchanging a matrix's sides.

Both only move memory: each reads what it needs once or twice, and writes it once, in whole lines.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_BLOCK = 16384  # numbers of a row that a program works on at a time
NUMBERS_OF_WARP = 1024
TILE, TILE_WARPS = 128, 8  # rows and columns that a program exchanges


@triton.jit  # type: ignore[untyped-decorator]
def _round_row(  # type: ignore[no-untyped-def]
    x, factors, codes, scales, n_numbers, stride,
    LARGEST: tl.constexpr, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ONE_BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    codes += row * n_numbers
    columns = tl.arange(0, BLOCK)
    if ONE_BLOCK:  # the row stays in registers
        inside = columns < n_numbers
        numbers = tl.load(x + columns, inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            numbers *= tl.load(factors + columns, inside, other=0.0)
        largest = tl.abs(numbers)
        bad = numbers * 0  # NaN where a number is: a maximum may ignore it
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        bad = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n_numbers, BLOCK):
            inside = start + columns < n_numbers
            numbers = tl.load(x + start + columns, inside, other=0.0).to(tl.float32)
            if HAS_FACTORS:
                numbers *= tl.load(factors + start + columns, inside, other=0.0)
            largest = tl.maximum(largest, tl.abs(numbers))
            bad += numbers * 0
    # the reciprocal of a smaller one would be infinite
    scale = tl.maximum(tl.max(largest, 0) / LARGEST, 1.1754943508222875e-38) + tl.sum(bad, 0)
    tl.store(scales + row, scale)
    factor = 1 / scale  # to divide each number takes as long as to read it
    # what is rounded above the largest number of e4m3 becomes that, as GPUs convert
    if ONE_BLOCK:
        tl.store(codes + columns, (numbers * factor).to(tl.float8e4nv), inside)
    else:
        for start in range(0, n_numbers, BLOCK):
            inside = start + columns < n_numbers
            numbers = tl.load(x + start + columns, inside, other=0.0).to(tl.float32)
            if HAS_FACTORS:
                numbers *= tl.load(factors + start + columns, inside, other=0.0)
            tl.store(codes + start + columns, (numbers * factor).to(tl.float8e4nv), inside)


def round_rows(x: Tensor, factors: Tensor | None, largest: float) -> tuple[Tensor, Tensor]:
    """Return the rows of a matrix in fp8 (n, m), and the scales (n,) that give its numbers.

    Args:
        x: The matrix (n, m), on a GPU.
        factors: What its columns are multiplied by before (m,), in float32.
        largest: The number that the largest of each row becomes.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    block = min(ROW_BLOCK, triton.next_power_of_2(x.shape[1]))
    with torch.cuda.device(x.device):
        _round_row[(len(x),)](
            x, scales if factors is None else factors, codes, scales, x.shape[1], x.stride(0),
            LARGEST=largest, HAS_FACTORS=factors is not None, BLOCK=block,
            ONE_BLOCK=block >= x.shape[1], num_warps=max(4, block // NUMBERS_OF_WARP),
        )  # fmt: skip
    return codes, scales


@triton.jit  # type: ignore[untyped-decorator]
def _exchange(x, y, n_rows, n_columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    tile = tl.load(x + rows[:, None] * n_columns + columns[None, :], inside)
    tl.store(y + columns[:, None] * n_rows + rows[None, :], tl.trans(tile), tl.trans(inside))


def transposed(x: Tensor) -> Tensor:
    """Return a matrix of bytes (n, m) on a GPU with its sides exchanged (m, n), contiguous."""
    n_rows, n_columns = x.shape
    y = x.new_empty(n_columns, n_rows)
    grid = (triton.cdiv(n_rows, TILE), triton.cdiv(n_columns, TILE))
    with torch.cuda.device(x.device):
        _exchange[grid](x.contiguous(), y, n_rows, n_columns, TILE=TILE, num_warps=TILE_WARPS)
    return y
