"""A frozen linear layer whose weights are quantised to 4 or 8 bits.

`nf4`, the 4-bit format of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): every
block of 64 weights is divided by its largest absolute value, and each quotient is rounded to the
nearest of 16 values, the quantiles of a normal distribution. The scales of the blocks are quantised
to 8 bits themselves, in blocks of 256 ("double quantisation"). This takes 4.13 bits per weight.

`int8`: every row (the weights of one output) is divided by its largest absolute value, and rounded
to one of 255 steps. This takes 8 bits per weight.

`fp8`: every row is scaled so that its largest absolute value becomes 448, and rounded to an 8-bit
float with a 4-bit exponent (e4m3: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).

`nf4` and `int8` weights are dequantised for each product, so activations are never rounded. GPUs
since Ada and Hopper can multiply `fp8` matrices directly, twice as fast as 16-bit ones: there, the
rows of activations and gradients are scaled and rounded like those of weights. On other devices,
and in float32, `fp8` weights are dequantised too.

Only the codes are saved for the backward pass. Codes and scales are ordinary tensors, which can be
moved, hashed, saved and sharded; bitsandbytes supplies the functions for `nf4`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn

from lora_cli.models.fp8 import FP8, SIZE_UNIT, fp8_product, fp8_rows, has_fp8_products

Format = Literal["nf4", "int8", "fp8"]
BLOCK = 64  # weights that share a scale in nf4
SCALE_BLOCK = 256  # scales that share a scale of their own
INT8_STEPS = 127
TABLES = ("mean_scale", "codes", "codes_of_scales")  # too small to be sharded


class QuantizedLinear(nn.Linear):
    """y = W x + b, with W (out, in) stored as codes.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        bias: The bias (out,), or None.
        kind: The format of the weights.
        transposed: Whether the layer replaces transformers' `Conv1D`, which stores (in, out).
        device: The device of the codes; `meta` until they are loaded.
    """

    weight: nn.Parameter
    """The frozen codes: (out * in / 2, 1) with two 4-bit codes each, or (out, in) 8-bit codes.
    `fp8` values are viewed as uint8, so that `.to(dtype)` does not cast them."""
    scales: nn.Parameter
    scales_of_scales: nn.Parameter
    mean_scale: Tensor
    codes: Tensor
    codes_of_scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        kind: Format,
        transposed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # `nn.Linear.__init__` would initialise a weight
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.transposed = kind, transposed
        self.register_parameter("bias", bias)
        for name, (shape, dtype) in self.stored(in_features, out_features, kind).items():
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            if name in TABLES:
                self.register_buffer(name, zeros)
            else:
                self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))

    @staticmethod
    def stored(
        in_features: int, out_features: int, kind: Format
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of every tensor of a quantised weight."""
        if kind != "nf4":
            dtype = torch.int8 if kind == "int8" else torch.uint8
            return {
                "weight": ((out_features, in_features), dtype),
                "scales": ((out_features,), torch.float32),
            }
        n_blocks = -(-in_features * out_features // BLOCK)
        return {
            "weight": ((-(-in_features * out_features // 2), 1), torch.uint8),
            "scales": ((n_blocks,), torch.uint8),
            "scales_of_scales": ((-(-n_blocks // SCALE_BLOCK),), torch.float32),
            "mean_scale": ((), torch.float32),
            "codes": ((16,), torch.float32),
            "codes_of_scales": ((256,), torch.float32),
        }

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantise a weight (out, in), or (in, out) of a `Conv1D`, and store its codes."""
        for name, tensor in quantized(weight.T if self.transposed else weight, self.kind).items():
            value = tensor if name in TABLES else nn.Parameter(tensor, requires_grad=False)
            setattr(self, name, value)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantised weight (out, in)."""
        if self.kind == "int8":
            return (self.weight.to(torch.float32) * (self.scales / INT8_STEPS)[:, None]).to(dtype)
        if self.kind == "fp8":
            return (self.weight.view(FP8).to(torch.float32) * self.scales[:, None]).to(dtype)
        from bitsandbytes import functional

        n_codes = 2 * len(self.weight)  # one more than weights, if their count is odd
        state = functional.QuantState(
            absmax=self.scales,
            # in one row: on CPUs with AVX-512, bitsandbytes 0.50 starts a new block with each row
            shape=torch.Size((1, n_codes)),
            code=self.codes,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.mean_scale,
            state2=functional.QuantState(
                absmax=self.scales_of_scales,
                code=self.codes_of_scales,
                blocksize=SCALE_BLOCK,
                dtype=torch.float32,
            ),
        )
        weight: Tensor = functional.dequantize_4bit(self.weight, state)
        n = self.out_features * self.in_features
        return weight.flatten()[:n].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b; x (..., in), result (..., out)."""
        y: Tensor
        if self.kind == "fp8" and self.multiplies_fp8(x):
            y = fp8_product(x, self.weight, self.scales, _compute_dtype(x))
        else:
            y = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiplies_fp8(self, x: Tensor) -> bool:
        """Return whether the device can multiply inputs by the fp8 codes directly."""
        sizes_fit = self.in_features % SIZE_UNIT == self.out_features % SIZE_UNIT == 0
        return sizes_fit and _compute_dtype(x) != torch.float32 and has_fp8_products(x.device)

    def extra_repr(self) -> str:
        """Return the text for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def quantized(weight: Tensor, kind: Format) -> dict[str, Tensor]:
    """Quantise a weight (out, in); return the tensors of `QuantizedLinear`, on its device."""
    weight = weight.contiguous()
    if kind == "int8":
        scales = weight.float().abs().amax(dim=1)
        steps = torch.where(scales > 0, INT8_STEPS / scales, 0.0)
        codes = (weight.float() * steps[:, None]).round().to(torch.int8)
        return {"weight": codes, "scales": scales}
    if kind == "fp8":
        rounded, scales = fp8_rows(weight, None)
        return {"weight": rounded.view(torch.uint8), "scales": scales}
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return {
        "weight": packed,
        "scales": state.absmax,
        "scales_of_scales": state.state2.absmax,
        "mean_scale": state.offset,
        "codes": state.code,
        "codes_of_scales": state.state2.code,
    }


class _Product(torch.autograd.Function):
    """W x; saves neither x nor W for the backward pass, which dequantises W again for W^T dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype, dtype = layer, x.dtype, _compute_dtype(x)
        return F.linear(x.to(dtype), layer.dequantized(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        return (dy @ ctx.layer.dequantized(dy.dtype)).to(ctx.dtype), None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a product with x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
