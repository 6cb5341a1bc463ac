"""Updates of a module are combined like PEFT's own functions combine the tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_close
from peft.utils import merge_utils
from torch import Tensor

from lora_cli.export.combine_methods import Method, combine_pairs, module_seed
from lora_cli.export.combine_names import METHODS
from lora_cli.export.low_rank_pairs import (
    Pair,
    is_plain_lora,
    parts_of,
    peft_tensors_of,
    plain_config,
    scale_of,
    with_equal_ranks,
)

DENSITY = 0.4
WEIGHTS = (0.7, -0.4, 1.0)
THEIRS: dict[str, Callable[..., Tensor]] = {
    "linear": merge_utils.task_arithmetic,
    "ties": functools.partial(merge_utils.ties, density=DENSITY),
    "dare_linear": functools.partial(merge_utils.dare_linear, density=DENSITY),
    "dare_ties": functools.partial(merge_utils.dare_ties, density=DENSITY),
    "magnitude_prune": functools.partial(merge_utils.magnitude_prune, density=DENSITY),
}


def drawn(*ranks: int, kernel: tuple[int, ...] = (), seed: int = 0) -> list[tuple[float, Pair]]:
    """Return weighted updates with 5 inputs and 4 outputs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ones = (1,) * len(kernel)
    pairs = [Pair(draw(r, 5, *kernel), draw(4, r, *ones), 1.5 + i) for i, r in enumerate(ranks)]
    return list(zip(WEIGHTS, pairs, strict=False))


def delta(pair: Pair) -> Tensor:
    """Return the update of a module as a full matrix (out, in * kernel)."""
    return pair.scale * pair.b.double().flatten(1) @ pair.a.double().flatten(1)


def best(whole: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank."""
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def by_peft(
    name: str, tensors: list[Tensor], weights: list[float], generator: torch.Generator
) -> Tensor:
    """Return PEFT's combination of tensors, with the same random numbers."""
    real = torch.bernoulli
    with pytest.MonkeyPatch.context() as patch:  # it draws in float32, as its tensors are
        patch.setattr(torch, "bernoulli", lambda p: real(p.float(), generator=generator).to(p))
        return THEIRS[name](tensors, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("name", THEIRS)
def test_matrices_are_combined_as_in_peft(name: str, seed: int) -> None:
    weighted = drawn(3, 3, 3)
    with torch.no_grad():  # two that are opposite and a third that is zero: a tie of the signs
        for matrix in ("a", "b"):
            first, second, third = (getattr(pair, matrix) for _, pair in weighted)
            second[:2] = -first[:2]
            third[:2] = 0.0
    density = 1.0 if name == "linear" else DENSITY
    found = combine_pairs("layers.0", weighted, Method(name, density, seed=seed))
    generator = torch.Generator().manual_seed(module_seed(seed, "layers.0"))
    roots = [math.sqrt(abs(weight * pair.scale)) for weight, pair in weighted]
    signed = [
        math.copysign(root, weight) for root, (weight, _) in zip(roots, weighted, strict=True)
    ]
    for side, factors in (("a", signed), ("b", roots)):
        tensors = [getattr(pair, side).double() for _, pair in weighted]
        expected = by_peft(name, tensors, factors, generator)
        assert_close(getattr(found, side).double(), expected, 1e-6)
    assert found.scale == 1.0


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", [name for name in METHODS if name.endswith("_svd")])
@pytest.mark.parametrize("kernel", [(), (3, 2)])
def test_whole_updates_are_combined_as_in_peft(
    name: str, rank: int | None, kernel: tuple[int, ...]
) -> None:
    weighted = drawn(1, 3, 2, kernel=kernel)
    found = combine_pairs("layers.0", weighted, Method(name, DENSITY, rank, seed=5))
    generator = torch.Generator().manual_seed(module_seed(5, "layers.0"))
    deltas, weights = [delta(pair) for _, pair in weighted], [weight for weight, _ in weighted]
    whole = by_peft(name.removesuffix("_svd"), deltas, weights, generator)
    kept = 3 if rank is None else rank  # the largest of theirs
    assert_close(delta(found), best(whole, kept), 1e-6)
    assert (found.a.shape, found.b.shape) == ((kept, 5, *kernel), (4, kept, *(1 for _ in kernel)))


@pytest.mark.parametrize("kernel", [(), (3, 2)])
@pytest.mark.parametrize("rank", [None, 1, 4])
def test_svd_gives_the_best_approximation_of_a_rank(
    rank: int | None, kernel: tuple[int, ...]
) -> None:
    weighted = drawn(1, 3, 2, kernel=kernel)
    whole = sum(weight * delta(pair) for weight, pair in weighted)
    assert isinstance(whole, Tensor)
    found = combine_pairs("layers.0", weighted, Method("svd", rank=rank))
    kept = 3 if rank is None else rank
    assert found.rank == kept
    assert_close(delta(found), best(whole, kept), 1e-6)
    joined = combine_pairs("layers.0", weighted, Method("cat"))
    assert joined.rank == 6
    assert_close(delta(joined), whole, 1e-6)


def test_only_b_is_added_if_all_have_the_same_a() -> None:
    weighted = [(w, Pair(torch.ones(2, 5), p.b, p.scale)) for w, p in drawn(2, 2)]
    found = combine_pairs("layers.0", weighted, Method("linear"))
    assert torch.equal(found.a, torch.ones(2, 5))
    assert_close(delta(found), sum(w * delta(pair) for w, pair in weighted), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_an_embedding_stays_one(method: str) -> None:
    for is_embedding in (True, False):
        weighted = [(w, Pair(p.a, p.b, p.scale, is_embedding)) for w, p in drawn(2, 2)]
        found = combine_pairs("x", weighted, Method(method, 0.5))
        assert found.is_embedding is is_embedding


@pytest.mark.parametrize(
    ("seed", "module", "drawn_from"),
    [
        (0, "layers.0", 7882188455178017),
        (1, "layers.0", 13894685854801547),
        (0, "layers.1", 68914227976594463),
    ],
)
def test_the_random_entries_of_a_module_are_those_of_earlier_versions(
    seed: int, module: str, drawn_from: int
) -> None:
    """Otherwise the same command with the same `--seed` would give a different adapter."""
    assert module_seed(seed, module) == drawn_from


# ------------------------------------------------------------------------------ pairs of matrices


def test_a_pair_can_be_padded_and_its_scale_folded_into_b() -> None:
    for kernel in ((), (3, 2)):
        ((_, pair),) = drawn(2, kernel=kernel)
        larger, folded = pair.padded(5), pair.folded()
        assert (larger.rank, larger.scale, folded.scale) == (5, pair.scale, 1.0)
        assert larger.a.shape == (5, 5, *kernel)
        assert larger.b.shape == (4, 5, *(1 for _ in kernel))
        for other in (larger, folded):
            assert_close(delta(other), delta(pair), 1e-6)
        assert torch.equal(folded.a, pair.a)
        assert not pair.is_grouped
    assert Pair(torch.ones(4, 5, 1), torch.ones(4, 2, 1), 1.0).is_grouped  # of two groups


def test_pairs_of_several_ranks_become_pairs_of_the_largest() -> None:
    pairs = {name: pair for name, (_, pair) in zip("ab", drawn(2, 3), strict=True)}
    found = with_equal_ranks(pairs)
    assert [name.partition(".lora_")[2] for name in peft_tensors_of(found, {})] == [
        "A.weight", "B.weight", "A.weight", "B.weight",
    ]  # fmt: skip
    for name, pair in pairs.items():
        assert (found[name].rank, found[name].scale) == (3, 1.0)
        assert_close(delta(found[name]), delta(pair), 1e-6)
    config = plain_config({"revision": "main", "r": 9, "fan_in_fan_out": True}, found, ["head"])
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 3, ["a", "b"])
    assert (config["revision"], config["fan_in_fan_out"]) == ("main", True)
    assert config["modules_to_save"] == ["head"]
    plain = plain_config({}, found)
    assert (plain["modules_to_save"], plain["fan_in_fan_out"]) == (None, False)
    assert (plain["use_rslora"], plain["use_dora"], plain["inference_mode"]) == (False, False, True)
    assert plain["init_lora_weights"] is True


def test_a_scale_is_alpha_by_the_rank_or_its_root() -> None:
    config = {"lora_alpha": 6, "alpha_pattern": {"q": 3}}
    assert scale_of(config, "a.v", 4) == 1.5
    assert scale_of(config, "a.q", 4) == 0.75
    assert scale_of({**config, "use_rslora": True}, "a.v", 4) == 3.0
    assert scale_of({}, "a.v", 4) == 2.0  # PEFT's own alpha is 8


def test_the_parts_of_an_adapter_s_file() -> None:
    def saved(**config: Any) -> Any:
        tensors = {
            "a.q.lora_A.weight": torch.ones(2, 5), "a.q.lora_B.weight": torch.ones(4, 2),
            "embed.lora_embedding_A": torch.ones(2, 9), "embed.lora_embedding_B": torch.ones(5, 2),
            "a.q.bias": torch.ones(4), "head.dense.weight": torch.ones(3, 4),
            "head.dense.bias": torch.ones(3),
        }  # fmt: skip
        values = {"lora_alpha": 6, "modules_to_save": ["head"], **config}
        return SimpleNamespace(type="lora", tensors=tensors, config=values, path="folder")

    assert is_plain_lora(saved())
    assert not is_plain_lora(saved(target_parameters=["experts.gate_up_proj"]))
    assert not is_plain_lora(saved(trainable_token_indices=[3]))
    parts = parts_of(saved())
    assert {name: pair.is_embedding for name, pair in parts.pairs.items()} == {
        "a.q": False, "embed": True,
    }  # fmt: skip
    assert {pair.scale for pair in parts.pairs.values()} == {3.0}
    assert (parts.pairs["a.q"].a.shape, parts.pairs["a.q"].b.shape) == ((2, 5), (4, 2))
    assert list(parts.biases) == ["a.q.bias"]
    assert list(parts.in_full) == ["head.dense.weight", "head.dense.bias"]
    assert list(peft_tensors_of(parts.pairs, {"head.dense.bias": torch.ones(3)})) == [
        f"base_model.model.{name}"
        for name in (
            "a.q.lora_A.weight", "a.q.lora_B.weight", "embed.lora_embedding_A",
            "embed.lora_embedding_B", "head.dense.bias",
        )
    ]  # fmt: skip
