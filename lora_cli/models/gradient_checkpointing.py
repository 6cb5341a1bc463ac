"""Gradient checkpointing: activations are computed again in the backward pass, to save memory."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lora_cli.errors import LoraError
from lora_cli.models.offloaded_inputs import offload_inputs
from lora_cli.recipe import Recipe
from lora_cli.unexpected_errors import own_words


def require_gradient_checkpointing(model: nn.Module, recipe: Recipe) -> None:
    """Reject an architecture that has no gradient checkpointing.

    Raises:
        LoraError: If it has none.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise LoraError(
            f"{type(model).__name__} cannot do gradient checkpointing",
            recipe.at("train.gradient_checkpointing"),
            "set `train.gradient_checkpointing: false`; a smaller `train.micro_batch_size` with "
            "more `train.gradient_accumulation_steps` saves memory too",
        )


def enable_gradient_checkpointing(
    model: nn.Module, recipe: Recipe, how: Literal[True, "offload"]
) -> None:
    """Let the backward pass recompute the activations, which saves memory.

    Args:
        model: A model that is on its device.
        recipe: For the message of the error.
        how: With "offload", the inputs of the layers wait in the host's memory.

    Raises:
        LoraError: If the architecture cannot do that.
    """
    require_gradient_checkpointing(model, recipe)
    # the second is the name in older versions of transformers
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable: Any = next(getattr(model, name) for name in names if hasattr(model, name))
    try:
        enable({"use_reentrant": False})
    except (ValueError, AttributeError, NotImplementedError) as error:
        what = f"{type(model).__name__} cannot do gradient checkpointing: {own_words(error)}"
        hint = "set `train.gradient_checkpointing: false`"
        raise LoraError(what, recipe.at("train.gradient_checkpointing"), hint) from error
    if how == "offload":
        offload_inputs(model)
