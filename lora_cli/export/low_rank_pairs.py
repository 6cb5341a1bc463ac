"""The low-rank updates of an adapter folder as pairs of matrices, without a model.

An adapted module adds `scale * B @ A` to its weight. Here a pair keeps its true scale, however the
configuration says it (alpha / rank, alpha / sqrt(rank), a pattern), so that combining and exporting
need not know about patterns or rsLoRA.
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

# keys of what is no update of a module: of single parameters, and of rows of the embedding
NOT_PAIRS = ("target_parameters", "trainable_token_indices")


@dataclass(frozen=True)
class Pair:
    """The two matrices of an adapted module.

    Args:
        a: (rank, in), of a convolution (rank, in, *kernel).
        b: (out, rank), of a convolution (out, rank, 1, ...).
        scale: Factor of B A.
        is_embedding: Whether the module is an embedding: `in` is the vocabulary then.
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
        """Whether it belongs to a convolution of several groups, whose B has fewer columns."""
        return int(self.b.shape[1]) != self.rank

    def padded(self, rank: int) -> Pair:
        """Return the same update with a larger rank: what is added is zero."""
        more = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(more, *self.a.shape[1:])])
        b = torch.cat([self.b, self.b.new_zeros(len(self.b), more, *self.b.shape[2:])], dim=1)
        return Pair(a, b, self.scale, self.is_embedding)

    def folded(self) -> Pair:
        """Return the same update with the scale multiplied into B, so that it is 1."""
        scaled = (self.b.double() * self.scale).float()
        return Pair(self.a.float(), scaled, 1.0, self.is_embedding)

    def delta(self) -> Tensor:
        """Return the update as a matrix (out, in * kernel) in float64."""
        return self.scale * self.b.double().flatten(1) @ self.a.double().flatten(1)


@dataclass
class AdapterParts:
    """What an adapter folder holds, by what it is."""

    pairs: dict[str, Pair]
    """By the name of the adapted module."""
    biases: dict[str, Tensor]
    """Trained biases of modules of the base."""
    in_full: dict[str, Tensor]
    """Parameters of modules that were trained in full, as a head."""


def is_plain_lora(saved: AdapterFolder) -> bool:
    """Return whether an adapter's updates are pairs of matrices of whole modules."""
    return saved.type == "lora" and not any(saved.config.get(key) for key in NOT_PAIRS)


def parts_of(saved: AdapterFolder) -> AdapterParts:
    """Return the parts of a plain LoRA adapter.

    Raises:
        IntegrityError: If a tensor is not one of such an adapter.
    """
    found = sort_tensors(saved.tensors, saved.type, ())
    if found.problems:
        at = str(saved.path)
        raise IntegrityError([Problem(one.what, at, one.hint) for one in found.problems])
    embeddings = {
        match[1] for name in saved.tensors if (match := re.match(r"(.+)\.lora_embedding_A", name))
    }
    pairs = {}
    for name, own in found.of_layers.items():
        scale = scale_of(saved.config, name, int(own["lora_A"].shape[0]))
        pairs[name] = Pair(own["lora_A"], own["lora_B"], scale, name in embeddings)
    tops = copied_modules(_modules_of(found.plain), saved.config)
    in_full = {n: t for n, t in found.plain.items() if any(n.startswith(f"{top}.") for top in tops)}
    biases = {name: tensor for name, tensor in found.plain.items() if name not in in_full}
    return AdapterParts(pairs, biases, in_full)


def scale_of(config: dict[str, Any], name: str, rank: int) -> float:
    """Return the factor of B A of a module, by PEFT's configuration."""
    alpha = first_match(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _modules_of(names: Iterable[str]) -> list[str]:
    """Return every module, and every module above it, that has one of these parameters."""
    found: dict[str, None] = {}
    for name in names:
        while "." in name:
            name = name.rpartition(".")[0]
            found[name] = None
    return list(found)


def of_one_rank(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """Return the same updates with the scale folded into B, and the largest rank for all."""
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
    """Return PEFT's configuration of pairs of one rank and scale 1.

    Args:
        config: Says which base they are of, and for which task.
        pairs: What `of_one_rank` returned.
        in_full: Modules trained in full.
    """
    rank = max(pair.rank for pair in pairs.values())
    kept = ("base_model_name_or_path", "revision", "task_type")
    return {
        "peft_type": "LORA",
        **{key: config[key] for key in kept if key in config},
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

    Computed from the products of the small matrices alone, in float64.
    """
    b = torch.cat([weight * pair.scale * pair.b.double().flatten(1) for weight, pair in pairs], 1)
    a = torch.cat([pair.a.double().flatten(1) for _, pair in pairs])
    products = (b.T @ b) * (a @ a.T)
    rank = pairs[0][1].rank
    return float(products.sum()), float(products[:rank, :rank].sum())
