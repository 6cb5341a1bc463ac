"""The distillation loss: the divergence of a student's probabilities from a teacher's.

With p the teacher's and q the student's probabilities, each the softmax of logits / T, it is

    T² * KL(p || q) = T² * sum p (log p - log q)

The factor T² keeps the size of its gradient independent of the temperature T (Hinton, Vinyals and
Dean, 2015).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor

N_TOP_TOKENS = 64  # tokens of each position for which the teacher's probability is kept
MIN_LOG_P = -1e4  # its exponential is 0, but unlike for -inf, 0 times it is not NaN
CHUNK_SIZE = 256  # positions for which all of a teacher's probabilities are in memory at a time


class TopTokens(NamedTuple):
    """A teacher's most likely next tokens at each of N positions.

    Args:
        ids: The K most likely tokens (N, K), int32.
        log_p: The log-probability of each, followed by that of all other tokens together,
            (N, K + 1), float32; (N, K) if there are no others.
    """

    ids: Tensor
    log_p: Tensor


def label_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² * KL of each row (B,), for logits (B, C) of mutually exclusive labels."""
    log_q = F.log_softmax(student / temperature, -1)
    log_p = F.log_softmax(teacher / temperature, -1)
    return temperature**2 * _divergence(log_p, log_q)


def multi_label_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² * KL of each row (B,), summed over labels, for logits (B, C) of several labels."""
    log_probabilities = [
        torch.stack([F.logsigmoid(z / temperature), F.logsigmoid(-z / temperature)], -1)
        for z in (teacher, student)
    ]
    return temperature**2 * _divergence(*log_probabilities).sum(-1)


@torch.no_grad()
def top_tokens(logits: Tensor, temperature: float) -> TopTokens:
    """Return the most likely tokens of a teacher's logits (N, V), at a temperature."""
    parts = [_top_tokens(part.float() / temperature) for part in torch.split(logits, CHUNK_SIZE)]
    ids, log_p = zip(*parts, strict=True)
    return TopTokens(torch.cat(ids), torch.cat(log_p))


def _top_tokens(scaled: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(scaled, -1)
    top, ids = log_p.topk(min(N_TOP_TOKENS, log_p.shape[-1]), -1)
    return ids.int(), _with_rest(log_p, top, ids)


def token_divergence(student: Tensor, teacher: TopTokens, temperature: float) -> Tensor:
    """Return T² * KL at each position (N,), for a student's logits (N, V).

    All tokens except the teacher's most likely ones count as one outcome. Joining outcomes never
    increases a divergence, so this is at most the divergence over all tokens. They are equal if
    V <= 64.
    """
    log_q = F.log_softmax(student.float() / temperature, -1)
    ids = teacher.ids.long()
    log_q = _with_rest(log_q, log_q.gather(-1, ids), ids)
    return temperature**2 * _divergence(teacher.log_p, log_q)


def _with_rest(log_p: Tensor, top: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities of some tokens, followed by that of all others together.

    The others are summed directly, since 1 minus the sum of the first would lose small numbers.
    """
    if ids.shape[-1] == log_p.shape[-1]:
        return top
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest], -1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the KL divergence over the last dimension; impossible outcomes add nothing."""
    log_p, log_q = log_p.clamp(min=MIN_LOG_P), log_q.clamp(min=MIN_LOG_P)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
