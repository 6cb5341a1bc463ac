"""Matrix products of fp8 (e4m3) matrices with row-wise scales, on a GPU.

A GPU accumulates such a product in float32, and then multiplies each entry by the scales of its row
in both matrices. So every row of activations and weights uses the full range of e4m3.

The product and its gradient are custom operators, which are opaque to `torch.compile`. Otherwise it
would fuse the rounding of several layers into one kernel, which torch 2.11 needs minutes to
compile. They take tensors of any number of dimensions, since compiling flattened ones took minutes
as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
MAX_E4M3 = 448.0
SIZE_UNIT = 16  # the sizes of the matrices have to be multiples of this


def has_fp8_products(device: torch.device) -> bool:
    """Return whether a device supports products of fp8 matrices."""
    if device.type != "cuda":
        return False
    card = torch.cuda.get_device_properties(device)
    return (card.major, card.minor) >= (8, 9)


def fp8_product(x: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W x (..., out), with the inputs rounded to fp8.

    Args:
        x: The inputs (..., in).
        codes: The fp8 values of the frozen weight W (out, in), viewed as uint8.
        scales: The scales of W's rows (out,).
        dtype: The dtype of the result.
    """
    rows, row_scales = fp8_rows(x.detach(), None)
    y: Tensor = _scaled_product(x, rows, row_scales, codes, scales, dtype)
    return y


# an operator of its own, so that compiled layers with the same inputs round them once
@torch.library.custom_op("lora_cli::fp8_rows", mutates_args=())
def fp8_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round the rows of a matrix to fp8; return the fp8 matrix (n, m) and the row scales (n,).

    Args:
        x: The matrix, (n, m) or (..., m).
        factors: The columns are multiplied by these before (m,), in float32.
    """
    x = x.flatten(0, -2)
    if x.is_cuda:
        try:
            from lora_cli.models.fp8_kernels import round_rows
        except ImportError:  # no Triton, as on Windows
            pass
        else:
            return round_rows(x, factors, MAX_E4M3)
    x = x.float() if factors is None else x.float() * factors
    # the reciprocal of a smaller scale would be infinite
    scales = (x.abs().amax(dim=1) / MAX_E4M3).clamp(min=torch.finfo(torch.float32).tiny)
    # rounding could push the largest value beyond the range
    return (x / scales[:, None]).clamp(-MAX_E4M3, MAX_E4M3).to(FP8), scales


@fp8_rows.register_fake
def _(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    n = math.prod(x.shape[:-1])
    return x.new_empty((n, x.shape[-1]), dtype=FP8), x.new_empty(n, dtype=torch.float32)


@torch.library.custom_op("lora_cli::fp8_product", mutates_args=())
def _scaled_product(
    x: Tensor,
    rows: Tensor,
    row_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return W x from rounded inputs; `x` is not read, but receives the gradient."""
    y = _product(rows, codes.view(FP8), row_scales, scales).to(dtype)
    return y.view(*x.shape[:-1], len(codes))


@_scaled_product.register_fake
def _(x: Tensor, _rows: Any, _scales: Any, codes: Tensor, _: Any, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(codes)), dtype=dtype)


@torch.library.custom_op("lora_cli::fp8_gradient", mutates_args=())
def _gradient(dy: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W^T dy (..., in), with the gradient dy (..., out) rounded to fp8.

    The sum is over the rows of W, so dy is multiplied by their scales before it is rounded.
    """
    rows, row_scales = fp8_rows(dy, scales)
    # GPUs need both fp8 matrices row-major. A temporary transposed copy costs a tenth of the
    # product's time; keeping one for all weights would cost the memory that fp8 saves
    weight = _transposed(codes).view(FP8)
    dx = _product(rows, weight, row_scales, row_scales.new_ones(len(weight))).to(dtype)
    return dx.view(*dy.shape[:-1], len(weight))


@_gradient.register_fake
def _(dy: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], codes.shape[1]), dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, codes, scales, _ = inputs
    ctx.save_for_backward(codes, scales)
    ctx.dtype = x.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(dy, *ctx.saved_tensors, ctx.dtype), None, None, None, None, None


_scaled_product.register_autograd(_backward, setup_context=_save_for_backward)


def _product(x: Tensor, w: Tensor, x_scales: Tensor, w_scales: Tensor) -> Tensor:
    """Return x w^T (n, out) in bfloat16, for fp8 matrices x (n, in) and w (out, in)."""
    return torch._scaled_mm(
        x,
        w.T,
        scale_a=x_scales[:, None],
        scale_b=w_scales[None],
        out_dtype=torch.bfloat16,  # the only dtype that torch supports for row-wise scales
        use_fast_accum=False,  # accumulate in float32, which is a tenth slower
    )


def _transposed(codes: Tensor) -> Tensor:
    """Return the transposed matrix, contiguous."""
    try:
        from lora_cli.models.fp8_kernels import transposed
    except ImportError:  # no Triton: torch's own copy takes five times as long
        return codes.T.contiguous()
    return transposed(codes)
