"""LoRA on experts on a real GPU: grouped products with its factors are those with the whole sum."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_experts
import torch
from test_precision import pytestmark as on_a_gpu
from torch import Tensor

from lora_cli.adapters import low_rank_sum
from lora_cli.adapters.attach import attach, trainable_parameters

pytestmark = on_a_gpu


def same_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second pass choose the experts of the first.

    The scores of two experts may differ by less than 16 bits can tell, and another rounding would
    send a token to another expert.
    """
    chosen: list[Tensor] = []
    topk, n_routers = torch.topk, 2

    def replayed(scores: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        if len(chosen) < n_routers:
            chosen.append(topk(scores, k, **options).indices)
            index = chosen[-1]
        else:
            index = chosen.pop(0)
            chosen.append(index)
        return scores.gather(-1, index), index

    monkeypatch.setattr(torch, "topk", replayed)


def loss_and_gradients(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = model(input_ids=ids).logits.float().square().mean()
    return loss.detach(), list(torch.autograd.grad(loss, trainable_parameters(model).values()))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 8, 12])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_factors_of_experts_give_what_their_sum_gives(
    kind: str, rank: int, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_experts.model(kind).to("cuda", dtype)
    places = {"target_modules": ["q_proj"], "target_parameters": tiny_experts.EXPERTS}
    attach(model, tiny.recipe_of("causal_lm", rank=rank, **places))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(0.0, 0.1)
    ids = torch.arange(3, 35, device="cuda").view(2, 16)
    same_experts(monkeypatch)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = loss_and_gradients(model, ids)
        monkeypatch.setattr(low_rank_sum, "_product", lambda *_: None)
        wanted = loss_and_gradients(model, ids)
    close = 1e-4 if dtype == torch.float32 and not autocast else 0.06
    assert abs(found[0] - wanted[0]) <= close * wanted[0].abs()
    for mine, other in zip(found[1], wanted[1], strict=True):
        assert (mine - other).norm() <= close * other.norm() + 1e-8
