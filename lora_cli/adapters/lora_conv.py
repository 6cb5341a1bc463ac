"""LoRA on convolutions: A is a convolution to `rank` channels, B a convolution of kernel size 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name for it
from torch import Tensor, nn

from lora_cli.adapters.lora import LoRALayer, Shape, computes_as_its_kind
from lora_cli.errors import LoraError


class LoRAConv(LoRALayer):
    """LoRA on `nn.Conv1d` and `nn.Conv2d`.

    A has the base's kernel size, stride, padding and dilation. If the base has G groups, A and B
    have G groups too, so that the update can be merged: `lora_A` (rank, in / G, *kernel), `lora_B`
    (out, rank / G, 1, ...). PEFT's A spans all input channels even then: (rank, in, *kernel). Such
    an A can be loaded, and its outputs are PEFT's, but it cannot be merged, because no weight with
    groups computes the same.
    """

    base: nn.Conv1d | nn.Conv2d

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Return whether a module is a convolution of one or two dimensions."""
        return isinstance(base, nn.Conv1d | nn.Conv2d) and computes_as_its_kind(base)

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of A and B.

        Raises:
            LoraError: If the rank is not a multiple of the groups.
        """
        assert isinstance(base, nn.Conv1d | nn.Conv2d)
        if rank % base.groups:
            raise LoraError(
                f"rank {rank} cannot be divided among the {base.groups} groups of a convolution",
                hint=f"use a rank that {base.groups} divides, or exclude the module",
            )
        ones = (1,) * len(base.kernel_size)
        return {
            "lora_A": (rank, base.in_channels // base.groups, *base.kernel_size),
            "lora_B": (base.out_channels, rank // base.groups, *ones),
        }

    @classmethod
    def peft_shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of `shapes`, but with an A that spans all input channels."""
        assert isinstance(base, nn.Conv1d | nn.Conv2d)
        shape_a = (rank, base.in_channels, *base.kernel_size)
        return {**cls.shapes(base, rank), "lora_A": shape_a}

    def to_peft(self, name: str) -> Tensor:
        """Return a parameter as PEFT stores it: A with zeros outside each row's group."""
        a = self.lora_A.detach()
        if name != "lora_A" or a.shape[1] == self.base.in_channels:
            return super().to_peft(name)
        padded = a.new_zeros(self.peft_shapes(self.base, self.rank)["lora_A"])
        for rows, channels in self._blocks():
            padded[rows, channels] = a[rows]
        return padded

    def from_peft(self, name: str, tensor: Tensor) -> None:
        """Set a parameter; an A that is nonzero outside its groups keeps all input channels."""
        if name == "lora_A" and self.base.groups > 1:
            grouped = torch.cat([tensor[rows, channels] for rows, channels in self._blocks()])
            is_grouped = torch.count_nonzero(grouped) == torch.count_nonzero(tensor)
            tensor = grouped if is_grouped else tensor
            if tensor.shape != self.lora_A.shape:
                self.lora_A = nn.Parameter(tensor.to(self.lora_A.device, torch.float32))
        super().from_peft(name, tensor)

    def _blocks(self) -> list[tuple[slice, slice]]:
        """Return each group's rows and input channels in an A that spans all channels."""
        groups = self.base.groups
        rows, channels = self.rank // groups, self.base.in_channels // groups
        return [
            (slice(g * rows, (g + 1) * rows), slice(g * channels, (g + 1) * channels))
            for g in range(groups)
        ]

    def update(self, x: Tensor) -> Tensor:
        """Return s B * A * x (two convolutions), in the shape of the base's output."""
        base = self.base
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        groups_a = base.in_channels // self.lora_A.shape[1]  # 1 if A spans all channels
        low = convolved(base, x, a, groups_a)
        return convolution(base)(low * self.scaling, b, groups=base.groups)

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
        a = torch.unflatten(self.lora_A.detach(), 0, (self.base.groups, -1))
        b = torch.unflatten(self.lora_B.detach().flatten(1), 0, (self.base.groups, -1))
        return self.scaling * torch.einsum("gor,gr...->go...", b, a).flatten(0, 1)


def convolution(base: nn.Conv1d | nn.Conv2d) -> Callable[..., Tensor]:
    """Return torch's convolution function for the base's number of dimensions."""
    return F.conv1d if isinstance(base, nn.Conv1d) else F.conv2d


def convolved(base: nn.Conv1d | nn.Conv2d, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return x convolved with another weight, with the base's stride, padding and dilation."""
    padding: str | int | tuple[int, ...] = base.padding
    if base.padding_mode != "zeros":
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        padding = 0
    return convolution(base)(x, weight, None, base.stride, padding, base.dilation, groups)
