r"""LoKr: a Kronecker product of two small matrices, Edalati et al. 2022 (KronA).

    y = W0 x + s (W1 (x) W2) x          s = alpha / rank

W1 (a, c) and W2 (b, d) with out = a b and in = c d: the sizes of the base are divided into two
factors as near to each other as they can be, a <= b and c <= d. Each of the two is a matrix of its
own where that is small, else a product of two of the rank. W1 starts at zero.

https://arxiv.org/abs/2212.10650
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora import Shape
from lora_cli.adapters.whole_update import WholeUpdate, has_wide_kernel, kernel_core, weight_shape

NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class LoKrLayer(WholeUpdate):
    """LoKr on a linear layer or a convolution.

    `lokr_w1` (a, c), or `lokr_w1_a` (a, rank) and `lokr_w1_b` (rank, c). `lokr_w2` (b, d, *kernel),
    or `lokr_w2_a` (b, rank) and `lokr_w2_b` (rank, d x kernel), or with a factor for the kernel
    `lokr_w2_a` (rank, b), `lokr_w2_b` (rank, d) and `lokr_t2` (rank, rank, height, width).
    """

    peft_names: ClassVar[dict[str, str]] = {name: name for name in NAMES}
    sometimes: ClassVar[frozenset[str]] = frozenset(NAMES)
    zero_at_start: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a")

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of the factors as PEFT chooses them if nothing is configured."""
        return cls.configured_shapes(base, rank, {})

    @classmethod
    def configured_shapes(
        cls, base: nn.Module, rank: int, config: Mapping[str, Any]
    ) -> dict[str, Shape]:
        """Return the shapes of the factors as PEFT chooses them."""
        n_out, n_in, *kernel = weight_shape(base)
        factor = config.get("decompose_factor", -1)
        (a, b), (c, d) = divided(n_out, factor), divided(n_in, factor)
        shapes: dict[str, Shape] = {}
        if config.get("decompose_both") and rank < max(a, c) / 2:
            shapes |= {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c)}
        else:
            shapes["lokr_w1"] = (a, c)
        if rank >= max(b, d) / 2:
            shapes["lokr_w2"] = (b, d, *kernel)
        elif config.get("use_effective_conv2d") and has_wide_kernel(base):
            core = kernel_core(base, rank)
            shapes |= {"lokr_t2": core, "lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d)}
        else:
            shapes |= {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}
        return shapes

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int | None:
        """Return the rank that a divided factor shows; of whole ones none can be seen."""
        for name in ("lokr_w1_b", "lokr_w2_b"):
            if name in tensors and tensors[name].ndim:
                return tensors[name].shape[0]
        return None

    def update_weight(self) -> Tensor:
        """Return s W1 (x) W2 in the shape of the base's weight."""
        w1, w2 = self._factor("lokr_w1"), self._factor("lokr_w2")
        if w2.ndim == 3:  # of a Conv1d: in PEFT, W1 meets the last two dimensions of such a W2
            blocks = w1[None, :, None, :, None] * w2[:, None, :, None, :]
        else:
            kernel = (None,) * (w2.ndim - 2)
            blocks = w1[:, None, :, None, *kernel] * w2[None, :, None]
        return (self.scaling * blocks).reshape(weight_shape(self.base))

    def _factor(self, name: str) -> Tensor:
        """Return W1 or W2, multiplied out where it is stored as a product."""
        if name in self._parameters:
            return self.get_parameter(name)
        a, b = self.get_parameter(f"{name}_a"), self.get_parameter(f"{name}_b")
        if name == "lokr_w2" and "lokr_t2" in self._parameters:
            return torch.einsum("pqhw,po,qi->oihw", self.get_parameter("lokr_t2"), a, b)
        return a @ b


def divided(size: int, factor: int) -> tuple[int, int]:
    """Return two factors of a size, the smaller one first, as LyCORIS and PEFT choose them.

    Args:
        size: What is divided.
        factor: The smaller one, where it divides the size; else the most that it may be. -1: they
            are as near to each other as they can be.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size)
    if factor != -1:
        most = min(most, max(factor, 1))
    smaller = next(k for k in range(most, 0, -1) if size % k == 0)
    return smaller, size // smaller


LOKR_LAYERS = (LoKrLayer,)
