"""The shares of the sets of `data.mix` in an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_cli.errors import LoraError
from lora_cli.preprocessing.batch_plan import Mixture, quotas_of
from lora_cli.recipe import Recipe
from lora_cli.tasks.examples import Encoded
from lora_cli.tasks.generation.packing import Packed


def mixture_of(recipe: Recipe, split: Encoded, examples: Any) -> Mixture | None:
    """Return which examples form an epoch; None where each of them is seen once.

    Args:
        recipe: Its `data.mix` gives the weights.
        split: The train rows.
        examples: Their examples, or packs of these.

    Raises:
        LoraError: If a set has so small a share that no example of it is drawn.
    """
    names, mix = list(split.rows.sets), recipe.data.mix
    weights = [mix[name].weight for name in names]
    known = [weight for weight in weights if weight is not None]
    if not known:
        return None
    sets = examples.sets if isinstance(examples, Packed) else split.sets
    members = tuple(np.flatnonzero(sets == number) for number in range(len(names)))
    quotas = quotas_of(known, len(examples))
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
