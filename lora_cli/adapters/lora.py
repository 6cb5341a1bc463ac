r"""LoRA layers, as in Hu et al. 2021, https://arxiv.org/abs/2106.09685.

A layer adds the product of two small trained matrices, A and B, to a frozen weight W0:

    y = W0 x + s B A x          s = alpha / rank          (rsLoRA: alpha / sqrt(rank))

A starts at random values and B at zero, so training starts exactly at the base model. (If both
started at zero, neither would have a gradient; if neither did, the model would start with noise.)

Shapes, as PyTorch stores them: x (..., in), A (rank, in), B (out, rank), W0 (out, in). Tutorials
often write x A B with A (in, rank) and B (rank, out): the same values, transposed.

An adapter layer holds the layer that it adapts as its child `base` and calls it, so this file needs
no code for quantised bases. `lora_conv.py` has the layer for convolutions, other files have the
variants (`dora.py`, ...), and `variants.py` chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name for it
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lora_cli.models.quantized_linear import QuantizedLinear

Shape = tuple[int, ...]
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D, QuantizedLinear)
EQUIVALENT_CLASSES = ("FalconLinear",)  # they override forward without changing its result


def computes_as_its_kind(base: nn.Module) -> bool:
    """Return whether a linear layer or convolution is called, with the forward of its base class.

    Subclasses may compute something else: the routers of Llama 4 and PhiMoE choose experts, the
    convolutions of BiT standardise their weight first. Adding a low-rank output to theirs would not
    be equal to updating their weight.
    """
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight without calling it
    kind = type(base)
    return kind.forward in [one.forward for one in KINDS] or kind.__name__ in EQUIVALENT_CLASSES


class LoRALayer(nn.Module):
    """A frozen layer with a trained low-rank update: the base class of all adapter layers.

    A subclass defines `fits`, `shapes`, `update` and `delta_weight`, and overrides `forward`,
    `merged_weight` or `reset_parameters` where its equation differs.

    The parameters of a new layer are zero. `reset_parameters` initialises them for training, and
    `from_peft` sets them to those of a trained adapter.

    Args:
        base: The layer to adapt.
        rank: Rank of the update.
        alpha: Numerator of the scaling.
        dropout: Probability of dropout on the input of the update, in training.
        use_rslora: Scale by alpha / sqrt(rank) instead of alpha / rank.
        shapes: The shapes of its parameters; None for those that `self.shapes` returns.

    Raises:
        LoraError: If `shapes` does.
    """

    lora_A: nn.Parameter  # noqa: N815 - the usual names
    lora_B: nn.Parameter  # noqa: N815

    peft_config: ClassVar[dict[str, bool]] = {}
    """The keys of PEFT's configuration that distinguish such layers from plain LoRA."""
    peft_names: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    """The name of each parameter in PEFT's file, after the name of the module."""
    optional_parameters: ClassVar[frozenset[str]] = frozenset()
    """The parameters that only some layers of the class have."""

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
            # float32 whatever the base is: an update of 1e-5 is lost in the 8 bits of bf16
            zeros = torch.zeros(shape, dtype=torch.float32, device=self.weight.device)
            self.register_parameter(name, nn.Parameter(zeros))

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Return whether a layer of this class can adapt a module."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shape of each parameter of a layer on a base that it fits.

        Raises:
            LoraError: If the layer is impossible on this base, or with this rank.
        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw A from the kaiming-uniform distribution with a = sqrt(5); set B to zero."""
        # drawn on the CPU, so that a seed gives the same adapter on every device
        drawn = torch.empty(self.lora_A.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        with torch.no_grad():
            if not self.lora_A.is_meta:
                self.lora_A.copy_(drawn)
            self.lora_B.zero_()

    @torch.no_grad()
    def start_at(self, a: Tensor, b: Tensor) -> None:
        """Initialise A and B for training with given values, instead of `reset_parameters`."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

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
        """Return W0 + s B A, the weight of a plain layer with the same output.

        Args:
            w0: The base's weight in float32 and in its own shape. If the base is quantised, the
                original weight.
        """
        return w0 + self.delta_weight()

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models read its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def __getattr__(self, name: str) -> Any:
        """Look attributes up in the base: models read more of a layer than its weight.

        Whisper reads the stride of its convolutions, and the size of an embedding.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            base: Any = super().__getattr__("base")
            while isinstance(base, LoRALayer):  # a module with two adapted parameters
                base = base.base
            if name not in vars(base):
                raise
            return vars(base)[name]

    def replace_weight(self, weight: nn.Parameter) -> None:
        """Set the base's weight, for example to the merged weight."""
        self.base.weight = weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias = getattr(self.base, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}"

    # ------------------------------------------------------- the same parameters in PEFT's file

    @classmethod
    def peft_shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of the same parameters in PEFT's file."""
        return cls.shapes(base, rank)

    @classmethod
    def configured_shapes(
        cls, base: nn.Module, rank: int, config: Mapping[str, Any]
    ) -> dict[str, Shape] | None:
        """Return the shapes that PEFT's configuration asks for; None if it cannot change them.

        Raises:
            LoraError: If `shapes` does.
        """
        return None

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int | None:
        """Return the rank of a layer from its tensors in PEFT's file; None if they do not show it.

        Args:
            tensors: The tensors by the names of this layer's parameters.
        """
        a = tensors["lora_A"]
        return a.shape[0] if a.ndim else 0

    def to_peft(self, name: str) -> Tensor:
        """Return a parameter of the layer as PEFT stores it."""
        shape = self.peft_shapes(self.base, self.rank)[name]
        return self.get_parameter(name).detach().reshape(shape)

    def from_peft(self, name: str, tensor: Tensor) -> None:
        """Set a parameter of the layer to what PEFT stored."""
        parameter = self.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(tensor.reshape(parameter.shape))

    @property
    def saved_rank(self) -> int:
        """The rank of the layer in PEFT's file."""
        return self.rank

    @property
    def saved_alpha(self) -> float:
        """The alpha in PEFT's file, which gives the same scaling with `saved_rank`."""
        ratio = self.saved_rank / self.rank
        return self.alpha * (math.sqrt(ratio) if self.use_rslora else ratio)


class LoRALinear(LoRALayer):
    """LoRA on `nn.Linear`, and on transformers' `Conv1D`, GPT-2's linear layer stored transposed.

    `lora_A` (rank, in), `lora_B` (out, rank); input (..., in), output (..., out).
    """

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        """Return whether a module is a linear layer that is called as one."""
        return isinstance(base, nn.Linear | Conv1D) and computes_as_its_kind(base)

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
        """Return the base's weight (out, in) in float32, dequantised if it is quantised."""
        if isinstance(self.base, QuantizedLinear):
            return self.base.dequantized()
        return self.in_layout(self.weight.detach().float())

    def in_layout(self, weight: Tensor) -> Tensor:
        """Convert a matrix (out, in) to the layout of the base's weight, or back."""
        return weight.T if isinstance(self.base, Conv1D) else weight


class LoRAEmbedding(LoRALayer):
    """LoRA on `nn.Embedding`: the update of a token's row is the same row of s (B A)^T.

    `lora_A` (rank, vocabulary), `lora_B` (dim, rank); input (...) of indices, output (..., dim).
    Here A starts at zero and B at random values: A has a column for each token, and B is shared by
    all tokens. There is no dropout, because the input is indices.
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
        return type(base) is nn.Embedding  # subclasses change what they look up

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
