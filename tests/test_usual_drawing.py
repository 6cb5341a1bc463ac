"""In how many steps, and with which guidance, each kind of model usually draws."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_diffusion
from test_text_to_image import built, recipe

from lora_cli.recipe_draft import draft_recipe

PIPELINES: dict[str, Any] = {
    "sd": diffusers.StableDiffusionPipeline,
    "xl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
}


def drafted(folder: Path, kind: str, **config: Any) -> dict[str, Any]:
    """Return what `lora init` says of drawing for a base."""
    tiny_diffusion.save(folder / "base", kind, **config)
    source = tiny_diffusion.write_folder(folder / "art", {"train": 4})
    draft = draft_recipe(source, str(folder / "base"), folder / "recipe.yaml")
    found = draft.values.get("evaluate", {}).get("drawing", {})
    assert ("as in diffusers" in draft.text()) == bool(found)
    return dict(found)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["flux", "sd3", "xl", "sd"])
def test_init_drafts_what_the_pipeline_of_diffusers_draws_with(kind: str, tmp_path: Path) -> None:
    values = {"guidance_scale": 7.5, **drafted(tmp_path, kind)}  # the default of a recipe
    parameters = inspect.signature(PIPELINES[kind].__call__).parameters
    assert values["guidance_scale"] == parameters["guidance_scale"].default
    if kind in ("sd3", "flux"):
        assert values["steps"] == parameters["num_inference_steps"].default
    else:  # of 50 steps: so many more do not change much
        assert "steps" not in values


def test_a_distilled_flux_draws_in_four_steps(tmp_path: Path) -> None:
    assert drafted(tmp_path, "flux", guidance_embeds=False) == {"steps": 4, "guidance_scale": 0.0}


def test_a_guidance_that_nobody_chose_is_said(tmp_path: Path) -> None:
    for given, is_said in ({}, True), ({"guidance_scale": 7.5}, False):
        path = recipe(tmp_path, "flux", evaluate={"drawing": {"steps": 1, **given}})
        notes = "\n".join(built(path).notes)
        assert (
            "usual for this model is `evaluate.drawing.guidance_scale: 3.5`" in notes
        ) == is_said
