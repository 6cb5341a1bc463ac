"""The types of PEFT's configurations that are read here, and what each type's own keys are called.

A type that is not in the table is rejected by its name.
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
    """What is particular to the configuration of a type."""

    alpha: str = "lora_alpha"
    """The key of the numerator of the scaling."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """What is written besides rank, alpha, patterns and target modules."""
    shaping: tuple[tuple[str, Any], ...] = ()
    """Keys that decide the shapes of the factors, and what they are of an adapter of a recipe."""
    supported: Modules = ()
    """The modules that PEFT adapts in this way."""


LORA_MODULES = (
    nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D,
)  # fmt: skip
WHOLE = (nn.Linear, nn.Conv1d, nn.Conv2d)
DROPOUTS = (("rank_dropout", 0.0), ("module_dropout", 0.0), ("init_weights", True))
LOHA_SHAPES = (("use_effective_conv2d", False),)
LOKR_SHAPES = (*LOHA_SHAPES, ("decompose_both", False), ("decompose_factor", -1))
PEFT_TYPES: dict[str, PeftType] = {
    "LORA": PeftType(supported=LORA_MODULES),
    "LOHA": PeftType("alpha", (*DROPOUTS, *LOHA_SHAPES), LOHA_SHAPES, WHOLE),
    "LOKR": PeftType("alpha", (*DROPOUTS, *LOKR_SHAPES), LOKR_SHAPES, WHOLE),
    "HEAD_ONLY": PeftType(),  # this tool's own: PEFT has no type for them
    "BITFIT": PeftType(),
}
TYPES_HERE: dict[str, AdapterType] = {
    "LOHA": "loha",
    "LOKR": "lokr",
    "HEAD_ONLY": "none",
    "BITFIT": "bitfit",
}
"""The recipe's types, but for those of PEFT's LORA, of which there are several."""


def alpha_of(config: dict[str, Any], name: str) -> float:
    """Return the numerator of a module's scaling, by a configuration."""
    key = PEFT_TYPES[config["peft_type"]].alpha
    return first_match(config.get("alpha_pattern") or {}, name, config.get(key, 8))
