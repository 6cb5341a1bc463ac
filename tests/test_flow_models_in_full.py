"""Tests of full fine-tuning of Stable Diffusion 3 and Flux: train, resume, generate images."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from closeness import assert_different
from PIL import Image
from safetensors.torch import load_file
from test_text_to_image import PROMPTS, SIDE, write_recipe

from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.export.merge import merge_adapter
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.training import train

DENOISER = "transformer/diffusion_pytorch_model.safetensors"
CLIP = "text_encoder/model.safetensors"
FROZEN = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_full_fine_tuning_end_to_end(kind: str, tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path, kind, task={"train_text_encoder": True}, data={"validation": "validation"},
        train={"optimizer": {"learning_rate": 0.01}, "scheduler": {"type": "constant"}},
        evaluate={"drawing": {"steps": 2, "guidance_scale": 3.0}, "every_steps": 2},
        checkpoint={"every_steps": 2},
    )  # fmt: skip
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "adapter": {"type": "full"}}))

    def run(out: str, steps: int, resume: bool = False) -> Path:
        overrides = [f"train.max_steps={steps}", f"output_dir={tmp_path / out}",
                 "checkpoint.allow_changes=true"]  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):
            train(load_recipe(path, overrides), resume=resume)
        return tmp_path / out

    out = run("out", 4)
    run("again", 2)
    again = run("again", 4, resume=True)
    for name, is_trained in ((DENOISER, True), (CLIP, True), (FROZEN, False)):
        before, after, resumed = (
            load_file(folder / name) for folder in (tmp_path / "base", out, again)
        )
        for key, tensor in after.items():
            assert torch.equal(tensor, resumed[key]), key
            assert is_trained or torch.equal(tensor, before[key]), key
        assert not is_trained or any(not torch.equal(t, before[n]) for n, t in after.items())

    metrics = evaluate_adapter(out, load_adapter_recipe(out), "validation")["validation"]
    assert np.isfinite(metrics["loss"])
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipe).__name__ == {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}[kind]
    task, model, _ = open_adapter(out, load_adapter_recipe(out))
    (image,) = task.draw_pictures(model, PROMPTS[:1])
    (expected, base_image) = (
        _generate(pipe) for pipe in (pipe, type(pipe).from_pretrained(tmp_path / "base"))
    )
    assert np.abs(expected - np.asarray(image, int)).max() <= 1
    assert_different(torch.tensor(expected).float(), torch.tensor(base_image).float())
    with pytest.raises(LoraError, match="already a complete model"):
        merge_adapter(None, out, tmp_path / "merged")


def _generate(pipe: diffusers.DiffusionPipeline) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    pipe.set_progress_bar_config(disable=True)
    image: Image.Image = pipe(
        PROMPTS[0], num_inference_steps=2, height=SIDE, width=SIDE, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    return np.asarray(image, dtype=np.int64)
