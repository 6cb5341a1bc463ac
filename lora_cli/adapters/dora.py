r"""DoRA: LoRA with a trained magnitude, as in Liu et al. 2024, https://arxiv.org/abs/2402.09353.

The weight vector of each output, a row of V, is decomposed into a direction and a magnitude. A and
B change the direction as in LoRA; the magnitude is a trained vector m with one entry per output:

    y = m / |V| V x          V = W0 + s B A          |V| (out): the norm of each row of V

m starts at |W0| and B at zero, so training starts exactly at the base model.

The backward pass treats |V| as a constant, as section 4.3 of the paper proposes and as PEFT does:
this saves memory and hardly changes the results. With g = m / |V|, and W0 x computed by the base,

    y = W0 x + (g - 1) W0 x + g s B A x          plus the base's bias, which is not scaled

|V| is computed in float32 in each forward pass, which takes one more product B A and a sum over
the weight.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.lora import LoRAEmbedding, LoRALayer, LoRALinear, Shape
from lora_cli.adapters.lora_conv import LoRAConv
from lora_cli.errors import LoraError
from lora_cli.models.quantized_linear import QuantizedLinear

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIN_NORM = 1e-12  # a row of zeros has no direction


class DoRALayer(LoRALayer):
    """A mixin that turns a LoRA layer into a DoRA layer; it comes before that layer in the bases.

    `magnitude` (out) is m.
    """

    magnitude: nn.Parameter

    peft_config: ClassVar[dict[str, bool]] = {"use_dora": True}
    peft_names: ClassVar[dict[str, str]] = {
        **LoRALayer.peft_names,
        "magnitude": "lora_magnitude_vector",
    }

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of A, B and m.

        Raises:
            LoraError: If the base is quantised in a format whose norms cannot be computed.
        """
        weight = base.weight
        assert isinstance(weight, Tensor)
        if weight.dtype not in FLOAT_DTYPES and not isinstance(base, QuantizedLinear):
            raise LoraError(
                f"DoRA needs the length of the base's weights, which are {weight.dtype}: quantised",
                hint="`adapter.type: lora` needs only what the base computes",
            )
        shapes = super().shapes(base, rank)
        return {**shapes, "magnitude": shapes["lora_B"][:1]}

    def reset_parameters(self) -> None:
        """Set A and B as LoRA does, and m to |W0|."""
        super().reset_parameters()
        if not self.magnitude.is_meta:
            with torch.no_grad():
                self.magnitude.copy_(self.length(self._w0()))

    def forward(self, x: Tensor) -> Tensor:
        """Return y in the base's dtype. Dropout applies to x in every term but the first W0 x."""
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        dropped = self.dropout(x)
        w0_x = self.base(dropped) if self.training and self.dropout.p else y
        if self.bias is not None:
            w0_x = w0_x - self._over_output(self.bias)
        gain = self._over_output(self.magnitude / self.length(self._w0()))
        return y + ((gain - 1) * w0_x + gain * self.update(dropped)).to(y.dtype)

    @torch.no_grad()
    def length(self, w0: Tensor) -> Tensor:
        """Return |W0 + s B A|, shape (out,), without a gradient."""
        # not in bfloat16, whose rounding error would exceed the change of a step
        with torch.autocast(w0.device.type, enabled=False):
            rows = (w0 + self.delta_weight()).transpose(0, self._output_dim).flatten(1)
            length: Tensor = rows.norm(dim=1).clamp(min=MIN_NORM)
            return length

    def merged_weight(self, w0: Tensor) -> Tensor:
        """Return m / |V| V, the weight of a plain layer with the same output.

        Args:
            w0: As in `LoRALayer`.
        """
        gain = self.magnitude.detach() / self.length(w0)
        rows = (w0 + self.delta_weight()).transpose(0, self._output_dim)
        scaled = gain.view(-1, *[1] * (rows.ndim - 1)) * rows
        return scaled.transpose(0, self._output_dim).contiguous()

    def _w0(self) -> Tensor:
        if isinstance(self.base, QuantizedLinear):
            return self.base.dequantized(self.magnitude.dtype)
        return self.weight.detach().to(self.magnitude.dtype)

    @property
    def _output_dim(self) -> int:
        """The dimension of the base's weight that belongs to its outputs."""
        return 1 if isinstance(self.base, Conv1D | nn.Embedding) else 0

    def _over_output(self, vector: Tensor) -> Tensor:
        """Reshape a vector with an entry per output so that it broadcasts to the base's output."""
        return vector


class DoRALinear(DoRALayer, LoRALinear):
    """DoRA on `nn.Linear` and transformers' `Conv1D`."""


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """DoRA on `nn.Embedding`: an output is a column of the table."""

    peft_names: ClassVar[dict[str, str]] = {**DoRALayer.peft_names, **LoRAEmbedding.peft_names}


class DoRAConv(DoRALayer, LoRAConv):
    """DoRA on `nn.Conv1d` and `nn.Conv2d` without groups."""

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of A, B and m.

        Raises:
            LoraError: If the base has groups, for which PEFT computes different norms.
        """
        if isinstance(base, nn.Conv1d | nn.Conv2d) and base.groups > 1:
            raise LoraError(
                f"DoRA does not fit a convolution of {base.groups} groups",
                hint="exclude the module, or use `adapter.type: lora`",
            )
        return super().shapes(base, rank)

    @classmethod
    def peft_shapes(cls, base: nn.Module, rank: int) -> dict[str, Shape]:
        """Return the shapes of `shapes`, but m with an output's dimensions: (1, out, 1, ...)."""
        shapes = super().peft_shapes(base, rank)
        n_out, *kernel_ones = shapes["lora_B"][0], *shapes["lora_B"][2:]
        return {**shapes, "magnitude": (1, n_out, *kernel_ones)}

    def _over_output(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * len(self.base.kernel_size))


DORA_LAYERS = (DoRALinear, DoRAEmbedding, DoRAConv)
