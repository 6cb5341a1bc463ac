"""Tests of the default number of steps and guidance scale of each kind of diffusion model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_diffusion
from test_text_to_image import load_task, write_recipe

from lora_cli.recipe_draft import draft_recipe

PIPELINES: dict[str, Any] = {
    "sd": diffusers.StableDiffusionPipeline,
    "xl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
}


def draft_drawing(folder: Path, kind: str, **config: Any) -> dict[str, Any]:
    """Return the `evaluate.drawing` that `lora init` drafts for a base."""
    tiny_diffusion.save(folder / "base", kind, **config)
    source = tiny_diffusion.write_folder(folder / "art", {"train": 4})
    draft = draft_recipe(source, str(folder / "base"), folder / "recipe.yaml")
    drawing = draft.values.get("evaluate", {}).get("drawing", {})
    assert ("as in diffusers" in draft.text()) == bool(drawing)
    return dict(drawing)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["flux", "sd3", "xl", "sd"])
def test_init_drafts_the_defaults_of_diffusers_pipelines(kind: str, tmp_path: Path) -> None:
    values = {"guidance_scale": 7.5, **draft_drawing(tmp_path, kind)}  # the recipe's default
    parameters = inspect.signature(PIPELINES[kind].__call__).parameters
    assert values["guidance_scale"] == parameters["guidance_scale"].default
    if kind in ("sd3", "flux"):
        assert values["steps"] == parameters["num_inference_steps"].default
    else:  # diffusers' 50 steps change little
        assert "steps" not in values


def test_a_distilled_flux_takes_four_steps(tmp_path: Path) -> None:
    assert draft_drawing(tmp_path, "flux", guidance_embeds=False) == {
        "steps": 4,
        "guidance_scale": 0.0,
    }


def test_a_default_guidance_that_is_unusual_is_noted(tmp_path: Path) -> None:
    for settings, is_noted in ({}, True), ({"guidance_scale": 7.5}, False):
        path = write_recipe(tmp_path, "flux", evaluate={"drawing": {"steps": 1, **settings}})
        notes = "\n".join(load_task(path).notes)
        assert (
            "usual for this model is `evaluate.drawing.guidance_scale: 3.5`" in notes
        ) == is_noted
