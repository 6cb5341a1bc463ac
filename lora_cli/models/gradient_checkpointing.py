"""Gradient checkpointing: recompute activations in the backward pass, to save memory."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lora_cli.errors import LoraError
from lora_cli.models.offloaded_inputs import offload_inputs
from lora_cli.recipe import Recipe
from lora_cli.unexpected_errors import own_words


def require_gradient_checkpointing(model: nn.Module, recipe: Recipe) -> None:
    """Reject an architecture that does not support gradient checkpointing.

    Raises:
        LoraError: If it does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise LoraError(
            f"{type(model).__name__} cannot do gradient checkpointing",
            recipe.at("train.gradient_checkpointing"),
            "set `train.gradient_checkpointing: false`; a smaller `train.micro_batch_size` with "
            "more `train.gradient_accumulation_steps` saves memory too",
        )


def enable_gradient_checkpointing(
    model: nn.Module, recipe: Recipe, mode: Literal[True, "offload"]
) -> None:
    """Enable gradient checkpointing for a model.

    Args:
        model: The model, on its device.
        recipe: The recipe, for error messages.
        mode: With "offload", the inputs of the layers are kept in host memory.

    Raises:
        LoraError: If the architecture does not support it.
    """
    require_gradient_checkpointing(model, recipe)
    # the second name is for older versions of transformers
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable: Any = next(getattr(model, name) for name in names if hasattr(model, name))
    try:
        enable({"use_reentrant": False})
    except (ValueError, AttributeError, NotImplementedError) as error:
        what = f"{type(model).__name__} cannot do gradient checkpointing: {own_words(error)}"
        hint = "set `train.gradient_checkpointing: false`"
        raise LoraError(what, recipe.at("train.gradient_checkpointing"), hint) from error
    if mode == "offload":
        offload_inputs(model)
