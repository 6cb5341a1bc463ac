"""W + L R as a module's own code sees it in the place of its parameter W, without adding it up.

The code of experts multiplies by a parameter in a few ways. Each becomes the products that it
stands for, so that no tensor of the size of W is computed or kept for the backward pass:

    x (W + L R)     =  x W + (x L) R          of all rows, or of each expert's rows by themselves
    linear(x, W + L R)  =  linear(x, W) + linear(linear(x, R), L)

Shapes: W (experts, n, m) or (n, m), L (..., n, rank), R (..., rank, m). Whatever else is done with
the parameter is done with the sum, which is then added up.
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
    """A parameter with a low-rank update; torch's functions take it as they take a tensor.

    It is no tensor: code that torch does not see, such as a kernel that reads memory, fails on it
    instead of missing the update.

    Args:
        weight: W.
        left: L, with the scaling in it.
        right: R.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        self.weight, self.left, self.right = weight, left, right

    @cached_property
    def whole(self) -> Tensor:
        """W + L R, in W's dtype."""
        # autocast would multiply in 16 bits
        with torch.autocast(self.weight.device.type, enabled=False):
            return (self.weight + self.left @ self.right).to(self.weight.dtype)

    # what is asked of it without computing
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
        """Return where W lies, which is compared with what kernels need."""
        return self.weight.data_ptr()

    def __len__(self) -> int:
        return len(self.weight)

    # parts of it
    def __getitem__(self, index: Any) -> Any:
        """Return one expert's matrix, or those of several; of other parts, the sum."""
        is_expert = isinstance(index, int) or (
            isinstance(index, Tensor) and index.dtype != torch.bool and index.ndim < 2
        )
        if self.ndim == 3 and is_expert:
            return LowRankSum(self.weight[index], self.left[index], self.right[index])
        return self.whole[index]

    def transpose(self, one: int, other: int) -> Any:
        """Return the sum with the sides of each matrix exchanged."""
        if {one % self.ndim, other % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            return self.whole.transpose(one, other)
        parts = (self.weight, self.right, self.left)
        return LowRankSum(*(part.transpose(-2, -1) for part in parts))

    @property
    def mT(self) -> Any:  # noqa: N802 - torch's name
        """The sum with the sides of each matrix exchanged."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:  # noqa: N802 - torch's name
        """The sum of a matrix with its sides exchanged."""
        return self.mT if self.ndim == 2 else self.whole.T

    def __getattr__(self, name: str) -> Any:
        """Return what is asked of the sum."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole, name)

    # products with it
    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute one of torch's functions of it: by products where it is known how."""
        kwargs = kwargs or {}
        if (product := _product(func, args, kwargs)) is not None:
            return product
        args, kwargs = tree_map_only(cls, lambda sum_: sum_.whole, (args, kwargs))
        return func(*args, **kwargs)

    def __matmul__(self, other: Tensor) -> Any:
        matmul: Any = torch.matmul
        return matmul(self, other)

    def __add__(self, other: Any) -> Any:
        return self.whole + other

    def __radd__(self, other: Any) -> Any:
        return other + self.whole

    def __sub__(self, other: Any) -> Any:
        return self.whole - other

    def __rsub__(self, other: Any) -> Any:
        return other - self.whole

    def __mul__(self, other: Any) -> Any:
        return self.whole * other

    def __rmul__(self, other: Any) -> Any:
        return other * self.whole

    def __truediv__(self, other: Any) -> Any:
        return self.whole / other

    def __neg__(self) -> Any:
        return -self.whole


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return what a function computes of a sum by products, or None if it is another function."""
    name = getattr(func, "__name__", "").rpartition(".")[2]
    first, second = (*args, None, None)[:2]
    if name == "linear" and isinstance(second, LowRankSum) and second.ndim == 2:
        y = linear(first, second.weight, *args[2:], **kwargs)
        return y + linear(linear(_as(first, second), second.right), second.left).to(y.dtype)
    if name in ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm") and not kwargs:
        if name == "__rmatmul__":
            first, second = second, first
        if isinstance(second, LowRankSum) and isinstance(first, Tensor):
            y = first @ second.weight
            return y + (_as(first, second) @ second.left @ second.right).to(y.dtype)
        if isinstance(first, LowRankSum):
            y = torch.matmul(first.weight, second)
            return y + (first.left @ (first.right @ _as(second, first))).to(y.dtype)
    if name in ("grouped_mm", "_grouped_mm", "grouped_mm_fallback"):
        offs = kwargs.get("offs", args[2] if len(args) == 3 else None)
        others = [value for key, value in kwargs.items() if key != "offs" and value is not None]
        if isinstance(second, LowRankSum) and offs is not None and not others:
            return _grouped(func, first, second, offs)
    return None


def _as(x: Tensor, factors: LowRankSum) -> Tensor:
    """Return inputs in the dtype of the update, which autocast may lower again."""
    return x.to(factors.left.dtype)


def _grouped(product: Callable[..., Tensor], x: Tensor, sum_: LowRankSum, offs: Tensor) -> Tensor:
    """Return the rows of each expert times its own matrix; rows are sorted by expert.

    Args:
        product: The function that multiplies so; it is not one that autocast knows.
        x: Rows (rows, n), in W's dtype.
        sum_: (experts, n, m).
        offs: Where each expert's rows end.
    """
    y = product(x, sum_.weight, offs=offs)
    left, right = sum_.left.to(x.dtype), sum_.right.to(x.dtype)
    rank = left.shape[-1]
    if more := -rank % (ALIGNED // x.element_size()):
        left, right = pad(left, (0, more)), pad(right, (0, 0, 0, more))
    return y + product(product(x, left, offs=offs), right, offs=offs)
