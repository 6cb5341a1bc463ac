"""Flux: the computation against plain diffusers and PEFT, and what is drawn."""

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
    Trained,
    recipe,
    require_losses_of,
    run,
    seen,
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
OF_TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Script:
    """train_dreambooth_lora_flux.py of diffusers on given noise, with PEFT's adapter."""

    def __init__(self, path: Path, targets: Sequence[str] = TARGETS) -> None:
        base = path.parent / "base"
        self.pipe = diffusers.FluxPipeline.from_pretrained(base)
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
            base, subfolder="scheduler"
        )
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        loaded = load_recipe(path)
        self.task: Any = build_task(loaded)
        self.task.load_processor()
        self.guidance = 3.5 if self.task.spec.flow is None else self.task.spec.flow.guidance
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets))
        self.pipe.transformer.add_adapter(config)
        if self.task.spec.train_text_encoder:
            of_text = peft.LoraConfig(r=2, lora_alpha=4, target_modules=OF_TEXT)
            peft.inject_adapter_in_model(of_text, self.pipe.text_encoder)
        self.split = load_data(self.task)["train"]
        seed_everything(0)
        self.model, new = self.task.load_model(torch.device("cpu"))
        attach(self.model, loaded, new)
        self.copy()

    @property
    def theirs(self) -> dict[str, Tensor]:
        """The parameters of PEFT, by this tool's names."""
        named = {
            f"{part}.{name}": parameter
            for part in ("transformer", "text_encoder")
            for name, parameter in getattr(self.pipe, part).named_parameters()
            if parameter.requires_grad
        }
        return {name.replace(".default.weight", ""): p for name, p in named.items()}

    def copy(self) -> None:
        """Give PEFT's adapter the numbers of this tool's."""
        ours, theirs = trainable_parameters(self.model), self.theirs
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            theirs[name].data.copy_(parameter.data)

    def ready(self, positions: Sequence[int], step: int) -> list[Any]:
        """Return the examples as this tool prepares them in a step."""
        return [prepared_for(self.task, self.split.examples[i], 0, step) for i in positions]

    def loss(self, positions: Sequence[int], step: int) -> Tensor:
        """Return the loss of examples in a step."""
        pipe, ready = self.pipe, self.ready(positions, step)
        files = [Path(self.split.examples[i]["image"]["path"]) for i in positions]
        pixels = torch.stack([seen(Image.open(file)) for file in files])
        captions = ["" if one["dropped"][0] else file.with_suffix(".txt").read_text().strip()
                    for file, one in zip(files, ready, strict=True)]  # fmt: skip
        noise = torch.stack([one["noise"][0] for one in ready])
        sampled = torch.stack([one["sampled"][0] for one in ready])
        indices = torch.tensor([one["steps"][0] for one in ready])
        texts, whole, text_ids = pipe.encode_prompt(captions, None)
        found = pipe.vae.encode(pixels).latent_dist
        latents = found.mean + found.std * sampled
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        count, channels, height, width = latents.shape
        ids = pipe._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32)
        timesteps = self.scheduler.timesteps[indices]
        sigmas = self.scheduler.sigmas[indices].view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        guidance = None
        if pipe.transformer.config.guidance_embeds:
            guidance = torch.tensor([self.guidance]).expand(count)
        pred = pipe.transformer(
            hidden_states=pipe._pack_latents(noisy, count, channels, height, width),
            timestep=timesteps / 1000, guidance=guidance, pooled_projections=whole,
            encoder_hidden_states=texts, txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
        factor = pipe.vae_scale_factor
        pred = pipe._unpack_latents(pred, height * factor, width * factor, factor)
        return (pred.float() - (noise - latents).float()).square().reshape(count, -1).mean()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train once: by SGD, which does not divide by rounding noise."""
    folder = tmp_path_factory.mktemp("trained")
    path = recipe(
        folder, "flux", task={"caption_dropout": 0.2, "train_text_encoder": True},
        train={"max_steps": N_STEPS, "optimizer": {"type": "sgd", "learning_rate": RATE},
               "scheduler": {"type": "constant"}, "max_grad_norm": 1e9},
    )  # fmt: skip
    return Trained(folder, path, run(path))


def test_twenty_steps_are_those_of_the_training_script_of_diffusers(trained: Trained) -> None:
    script = Script(trained.path)
    require_losses_of(script, script.theirs.values(), trained.out)


@pytest.mark.parametrize(
    ("config", "flow"), [({}, {"guidance": 1.0}), ({"guidance_embeds": False}, {})]
)
@pytest.mark.slow_after(1)
def test_gradients_are_those_of_diffusers(
    tmp_path: Path, config: dict[str, Any], flow: dict[str, Any]
) -> None:
    tiny_diffusion.save(tmp_path / "base", "flux", **config)
    targets = [*TARGETS, "add_q_proj", "to_add_out", "proj_mlp"]
    path = recipe(tmp_path, task={"flow": flow}, adapter={"target_modules": targets})
    script = Script(path, targets)
    task, model = script.task, script.model
    for parameter in trainable_parameters(model).values():
        parameter.data.normal_(std=0.2)
    script.copy()
    batch = task.collate(script.ready([0, 1, 2], 2))
    loss, expected = task.loss(model, batch) / batch.n_items, script.loss([0, 1, 2], 2)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in trainable_parameters(model).items():
        wanted = script.theirs[name].grad
        assert wanted is not None
        scale = float(wanted.abs().max())
        assert scale > 0
        assert float((parameter.grad - wanted).abs().max()) <= 1e-5 * max(scale, 1e-2), name


def test_patches_are_those_of_the_pipeline() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    packed = patches_of(latents)
    assert torch.equal(packed, diffusers.FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(latents_of(packed, 2, 3), latents)


def difference(one: Any, other: Any) -> int:
    found = np.asarray(one, dtype=int) - np.asarray(other, dtype=int)
    return int(np.abs(found).max())


def drawn_by(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS[0], num_inference_steps=2, height=SIDE, width=SIDE, guidance_scale=7.5,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip


def test_what_is_drawn_and_written_is_what_diffusers_draws_and_reads(trained: Trained) -> None:
    task, model, _ = open_adapter(trained.out, load_adapter_recipe(trained.out))
    (found,) = task.draw_pictures(model, PROMPTS[:1])
    pipe = diffusers.FluxPipeline.from_pretrained(trained.folder / "base")
    bare = drawn_by(pipe)
    pipe.load_lora_weights(trained.out)
    assert difference(drawn_by(pipe), found) <= 1
    assert difference(bare, found) > 1
    merge_adapter(None, trained.out, trained.folder / "merged")
    pipe = diffusers.DiffusionPipeline.from_pretrained(trained.folder / "merged")
    assert type(pipe) is diffusers.FluxPipeline
    assert difference(drawn_by(pipe), found) <= 1
    (line,) = export_adapter(
        trained.out, trained.folder / "exported", "diffusers", say=lambda _: None
    )
    assert line.startswith("loaded by diffusers")


@pytest.mark.slow
def test_a_file_that_diffusers_writes_is_read(tmp_path: Path) -> None:
    base = tiny_diffusion.save(tmp_path / "base", "flux")
    pipe = diffusers.FluxPipeline.from_pretrained(base)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["to_q", "proj_mlp", "add_k_proj"],
        init_lora_weights=False,
    )  # fmt: skip
    pipe.transformer.add_adapter(config)
    state = peft.get_peft_model_state_dict(pipe.transformer)
    scaled = {name: 2 * one if "lora_B" in name else one for name, one in state.items()}
    diffusers.FluxPipeline.save_lora_weights(tmp_path / "theirs", transformer_lora_layers=scaled)
    assert read_adapter(tmp_path / "theirs").tensors
    merge_adapter(str(base), tmp_path / "theirs", tmp_path / "merged")
    merged = diffusers.FluxPipeline.from_pretrained(tmp_path / "merged").transformer
    weight = "transformer_blocks.0.attn.to_q.weight"
    theirs = pipe.transformer.transformer_blocks[0].attn.to_q
    wanted = theirs.weight + theirs.get_delta_weight("default")
    assert_close(merged.state_dict()[weight], wanted, 1e-5)
    assert_different(wanted, theirs.weight)
