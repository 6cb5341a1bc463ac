"""The types of PEFT configurations that can be read, and the keys that are particular to each.

Types that are not in the table are rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.match_names import first_match
from lora_cli.recipe import AdapterType

Modules = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class PeftType:
    """The particularities of a type's configuration."""

    alpha: str = "lora_alpha"
    """The key of the numerator of the scaling."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """The keys written in addition to rank, alpha, patterns and target modules."""
    shaping: tuple[tuple[str, Any], ...] = ()
    """Keys that decide the shapes of the factors, with their values for adapters from a recipe."""
    supported: Modules = ()
    """The module classes that PEFT adapts with this type."""


LORA_MODULES = (
    nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D,
)  # fmt: skip
LYCORIS_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d)
DROPOUTS = (("rank_dropout", 0.0), ("module_dropout", 0.0), ("init_weights", True))
LOHA_SHAPES = (("use_effective_conv2d", False),)
LOKR_SHAPES = (*LOHA_SHAPES, ("decompose_both", False), ("decompose_factor", -1))
PEFT_TYPES: dict[str, PeftType] = {
    "LORA": PeftType(supported=LORA_MODULES),
    "LOHA": PeftType("alpha", (*DROPOUTS, *LOHA_SHAPES), LOHA_SHAPES, LYCORIS_MODULES),
    "LOKR": PeftType("alpha", (*DROPOUTS, *LOKR_SHAPES), LOKR_SHAPES, LYCORIS_MODULES),
    "HEAD_ONLY": PeftType(),  # this tool's own: PEFT has no such types
    "BITFIT": PeftType(),
}
RECIPE_TYPES: dict[str, AdapterType] = {
    "LOHA": "loha",
    "LOKR": "lokr",
    "HEAD_ONLY": "none",
    "BITFIT": "bitfit",
}
"""The recipe's types, except those that are LORA in PEFT, since there are several."""


def alpha_of(config: dict[str, Any], name: str) -> float:
    """Return the alpha of a module according to a configuration."""
    key = PEFT_TYPES[config["peft_type"]].alpha
    return first_match(config.get("alpha_pattern") or {}, name, config.get(key, 8))
