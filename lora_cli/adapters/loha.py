r"""LoHa: the entrywise product of two low-rank matrices, Hyeon-Woo et al. 2021 (FedPara).

    y = W0 x + s ((A1 B1) o (A2 B2)) x          s = alpha / rank

A1, A2 (out, rank), B1, B2 (rank, in): with two products of rank r, the update has rank up to r^2.
B2 starts at zero. A convolution's kernel is flattened into `in`, or each of the two products has a
core tensor T for the kernel (the paper's Proposition 3, `use_effective_conv2d` in PEFT):

    W[o, i, ...] = sum over p, q of T[p, q, ...] A[p, o] B[q, i]         A (rank, out), B (rank, in)

https://arxiv.org/abs/2108.06098
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.adapters.lora import Shape
from lora_cli.adapters.whole_update import WholeUpdate, core_shape, has_wide_kernel, weight_shape


class LoHaLayer(WholeUpdate):
    """LoHa on a linear layer or a convolution.

    `hada_w1_a`, `hada_w2_a` (out, rank), `hada_w1_b`, `hada_w2_b` (rank, in x kernel). With
    core tensors: (rank, out), (rank, in) and `hada_t1`, `hada_t2` (rank, rank, height, width).
    """

    peft_names: ClassVar[dict[str, str]] = {
        name: name
        for name in (
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        )
    }  # fmt: skip
    optional_parameters: ClassVar[frozenset[str]] = frozenset({"hada_t1", "hada_t2"})
    zero_at_start: ClassVar[tuple[str, ...]] = ("hada_w2_b",)

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of the four factors, with the kernel flattened into the input."""
        n_out, *inputs = weight_shape(base)
        a, b = (n_out, rank), (rank, math.prod(inputs))
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}

    @classmethod
    def configured_shapes(
        cls, base: nn.Module, rank: int, config: Mapping[str, Any]
    ) -> dict[str, Shape] | None:
        """Return the shapes with core tensors, if the configuration asks for them."""
        if not (config.get("use_effective_conv2d") and has_wide_kernel(base)):
            return None
        n_out, n_in, *_ = weight_shape(base)
        a, b, t = (rank, n_out), (rank, n_in), core_shape(base, rank)
        plain = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        return {"hada_t1": t, **plain, "hada_t2": t}

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int | None:
        """Return the rank, read from B1."""
        b = tensors["hada_w1_b"]
        return b.shape[0] if b.ndim else 0

    def update_weight(self) -> Tensor:
        """Return s (A1 B1) o (A2 B2) in the shape of the base's weight."""
        product = self.scaling * self._factor(1) * self._factor(2)
        return product.reshape(weight_shape(self.base))

    def _factor(self, number: int) -> Tensor:
        """Return product 1 or 2: (out, in x kernel), or (out, in, height, width) with a core."""
        a = self.get_parameter(f"hada_w{number}_a")
        b = self.get_parameter(f"hada_w{number}_b")
        if "hada_t1" not in self._parameters:
            return a @ b
        return torch.einsum("pqhw,po,qi->oihw", self.get_parameter(f"hada_t{number}"), a, b)


LOHA_LAYERS = (LoHaLayer,)
