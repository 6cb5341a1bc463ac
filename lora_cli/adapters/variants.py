"""Map each type of adapter to its layer classes; no other module chooses among the variants."""

from __future__ import annotations

from torch import nn

from lora_cli.adapters.dora import DORA_LAYERS
from lora_cli.adapters.loha import LOHA_LAYERS
from lora_cli.adapters.lokr import LOKR_LAYERS
from lora_cli.adapters.lora import LoRAEmbedding, LoRALayer, LoRALinear
from lora_cli.adapters.lora_conv import LoRAConv
from lora_cli.adapters.residual_lora import ResidualLoRALinear
from lora_cli.recipe.spec import AdapterSpec, AdapterType

Layers = tuple[type[LoRALayer], ...]
LORA_LAYERS = (LoRALinear, LoRAEmbedding, LoRAConv)


def layers_of(kind: AdapterType) -> Layers:
    """Return the layer classes of a type of adapter; empty if it adds no layers."""
    match kind:
        case "lora":
            return LORA_LAYERS
        case "dora":
            return DORA_LAYERS
        case "loha":
            return LOHA_LAYERS
        case "lokr":
            return LOKR_LAYERS
        case "full" | "none" | "bitfit":
            return ()


def layers_to_train(spec: AdapterSpec) -> Layers:
    """Return the layer classes for training; `adapter.init` can add one."""
    layers = layers_of(spec.type)
    return (ResidualLoRALinear, *layers) if spec.starts_at_weights else layers


def layer_for(base: nn.Module, layers: Layers) -> type[LoRALayer] | None:
    """Return the first class that fits a module, or None if none does."""
    return next((layer for layer in layers if layer.fits(base)), None)
