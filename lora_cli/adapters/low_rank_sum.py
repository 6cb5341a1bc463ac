"""A stand-in for a parameter W that acts as W + L R without computing the sum.

The code of experts multiplies by a parameter in a few ways. Each of them is computed factor by
factor, so that no tensor of W's size is computed or kept for the backward pass:

    x (W + L R)     =  x W + (x L) R          for all rows, or for each expert's rows separately
    linear(x, W + L R)  =  linear(x, W) + linear(linear(x, R), L)

Shapes: W (experts, n, m) or (n, m), L (..., n, rank), R (..., rank, m). For every other operation
the sum is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.utils._pytree import tree_map_only

ALIGNED = 16  # bytes: grouped products need rows that start at such an address


class LowRankSum:
    """A parameter with a low-rank update, which torch's functions accept in place of a tensor.

    It is not a tensor: code that bypasses torch, such as a kernel that reads memory, fails on it
    instead of missing the update.

    Args:
        weight: W.
        left: L, including the scaling.
        right: R.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        self.weight, self.left, self.right = weight, left, right

    @cached_property
    def total(self) -> Tensor:
        """W + L R, in W's dtype."""
        # autocast would multiply in 16 bits
        with torch.autocast(self.weight.device.type, enabled=False):
            return (self.weight + self.left @ self.right).to(self.weight.dtype)

    # attributes that need no computation
    @property
    def dtype(self) -> torch.dtype:
        """W's dtype."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """W's device."""
        return self.weight.device

    @property
    def shape(self) -> torch.Size:
        """W's shape."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """The number of W's dimensions."""
        return self.weight.ndim

    def dim(self) -> int:
        """Return the number of W's dimensions."""
        return self.weight.ndim

    def size(self, *dim: int) -> Any:
        """Return W's size."""
        return self.weight.size(*dim)

    def data_ptr(self) -> int:
        """Return W's address, which callers compare with the alignment that kernels need."""
        return self.weight.data_ptr()

    def __len__(self) -> int:
        return len(self.weight)

    # indexing and transposing
    def __getitem__(self, index: Any) -> Any:
        """Return the matrices of one or more experts as a sum; otherwise index the computed sum."""
        is_expert = isinstance(index, int) or (
            isinstance(index, Tensor) and index.dtype != torch.bool and index.ndim < 2
        )
        if self.ndim == 3 and is_expert:
            return LowRankSum(self.weight[index], self.left[index], self.right[index])
        return self.total[index]

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Return the sum with each matrix transposed."""
        if {dim0 % self.ndim, dim1 % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            return self.total.transpose(dim0, dim1)
        parts = (self.weight, self.right, self.left)
        return LowRankSum(*(part.transpose(-2, -1) for part in parts))

    @property
    def mT(self) -> Any:  # noqa: N802 - torch's name
        """The sum with each matrix transposed."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:  # noqa: N802 - torch's name
        """The transposed sum."""
        return self.mT if self.ndim == 2 else self.total.T

    def __getattr__(self, name: str) -> Any:
        """Look all other attributes up in the computed sum."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.total, name)

    # operators and functions
    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute a torch function: factor by factor for known products, otherwise on the sum."""
        kwargs = kwargs or {}
        if (product := _product(func, args, kwargs)) is not None:
            return product
        args, kwargs = tree_map_only(cls, lambda sum_: sum_.total, (args, kwargs))
        return func(*args, **kwargs)

    def __matmul__(self, other: Tensor) -> Any:
        matmul: Any = torch.matmul
        return matmul(self, other)

    def __add__(self, other: Any) -> Any:
        return self.total + other

    def __radd__(self, other: Any) -> Any:
        return other + self.total

    def __sub__(self, other: Any) -> Any:
        return self.total - other

    def __rsub__(self, other: Any) -> Any:
        return other - self.total

    def __mul__(self, other: Any) -> Any:
        return self.total * other

    def __rmul__(self, other: Any) -> Any:
        return other * self.total

    def __truediv__(self, other: Any) -> Any:
        return self.total / other

    def __neg__(self) -> Any:
        return -self.total


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return a product computed factor by factor, or None if `func` is not a known product."""
    name = getattr(func, "__name__", "").rpartition(".")[2]
    first, second = (*args, None, None)[:2]
    if name == "linear" and isinstance(second, LowRankSum) and second.ndim == 2:
        y = linear(first, second.weight, *args[2:], **kwargs)
        return y + linear(linear(_in_dtype_of(first, second), second.right), second.left).to(
            y.dtype
        )
    if name in ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm") and not kwargs:
        if name == "__rmatmul__":
            first, second = second, first
        if isinstance(second, LowRankSum) and isinstance(first, Tensor):
            y = first @ second.weight
            return y + (_in_dtype_of(first, second) @ second.left @ second.right).to(y.dtype)
        if isinstance(first, LowRankSum):
            y = torch.matmul(first.weight, second)
            return y + (first.left @ (first.right @ _in_dtype_of(second, first))).to(y.dtype)
    if name in ("grouped_mm", "_grouped_mm", "grouped_mm_fallback"):
        offs = kwargs.get("offs", args[2] if len(args) == 3 else None)
        other_options = [
            value for key, value in kwargs.items() if key != "offs" and value is not None
        ]
        if isinstance(second, LowRankSum) and offs is not None and not other_options:
            return _grouped(func, first, second, offs)
    return None


def _in_dtype_of(x: Tensor, factors: LowRankSum) -> Tensor:
    """Return inputs in the dtype of the factors; autocast may lower it again."""
    return x.to(factors.left.dtype)


def _grouped(product: Callable[..., Tensor], x: Tensor, sum_: LowRankSum, offs: Tensor) -> Tensor:
    """Return the grouped product: the rows of each expert times its own matrix.

    Args:
        product: The function for grouped products; autocast does not cast its inputs.
        x: The rows, sorted by expert (rows, n), in W's dtype.
        sum_: (experts, n, m).
        offs: The end of each expert's rows (experts,).
    """
    y = product(x, sum_.weight, offs=offs)
    left, right = sum_.left.to(x.dtype), sum_.right.to(x.dtype)
    rank = left.shape[-1]
    if padding := -rank % (ALIGNED // x.element_size()):
        left, right = pad(left, (0, padding)), pad(right, (0, 0, 0, padding))
    return y + product(product(x, left, offs=offs), right, offs=offs)
