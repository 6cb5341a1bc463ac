"""Checks of a text-to-image recipe against its base model: unused keys, image sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_cli.errors import LoraError, Problem
from lora_cli.models.diffusion_family import Family
from lora_cli.recipe import Recipe
from lora_cli.recipe.spec import TextToImageSpec
from lora_cli.recipe.spec.text_to_image_spec import GUIDANCE


def check_keys(recipe: Recipe, spec: TextToImageSpec, family: Family) -> None:
    """Reject keys of the recipe that have no effect with this kind of base model.

    Raises:
        LoraError: With a problem for each such key.
    """
    at = recipe.at
    ignored: dict[str, Any] = {}
    what, hint = f"has no meaning for {family.name}", "leave it out"
    if family.uses_flow_matching:
        ignored = {"snr_gamma": spec.snr_gamma, "noise_offset": spec.noise_offset}
        what += ", which learns by flow matching"
        hint += "; `task.flow` says how steps are drawn and weighted"
    else:
        ignored = {"flow": spec.flow}
    problems = [Problem(f"`{k}` {what}", at(f"task.{k}"), hint) for k, v in ignored.items() if v]
    if spec.without_t5 and not family.optional:
        what = f"`without_t5` has no meaning for {family.name}: it needs all its text encoders"
        problems.append(Problem(what, at("task.without_t5"), "leave it out"))
    if spec.flow and spec.flow.guidance != GUIDANCE and not family.reads_guidance:
        what = "`guidance` has no meaning for this model, which reads none"
        problems.append(Problem(what, at("task.flow.guidance"), "leave it out"))
    if recipe.evaluate.drawing.negative_prompt and not family.has_negative_prompt:
        what = f"`negative_prompt` has no meaning for {family.name}: it reads one text a step"
        problems.append(Problem(what, at("evaluate.drawing.negative_prompt"), "leave it out"))
    if problems:
        raise LoraError(problems)


def check_resolution(recipe: Recipe, spec: TextToImageSpec, family: Family) -> None:
    """Reject a resolution that the model cannot divide into whole latents and patches.

    Raises:
        LoraError: With the nearest valid resolution as a hint.
    """
    side = family.divisor
    if spec.resolution % side:
        near = max(round(spec.resolution / side), 1) * side
        what = f"`resolution: {spec.resolution}` is no multiple of {side} pixels, in which "
        what += "steps the model draws"
        raise LoraError(what, recipe.at("task.resolution"), f"for example {near}")


def check_longest_side(
    recipe: Recipe,
    spec: TextToImageSpec,
    family: Family,
    sizes: Sequence[tuple[int, int]],
) -> None:
    """Reject image sizes that exceed the model's position embeddings.

    Args:
        recipe: The recipe.
        spec: The recipe's task.
        family: The kind of base model.
        sizes: The image sizes (width, height), in pixels.

    Raises:
        LoraError: If a side is too long.
    """
    longest, limit = max(map(max, sizes)), family.longest_side
    if limit is not None and longest > limit:
        what = f"pictures of up to {longest} pixels a side are too large for this model, which "
        what += f"has positions for {limit}"
        other = ", or `task.max_aspect_ratio`" if spec.aspect_ratios else ""
        raise LoraError(what, recipe.at("task.resolution"), f"lower `task.resolution`{other}")
