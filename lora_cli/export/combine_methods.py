"""Combine several low-rank updates of a module into one.

The names and the results are those of PEFT's `add_weighted_adapter`:

    cat              concatenates the A by rows and the B by columns: exactly the weighted sum; the
                     ranks add up
    linear           adds the matrices themselves: A = sum of sqrt(w s) A_i, B likewise. The product
                     has mixed terms B_i A_j, so it is an approximation; if all adapters have the
                     same A, only the B are added, which is exact (and differs from PEFT, whose
                     result is then scaled wrongly)
    svd              the best approximation of the weighted sum with a given rank
    magnitude_prune  like linear, after setting all but the largest entries of each matrix to zero
    dare_linear      like linear, after setting random entries to zero and scaling up the others
    ties             keeps the largest entries; if their signs differ, averages the majority's
    dare_ties        like ties, with random entries

The last four have variants ending in `_svd`, which combine the updates B A instead of the matrices,
and reduce the result to a rank by SVD.
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
    """A method to combine updates.

    Args:
        name: One of `lora_cli.export.combine_names.METHODS`.
        density: The share of entries that a pruning method keeps.
        rank: The rank of an SVD's result; None for the largest rank of the adapters.
        seed: The seed for choosing random entries.
    """

    name: str
    density: float = 1.0
    rank: int | None = None
    seed: int = 0


def combine_pairs(module: str, weighted: Weighted, method: Method) -> Pair:
    """Combine several updates of a module into one with scale 1.

    Args:
        module: The module's name, which is part of the random seed.
        weighted: The updates with their weights; of equal rank if the method adds matrices.
        method: The method.
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
        blended = _combined(name, deltas, weights, method.density, generator)
        rank = method.rank or max(pair.rank for _, pair in weighted)
        u, s, v = torch.linalg.svd(blended, full_matrices=False)
        return _from_svd(u[:, :rank] * s[:rank], v[:rank], first)
    # A and B each get the square root of the factor, and A its sign
    factors = [weight * pair.scale for weight, pair in weighted]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    a, b = (
        _combined(method.name, [m.double() for m in matrices], weights, method.density, generator)
        for matrices, weights in (
            ([pair.a for _, pair in weighted], signed),
            ([pair.b for _, pair in weighted], roots),
        )
    )
    return Pair(a.float(), b.float(), 1.0, first.is_embedding)


def concatenated(weighted: Weighted) -> Pair:
    """Return the weighted sum of updates, whose rank is the sum of their ranks."""
    a = torch.cat([(w * pair.scale * pair.a.double()).float() for w, pair in weighted])
    b = torch.cat([pair.b.float() for _, pair in weighted], dim=1)
    (_, first), *_ = weighted
    return Pair(a, b, 1.0, first.is_embedding)


def module_seed(seed: int, module: str) -> int:
    """Return a module's seed, which makes its random entries independent of other modules."""
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _have_equal_a(weighted: Weighted) -> bool:
    (_, first), *further = weighted
    return all(torch.equal(pair.a, first.a) for _, pair in further)


def _added_b(weighted: Weighted) -> Pair:
    """Return the exact weighted sum of updates that have the same A."""
    (_, first), *_ = weighted
    terms = [weight * pair.scale * pair.b.double() for weight, pair in weighted]
    return Pair(first.a.float(), torch.stack(terms).sum(0).float(), 1.0, first.is_embedding)


def _product_svd(pair: Pair, rank: int) -> Pair:
    """Return the best approximation of B A with this rank, without computing B A itself."""
    q_b, r_b = torch.linalg.qr(pair.b.double().flatten(1))
    q_a, r_a = torch.linalg.qr(pair.a.double().flatten(1).T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _from_svd(q_b @ (u[:, :rank] * s[:rank]), v[:rank] @ q_a.T, pair)


def _from_svd(b: Tensor, a: Tensor, template: Pair) -> Pair:
    """Return the factors of an SVD in the shapes of a layer."""
    a = a.reshape(len(a), *template.a.shape[1:]).float().contiguous()
    b = b.reshape(*b.shape, *(1,) * (template.b.ndim - 2)).float().contiguous()
    return Pair(a, b, 1.0, template.is_embedding)


def _combined(
    name: str,
    tensors: list[Tensor],
    weights: list[float],
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """Combine several tensors of the same shape."""
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
    """Set all but the largest entries to zero."""
    keep = torch.topk(tensor.abs().flatten(), int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    mask[keep] = 1
    return tensor * mask.reshape(tensor.shape)


def _random_entries(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Set random entries to zero, and scale the others up to compensate."""
    mask = torch.bernoulli(torch.full(tensor.shape, density), generator=generator)
    return tensor * mask / density
