"""Tests of quantised layers, against bitsandbytes and plain autograd with the same codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_cli.models.quantized_linear import Format, QuantizedLinear

functional: Any = pytest.importorskip("bitsandbytes.functional")
FORMATS: list[Format] = ["nf4", "int8", "fp8"]
SHAPE = (96, 40)  # out, in


def layer(kind: Format, dtype: torch.dtype = torch.float32) -> tuple[QuantizedLinear, torch.Tensor]:
    torch.manual_seed(0)
    weight, bias = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE[0], dtype=dtype)
    made = QuantizedLinear(SHAPE[1], SHAPE[0], nn.Parameter(bias), kind)
    made.set_weight(weight)
    return made, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_equals_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    made, weight = layer("nf4", dtype)
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(made.weight, codes)
    assert torch.equal(made.dequantized(dtype), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [(96, 32), (64, 64), (48, 160), (33, 65), (5, 13), (1, 1)])
def test_a_weight_is_its_code_times_the_scale_of_its_block(shape: tuple[int, int]) -> None:
    made = QuantizedLinear(shape[1], shape[0], None, "nf4")
    made.set_weight(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    codes = torch.stack([made.weight >> 4, made.weight & 15], -1).flatten().long()
    of_blocks = made.scales_of_scales.repeat_interleave(256)[: len(made.scales)]
    scales = made.codes_of_scales[made.scales.long()] * of_blocks + made.mean_scale
    numbers = made.codes[codes] * scales.repeat_interleave(64)[: len(codes)]
    wanted = numbers[: shape[0] * shape[1]].view(shape)
    torch.testing.assert_close(made.dequantized(), wanted, rtol=1e-6, atol=1e-7)


def test_int8_equals_that_of_bitsandbytes() -> None:
    made, weight = layer("int8", torch.float16)
    codes, scales, _ = functional.int8_vectorwise_quant(weight)
    assert torch.equal(made.weight, codes)
    torch.testing.assert_close(
        made.dequantized(), functional.int8_vectorwise_dequant(codes, scales), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.1), ("int8", 0.006), ("fp8", 0.03)])
def test_a_weight_is_close_to_the_original(kind: Format, error: float) -> None:
    made, weight = layer(kind)
    assert float((made.dequantized() - weight).norm() / weight.norm()) < error


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e3])
def test_fp8_rounds_as_torch_does_and_scales_each_row_to_448(size: float) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * size
    weight[0] *= 1e-4
    made = QuantizedLinear(SHAPE[1], SHAPE[0], None, "fp8")
    made.set_weight(weight)
    numbers = made.weight.view(torch.float8_e4m3fn).float()
    assert torch.equal(numbers.abs().amax(dim=1), torch.full((SHAPE[0],), 448.0))
    # e4m3 has 3 mantissa bits: the error is at most a 16th of the value, and below the
    # smallest normal value 2^-6 at most half a step of 2^-9
    scales = weight.abs().amax(dim=1, keepdim=True) / 448
    limit = (weight.abs() / 16).maximum(scales * 2.0**-10) * 1.001
    assert bool(((made.dequantized() - weight).abs() <= limit).all())


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_each_row_of_int8_has_steps_of_its_own_size(size: float) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) * size
    weight[0] *= 1e-4  # one small row among others
    made = QuantizedLinear(SHAPE[1], SHAPE[0], None, "int8")
    made.set_weight(weight)
    half_a_step = weight.abs().amax(dim=1, keepdim=True) / 127 / 2
    assert bool(((made.dequantized() - weight).abs() <= half_a_step * 1.001).all())


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_zeros_stay_zero(kind: Format) -> None:
    made = QuantizedLinear(SHAPE[1], SHAPE[0], None, kind)
    made.set_weight(torch.zeros(SHAPE))
    assert torch.count_nonzero(made.dequantized()) == 0


@pytest.mark.parametrize("kind", FORMATS)
def test_outputs_and_gradients_equal_those_of_a_plain_layer(kind: Format) -> None:
    made, _ = layer(kind)
    x = torch.randn(3, 5, SHAPE[1], requires_grad=True)
    other = x.detach().clone().requires_grad_()
    plain = F.linear(other, made.dequantized(), made.bias)
    found = made(x)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6 * float(plain.detach().abs().max()))
    dy = torch.randn_like(found)
    found.backward(dy)
    bias_gradient = made.bias.grad.clone()
    made.bias.grad = None
    plain.backward(dy)
    assert x.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(
        x.grad, other.grad, rtol=0, atol=1e-6 * float(other.grad.abs().max())
    )
    torch.testing.assert_close(bias_gradient, made.bias.grad)
    assert made.weight.grad is None


@pytest.mark.parametrize("kind", FORMATS)
def test_only_codes_are_saved_for_the_backward_pass(kind: Format) -> None:
    made, _ = layer(kind)
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made(torch.randn(3, SHAPE[1], requires_grad=True)).sum()
    assert kept == []


@pytest.mark.parametrize("kind", FORMATS)
def test_under_autocast_the_product_is_computed_in_16_bits(kind: Format) -> None:
    made, _ = layer(kind)
    x = torch.randn(3, SHAPE[1], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    wanted = made.dequantized().sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_state_dict_restores_the_layer(kind: Format) -> None:
    made, _ = layer(kind)
    other = QuantizedLinear(SHAPE[1], SHAPE[0], nn.Parameter(torch.zeros(SHAPE[0])), kind)
    other.load_state_dict(made.state_dict())
    x = torch.randn(2, SHAPE[1])
    assert torch.equal(made(x), other(x))
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_memory_of_a_layer_is_as_documented(kind: Format) -> None:
    stored = QuantizedLinear(4096, 4096, None, kind, device="meta").state_dict().values()
    bits = 8 * sum(t.numel() * t.element_size() for t in stored) / 4096**2
    assert bits == pytest.approx({"nf4": 4.13, "int8": 8.0, "fp8": 8.0}[kind], abs=0.01)
