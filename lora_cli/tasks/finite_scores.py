"""Checks that weights and scores are finite: an answer computed from NaN is not an answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_cli.adapters.attach import adapter_layers, lora_layers, name_in_base
from lora_cli.errors import NumericsError
from lora_cli.recipe import Recipe

LARGE_SCALING = 1000.0  # no adapter that learned anything is scaled by as much
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = "are the weights of the base or of the adapter damaged, or of a model of another dtype?"


def likely_cause(model: nn.Module, recipe: Recipe | None = None) -> str:
    """Return a hint about why a model's outputs are NaN or infinite.

    Args:
        model: The model, with its adapter attached if it has one.
        recipe: The recipe, for the precision in which the model ran; None for float32.
    """
    layers = lora_layers(model)
    name = max(layers, key=lambda name: abs(layers[name].scaling), default=None)
    if name is not None and abs(layers[name].scaling) > LARGE_SCALING:
        layer = layers[name]
        return (
            f"the update of `{name}` is multiplied by {layer.scaling:g} (alpha {layer.alpha:g}, "
            f"rank {layer.rank}): is the adapter's alpha right?"
        )
    if recipe is not None and recipe.train.precision != "fp32":
        return "does the model overflow? Try `--set train.precision=fp32`"
    return WEIGHTS


@torch.no_grad()
def require_finite_weights(model: nn.Module, at: str) -> None:
    """Reject a model that has a NaN or infinite weight.

    The outputs do not always show it: torch's attention on the CPU turns a row of NaN into zeros.

    Args:
        model: The model that is going to be used.
        at: The location for the error message, such as the recipe key that names the model.

    Raises:
        NumericsError: With the name of the first such weight.
    """
    for name, weight in model.named_parameters():
        if weight.numel() and weight.dtype in FLOATS:
            extremes = torch.stack(torch.aminmax(weight))  # without a copy of the weight
            if not bool(torch.isfinite(extremes).all()):
                owner, _, last = name.rpartition(".")
                name = f"{name_in_base(owner, adapter_layers(model))}.{last}".lstrip(".")
                what = f"the model's weights are not finite: `{name}` contains NaN or infinity"
                raise NumericsError(what, at, "download or copy the model again")


def require_finite(
    scores: Tensor,
    model: nn.Module,
    recipe: Recipe | None = None,
    at: str = "the model with its adapter",
) -> None:
    """Reject scores that contain NaN or infinity.

    Args:
        scores: Scores (B, C) of rows.
        model: The model that computed them.
        recipe: The model's recipe, if it is known.
        at: The location for the error message.

    Raises:
        NumericsError: If a score is not finite. Its hint names the likely cause.
    """
    if not bool(torch.isfinite(scores).all()):
        bad = scores[~torch.isfinite(scores)].flatten()[0].item()
        what = f"the model's scores are not finite: one is {bad}"
        raise NumericsError(what, at, likely_cause(model, recipe))


class FiniteScores:
    """A logits processor for generation that checks the scores of each new token.

    Args:
        model: The model that generates.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (B, vocabulary) unchanged.

        Raises:
            NumericsError: If a score is NaN or infinite. Minus infinity is allowed, since it rules
                a token out, unless it rules out all tokens.
        """
        ruled_out = scores == -torch.inf
        none_left = ruled_out.all(-1, keepdim=True)
        require_finite(scores.masked_fill(ruled_out & ~none_left, 0.0), self.model)
        return scores
