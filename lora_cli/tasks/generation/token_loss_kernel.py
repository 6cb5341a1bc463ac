"""Cross-entropy of scores on a GPU, in one kernel that also writes the gradient over the scores.

For a row x of scores and the wanted token t, with p = softmax(x):

    loss = log sum exp(x) - x[t]          d loss / d x = p - onehot(t)

PyTorch's own functions convert the scores to float32 first, and write and read as many numbers
again for the softmax, its gradient, and the conversion back: most of the time of the loss of a
model with 100,000 tokens. Here a program computes one row: it reads the scores twice, adds up in
float32, and writes the gradient once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # scores that a program works on at a time
WARPS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _row(scores, wanted, losses, n_scores, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    scores += row * n_scores
    columns = tl.arange(0, BLOCK)
    token = tl.load(wanted + row)
    # a token that has no score gives NaN, which ends the run, and not a number from elsewhere
    exists = (token >= 0) & (token < n_scores)
    own = tl.load(scores + token, exists, other=float("nan")).to(tl.float32)
    # the largest score so far, and the sum of exp(score - largest), of every BLOCK-th column
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_scores, BLOCK):
        inside = start + columns < n_scores
        x = tl.load(scores + start + columns, inside, other=float("-inf")).to(tl.float32)
        larger = tl.where(x > largest, x, largest)
        # where there was no score yet, exp(-inf - -inf) would be NaN
        kept = tl.where(largest == float("-inf"), total, total * tl.exp(largest - larger))
        total = kept + tl.where(x == float("-inf"), 0.0, tl.exp(x - larger))
        largest = larger
    maximum = tl.max(largest, 0)
    shares = tl.where(largest == float("-inf"), total, total * tl.exp(largest - maximum))
    log_sum = maximum + tl.log(tl.sum(shares, 0))
    tl.store(losses + row, log_sum - own)
    if GRADIENT:
        for start in range(0, n_scores, BLOCK):
            inside = start + columns < n_scores
            x = tl.load(scores + start + columns, inside, other=float("-inf")).to(tl.float32)
            slope = tl.exp(x - log_sum) - tl.where(start + columns == token, 1.0, 0.0)
            tl.store(scores + start + columns, slope.to(scores.dtype.element_ty), inside)


def token_losses(scores: Tensor, wanted: Tensor, gradient: bool) -> Tensor:
    """Return the negative log-likelihoods (N,) of tokens, in float32.

    Args:
        scores: Scores of all tokens (N, V), contiguous, on a GPU.
        wanted: The tokens (N,).
        gradient: Whether `scores` are overwritten by the gradient of the sum of the losses.
    """
    n_rows, n_scores = scores.shape
    losses = torch.empty(n_rows, dtype=torch.float32, device=scores.device)
    with torch.cuda.device(scores.device):
        _row[(n_rows,)](
            scores, wanted, losses, n_scores, GRADIENT=gradient, BLOCK=BLOCK, num_warps=WARPS
        )
    return losses
