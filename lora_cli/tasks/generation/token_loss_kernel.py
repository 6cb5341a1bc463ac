"""Computes cross-entropy on a GPU, in one kernel that also replaces the logits by their gradient.

For a row x of logits and the target token t, with p = softmax(x):

    loss = log sum exp(x) - x[t]          d loss / d x = p - onehot(t)

PyTorch's functions first convert the logits to float32. They write and read as many numbers again
for the softmax, its gradient, and the conversion back, which takes most of the time of the loss if
the vocabulary has 100,000 tokens. Here, one program computes one row: it reads the logits twice,
adds them up in float32, and writes the gradient once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits that a program processes at a time
WARPS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_row(  # type: ignore[no-untyped-def]
    logits,
    targets,
    losses,
    n_logits,
    WITH_GRADIENT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * n_logits
    offsets = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    # a target outside the vocabulary gives NaN, which ends the run, instead of another row's logit
    exists = (target >= 0) & (target < n_logits)
    target_logit = tl.load(logits + target, exists, other=float("nan")).to(tl.float32)
    # the largest logit so far, and the sum of exp(logit - largest), over every BLOCK-th column
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_logits, BLOCK):
        inside = start + offsets < n_logits
        x = tl.load(logits + start + offsets, inside, other=float("-inf")).to(tl.float32)
        larger = tl.where(x > largest, x, largest)
        # exp(-inf - -inf) would be NaN as long as all logits of a column are -inf
        kept = tl.where(largest == float("-inf"), total, total * tl.exp(largest - larger))
        total = kept + tl.where(x == float("-inf"), 0.0, tl.exp(x - larger))
        largest = larger
    maximum = tl.max(largest, 0)
    shares = tl.where(largest == float("-inf"), total, total * tl.exp(largest - maximum))
    log_sum = maximum + tl.log(tl.sum(shares, 0))
    tl.store(losses + row, log_sum - target_logit)
    if WITH_GRADIENT:
        for start in range(0, n_logits, BLOCK):
            inside = start + offsets < n_logits
            x = tl.load(logits + start + offsets, inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - log_sum) - tl.where(start + offsets == target, 1.0, 0.0)
            tl.store(logits + start + offsets, gradient.to(logits.dtype.element_ty), inside)


def token_losses(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """Return the negative log-likelihoods of target tokens (N,), in float32.

    Args:
        logits: The logits (N, V), contiguous, on a GPU.
        targets: The target tokens (N,).
        with_gradient: Whether to overwrite `logits` by the gradient of the sum of the losses.
    """
    n_rows, n_logits = logits.shape
    losses = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device):
        _cross_entropy_row[(n_rows,)](
            logits,
            targets,
            losses,
            n_logits,
            WITH_GRADIENT=with_gradient,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return losses
