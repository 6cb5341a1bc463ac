"""Generate sample images during training, from the same prompts and the same noise each time."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.adapters.attach import training_mode
from lora_cli.data.pictures import thumbnail_url
from lora_cli.files import write_json
from lora_cli.reporting.page_drawn_pictures import DRAWINGS
from lora_cli.tasks.contract import Task

SAMPLES = "samples"  # the subfolder for the images, in the output folder of the run
BEST = "best"
SHOWN_SIDE = 192  # pixels of the longer side in the report


@torch.no_grad()
def draw_samples(
    model: nn.Module, task: Task, accelerator: Accelerator, folder: Path, step: int | None
) -> None:
    """Generate an image for each of the recipe's `validation_prompts`, on the main process only.

    Args:
        model: The model; it is put into eval mode, and back into training mode.
        task: The model's task; nothing is written if it does not generate images.
        accelerator: The precision and the processes.
        folder: The output folder of the run; gets `samples/step-000100/0.png` for the first prompt.
        step: The number of steps so far; None for the best adapter, after training.
    """
    prompts = task.recipe.task.sample_prompts
    if not prompts or not accelerator.is_main_process:
        return
    step_folder = folder / SAMPLES / (BEST if step is None else f"step-{step:06d}")
    step_folder.mkdir(parents=True, exist_ok=True)
    was_training = model.training
    model.eval()
    try:
        with accelerator.autocast():
            for i, prompt in enumerate(prompts):
                (picture,) = task.draw_pictures(model, [prompt])
                picture.save(step_folder / f"{i}.png")
    finally:
        if was_training:
            training_mode(model, task.frozen_layers)
    if step is None:
        write_json(folder / SAMPLES / DRAWINGS, _thumbnails(folder / SAMPLES, prompts))


def _thumbnails(folder: Path, prompts: list[str]) -> dict[str, object]:
    """Return thumbnails of all images, by step, for the report."""
    step_folders = sorted(path for path in folder.iterdir() if path.name.startswith("step-"))
    snapshots = []
    for step_folder in [*step_folders, folder / BEST]:
        files = [step_folder / f"{i}.png" for i in range(len(prompts))]
        if all(file.is_file() for file in files):
            pictures = [
                thumbnail_url({"bytes": None, "path": str(file)}, SHOWN_SIDE) for file in files
            ]
            snapshots.append({"when": step_folder.name, "pictures": pictures})
    return {"prompts": prompts, "drawn": snapshots}
