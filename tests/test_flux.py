"""Tests of Flux: losses, gradients and generated images against diffusers and PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import tiny_diffusion
import torch
from closeness import assert_close, assert_different
from PIL import Image
from test_text_to_image import (
    PROMPTS,
    RATE,
    SIDE,
    TrainedRun,
    assert_losses_equal,
    preprocess,
    run,
    write_recipe,
)
from torch import Tensor

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.adapters.peft_format.adapter_folder import read_adapter
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.export.export_adapter import export_adapter
from lora_cli.export.merge import merge_adapter
from lora_cli.models.flux import latents_of, patches_of
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.tasks import build_task
from lora_cli.training.batches import prepared_for
from lora_cli.training.seeds import seed_everything

N_STEPS = 20
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class ReferenceScript:
    """Diffusers' train_dreambooth_lora_flux.py, on given noise, with PEFT's adapter."""

    def __init__(self, path: Path, targets: Sequence[str] = TARGETS) -> None:
        base = path.parent / "base"
        self.pipe = diffusers.FluxPipeline.from_pretrained(base)
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
            base, subfolder="scheduler"
        )
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        recipe = load_recipe(path)
        self.task: Any = build_task(recipe)
        self.task.load_processor()
        self.guidance = 3.5 if self.task.spec.flow is None else self.task.spec.flow.guidance
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets))
        self.pipe.transformer.add_adapter(config)
        if self.task.spec.train_text_encoder:
            text_config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=TEXT_TARGETS)
            peft.inject_adapter_in_model(text_config, self.pipe.text_encoder)
        self.split = load_data(self.task)["train"]
        seed_everything(0)
        self.model, new_parameters = self.task.load_model(torch.device("cpu"))
        attach(self.model, recipe, new_parameters)
        self.copy()

    @property
    def peft_parameters(self) -> dict[str, Tensor]:
        """PEFT's parameters by this tool's names."""
        named = {
            f"{part}.{name}": parameter
            for part in ("transformer", "text_encoder")
            for name, parameter in getattr(self.pipe, part).named_parameters()
            if parameter.requires_grad
        }
        return {name.replace(".default.weight", ""): p for name, p in named.items()}

    def copy(self) -> None:
        """Copy this tool's adapter to PEFT's."""
        own, peft_parameters = trainable_parameters(self.model), self.peft_parameters
        assert own.keys() == peft_parameters.keys()
        for name, parameter in own.items():
            peft_parameters[name].data.copy_(parameter.data)

    def prepared(self, positions: Sequence[int], step: int) -> list[Any]:
        """Return examples as this tool prepares them for a step."""
        return [prepared_for(self.task, self.split.examples[i], 0, step) for i in positions]

    def loss(self, positions: Sequence[int], step: int) -> Tensor:
        """Return the loss of examples in a step."""
        pipe, prepared = self.pipe, self.prepared(positions, step)
        files = [Path(self.split.examples[i]["image"]["path"]) for i in positions]
        pixels = torch.stack([preprocess(Image.open(file)) for file in files])
        captions = ["" if example["dropped"][0] else file.with_suffix(".txt").read_text().strip()
                    for file, example in zip(files, prepared, strict=True)]  # fmt: skip
        noise = torch.stack([example["noise"][0] for example in prepared])
        sampled = torch.stack([example["sampled"][0] for example in prepared])
        indices = torch.tensor([example["steps"][0] for example in prepared])
        texts, pooled, text_ids = pipe.encode_prompt(captions, None)
        posterior = pipe.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * sampled
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        count, channels, height, width = latents.shape
        ids = pipe._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32)
        timesteps = self.scheduler.timesteps[indices]
        sigmas = self.scheduler.sigmas[indices].view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        guidance = None
        if pipe.transformer.config.guidance_embeds:
            guidance = torch.tensor([self.guidance]).expand(count)
        prediction = pipe.transformer(
            hidden_states=pipe._pack_latents(noisy, count, channels, height, width),
            timestep=timesteps / 1000, guidance=guidance, pooled_projections=pooled,
            encoder_hidden_states=texts, txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
        factor = pipe.vae_scale_factor
        prediction = pipe._unpack_latents(prediction, height * factor, width * factor, factor)
        return (prediction.float() - (noise - latents).float()).square().reshape(count, -1).mean()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Train once, with SGD, as Adam would amplify rounding differences."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_recipe(
        folder, "flux", task={"caption_dropout": 0.2, "train_text_encoder": True},
        train={"max_steps": N_STEPS, "optimizer": {"type": "sgd", "learning_rate": RATE},
               "scheduler": {"type": "constant"}, "max_grad_norm": 1e9},
    )  # fmt: skip
    return TrainedRun(folder, path, run(path))


def test_losses_of_20_steps_equal_diffusers_script(trained: TrainedRun) -> None:
    script = ReferenceScript(trained.path)
    assert_losses_equal(script, script.peft_parameters.values(), trained.out)


@pytest.mark.parametrize(
    ("config", "flow"), [({}, {"guidance": 1.0}), ({"guidance_embeds": False}, {})]
)
@pytest.mark.slow_after(1)
def test_gradients_equal_those_of_diffusers(
    tmp_path: Path, config: dict[str, Any], flow: dict[str, Any]
) -> None:
    tiny_diffusion.save(tmp_path / "base", "flux", **config)
    targets = [*TARGETS, "add_q_proj", "to_add_out", "proj_mlp"]
    path = write_recipe(tmp_path, task={"flow": flow}, adapter={"target_modules": targets})
    script = ReferenceScript(path, targets)
    task, model = script.task, script.model
    for parameter in trainable_parameters(model).values():
        parameter.data.normal_(std=0.2)
    script.copy()
    batch = task.collate(script.prepared([0, 1, 2], 2))
    loss, expected = task.loss(model, batch) / batch.n_items, script.loss([0, 1, 2], 2)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in trainable_parameters(model).items():
        expected_gradient = script.peft_parameters[name].grad
        assert expected_gradient is not None
        scale = float(expected_gradient.abs().max())
        assert scale > 0
        assert float((parameter.grad - expected_gradient).abs().max()) <= 1e-5 * max(scale, 1e-2), (
            name
        )


def test_patches_equal_those_of_the_pipeline() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    packed = patches_of(latents)
    assert torch.equal(packed, diffusers.FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(latents_of(packed, 2, 3), latents)


def max_difference(a: Any, b: Any) -> int:
    max_difference = np.asarray(a, dtype=int) - np.asarray(b, dtype=int)
    return int(np.abs(max_difference).max())


def generate(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS[0], num_inference_steps=2, height=SIDE, width=SIDE, guidance_scale=7.5,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip


def test_diffusers_reads_the_adapter_and_generates_the_same_image(trained: TrainedRun) -> None:
    task, model, _ = open_adapter(trained.out, load_adapter_recipe(trained.out))
    (image,) = task.draw_pictures(model, PROMPTS[:1])
    pipe = diffusers.FluxPipeline.from_pretrained(trained.folder / "base")
    base_image = generate(pipe)
    pipe.load_lora_weights(trained.out)
    assert max_difference(generate(pipe), image) <= 1
    assert max_difference(base_image, image) > 1
    merge_adapter(None, trained.out, trained.folder / "merged")
    pipe = diffusers.DiffusionPipeline.from_pretrained(trained.folder / "merged")
    assert type(pipe) is diffusers.FluxPipeline
    assert max_difference(generate(pipe), image) <= 1
    (line,) = export_adapter(
        trained.out, trained.folder / "exported", "diffusers", say=lambda _: None
    )
    assert line.startswith("loaded by diffusers")


@pytest.mark.slow
def test_adapter_files_of_diffusers_are_read(tmp_path: Path) -> None:
    base = tiny_diffusion.save(tmp_path / "base", "flux")
    pipe = diffusers.FluxPipeline.from_pretrained(base)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["to_q", "proj_mlp", "add_k_proj"],
        init_lora_weights=False,
    )  # fmt: skip
    pipe.transformer.add_adapter(config)
    state = peft.get_peft_model_state_dict(pipe.transformer)
    scaled = {name: 2 * tensor if "lora_B" in name else tensor for name, tensor in state.items()}
    diffusers.FluxPipeline.save_lora_weights(tmp_path / "theirs", transformer_lora_layers=scaled)
    assert read_adapter(tmp_path / "theirs").tensors
    merge_adapter(str(base), tmp_path / "theirs", tmp_path / "merged")
    merged = diffusers.FluxPipeline.from_pretrained(tmp_path / "merged").transformer
    weight = "transformer_blocks.0.attn.to_q.weight"
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    expected = layer.weight + layer.get_delta_weight("default")
    assert_close(merged.state_dict()[weight], expected, 1e-5)
    assert_different(expected, layer.weight)
