r"""The low-rank layers: LoRA, as in Hu et al. 2021, https://arxiv.org/abs/2106.09685.

A layer computes, with a frozen base weight W0 and two small trained matrices A and B,

    y = W0 x + s B A x          s = alpha / rank          (rsLoRA: alpha / sqrt(rank))

A is drawn at random and B starts at zero, so that step 0 is the base model exactly. (Were both
zero, neither would have a gradient; were both random, the model would start with noise.)

Shapes, as PyTorch stores them: x (..., in), A (rank, in), B (out, rank), W0 (out, in). Tutorials
often write x A B with A (in, rank) and B (rank, out): the same numbers, transposed.

A layer wraps its base, so a base that is quantised or sharded needs nothing from this file. A layer
owes two things: `forward`, and `delta_weight`, the s B A that merging adds to W0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import LoraError


class LoRALayer(nn.Module):
    """A frozen base layer and its low-rank update.

    Args:
        base: The layer to adapt; it is kept as the child `base`.
        shape_a: Shape of `lora_A`; the first dimension is the rank.
        shape_b: Shape of `lora_B`; the first dimension is that of the output.
        alpha: Numerator of the scaling.
        dropout: Dropout on the input of the low-rank path, in training.
        use_rslora: Scale by alpha / sqrt(rank) instead of alpha / rank.
    """

    def __init__(
        self,
        base: nn.Module,
        shape_a: tuple[int, ...],
        shape_b: tuple[int, ...],
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.rank = shape_a[0]
        self.alpha = alpha
        self.use_rslora = use_rslora
        self.scaling = alpha / (math.sqrt(self.rank) if use_rslora else self.rank)
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        device = self.weight.device
        # float32 whatever the base is: an update of 1e-5 is lost in bf16's 8 bits
        self.lora_A = nn.Parameter(torch.zeros(shape_a, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(shape_b, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A, kaiming-uniform with a = sqrt(5); set B to zero."""
        with torch.no_grad():
            # drawn on the CPU, so that a seed gives the same adapter on every device
            drawn = torch.empty(self.lora_A.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            if not self.lora_A.is_meta:
                self.lora_A.copy_(drawn)
            self.lora_B.zero_()

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias = getattr(self.base, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output plus the scaled low-rank update, in the base's dtype."""
        y: Tensor = self.base(x)
        return y + self.update(x).to(y.dtype) if self.enabled else y

    def update(self, x: Tensor) -> Tensor:
        """Return s B A x."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """Return s B A in float32, in the shape of the base's weight."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """Return W0 + s B A in float32, in the shape of the base's weight."""
        return self.weight.detach().float() + self.delta_weight()

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}"


class LoRALinear(LoRALayer):
    """LoRA on `nn.Linear`, or on transformers' `Conv1D` (GPT-2), a linear layer stored transposed.

    `lora_A` (rank, in), `lora_B` (out, rank); input (..., in), output (..., out).
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        self.transposed = isinstance(base, Conv1D)  # its weight is (in, out)
        if isinstance(base, nn.Linear):
            n_out, n_in = base.out_features, base.in_features  # a 4-bit weight has another shape
        else:
            assert isinstance(base, Conv1D)
            n_in, n_out = base.weight.shape
        super().__init__(base, (rank, n_in), (n_out, rank), alpha, dropout, use_rslora)

    def update(self, x: Tensor) -> Tensor:
        """Return s B A x, shape (..., out)."""
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(F.linear(self.dropout(x), a) * self.scaling, b)

    def delta_weight(self) -> Tensor:
        """Return s B A, shape (out, in), or (in, out) for `Conv1D`."""
        delta = self.scaling * (self.lora_B.detach() @ self.lora_A.detach())
        return delta.T if self.transposed else delta


class LoRAEmbedding(LoRALayer):
    """LoRA on `nn.Embedding`: the update of a row is a row of s (B A)^T.

    `lora_A` (rank, vocabulary), `lora_B` (dim, rank); input (...) of indices, output (..., dim).
    Here A starts at zero and B at random: a row of A is looked up, so B is the matrix that every
    token shares. There is no dropout on indices.
    """

    def __init__(
        self,
        base: nn.Embedding,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        shape_a, shape_b = (rank, base.num_embeddings), (base.embedding_dim, rank)
        super().__init__(base, shape_a, shape_b, alpha, 0.0, use_rslora)

    def reset_parameters(self) -> None:
        """Set A to zero; draw B from a standard normal distribution."""
        with torch.no_grad():
            drawn = torch.randn(self.lora_B.shape, dtype=torch.float32)
            if not self.lora_B.is_meta:
                self.lora_B.copy_(drawn)
            self.lora_A.zero_()

    def update(self, x: Tensor) -> Tensor:
        """Return s (B A)^T[x], shape (..., dim)."""
        return F.linear(F.embedding(x, self.lora_A.T) * self.scaling, self.lora_B)

    def delta_weight(self) -> Tensor:
        """Return s (B A)^T, shape (vocabulary, dim)."""
        return self.scaling * (self.lora_B.detach() @ self.lora_A.detach()).T


class LoRAConv(LoRALayer):
    """LoRA on `nn.Conv1d` and `nn.Conv2d`: A is a convolution to `rank` channels, B is 1 x 1.

    A has the base's stride, padding and dilation. With G groups, both have G groups, so that the
    update is grouped as the base is and can be merged: `lora_A` (rank, in / G, *kernel), `lora_B`
    (out, rank / G, 1, ...). PEFT stores, with groups, an A over all input channels, (rank, in,
    *kernel): such an A can be set and computes what PEFT computes, but no grouped weight is equal
    to it, so it cannot be merged.
    """

    def __init__(
        self,
        base: nn.Conv1d | nn.Conv2d,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        check_groups(base, rank)
        self.convolve = F.conv1d if isinstance(base, nn.Conv1d) else F.conv2d
        self.groups = base.groups
        shape_a = (rank, base.in_channels // base.groups, *base.kernel_size)
        shape_b = (base.out_channels, rank // base.groups, *(1 for _ in base.kernel_size))
        super().__init__(base, shape_a, shape_b, alpha, dropout, use_rslora)

    def update(self, x: Tensor) -> Tensor:
        """Return s B * A * x (two convolutions), in the shape of the base's output."""
        base = self.base
        assert isinstance(base, nn.Conv1d | nn.Conv2d)
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        x = self.dropout(x)
        padding: str | int | tuple[int, ...] = base.padding
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        groups_a = base.in_channels // self.lora_A.shape[1]  # 1 for an A over all channels
        low: Tensor = self.convolve(x, a, None, base.stride, padding, base.dilation, groups_a)
        result: Tensor = self.convolve(low * self.scaling, b, groups=self.groups)
        return result

    def delta_weight(self) -> Tensor:
        """Return the kernel of the update, shape (out, in / G, *kernel).

        Raises:
            LoraError: If A spans all channels of a grouped base.
        """
        if self.lora_A.shape[1] != self.weight.shape[1]:
            raise LoraError(
                "an adapter whose A spans all channels of a grouped convolution cannot be merged",
                hint="use it unmerged, or train it again with this tool, which keeps the groups",
            )
        # G groups: a (G, rank/G, in/G, *kernel), b (G, out/G, rank/G)
        a = torch.unflatten(self.lora_A.detach(), 0, (self.groups, -1))
        b = torch.unflatten(self.lora_B.detach().flatten(1), 0, (self.groups, -1))
        return self.scaling * torch.einsum("gor,gr...->go...", b, a).flatten(0, 1)


def check_groups(base: nn.Module, rank: int) -> None:
    """Refuse a rank that the groups of a convolution do not divide; all else is fine.

    Raises:
        LoraError: If a row of B would have no whole number of columns.
    """
    groups = base.groups if isinstance(base, nn.Conv1d | nn.Conv2d) else 1
    if rank % groups:
        raise LoraError(
            f"rank {rank} cannot be divided among the {groups} groups of a convolution",
            hint=f"use a rank that {groups} divides, or exclude the module",
        )


def layer_for(
    base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False
) -> LoRALayer | None:
    """Return the low-rank layer that fits `base`, or None where none does."""
    if isinstance(base, nn.Linear | Conv1D):
        return LoRALinear(base, rank, alpha, dropout, use_rslora)
    if type(base) is nn.Embedding:  # subclasses scale or cut what they look up
        return LoRAEmbedding(base, rank, alpha, dropout, use_rslora)
    if isinstance(base, nn.Conv1d | nn.Conv2d):
        return LoRAConv(base, rank, alpha, dropout, use_rslora)
    return None


def can_adapt(module: nn.Module) -> bool:
    """Return whether a low-rank layer fits the module."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention takes its weight and never calls it
    return (
        isinstance(module, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d)
        or type(module) is nn.Embedding
    )
