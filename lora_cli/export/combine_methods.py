"""How several low-rank updates of a module become one.

The names and the numbers are those of PEFT's `add_weighted_adapter`:

    cat              A and B one below and next to the other: exactly the weighted sum, and the
                     ranks add up
    linear           the matrices themselves are added: A = sum of sqrt(w s) A_i, B likewise. The
                     product has mixed terms B_i A_j, so it is an approximation; where all have the
                     same A, only the B are added, which is exact (and differs from PEFT, whose
                     result is then scaled wrongly)
    svd              the best update of a given rank near the weighted sum
    magnitude_prune  as linear, after setting all but the largest entries of each to zero
    dare_linear      as linear, after setting random entries to zero and enlarging the others
    ties             the largest entries; where signs disagree, the average of the majority
    dare_ties        the same with random entries

The last four also with `_svd`: they treat the updates B A instead of the matrices, and the result
gets its rank by SVD.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.export.low_rank_pairs import Pair

Weighted = list[tuple[float, Pair]]


@dataclass(frozen=True)
class Method:
    """A way of combining.

    Args:
        name: One of `lora_cli.export.combine_names.METHODS`.
        density: Share of the entries that a pruning method keeps.
        rank: Rank of an SVD's result; None is the largest of the adapters'.
        seed: Of the random entries.
    """

    name: str
    density: float = 1.0
    rank: int | None = None
    seed: int = 0


def combine_pairs(module: str, weighted: Weighted, method: Method) -> Pair:
    """Return one update instead of several of a module, with the scale 1.

    Args:
        module: Its name, which with the seed decides what is random.
        weighted: The updates with their weights; of equal rank where matrices are added.
        method: How.
    """
    if method.name == "cat":
        return concatenated(weighted)
    if method.name == "linear" and _have_equal_a(weighted):
        return _added_b(weighted)
    generator = torch.Generator().manual_seed(module_seed(method.seed, module))
    (_, first), *_ = weighted
    if method.name == "svd":
        rank = method.rank or max(pair.rank for _, pair in weighted)
        return _product_svd(concatenated(weighted), rank)
    if method.name.endswith("_svd"):
        deltas = [pair.delta() for _, pair in weighted]
        weights = [weight for weight, _ in weighted]
        name = method.name.removesuffix("_svd")
        blended = _blended(name, deltas, weights, method.density, generator)
        rank = method.rank or max(pair.rank for _, pair in weighted)
        u, s, v = torch.linalg.svd(blended, full_matrices=False)
        return _from_svd(u[:, :rank] * s[:rank], v[:rank], first)
    # each matrix gets the root of the factor, and A its sign
    factors = [weight * pair.scale for weight, pair in weighted]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    a, b = (
        _blended(method.name, [m.double() for m in matrices], weights, method.density, generator)
        for matrices, weights in (
            ([pair.a for _, pair in weighted], signed),
            ([pair.b for _, pair in weighted], roots),
        )
    )
    return Pair(a.float(), b.float(), 1.0, first.is_embedding)


def concatenated(weighted: Weighted) -> Pair:
    """Return the weighted sum of updates, whose rank is the sum of theirs."""
    a = torch.cat([(w * pair.scale * pair.a.double()).float() for w, pair in weighted])
    b = torch.cat([pair.b.float() for _, pair in weighted], dim=1)
    (_, first), *_ = weighted
    return Pair(a, b, 1.0, first.is_embedding)


def module_seed(seed: int, module: str) -> int:
    """Return the seed of a module, so that its entries do not depend on the other modules."""
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _have_equal_a(weighted: Weighted) -> bool:
    (_, first), *others = weighted
    return all(torch.equal(pair.a, first.a) for _, pair in others)


def _added_b(weighted: Weighted) -> Pair:
    """Return the exact weighted sum of updates that have the same A."""
    (_, first), *_ = weighted
    terms = [weight * pair.scale * pair.b.double() for weight, pair in weighted]
    return Pair(first.a.float(), torch.stack(terms).sum(0).float(), 1.0, first.is_embedding)


def _product_svd(pair: Pair, rank: int) -> Pair:
    """Return the best update of a rank near B A, without computing B A itself."""
    q_b, r_b = torch.linalg.qr(pair.b.double().flatten(1))
    q_a, r_a = torch.linalg.qr(pair.a.double().flatten(1).T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _from_svd(q_b @ (u[:, :rank] * s[:rank]), v[:rank] @ q_a.T, pair)


def _from_svd(b: Tensor, a: Tensor, like: Pair) -> Pair:
    """Return matrices of an SVD in the shapes of a layer."""
    a = a.reshape(len(a), *like.a.shape[1:]).float().contiguous()
    b = b.reshape(*b.shape, *(1,) * (like.b.ndim - 2)).float().contiguous()
    return Pair(a, b, 1.0, like.is_embedding)


def _blended(
    name: str,
    tensors: list[Tensor],
    weights: list[float],
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """Return one tensor instead of several of a shape."""
    if density < 1:
        prune = _random_entries if name.startswith("dare") else _largest_entries
        tensors = [prune(tensor, density, generator) for tensor in tensors]
    stacked = torch.stack(tensors)
    factors = torch.tensor(weights, dtype=stacked.dtype).reshape(-1, *(1,) * (stacked.ndim - 1))
    if not name.endswith("ties"):
        return (stacked * factors).sum(0)
    majority = torch.where(stacked.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == majority
    return (stacked * factors * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest_entries(tensor: Tensor, density: float, _: torch.Generator) -> Tensor:
    """Return a tensor in which all but the largest entries are zero."""
    keep = torch.topk(tensor.abs().flatten(), int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    mask[keep] = 1
    return tensor * mask.reshape(tensor.shape)


def _random_entries(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return a tensor in which random entries are zero, and the others larger to make up for it."""
    mask = torch.bernoulli(torch.full(tensor.shape, density), generator=generator)
    return tensor * mask / density
