"""How far a student's answers are from a teacher's: the part of the loss that a teacher adds.

With p the teacher's and q the student's probabilities, each of logits / T, it is

    T² * KL(p || q) = T² * sum p (log p - log q)

T² keeps its gradient of the same size at any temperature T (Hinton, Vinyals and Dean, 2015).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor

TOP = 64  # tokens of a position of which a teacher's probability is kept
IMPOSSIBLE = -1e4  # a log-probability whose exponential is 0, and no infinity: 0 times that is NaN
CHUNK = 256  # positions of which all of a teacher's probabilities are in memory at once


class TopTokens(NamedTuple):
    """What a teacher says of the next token at each of N places.

    Args:
        ids: Its likeliest K tokens (N, K), int32.
        log_p: The logarithm of the probability of each, and behind them of all other tokens
            together (N, K + 1), float32. Without the last where there are no others: (N, K).
    """

    ids: Tensor
    log_p: Tensor


def label_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² * KL of each row (B,), of logits (B, C) for labels that exclude each other."""
    log_q = F.log_softmax(student / temperature, -1)
    log_p = F.log_softmax(teacher / temperature, -1)
    return temperature**2 * _divergence(log_p, log_q)


def marks_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the same (B,), summed over labels (B, C) that each hold or do not."""
    both = [
        torch.stack([F.logsigmoid(z / temperature), F.logsigmoid(-z / temperature)], -1)
        for z in (teacher, student)
    ]
    return temperature**2 * _divergence(*both).sum(-1)


@torch.no_grad()
def top_tokens(logits: Tensor, temperature: float) -> TopTokens:
    """Return what is kept of a teacher's logits (N, V), at a temperature."""
    found = [_top_tokens(part.float() / temperature) for part in torch.split(logits, CHUNK)]
    ids, log_p = zip(*found, strict=True)
    return TopTokens(torch.cat(ids), torch.cat(log_p))


def _top_tokens(scaled: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(scaled, -1)
    top, ids = log_p.topk(min(TOP, log_p.shape[-1]), -1)
    return ids.int(), _with_rest(log_p, top, ids)


def token_divergence(student: Tensor, teacher: TopTokens, temperature: float) -> Tensor:
    """Return T² * KL at each place (N,), with a student's logits (N, V).

    All tokens besides the teacher's likeliest count as one outcome. What is left out by that is
    never negative, so this is at most the divergence over all tokens; with V <= 64 it is equal.
    """
    log_q = F.log_softmax(student.float() / temperature, -1)
    ids = teacher.ids.long()
    log_q = _with_rest(log_q, log_q.gather(-1, ids), ids)
    return temperature**2 * _divergence(teacher.log_p, log_q)


def _with_rest(log_p: Tensor, top: Tensor, ids: Tensor) -> Tensor:
    """Return some tokens' log-probabilities and, behind them, that of all others together.

    The others are added up themselves: 1 less the sum of the first would lose small numbers.
    """
    if ids.shape[-1] == log_p.shape[-1]:
        return top
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest], -1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the KL divergence over the last dimension; what is impossible adds nothing."""
    log_p, log_q = log_p.clamp(min=IMPOSSIBLE), log_q.clamp(min=IMPOSSIBLE)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
