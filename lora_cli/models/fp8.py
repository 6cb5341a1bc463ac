"""Products of matrices of 8-bit numbers (e4m3) whose rows have a scale each, on a GPU.

A GPU adds up such a product in float32, and then multiplies each entry by the scales of its row in
either matrix. So every row of activations and of weights uses all the range that e4m3 has.

The product and its gradient are operations that `torch.compile` takes as they are: it would join
the rounding of several layers to one kernel, which torch 2.11 needs minutes to compile. They take
tensors of any number of dimensions, since to reason about flattened ones took it minutes as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SIZE_UNIT = 16  # the sizes of the matrices are multiples of it


def has_fp8_products(device: torch.device) -> bool:
    """Return whether a device multiplies matrices of fp8 numbers."""
    if device.type != "cuda":
        return False
    card = torch.cuda.get_device_properties(device)
    return (card.major, card.minor) >= (8, 9)


def fp8_product(x: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W x, of inputs that are rounded for it: (..., out).

    Args:
        x: Inputs (..., in).
        codes: The bits of the frozen weight W's numbers, as integers (out, in).
        scales: The factors of W's rows (out,).
        dtype: Of the result.
    """
    rows, row_scales = fp8_rows(x.detach(), None)
    y: Tensor = _of_rounded(x, rows, row_scales, codes, scales, dtype)
    return y


# layers with the same inputs round them once, where torch compiles them
@torch.library.custom_op("lora_cli::fp8_rows", mutates_args=())
def fp8_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows of a matrix in fp8 (n, m), and the scales (n,) that give its numbers.

    Args:
        x: The matrix, (n, m) or (..., m).
        factors: What its columns are multiplied by before (m,), in float32.
    """
    x = x.flatten(0, -2)
    if x.is_cuda:
        try:
            from lora_cli.models.fp8_kernels import round_rows
        except ImportError:  # no Triton, as on Windows
            pass
        else:
            return round_rows(x, factors, LARGEST)
    x = x.float() if factors is None else x.float() * factors
    # the reciprocal of a smaller one would be infinite
    scales = (x.abs().amax(dim=1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    # rounded up, the largest could be too large
    return (x / scales[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scales


@fp8_rows.register_fake
def _(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    n = math.prod(x.shape[:-1])
    return x.new_empty((n, x.shape[-1]), dtype=FP8), x.new_empty(n, dtype=torch.float32)


@torch.library.custom_op("lora_cli::fp8_product", mutates_args=())
def _of_rounded(
    x: Tensor,
    rows: Tensor,
    row_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return W x from rounded inputs; `x` is not read, but gets the gradient."""
    y = _product(rows, codes.view(FP8), row_scales, scales).to(dtype)
    return y.view(*x.shape[:-1], len(codes))


@_of_rounded.register_fake
def _(x: Tensor, _rows: Any, _scales: Any, codes: Tensor, _: Any, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(codes)), dtype=dtype)


@torch.library.custom_op("lora_cli::fp8_gradient", mutates_args=())
def _gradient(dy: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W^T dy of a gradient (..., out) that is rounded for it: (..., in).

    The rows of W are what is added up here, so their scales go into dy before it is rounded.
    """
    rows, row_scales = fp8_rows(dy, scales)
    # GPUs multiply fp8 matrices row by row. A copy for the moment costs a tenth of the product; a
    # second one of all weights would cost what fp8 saves
    weight = _transposed(codes).view(FP8)
    dx = _product(rows, weight, row_scales, row_scales.new_ones(len(weight))).to(dtype)
    return dx.view(*dy.shape[:-1], len(weight))


@_gradient.register_fake
def _(dy: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], codes.shape[1]), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, codes, scales, _ = inputs
    ctx.save_for_backward(codes, scales)
    ctx.dtype = x.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(dy, *ctx.saved_tensors, ctx.dtype), None, None, None, None, None


_of_rounded.register_autograd(_backward, setup_context=_keep)


def _product(x: Tensor, w: Tensor, x_scales: Tensor, w_scales: Tensor) -> Tensor:
    """Return the product of fp8 rows x (n, in) and w (out, in) in bfloat16: (n, out)."""
    return torch._scaled_mm(
        x,
        w.T,
        scale_a=x_scales[:, None],
        scale_b=w_scales[None],
        out_dtype=torch.bfloat16,  # the one that torch has such products for
        use_fast_accum=False,  # a tenth slower, and added up in float32
    )


def _transposed(codes: Tensor) -> Tensor:
    """Return a matrix of codes with its sides exchanged, contiguous."""
    try:
        from lora_cli.models.fp8_kernels import transposed
    except ImportError:  # no Triton: torch's own copy takes five times as long
        return codes.T.contiguous()
    return transposed(codes)
