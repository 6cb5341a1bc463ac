"""Pictures that a model draws while it is trained: the same texts from the same noise each time."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.adapters.attach import training_mode
from lora_cli.data.pictures import thumbnail_of
from lora_cli.files import write_json
from lora_cli.reporting.page_drawn_pictures import DRAWINGS
from lora_cli.tasks.contract import Task

SAMPLES = "samples"  # the folder of the pictures, in that of the run
BEST = "best"
SHOWN_SIDE = 192  # pixels of the longer side in the report


@torch.no_grad()
def draw_samples(
    model: nn.Module, task: Task, accelerator: Accelerator, folder: Path, when: int | None
) -> None:
    """Draw the recipe's `validation_prompts`, on the main process alone.

    Args:
        model: The model; it is put into eval mode, and back into training mode.
        task: Of the model; one that does not draw leaves nothing.
        accelerator: Precision and processes.
        folder: Of the run; gets `samples/step-000100/0.png` for the first text.
        when: After which step; None: with the best adapter, when all is done.
    """
    prompts = task.recipe.task.sample_prompts
    if not prompts or not accelerator.is_main_process:
        return
    place = folder / SAMPLES / (BEST if when is None else f"step-{when:06d}")
    place.mkdir(parents=True, exist_ok=True)
    was_training = model.training
    model.eval()
    try:
        with accelerator.autocast():
            for i, prompt in enumerate(prompts):
                (picture,) = task.draw_pictures(model, [prompt])
                picture.save(place / f"{i}.png")
    finally:
        if was_training:
            training_mode(model, task.frozen_layers)
    if when is None:
        write_json(folder / SAMPLES / DRAWINGS, _shown(folder / SAMPLES, prompts))


def _shown(folder: Path, prompts: list[str]) -> dict[str, object]:
    """Return small copies of all pictures, by when they were drawn, for the report."""
    places = sorted(place for place in folder.iterdir() if place.name.startswith("step-"))
    drawn = []
    for place in [*places, folder / BEST]:
        files = [place / f"{i}.png" for i in range(len(prompts))]
        if all(file.is_file() for file in files):
            pictures = [
                thumbnail_of({"bytes": None, "path": str(file)}, SHOWN_SIDE) for file in files
            ]
            drawn.append({"when": place.name, "pictures": pictures})
    return {"prompts": prompts, "drawn": drawn}
