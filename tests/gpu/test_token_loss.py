"""The kernel of the tokens' loss computes what torch does in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu import test_precision as runs

pytestmark = runs.pytestmark
SHAPES = [(1, 2), (3, 7), (5, 8192), (4, 8193), (300, 50257), (17, 128256), (2, 262144)]
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def scores_of(rows: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.randn(rows, tokens, device="cuda", generator=generator) * 8
    wanted = torch.randint(tokens, (rows,), device="cuda", generator=generator)
    wanted[0] = tokens - 1
    return scores.to(dtype), wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_torch_s(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from lora_cli.tasks.generation.token_loss_kernel import token_losses

    scores, wanted = scores_of(*shape, dtype)
    exact = scores.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, wanted, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    kept = scores.clone()
    torch.testing.assert_close(
        token_losses(scores, wanted, False).double(), losses, rtol=1e-6, atol=1e-5
    )
    assert torch.equal(scores, kept)
    found = token_losses(scores, wanted, True)
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=1e-5)
    # an entry of bfloat16 has 8 bits; the difference of nearly equal numbers loses some too
    torch.testing.assert_close(scores.double(), gradient, rtol=DTYPES[dtype], atol=1e-7)
    again = kept.clone()
    assert torch.equal(token_losses(again, wanted, True), found)
    assert torch.equal(again, scores)


def test_scores_of_minus_infinity_count_nothing_and_bad_ones_are_seen() -> None:
    from lora_cli.tasks.generation.token_loss_kernel import token_losses

    scores, wanted = scores_of(6, 9000, torch.float32)
    scores[1, :8500], wanted[1] = float("-inf"), 8999
    scores[2, 100], scores[3, 100] = float("nan"), float("inf")
    wanted[4], wanted[5] = -100, 9000
    exact = torch.nn.functional.cross_entropy(scores[:2].double(), wanted[:2], reduction="none")
    found = token_losses(scores, wanted, True)
    torch.testing.assert_close(found[:2].double(), exact, rtol=1e-6, atol=1e-5)
    assert (scores[1, :8500] == 0).all()
    assert found[2:].isnan().all()
