r"""The low-rank layers: LoRA, as in Hu et al. 2021, https://arxiv.org/abs/2106.09685.

A layer computes, with a frozen base weight W0 and two small trained matrices A and B,

    y = W0 x + s B A x          s = alpha / rank          (rsLoRA: alpha / sqrt(rank))

A is drawn at random and B starts at zero, so that step 0 is the base model exactly. (Were both
zero, neither would have a gradient; were both random, the model would start with noise.)

Shapes, as PyTorch stores them: x (..., in), A (rank, in), B (out, rank), W0 (out, in). Tutorials
often write x A B with A (in, rank) and B (rank, out): the same numbers, transposed.

A layer wraps its base, so a base that is quantised or sharded needs nothing from this file.
`LoRALayer` says what a layer owes; other adapters (`dora.py`) are layers in the same way, and
`variants.py` chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import LoraError
from lora_cli.models.quantized_linear import QuantizedLinear

Shape = tuple[int, ...]


class LoRALayer(nn.Module):
    """A frozen base layer and what is trained in its place.

    A class of layers owes `fits`, `shapes`, `forward` (here: `update`), `merged_weight` (here:
    `delta_weight`), the start of a training (`reset_parameters`), and PEFT's names of its
    parameters. Constructing a layer draws nothing: everything is zero until it is reset or loaded.

    Args:
        base: The layer to adapt; it is kept as the child `base`.
        rank: Rank of the update.
        alpha: Numerator of the scaling.
        dropout: Dropout on the input of the low-rank path, in training.
        use_rslora: Scale by alpha / sqrt(rank) instead of alpha / rank.
        shapes: Of its parameters, where they are not those of `shapes`.

    Raises:
        LoraError: As `shapes`.
    """

    lora_A: nn.Parameter  # noqa: N815 - the field's own names
    lora_B: nn.Parameter  # noqa: N815

    peft_config: ClassVar[dict[str, bool]] = {}
    """Keys of PEFT's configuration that tell such layers from plain LoRA."""
    peft_names: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    """PEFT's name of each parameter, beneath the name of the module."""
    sometimes: ClassVar[frozenset[str]] = frozenset()
    """Parameters that only some such layers have."""

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        shapes: dict[str, Shape] | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.rank = rank
        shapes = self.shapes(base, rank) if shapes is None else shapes
        self.alpha = alpha
        self.use_rslora = use_rslora
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        for name, shape in shapes.items():
            # float32 whatever the base is: an update of 1e-5 is lost in bf16's 8 bits
            zeros = torch.zeros(shape, dtype=torch.float32, device=self.weight.device)
            self.register_parameter(name, nn.Parameter(zeros))

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Return whether such a layer can take the place of a module."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shape of each parameter that the layer adds to a base which it fits.

        Raises:
            LoraError: If this base, or this rank on it, is impossible.
        """
        raise NotImplementedError

    @classmethod
    def peft_shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of the same parameters in PEFT's file."""
        return cls.shapes(base, rank)

    @classmethod
    def configured_shapes(
        cls, base: nn.Module, rank: int, config: Mapping[str, Any]
    ) -> dict[str, Shape] | None:
        """Return other shapes that PEFT's configuration asks for; None where it can ask for none.

        Raises:
            LoraError: As `shapes`.
        """
        return None

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int | None:
        """Return the rank that tensors of PEFT's file show; None where they show none.

        Args:
            tensors: What a layer adds, by its own names.
        """
        a = tensors["lora_A"]
        return a.shape[0] if a.ndim else 0

    def to_peft(self, name: str) -> Tensor:
        """Return one of the layer's own parameters as PEFT stores it."""
        shape = self.peft_shapes(self.base, self.rank)[name]
        return self.get_parameter(name).detach().reshape(shape)

    def from_peft(self, name: str, tensor: Tensor) -> None:
        """Set one of the layer's own parameters to what PEFT stored."""
        parameter = self.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(tensor.reshape(parameter.shape))

    def reset_parameters(self) -> None:
        """Draw A, kaiming-uniform with a = sqrt(5); set B to zero."""
        # drawn on the CPU, so that a seed gives the same adapter on every device
        drawn = torch.empty(self.lora_A.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        with torch.no_grad():
            if not self.lora_A.is_meta:
                self.lora_A.copy_(drawn)
            self.lora_B.zero_()

    @torch.no_grad()
    def start_at(self, a: Tensor, b: Tensor) -> None:
        """Set A and B at the start of a training."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    @property
    def saved_rank(self) -> int:
        """The rank of the layer in PEFT's file."""
        return self.rank

    @property
    def saved_alpha(self) -> float:
        """The alpha there, by which the scaling is the same."""
        ratio = self.saved_rank / self.rank
        return self.alpha * (math.sqrt(ratio) if self.use_rslora else ratio)

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def replace_weight(self, weight: nn.Parameter) -> None:
        """Give the base another weight, as the merged one."""
        self.base.weight = weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias = getattr(self.base, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output plus the scaled low-rank update, in the base's dtype."""
        y: Tensor = self.base(x)
        return y + self.update(self.dropout(x)).to(y.dtype) if self.enabled else y

    def update(self, x: Tensor) -> Tensor:
        """Return s B A x."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """Return s B A in the shape of the base's weight."""
        raise NotImplementedError

    def merged_weight(self, w0: Tensor) -> Tensor:
        """Return W0 + s B A, the weight of a plain layer that computes the same.

        Args:
            w0: The weight of the base in float32, in its own shape: of a quantised base, the one
                that it was made from.
        """
        return w0 + self.delta_weight()

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}"


class LoRALinear(LoRALayer):
    """LoRA on `nn.Linear`, or on transformers' `Conv1D` (GPT-2), a linear layer stored transposed.

    `lora_A` (rank, in), `lora_B` (out, rank); input (..., in), output (..., out).
    """

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Return whether a module is a linear layer that is called as one."""
        if isinstance(base, NonDynamicallyQuantizableLinear):
            return False  # nn.MultiheadAttention takes its weight and never calls it
        return isinstance(base, nn.Linear | Conv1D)

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of A and B."""
        if isinstance(base, nn.Linear):
            n_out, n_in = base.out_features, base.in_features  # a 4-bit weight has another shape
        else:
            assert isinstance(base, Conv1D)
            n_in, n_out = base.weight.shape
        return {"lora_A": (rank, n_in), "lora_B": (n_out, rank)}

    def update(self, x: Tensor) -> Tensor:
        """Return s B A x, shape (..., out)."""
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(F.linear(x, a) * self.scaling, b)

    def delta_weight(self) -> Tensor:
        """Return s B A, shape (out, in), or (in, out) for `Conv1D`."""
        return self.in_layout(self.scaling * (self.lora_B.detach() @ self.lora_A.detach()))

    def w0(self) -> Tensor:
        """Return the base's weight (out, in) in float32; of a quantised base, as its codes say."""
        if isinstance(self.base, QuantizedLinear):
            return self.base.dequantized()
        return self.in_layout(self.weight.detach().float())

    def in_layout(self, weight: Tensor) -> Tensor:
        """Return a matrix (out, in) as the base stores its weight, and the other way round."""
        return weight.T if isinstance(self.base, Conv1D) else weight


class LoRAEmbedding(LoRALayer):
    """LoRA on `nn.Embedding`: the update of a row is a row of s (B A)^T.

    `lora_A` (rank, vocabulary), `lora_B` (dim, rank); input (...) of indices, output (..., dim).
    Here A starts at zero and B at random: a row of A is looked up, so B is the matrix that every
    token shares. There is no dropout on indices.
    """

    peft_names: ClassVar[dict[str, str]] = {
        "lora_A": "lora_embedding_A",
        "lora_B": "lora_embedding_B",
    }

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        shapes: dict[str, Shape] | None = None,
    ) -> None:
        super().__init__(base, rank, alpha, 0.0, use_rslora, shapes)

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Return whether a module is a plain embedding."""
        return type(base) is nn.Embedding  # subclasses scale or cut what they look up

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of A and B."""
        assert isinstance(base, nn.Embedding)
        return {"lora_A": (rank, base.num_embeddings), "lora_B": (base.embedding_dim, rank)}

    def reset_parameters(self) -> None:
        """Set A to zero; draw B from a standard normal distribution."""
        drawn = torch.randn(self.lora_B.shape, dtype=torch.float32)
        with torch.no_grad():
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

    base: nn.Conv1d | nn.Conv2d

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Return whether a module is a convolution of one or two dimensions."""
        return isinstance(base, nn.Conv1d | nn.Conv2d)

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of A and B.

        Raises:
            LoraError: If the groups do not divide the rank: a row of B would have no whole number
                of columns.
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
        """Return the same shapes, but with an A over all input channels."""
        assert isinstance(base, nn.Conv1d | nn.Conv2d)
        shape_a = (rank, base.in_channels, *base.kernel_size)
        return {**cls.shapes(base, rank), "lora_A": shape_a}

    def to_peft(self, name: str) -> Tensor:
        """Return a parameter as PEFT stores it: A with zeros outside a row's group."""
        a = self.lora_A.detach()
        if name != "lora_A" or a.shape[1] == self.base.in_channels:
            return super().to_peft(name)
        wide = a.new_zeros(self.peft_shapes(self.base, self.rank)["lora_A"])
        for rows, channels in self._blocks():
            wide[rows, channels] = a[rows]
        return wide

    def from_peft(self, name: str, tensor: Tensor) -> None:
        """Set a parameter; an A that is not zero outside the groups stays over all channels."""
        if name == "lora_A" and self.base.groups > 1:
            narrow = torch.cat([tensor[rows, channels] for rows, channels in self._blocks()])
            is_grouped = torch.count_nonzero(narrow) == torch.count_nonzero(tensor)
            tensor = narrow if is_grouped else tensor
            if tensor.shape != self.lora_A.shape:
                self.lora_A = nn.Parameter(tensor.to(self.lora_A.device, torch.float32))
        super().from_peft(name, tensor)

    def _blocks(self) -> list[tuple[slice, slice]]:
        """Return each group's rows and channels of an A over all channels."""
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
        groups_a = base.in_channels // self.lora_A.shape[1]  # 1 for an A over all channels
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
    """Return torch's function for a convolution of as many dimensions."""
    return F.conv1d if isinstance(base, nn.Conv1d) else F.conv2d


def convolved(base: nn.Conv1d | nn.Conv2d, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return x convolved with another weight, with the base's stride, padding and dilation."""
    padding: str | int | tuple[int, ...] = base.padding
    if base.padding_mode != "zeros":
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        padding = 0
    return convolution(base)(x, weight, None, base.stride, padding, base.dilation, groups)


LORA_LAYERS = (LoRALinear, LoRAEmbedding, LoRAConv)
