"""Products with W + L R, compared with those of the sum itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import tiny
import tiny_experts
import torch
from closeness import assert_close
from torch import Tensor, nn

from lora_cli.adapters.attach import attach, lora_layers, trainable_parameters
from lora_cli.adapters.lora_parameter import LoRAParameter
from lora_cli.adapters.low_rank_sum import LowRankSum, _grouped

ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)


def parts(*shape: int, rank: int = 2, dtype: torch.dtype = torch.float64) -> LowRankSum:
    generator = torch.Generator().manual_seed(sum(shape))
    *experts, n, m = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype).requires_grad_()

    return LowRankSum(draw(*shape), draw(*experts, n, rank), draw(*experts, rank, m))


def never(_: LowRankSum) -> Tensor:
    raise AssertionError("the sum was added up")


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator, dtype=dtype)


linear, grouped = torch.nn.functional.linear, torch._grouped_mm
PRODUCTS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "linear": ((4, 3), lambda w: linear(draw(2, 5, 3), w)),
    "linear with a bias": ((4, 3), lambda w: linear(draw(5, 3), w, draw(4))),
    "x w": ((3, 4), lambda w: draw(2, 5, 3) @ w),
    "w x": ((3, 4), lambda w: w @ draw(4, 2)),
    "matmul": ((3, 4), lambda w: torch.matmul(draw(5, 3), w)),
    "mm": ((3, 4), lambda w: torch.mm(draw(5, 3), w)),
    "a turned matrix": ((4, 3), lambda w: draw(5, 3) @ w.T),
    "of an expert": ((3, 4, 5), lambda w: linear(draw(2, 5), w[1])),
    "of an expert by a tensor": ((3, 4, 5), lambda w: draw(2, 4) @ w[torch.tensor(2)]),
    "of the last expert": ((3, 4, 5), lambda w: draw(2, 4) @ w[-1]),
    "of chosen experts": (
        (3, 4, 5),
        lambda w: torch.bmm(w[torch.tensor([2, 0, 2])], draw(3, 5, 1)),
    ),
    "of chosen experts, turned": (
        (3, 4, 5),
        lambda w: torch.bmm(draw(3, 1, 4), w[torch.tensor([2, 0, 2])]),
    ),
    "turned experts": ((3, 4, 5), lambda w: draw(3, 2, 5) @ w.transpose(1, 2)),
    "turned experts, mT": ((3, 4, 5), lambda w: torch.bmm(draw(3, 2, 5), w.mT)),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_with_the_sum_is_a_sum_of_two_products(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, product = PRODUCTS[case]
    sum_ = parts(*shape)
    of = [sum_.weight, sum_.left, sum_.right]
    expected = product(sum_.weight + sum_.left @ sum_.right)
    gradients = torch.autograd.grad(expected.square().sum(), of)
    monkeypatch.setattr(LowRankSum, "total", property(never))
    found = product(sum_)
    assert_close(found, expected, 1e-12)
    for mine, other in zip(torch.autograd.grad(found.square().sum(), of), gradients, strict=True):
        assert_close(mine, other, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["torch", "functional", "fallback", "by position"])
def test_the_rows_of_each_expert_are_multiplied_together(
    name: str, turned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = {
        "torch": torch._grouped_mm,
        "functional": getattr(torch.nn.functional, "grouped_mm", torch._grouped_mm),
        "fallback": torch.ops.transformers.grouped_mm_fallback,
        "by position": lambda x, matrices, offs: torch._grouped_mm(x, matrices, offs),
    }
    sum_ = parts(3, 16, 8, rank=3, dtype=torch.float32)
    sum_.weight.data = sum_.weight.data.to(dtype)
    total, x = (sum_.weight + sum_.left @ sum_.right).detach(), draw(5, 16, dtype=dtype)
    if turned:
        total, x = total.mT, x[:, :8].contiguous()
    ends = [0, *ENDS.tolist()]
    expected = torch.cat([x[a:b].float() @ total[e] for e, (a, b) in enumerate(pairwise(ends))])
    monkeypatch.setattr(LowRankSum, "total", property(never))
    found = products[name](x, sum_.transpose(-2, -1) if turned else sum_, offs=ENDS)
    assert found.dtype == dtype
    assert_close(found.float(), expected, 1e-6 if dtype == torch.float32 else 2e-2)
    found.float().square().sum().backward()
    assert sum_.left.grad is not None
    assert sum_.right.grad is not None
    assert sum_.left.grad[0].any()
    assert not sum_.left.grad[1].any()  # the second expert has no rows


@pytest.mark.parametrize(
    ("dtype", "rank", "width"),
    [(torch.float32, 3, 4), (torch.float32, 4, 4), (torch.float32, 5, 8),
     (torch.bfloat16, 7, 8), (torch.bfloat16, 8, 8), (torch.bfloat16, 9, 16)],
)  # fmt: skip
def test_rows_of_grouped_factors_are_multiples_of_16_bytes(
    dtype: torch.dtype, rank: int, width: int
) -> None:
    """Kernels of grouped products crash on rows that do not start at an aligned address."""
    shapes = []

    def product(x: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
        shapes.append(tuple(matrices.shape))
        return x.new_zeros(len(x), matrices.shape[-1])

    _grouped(product, draw(5, 16, dtype=dtype), parts(3, 16, 8, rank=rank, dtype=dtype), ENDS)
    assert shapes == [(3, 16, 8), (3, 16, width), (3, width, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_in_32_bits_meet_a_parameter_in_16(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sum_ = parts(16, 8, rank=3, dtype=torch.float32)
    total, x = (sum_.weight + sum_.left @ sum_.right).detach(), draw(5, 8, dtype=torch.float32)
    monkeypatch.setattr(LowRankSum, "total", property(never))
    with torch.autocast("cpu", torch.bfloat16):  # of a base in either
        found = linear(x, LowRankSum(sum_.weight.to(dtype), sum_.left, sum_.right))
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), x @ total.T, 3e-2)
    in_16 = LowRankSum(sum_.weight.to(torch.bfloat16), sum_.left, sum_.right)
    found = linear(x.to(torch.bfloat16), in_16)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), x @ total.T, 3e-2)


def test_all_other_operations_use_the_sum() -> None:
    sum_ = parts(3, 4, 4)
    total = (sum_.weight + sum_.left @ sum_.right).detach()
    assert (len(sum_), sum_.ndim, sum_.dim(), sum_.shape) == (3, 3, 3, total.shape)
    assert (sum_.size(), sum_.size(1), sum_.dtype) == (total.shape, 4, torch.float64)
    assert sum_.device == total.device
    assert sum_.data_ptr() == sum_.weight.data_ptr()
    pairs = [
        (sum_ + 1, total + 1), (2 + sum_, 2 + total), (sum_ - 1, total - 1),
        (3 - sum_, 3 - total), (sum_ * 2, total * 2), (2 * sum_, total * 2),
        (sum_ / 2, total / 2), (-sum_, -total), (sum_.float(), total.float()),
        (sum_[1].float(), total[1].float()), (sum_[:, 1], total[:, 1]), (sum_[1:], total[1:]),
        (sum_[torch.tensor([True, False, True])], total[[0, 2]]),
        (sum_[torch.tensor([[0, 2]])], total[torch.tensor([[0, 2]])]),
        (sum_.transpose(0, 1), total.transpose(0, 1)), (torch.stack([sum_, sum_])[1], total),
        (torch.exp(input=sum_), total.exp()), (sum_[0].T.exp(), total[0].T.exp()),
        (torch.cat([row.total for row in sum_]), total.flatten(0, 1)),
        (torch.einsum("eij,j->ei", sum_, draw(4)), total @ draw(4)),
        (torch.mm(draw(2, 4), mat2=sum_[0]), draw(2, 4) @ total[0]),
        (sum_ @ sum_, total @ total),
    ]  # fmt: skip
    for found, expected in pairs:
        assert_close(found, expected, 1e-6)
    assert isinstance(sum_[torch.tensor([[0, 2]])], Tensor)
    with pytest.raises(AttributeError):
        _ = sum_.nothing_of_the_kind


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_run_without_computing_the_sum(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_experts.model(kind)
    router = "mlp.router.weight" if kind == "gpt_oss" else "mlp.gate.weight"
    adapter = {
        "rank": 3,
        "target_modules": [],
        "target_parameters": [*tiny_experts.EXPERTS, router],
    }
    model = copy.deepcopy(base)
    attach(model, tiny.recipe_of("causal_lm", **adapter))
    tiny.wake(model)
    total = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            assert isinstance(layer, LoRAParameter)
            owner: Any = total.get_submodule(name.replace(".base", ""))
            owner.get_parameter(layer.parameter).add_(layer.delta_weight())
    for one in (model, total):
        one.set_experts_implementation(how)
    ids = tiny_experts.ids()
    expected = total(input_ids=ids).logits
    monkeypatch.setattr(LowRankSum, "total", property(never))
    found = model(input_ids=ids).logits
    assert_close(found, expected, 1e-5)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable_parameters(model).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=ids).logits.isfinite().all()


def test_custom_kernels_get_the_sum() -> None:
    class Experts(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3, 3))
            self.config = type("Config", (), {"_experts_implementation": how})()
            self.seen: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.weight
            return x @ self.weight[0]

    for how, kind in (("grouped_mm", LowRankSum), ("deepgemm", Tensor)):
        owner = Experts(how)
        LoRAParameter(owner, "weight", 2, 2.0)(torch.ones(1, 3))
        assert isinstance(owner.seen, kind)
        assert isinstance(owner.weight, nn.Parameter)
