"""Build the mixture of an epoch from the weights of `data.mix`."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_cli.errors import LoraError
from lora_cli.preprocessing.batch_plan import Mixture, quotas_of
from lora_cli.recipe import Recipe
from lora_cli.tasks.examples import Encoded
from lora_cli.tasks.generation.packing import Packed


def mixture_of(recipe: Recipe, split: Encoded, examples: Any) -> Mixture | None:
    """Return the mixture that forms an epoch; None if an epoch has each example once.

    Args:
        recipe: The recipe; `data.mix` contains the weights.
        split: The train rows.
        examples: The examples of the rows, or packs of them.

    Raises:
        LoraError: If a set has no examples, or its share is so small that none is used.
    """
    names, mix = list(split.rows.sets), recipe.data.mix
    weights = [mix[name].weight for name in names]
    given_weights = [weight for weight in weights if weight is not None]
    if not given_weights:
        return None
    sets = examples.sets if isinstance(examples, Packed) else split.sets
    members = tuple(np.flatnonzero(sets == number) for number in range(len(names)))
    quotas = quotas_of(given_weights, len(examples))
    for name, of_set, quota in zip(names, members, quotas, strict=True):
        key = f"data.mix.{name}"
        if not len(of_set):
            what = f"no row of the set `{name}` leaves anything to train"
            raise LoraError(what, recipe.at(key), f"leave it out, or raise {_limit(recipe)}")
        if not quota:
            what = f"the set `{name}` has so small a `weight` that an epoch of {len(examples):,} "
            what += "examples has none of it"
            raise LoraError(what, recipe.at(f"{key}.weight"), "give it more, or leave it out")
    return Mixture(members, quotas)


def _limit(recipe: Recipe) -> str:
    return " and ".join(f"`task.{key}`" for key in recipe.task.length_keys)
