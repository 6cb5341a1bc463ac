r"""LoKr: a Kronecker product of two small matrices, Edalati et al. 2022 (KronA).

    y = W0 x + s (W1 (x) W2) x          s = alpha / rank

W1 (a, c) and W2 (b, d) with out = a b and in = c d: each size of the base is split into two factors
that are as close to each other as possible, a <= b and c <= d. W1 and W2 are stored as a matrix if
that is small, otherwise as a low-rank product of two. W1 starts at zero.

https://arxiv.org/abs/2212.10650
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora import Shape
from lora_cli.adapters.whole_update import WholeUpdate, core_shape, has_wide_kernel, weight_shape

NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class LoKrLayer(WholeUpdate):
    """LoKr on a linear layer or a convolution.

    `lokr_w1` (a, c), or `lokr_w1_a` (a, rank) and `lokr_w1_b` (rank, c). `lokr_w2` (b, d, *kernel),
    or `lokr_w2_a` (b, rank) and `lokr_w2_b` (rank, d x kernel), or with a core tensor
    `lokr_w2_a` (rank, b), `lokr_w2_b` (rank, d) and `lokr_t2` (rank, rank, height, width).
    """

    peft_names: ClassVar[dict[str, str]] = {name: name for name in NAMES}
    optional_parameters: ClassVar[frozenset[str]] = frozenset(NAMES)
    zero_at_start: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a")

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of the factors that PEFT chooses by default."""
        return cls.configured_shapes(base, rank, {})

    @classmethod
    def configured_shapes(
        cls, base: nn.Module, rank: int, config: Mapping[str, Any]
    ) -> dict[str, Shape]:
        """Return the shapes of the factors that PEFT chooses for a configuration."""
        n_out, n_in, *kernel = weight_shape(base)
        factor = config.get("decompose_factor", -1)
        (a, b), (c, d) = factorised(n_out, factor), factorised(n_in, factor)
        shapes: dict[str, Shape] = {}
        if config.get("decompose_both") and rank < max(a, c) / 2:
            shapes |= {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c)}
        else:
            shapes["lokr_w1"] = (a, c)
        if rank >= max(b, d) / 2:
            shapes["lokr_w2"] = (b, d, *kernel)
        elif config.get("use_effective_conv2d") and has_wide_kernel(base):
            core = core_shape(base, rank)
            shapes |= {"lokr_t2": core, "lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d)}
        else:
            shapes |= {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}
        return shapes

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int | None:
        """Return the rank, read from a low-rank factor; None if both W1 and W2 are full."""
        for name in ("lokr_w1_b", "lokr_w2_b"):
            if name in tensors and tensors[name].ndim:
                return tensors[name].shape[0]
        return None

    def update_weight(self) -> Tensor:
        """Return s W1 (x) W2 in the shape of the base's weight."""
        w1, w2 = self._factor("lokr_w1"), self._factor("lokr_w2")
        if w2.ndim == 3:  # a Conv1d: in PEFT, W1 multiplies the last two dimensions of this W2
            blocks = w1[None, :, None, :, None] * w2[:, None, :, None, :]
        else:
            kernel = (None,) * (w2.ndim - 2)
            blocks = w1[:, None, :, None, *kernel] * w2[None, :, None]
        return (self.scaling * blocks).reshape(weight_shape(self.base))

    def _factor(self, name: str) -> Tensor:
        """Return W1 or W2, multiplying its factors if it is stored as a product."""
        if name in self._parameters:
            return self.get_parameter(name)
        a, b = self.get_parameter(f"{name}_a"), self.get_parameter(f"{name}_b")
        if name == "lokr_w2" and "lokr_t2" in self._parameters:
            return torch.einsum("pqhw,po,qi->oihw", self.get_parameter("lokr_t2"), a, b)
        return a @ b


def factorised(size: int, factor: int) -> tuple[int, int]:
    """Factorise a size in two, smaller factor first, as `factorization` of LyCORIS and PEFT does.

    Args:
        size: The size to factorise.
        factor: The first factor if it divides the size; otherwise an upper bound of the smaller
            factor. -1: the two factors are as close to each other as possible.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size)
    if factor != -1:
        limit = min(limit, max(factor, 1))
    smaller = next(k for k in range(limit, 0, -1) if size % k == 0)
    return smaller, size // smaller


LOKR_LAYERS = (LoKrLayer,)
