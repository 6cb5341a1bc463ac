"""Tests of the kernel for A x with dropout, against its equation with masks computed by numpy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from test_precision import pytestmark as on_a_gpu
from torch import Tensor, nn

from lora_cli.adapters.lora import LoRALinear
from lora_cli.training import stacked_products
from lora_cli.training.stacked_products import hidden_of_updates, new_seed

pytestmark = on_a_gpu
U32 = np.uint32


def mixed(x: Any) -> Any:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> U32(16))) * U32(0x7FEB352D)
        x = (x ^ (x >> U32(15))) * U32(0x846CA68B)
        return x ^ (x >> U32(16))


def masks(seed: Tensor, n_layers: int, n_rows: int, n_columns: int, p: float) -> list[Tensor]:
    """Return which elements each layer keeps, by the hash that the kernel documents."""
    rows, columns, bits = np.arange(n_rows, dtype=U32), np.arange(n_columns, dtype=U32), int(seed)
    found = []
    with np.errstate(over="ignore"):
        row = mixed(rows * U32(0x9E3779B1) + U32(bits & 0xFFFFFFFF))
        column = mixed(columns * U32(0x85EBCA77) + U32(bits >> 32))
        numbers = row[:, None] + column[None, :]
        for _ in range(n_layers):
            numbers = (numbers ^ (numbers >> U32(15))) * U32(0x846CA68B)
            kept = numbers.view(np.int32) >= int(p * 2**32) - 2**31
            found.append(torch.from_numpy(kept).cuda())
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize(
    ("shape", "n", "n_layers", "rank"),
    [
        ((2, 128), 256, 3, 16), ((3, 37), 136, 2, 5), ((1, 1), 8, 1, 1), ((2, 65), 2100, 3, 64),
        ((1, 0), 16, 2, 4), ((3, 1025), 72, 1, 33),
    ],
)  # fmt: skip
def test_products_and_gradients_equal_those_of_the_equation(
    shape: tuple[int, int], n: int, n_layers: int, rank: int, p: float, dtype: torch.dtype
) -> None:
    from lora_cli.training.lora_dropout_kernel import products_with_dropout

    torch.manual_seed(0)
    x = torch.randn(*shape, n, device="cuda").to(dtype).requires_grad_()
    a = torch.randn(n_layers, rank, n, device="cuda").to(dtype).requires_grad_()
    seed = new_seed(x)
    exact_x, exact_a = (t.detach().double().requires_grad_() for t in (x, a))
    pairs = zip(masks(seed, n_layers, shape[0] * shape[1], n, p), exact_a, strict=True)
    products = [(kept.view(*shape, n) * exact_x / (1 - p)) @ a_i.T for kept, a_i in pairs]
    wanted = torch.stack(products, -2)
    found = products_with_dropout(x, a, seed, p)
    slope = torch.randn_like(wanted)
    for f, w in zip(
        (found, *torch.autograd.grad(found, (x, a), slope.to(dtype))),
        (wanted, *torch.autograd.grad(wanted, (exact_x, exact_a), slope)),
        strict=True,
    ):
        assert f.shape == w.shape
        limit = (0.02 if dtype == torch.bfloat16 else 0.003) * w.abs().amax() if w.numel() else 0
        assert ((f.double() - w).abs() <= limit).all()


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_masks_are_random(p: float) -> None:
    seeds = [new_seed(torch.empty(0, device="cuda")) for _ in range(2)]
    drawn = [kept.double() - (1 - p) for seed in seeds for kept in masks(seed, 3, 2048, 1024, p)]
    spread = (p * (1 - p)) ** 0.5
    for kept in drawn:
        n = kept.numel()
        assert abs(kept.mean()) < 5 * spread / n**0.5
        for sums in (kept.sum(0), kept.sum(1)):  # over the elements of a column, of a row
            size = n / len(sums)
            assert (sums.abs() < 6 * spread * size**0.5).all()
            assert 0.8 < sums.square().mean() / (spread**2 * size) < 1.25
        for rows, columns in ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (64, 0), (0, 64)):
            other = kept.roll((rows, columns), (0, 1))
            assert abs((kept * other).mean()) < 5 * spread**2 / n**0.5
            corners = kept * other * kept.roll(rows + 1, 0) * other.roll(-rows - 1, 0)
            assert abs(corners.mean()) < 5 * spread**4 / n**0.5
    for one, other in itertools.combinations(drawn, 2):  # of the same element
        assert abs((one * other).mean()) < 5 * spread**2 / one.numel() ** 0.5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("ranks", "dropouts"),
    [
        ((4, 4, 4), (0.2, 0.2, 0.2)), ((4, 8), (0.2, 0.2)), ((4, 4), (0.2, 0.4)), ((7,), (0.5,)),
        ((4, 4), (0.0, 0.4)), ((2,) * 5, (0.1,) * 5),
    ],
)  # fmt: skip
def test_layers_use_it_for_their_updates(
    ranks: tuple[int, ...], dropouts: tuple[float, ...], autocast: bool, compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch._dynamo.reset()
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    layers = []
    for rank, p in zip(ranks, dropouts, strict=True):
        layers.append(LoRALinear(nn.Linear(96, 40, dtype=dtype), rank, alpha=6, dropout=p).cuda())
        nn.init.normal_(layers[-1].lora_A)
    seed = torch.tensor([2**40 + 5], device="cuda")
    monkeypatch.setattr(stacked_products, "new_seed", lambda x: seed)
    x = torch.randn(3, 50, 96, device="cuda", dtype=dtype)
    function = torch.compile(hidden_of_updates) if compiled else hidden_of_updates
    with torch.autocast("cuda", torch.bfloat16, autocast):
        found = function(layers, x)
    together = len({*ranks}) == len({*dropouts}) == 1 and len(ranks) <= 3
    for i, (h, layer) in enumerate(zip(found, layers, strict=True)):
        kept = masks(seed, i + 1, 150, 96, layer.dropout.p)[i if together else 0].view(3, 50, 96)
        wanted = (kept * x / (1 - layer.dropout.p)) @ layer.lora_A.to(dtype).T * layer.scaling
        assert h.dtype == torch.bfloat16
        assert (h - wanted).abs().max() <= 0.03 * wanted.abs().max()


def test_numbers_of_32_bits_and_large_ranks_use_the_dropout_of_torch() -> None:
    for dtype, rank in ((torch.float32, 4), (torch.bfloat16, 65)):
        layer = LoRALinear(nn.Linear(96, 40), rank, alpha=6, dropout=0.5).cuda()
        nn.init.normal_(layer.lora_A)
        x = torch.randn(7, 96, device="cuda", dtype=dtype)
        torch.manual_seed(1)
        (found,) = hidden_of_updates([layer], x)
        torch.manual_seed(1)
        wanted = layer.dropout(x) @ layer.lora_A.to(dtype).T * layer.scaling
        assert (found - wanted).abs().max() <= 0.02 * wanted.abs().max()
