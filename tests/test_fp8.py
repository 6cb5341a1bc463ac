"""Tests that fp8 products equal those of the rounded rows in float64, also on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_cli.models import quantized_linear
from lora_cli.models.fp8 import FP8, fp8_rows, has_fp8_products
from lora_cli.models.quantized_linear import QuantizedLinear

SIZES = [(5, 32, 48), (1, 64, 16), (40, 16, 80)]


@pytest.fixture(autouse=True)
def _products_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(quantized_linear, "has_fp8_products", lambda device: True)


def layer_of(n_in: int, n_out: int, bias: bool = False) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(n_in)
    numbers = torch.randn(n_out, n_in, generator=generator)
    sizes = torch.rand(n_out, 1, generator=generator)  # rows of very different magnitudes
    layer = QuantizedLinear(n_in, n_out, nn.Parameter(torch.randn(n_out)) if bias else None, "fp8")
    layer.set_weight(numbers * sizes)
    return layer


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the dequantised fp8 rows in float64: scaled to 448, and rounded by torch."""
    scales = x.double().abs().amax(dim=1, keepdim=True) / 448
    return (x.double() / scales).float().to(FP8).double() * scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_products_and_gradients_are_those_of_rounded_rows(
    sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    n, n_in, n_out = sizes
    layer = layer_of(n_in, n_out)
    x = (torch.randn(n, n_in) * 3).to(dtype).requires_grad_()
    dy = torch.randn(n, n_out).to(dtype)
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == dtype
    scales, numbers = layer.scales.double(), layer.weight.view(FP8).double()
    wanted = rounded_rows(x.detach()) @ (numbers * scales[:, None]).T
    assert float((y.detach().double() - wanted).norm() / wanted.norm()) < 3e-3
    wanted = rounded_rows(dy.double() * scales) @ numbers
    assert float((x.grad.double() - wanted).norm() / wanted.norm()) < 3e-3


def test_inputs_may_have_any_dimensions_and_rows_are_independent() -> None:
    layer = layer_of(32, 48, bias=True)
    x = torch.randn(2, 3, 32).bfloat16()
    y = layer(x)
    assert y.shape == (2, 3, 48)
    assert layer.bias is not None
    product = rounded_rows(x.flatten(0, 1)) @ layer.dequantized().double().T
    wanted = product.view(2, 3, 48) + layer.bias.detach()
    assert float((y.detach().double() - wanted).norm() / wanted.norm()) < 5e-3
    torch.testing.assert_close(layer(x[1, 2:3]), y[1, 2:3])


def test_under_autocast_the_result_has_its_dtype_and_the_gradient_that_of_the_input() -> None:
    layer = layer_of(32, 48)
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_in_float32_only_the_weight_is_rounded() -> None:
    layer = layer_of(32, 48)
    x = torch.randn(4, 32)
    torch.testing.assert_close(layer(x), x @ layer.dequantized().T)


@pytest.mark.parametrize("sizes", [(24, 32), (32, 24)])
def test_weights_of_unsupported_sizes_are_dequantised(
    sizes: tuple[int, int],
) -> None:
    layer = layer_of(*sizes)
    x = torch.randn(4, sizes[0]).bfloat16()
    torch.testing.assert_close(layer(x), x @ layer.dequantized(torch.bfloat16).T)


def test_a_compiled_layer_has_the_same_gradient() -> None:
    up, down = layer_of(32, 64), layer_of(64, 32)

    def compute(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = down(torch.nn.functional.silu(up(x)) * up(2 * x))
        return y

    x = torch.randn(3, 4, 32).bfloat16().requires_grad_()
    (wanted,) = torch.autograd.grad(compute(x).float().square().sum(), x)
    compiled = torch.compile(compute, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x).float().square().sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_nan_or_infinity_gives_nan(bad: float) -> None:
    x = torch.ones(2, 4)
    x[0, 1] = bad
    numbers, scales = fp8_rows(x, None)
    again = numbers.float() * scales[:, None]
    assert not again[0].isfinite().all()
    torch.testing.assert_close(again[1], x[1])


def test_factors_multiply_the_columns_before_they_are_rounded() -> None:
    x, factors = torch.randn(6, 32).bfloat16(), torch.rand(32)
    for one, other in zip(fp8_rows(x, factors), fp8_rows(x.float() * factors, None), strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize(
    ("major", "minor", "can"), [(8, 0, False), (8, 6, False), (8, 9, True), (9, 0, True)]
)  # A100, A10, L4, H100
def test_gpus_since_ada_multiply_in_fp8(
    major: int, minor: int, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert has_fp8_products(torch.device("cuda", 0)) is can
    assert not has_fp8_products(torch.device("cpu"))
