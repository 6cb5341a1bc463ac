"""Triton kernels for products of fp8 matrices: round the rows of a matrix, and transpose it.

Both are bound by memory bandwidth: they read each value once or twice, and write it once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_BLOCK = 16384  # values of a row that a program processes at a time
VALUES_PER_WARP = 1024
TILE, TILE_WARPS = 128, 8  # rows and columns of the tile that a program transposes


@triton.jit  # type: ignore[untyped-decorator]
def _round_row(  # type: ignore[no-untyped-def]
    x, factors, codes, scales, n_values, stride,
    LARGEST: tl.constexpr, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ONE_BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    codes += row * n_values
    columns = tl.arange(0, BLOCK)
    if ONE_BLOCK:  # the row stays in registers
        inside = columns < n_values
        values = tl.load(x + columns, inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            values *= tl.load(factors + columns, inside, other=0.0)
        largest = tl.abs(values)
        nan_row = values * 0  # NaN if a value is: a maximum may ignore NaN
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        nan_row = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n_values, BLOCK):
            inside = start + columns < n_values
            values = tl.load(x + start + columns, inside, other=0.0).to(tl.float32)
            if HAS_FACTORS:
                values *= tl.load(factors + start + columns, inside, other=0.0)
            largest = tl.maximum(largest, tl.abs(values))
            nan_row += values * 0
    # the reciprocal of a smaller scale would be infinite
    scale = tl.maximum(tl.max(largest, 0) / LARGEST, 1.1754943508222875e-38) + tl.sum(nan_row, 0)
    tl.store(scales + row, scale)
    factor = 1 / scale  # dividing each value takes as long as reading it
    # the conversion saturates: values above the largest e4m3 value become that value
    if ONE_BLOCK:
        tl.store(codes + columns, (values * factor).to(tl.float8e4nv), inside)
    else:
        for start in range(0, n_values, BLOCK):
            inside = start + columns < n_values
            values = tl.load(x + start + columns, inside, other=0.0).to(tl.float32)
            if HAS_FACTORS:
                values *= tl.load(factors + start + columns, inside, other=0.0)
            tl.store(codes + start + columns, (values * factor).to(tl.float8e4nv), inside)


def round_rows(x: Tensor, factors: Tensor | None, largest: float) -> tuple[Tensor, Tensor]:
    """Round the rows of a matrix to fp8; return the fp8 matrix (n, m) and the row scales (n,).

    Args:
        x: The matrix (n, m), on a GPU.
        factors: The columns are multiplied by these before (m,), in float32.
        largest: The fp8 value to which the largest absolute value of each row is scaled.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    block = min(ROW_BLOCK, triton.next_power_of_2(x.shape[1]))
    with torch.cuda.device(x.device):
        _round_row[(len(x),)](
            x, scales if factors is None else factors, codes, scales, x.shape[1], x.stride(0),
            LARGEST=largest, HAS_FACTORS=factors is not None, BLOCK=block,
            ONE_BLOCK=block >= x.shape[1], num_warps=max(4, block // VALUES_PER_WARP),
        )  # fmt: skip
    return codes, scales


@triton.jit  # type: ignore[untyped-decorator]
def _transpose(x, y, n_rows, n_columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    tile = tl.load(x + rows[:, None] * n_columns + columns[None, :], inside)
    tl.store(y + columns[:, None] * n_rows + rows[None, :], tl.trans(tile), tl.trans(inside))


def transposed(x: Tensor) -> Tensor:
    """Return the transpose (m, n) of a matrix of bytes (n, m) on a GPU, contiguous."""
    n_rows, n_columns = x.shape
    y = x.new_empty(n_columns, n_rows)
    grid = (triton.cdiv(n_rows, TILE), triton.cdiv(n_columns, TILE))
    with torch.cuda.device(x.device):
        _transpose[grid](x.contiguous(), y, n_rows, n_columns, TILE=TILE, num_warps=TILE_WARPS)
    return y
