"""Blocks of matrices, which the programs of Triton kernels load, multiply and write."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matrix_block(x, rows, columns, n_rows, n_columns):  # type: ignore[no-untyped-def]
    """Load the block of a matrix (n_rows, n_columns) at some rows and columns; 0 outside of it."""
    rows, columns = rows[:, None], columns[None, :]
    inside = (rows < n_rows) & (columns < n_columns)
    return tl.load(x + rows.to(tl.int64) * n_columns + columns, inside, other=0.0)


@triton.jit
def store_block(x, block, rows, columns, n_rows, n_columns):  # type: ignore[no-untyped-def]
    """Write a block of a matrix (n_rows, n_columns)."""
    rows, columns = rows[:, None], columns[None, :]
    place = x + rows.to(tl.int64) * n_columns + columns
    tl.store(place, block.to(x.dtype.element_ty), (rows < n_rows) & (columns < n_columns))


def block_rank(rank: int) -> int:
    """Return the rank of a program's blocks: a power of two of at least 16, as `tl.dot` needs."""
    return max(triton.next_power_of_2(rank), 16) if rank else 0
