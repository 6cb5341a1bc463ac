"""Build the optimizer of a recipe: one `case` for each `train.optimizer.type`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lora_cli.adapters.parameter_groups import parameter_groups
from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe


def build_optimizer(
    model: nn.Module, recipe: Recipe, in_full: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer for the trained parameters.

    Each parameter group also has `names`: the names of its parameters, in the same order.

    Args:
        model: The model with its adapter attached.
        recipe: The `train.optimizer` section names the optimizer and its settings.
        in_full: The names of the modules trained in full, which the recipe's groups call `head`.

    Raises:
        LoraError: If a group matches nothing, or a package is missing.
    """
    spec = recipe.train.optimizer
    groups = parameter_groups(model, recipe, in_full)
    on_gpu = next(model.parameters()).is_cuda
    match spec.type:
        case "adamw":
            return torch.optim.AdamW(
                groups, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps, fused=on_gpu or None
            )
        case "adamw_8bit":
            try:
                import bitsandbytes
            except ImportError as error:
                raise LoraError(
                    "`adamw_8bit` needs bitsandbytes",
                    recipe.at("train.optimizer.type"),
                    "pip install 'lora-cli[quantization]'",
                ) from error
            optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
                groups, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps
            )
            return optimizer
        case "sgd":
            return torch.optim.SGD(groups, momentum=spec.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups)
