"""Which layers a type of adapter is made of: the one place that chooses among the variants."""

from __future__ import annotations

from torch import nn

from lora_cli.adapters.dora import DORA_LAYERS
from lora_cli.adapters.loha import LOHA_LAYERS
from lora_cli.adapters.lokr import LOKR_LAYERS
from lora_cli.adapters.lora import LORA_LAYERS, LoRALayer
from lora_cli.adapters.residual_lora import ResidualLoRALinear
from lora_cli.recipe.spec import AdapterSpec, AdapterType

Layers = tuple[type[LoRALayer], ...]


def layers_of(kind: AdapterType) -> Layers:
    """Return the classes of layers that a type of adapter has; none if it adds no layers."""
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
    """Return the classes of layers for a training, which may start at a part of the weights."""
    layers = layers_of(spec.type)
    return (ResidualLoRALinear, *layers) if spec.starts_at_weights else layers


def layer_for(base: nn.Module, layers: Layers) -> type[LoRALayer] | None:
    """Return the first class that fits a module, or None where none does."""
    return next((layer for layer in layers if layer.fits(base)), None)
