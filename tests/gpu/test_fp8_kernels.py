"""Tests of fp8 bases on a GPU that supports fp8 products: rounded products, and training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_graphs import language_model
from test_precision import losses, recipe, train
from test_precision import pytestmark as on_a_gpu

from lora_cli.models.fp8 import fp8_rows, has_fp8_products
from lora_cli.models.quantized_linear import QuantizedLinear

pytestmark = [
    *on_a_gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_fp8_products(torch.device("cuda", 0))),
        reason="needs a GPU that multiplies in fp8",
    ),
]


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the dequantised fp8 rows in float64: scaled to 448, and rounded by torch."""
    scales = x.double().abs().amax(dim=1, keepdim=True) / 448
    return (x.double() / scales).float().to(torch.float8_e4m3fn).double() * scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(64, 1024, 4096), (3, 16, 48), (1, 4096, 16), (777, 336, 80)])
def test_fp8_products_are_those_of_rounded_rows(
    sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    n, n_in, n_out = sizes
    torch.manual_seed(0)
    layer = QuantizedLinear(n_in, n_out, None, "fp8", device="cuda")
    layer.set_weight(torch.randn(n_out, n_in, device="cuda") * torch.rand(n_out, 1, device="cuda"))
    x = (torch.randn(n, n_in, device="cuda") * 3).to(dtype).requires_grad_()
    dy = torch.randn(n, n_out, device="cuda").to(dtype)
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == dtype
    scales = layer.scales.double()
    numbers = layer.weight.view(torch.float8_e4m3fn).double()
    wanted = rounded_rows(x.detach()) @ (numbers * scales[:, None]).T
    assert float((y.detach().double() - wanted).norm() / wanted.norm()) < 4e-3
    wanted = rounded_rows(dy.double() * scales) @ numbers
    assert float((x.grad.double() - wanted).norm() / wanted.norm()) < 4e-3
    # the rounding error: both factors have 3 mantissa bits
    exact = x.detach().double() @ layer.dequantized().double().T
    most = 0.06 if y.numel() == 16 else 0.04  # the average of few values varies more
    assert 1e-3 < float((y.detach().double() - exact).norm() / exact.norm()) < most


def test_a_compiled_layer_has_the_same_gradient() -> None:
    torch.manual_seed(0)
    up, down = (
        QuantizedLinear(*sizes, None, "fp8", device="cuda") for sizes in ((64, 128), (128, 64))
    )
    up.set_weight(torch.randn(128, 64, device="cuda"))
    down.set_weight(torch.randn(64, 128, device="cuda"))

    def compute(x: torch.Tensor) -> torch.Tensor:
        return down(torch.nn.functional.silu(up(x)) * up(2 * x))

    x = torch.randn(3, 40, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (wanted,) = torch.autograd.grad(compute(x).float().square().mean(), x)
    (found,) = torch.autograd.grad(torch.compile(compute)(x).float().square().mean(), x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_rows_are_rounded_as_on_a_cpu() -> None:
    torch.manual_seed(0)
    x = (
        torch.randn(50, 5000, device="cuda").bfloat16()
        * torch.rand(50, 1, device="cuda").bfloat16()
    )
    x[3], x[4, 7], x[5, 8] = 0, math.nan, math.inf
    factors = torch.rand(5000, device="cuda")
    for given in (None, factors):
        codes, scales = fp8_rows(x, given)
        wanted, wanted_scales = fp8_rows(x.cpu(), None if given is None else given.cpu())
        same = codes.cpu().view(torch.uint8) == wanted.view(torch.uint8)
        bad = ~scales.cpu().isfinite()
        assert bad.tolist() == (~wanted_scales.isfinite()).tolist()
        assert bad.tolist() == [row in (4, 5) for row in range(50)]
        torch.testing.assert_close(scales.cpu()[~bad], wanted_scales[~bad], rtol=1e-6, atol=0)
        # ties between two values may be rounded to either
        assert float(same[~bad].float().mean()) > 0.98
        steps = codes.cpu().view(torch.uint8).int() - wanted.view(torch.uint8).int()
        assert int(steps[~bad].abs().max()) <= 1
        numbers = codes.cpu().float() * scales.cpu()[:, None]
        assert not numbers[bad].isfinite().any()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_weights_of_unsupported_sizes_are_dequantised(
    shape: tuple[int, int],
) -> None:
    layer = QuantizedLinear(*shape, None, "fp8", device="cuda")
    layer.set_weight(torch.randn(shape[::-1], device="cuda"))
    x = torch.randn(5, shape[0], device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), x @ layer.dequantized(torch.bfloat16).T)


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_a_decoder_learns_in_fp8_as_in_bf16(kernels: str, tmp_path: Path) -> None:
    curves = []
    for kind in ("null", "fp8"):
        settings = (f"model.quantization={kind}", "train.precision=bf16", "train.max_steps=30",
                    f"train.kernels={kernels}", "train.optimizer.learning_rate=1e-3")  # fmt: skip
        train(language_model(tmp_path, *settings, output=f"{kind}-{kernels}"))
        curves.append(losses(tmp_path / f"{kind}-{kernels}"))
    plain, rounded = curves
    assert plain[-1] < plain[0] - 0.3
    assert rounded != plain
    for one, other in zip(plain, rounded, strict=True):
        assert abs(one - other) < 0.02 * one


@pytest.mark.parametrize("again", ["true", "false"])
def test_a_run_in_fp8_is_reproducible_bit_for_bit(again: str, tmp_path: Path) -> None:
    settings = ("model.quantization=fp8", "train.precision=bf16", "train.max_steps=20",
                f"train.gradient_checkpointing={again}")  # fmt: skip
    for output in ("one", "other"):
        train(recipe(tmp_path, *settings, output=output))
    one, other = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other")
    )
    assert one == other
