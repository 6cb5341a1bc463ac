"""Represent the low-rank updates of an adapter folder as pairs of matrices, without a model.

An adapted module adds `scale * B @ A` to its weight. A pair holds its effective scale, whether the
configuration expresses it as alpha / rank, alpha / sqrt(rank) or by a pattern, so that combining
and exporting need not handle patterns or rsLoRA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapters.match_names import first_match
from lora_cli.adapters.peft_format.adapter_folder import AdapterFolder
from lora_cli.adapters.peft_format.peft_rules import copied_modules
from lora_cli.adapters.peft_format.peft_tensors import sort_tensors
from lora_cli.adapters.peft_format.tensor_names import PREFIX
from lora_cli.errors import IntegrityError, Problem

# keys of updates that are not pairs: of single parameters, and of rows of the embedding
NOT_PAIRS = ("target_parameters", "trainable_token_indices")


@dataclass(frozen=True)
class Pair:
    """The two matrices of an adapted module.

    Args:
        a: (rank, in), or (rank, in, *kernel) for a convolution.
        b: (out, rank), or (out, rank, 1, ...) for a convolution.
        scale: The factor of B A.
        is_embedding: Whether the module is an embedding, for which `in` is the vocabulary size.
    """

    a: Tensor
    b: Tensor
    scale: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return int(self.a.shape[0])

    @property
    def is_grouped(self) -> bool:
        """Whether the module is a grouped convolution, whose B has fewer columns."""
        return int(self.b.shape[1]) != self.rank

    def padded(self, rank: int) -> Pair:
        """Return the same update with a larger rank, by padding with zeros."""
        n_new = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(n_new, *self.a.shape[1:])])
        b = torch.cat([self.b, self.b.new_zeros(len(self.b), n_new, *self.b.shape[2:])], dim=1)
        return Pair(a, b, self.scale, self.is_embedding)

    def folded(self) -> Pair:
        """Return the same update with scale 1, by multiplying the scale into B."""
        scaled = (self.b.double() * self.scale).float()
        return Pair(self.a.float(), scaled, 1.0, self.is_embedding)

    def delta(self) -> Tensor:
        """Return the update as a matrix (out, in * kernel) in float64."""
        return self.scale * self.b.double().flatten(1) @ self.a.double().flatten(1)


@dataclass
class AdapterParts:
    """The tensors of an adapter folder by kind."""

    pairs: dict[str, Pair]
    """Low-rank updates by the name of the adapted module."""
    biases: dict[str, Tensor]
    """Trained biases of modules of the base."""
    in_full: dict[str, Tensor]
    """Parameters of modules that were trained in full, such as a head."""


def is_plain_lora(saved: AdapterFolder) -> bool:
    """Return whether all updates of an adapter are pairs of matrices of modules."""
    return saved.type == "lora" and not any(saved.config.get(key) for key in NOT_PAIRS)


def parts_of(saved: AdapterFolder) -> AdapterParts:
    """Return the parts of a plain LoRA adapter.

    Raises:
        IntegrityError: If a tensor does not belong in such an adapter.
    """
    kinds = sort_tensors(saved.tensors, saved.type, ())
    if kinds.problems:
        at = str(saved.path)
        raise IntegrityError([Problem(p.what, at, p.hint) for p in kinds.problems])
    embeddings = {
        match[1] for name in saved.tensors if (match := re.match(r"(.+)\.lora_embedding_A", name))
    }
    pairs = {}
    for name, tensors in kinds.by_layer.items():
        scale = scale_of(saved.config, name, int(tensors["lora_A"].shape[0]))
        pairs[name] = Pair(tensors["lora_A"], tensors["lora_B"], scale, name in embeddings)
    tops = copied_modules(_modules_of(kinds.full_parameters), saved.config)
    in_full = {
        n: t
        for n, t in kinds.full_parameters.items()
        if any(n.startswith(f"{top}.") for top in tops)
    }
    biases = {name: tensor for name, tensor in kinds.full_parameters.items() if name not in in_full}
    return AdapterParts(pairs, biases, in_full)


def scale_of(config: dict[str, Any], name: str, rank: int) -> float:
    """Return the factor of a module's B A according to PEFT's configuration."""
    alpha = first_match(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _modules_of(names: Iterable[str]) -> list[str]:
    """Return all modules that contain one of these parameters, directly or indirectly."""
    modules: dict[str, None] = {}
    for name in names:
        while "." in name:
            name = name.rpartition(".")[0]
            modules[name] = None
    return list(modules)


def with_equal_ranks(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """Return the same updates with scale 1, and padded to the largest rank."""
    rank = max(pair.rank for pair in pairs.values())
    return {name: pair.folded().padded(rank) for name, pair in pairs.items()}


def peft_tensors_of(pairs: dict[str, Pair], in_full: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of PEFT's file for pairs and modules trained in full."""
    tensors = {}
    for name, pair in pairs.items():
        kind, end = ("lora_embedding_", "") if pair.is_embedding else ("lora_", ".weight")
        for side, matrix in (("A", pair.a), ("B", pair.b)):
            tensors[f"{PREFIX}{name}.{kind}{side}{end}"] = matrix
    return tensors | {f"{PREFIX}{name}": tensor for name, tensor in in_full.items()}


def plain_config(
    config: dict[str, Any], pairs: dict[str, Pair], in_full: list[str] | None = None
) -> dict[str, Any]:
    """Return PEFT's configuration for pairs of one rank and scale 1.

    Args:
        config: The adapter's configuration, which names its base and task.
        pairs: The pairs, as `with_equal_ranks` returned them.
        in_full: Modules trained in full.
    """
    rank = max(pair.rank for pair in pairs.values())
    copied_keys = ("base_model_name_or_path", "revision", "task_type")
    return {
        "peft_type": "LORA",
        **{key: config[key] for key in copied_keys if key in config},
        "modules_to_save": in_full or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(pairs),
        "bias": "none",
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }


def squared_norms(pairs: list[tuple[float, Pair]]) -> tuple[float, float]:
    """Return the squared norms of a weighted sum of updates, and of its first term.

    They are computed in float64 from products of the small matrices.
    """
    b = torch.cat([weight * pair.scale * pair.b.double().flatten(1) for weight, pair in pairs], 1)
    a = torch.cat([pair.a.double().flatten(1) for _, pair in pairs])
    products = (b.T @ b) * (a @ a.T)
    rank = pairs[0][1].rank
    return float(products.sum()), float(products[:rank, :rank].sum())
