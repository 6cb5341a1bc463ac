r"""LoRA that is initialised from the weight itself, as in PiSSA and OLoRA.

A and B start at A0 and B0, and s B0 A0 is the principal part of W0. That part is subtracted from
the base, so that training starts exactly at the base model; the remainder (the residual) is frozen:

    y = (W0 - s B0 A0) x + s B A x  =  W0 x + s B A x - s B0 A0 x

PEFT computes the first form, and overwrites the base's weight. This layer computes the second form:
the base keeps its weight, and the layer stores A0 and B0. So the base can be quantised or stored in
16 bits without rounding the residual, and the model without the adapter is the base. The adapter is
saved as plain LoRA of twice the rank, which any program can use with the original base:

    A' = [A; A0] (2 rank, in)    B' = [B, -B0] (out, 2 rank)    s B' A' = s B A - s B0 A0
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name for it
from torch import Tensor, nn

from lora_cli.adapters.lora import LoRALinear, Shape


class ResidualLoRALinear(LoRALinear):
    """LoRA on a linear layer or `Conv1D`, minus the update of A0 and B0.

    `initial_A` (rank, in) and `initial_B` (out, rank) are A0 and B0, which are not trained.
    """

    initial_A: Tensor  # noqa: N815 - as lora_A
    initial_B: Tensor  # noqa: N815

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # not in the state dict, since an adapter that is loaded from a folder does not have them
        self.register_buffer("initial_A", torch.zeros_like(self.lora_A), persistent=False)
        self.register_buffer("initial_B", torch.zeros_like(self.lora_B), persistent=False)

    @property
    def saved_rank(self) -> int:
        """The rank of the plain LoRA that is saved."""
        return 2 * self.rank

    @classmethod
    def peft_shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of A' and B'."""
        return super().shapes(base, 2 * rank)

    def to_peft(self, name: str) -> Tensor:
        """Return A' or B'."""
        if name == "lora_A":
            return torch.cat([self.lora_A.detach(), self.initial_A])
        return torch.cat([self.lora_B.detach(), -self.initial_B], dim=1)

    @torch.no_grad()
    def from_peft(self, name: str, tensor: Tensor) -> None:
        """Set A and A0 from A', or B and B0 from B'."""
        if name == "lora_A":
            self.lora_A.copy_(tensor[: self.rank])
            self.initial_A.copy_(tensor[self.rank :])
        else:
            self.lora_B.copy_(tensor[:, : self.rank])
            self.initial_B.copy_(-tensor[:, self.rank :])

    def start_at(self, a: Tensor, b: Tensor) -> None:
        """Set A and A0 to `a`, B and B0 to `b`, so that the update starts at zero."""
        super().start_at(a, b)
        self.initial_A.copy_(a)
        self.initial_B.copy_(b)

    def update(self, x: Tensor) -> Tensor:
        """Return s B A x - s B0 A0 x, shape (..., out)."""
        a, b = self.initial_A.to(x.dtype), self.initial_B.to(x.dtype)
        return super().update(x) - F.linear(F.linear(x, a) * self.scaling, b)

    def delta_weight(self) -> Tensor:
        """Return s B A - s B0 A0, shape (out, in), or (in, out) for `Conv1D`."""
        return super().delta_weight() - self.in_layout(
            self.scaling * (self.initial_B @ self.initial_A)
        )
