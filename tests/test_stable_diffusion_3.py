"""Tests of Stable Diffusion 3: losses, gradients and images against diffusers and PEFT."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import tiny_diffusion
import tiny_pictures
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from PIL import Image
from scipy.stats import ks_2samp
from test_text_to_image import (
    PROMPTS,
    RATE,
    SIDE,
    TrainedRun,
    assert_losses_equal,
    assert_tensors_equal,
    logged_losses,
    preprocess,
    run,
    write_recipe,
)
from torch import Tensor

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.export.merge import merge_adapter
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.recipe.spec import FlowSpec
from lora_cli.tasks import build_task
from lora_cli.tasks.diffusion.flow_noise import FlowNoise
from lora_cli.training.batches import prepared_for
from lora_cli.training.seeds import seed_everything

CPU = torch.device("cpu")
N_STEPS = 20
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
CLIPS = ("text_encoder", "text_encoder_2")
WITHOUT_T5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}


class ReferenceScript:
    """Diffusers' train_dreambooth_lora_sd3.py, on given noise, with PEFT's adapter.

    It starts with the weights of a run of this tool, and uses the same random numbers.
    """

    def __init__(self, path: Path, targets: Sequence[str] = TARGETS, has_t5: bool = True) -> None:
        self.pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
            path.parent / "base", **({} if has_t5 else WITHOUT_T5)
        )
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
            path.parent / "base", subfolder="scheduler"
        )
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        recipe = load_recipe(path)
        self.task: Any = build_task(recipe)
        self.task.load_processor()
        self.spec = self.task.spec
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets))
        self.pipe.transformer.add_adapter(config)
        if self.spec.train_text_encoder:
            text_config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=TEXT_TARGETS)
            for name in CLIPS:
                peft.inject_adapter_in_model(text_config, getattr(self.pipe, name))
        self.split = load_data(self.task)["train"]
        seed_everything(0)
        self.model, new_parameters = self.task.load_model(CPU)
        attach(self.model, recipe, new_parameters)
        self.copy()

    @property
    def peft_parameters(self) -> dict[str, Tensor]:
        """PEFT's parameters by this tool's names."""
        named = {
            f"{part}.{name}": parameter
            for part in ("transformer", *CLIPS)
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

    def caption_of(self, file: Path) -> str:
        """Return the caption of an image."""
        text = file.with_suffix(".txt")
        return text.read_text().strip() if text.exists() else str(self.spec.prior.caption)

    def loss(self, positions: Sequence[int], step: int, image_index: int = 0) -> Tensor:
        """Return the loss of examples in a step: of the subject's images (0) or the class's (1)."""
        pipe, prepared = self.pipe, self.prepared(positions, step)
        key = ("image", "prior_image")[image_index]
        files = [Path(self.split.examples[i][key]["path"]) for i in positions]
        pixels = torch.stack([preprocess(Image.open(file)) for file in files])
        captions = ["" if example["dropped"][image_index] else self.caption_of(file)
                    for file, example in zip(files, prepared, strict=True)]  # fmt: skip
        noise = torch.stack([example["noise"][image_index] for example in prepared])
        sampled = torch.stack([example["sampled"][image_index] for example in prepared])
        indices = torch.tensor([example["steps"][image_index] for example in prepared])

        texts, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False
        )
        latents = pipe.vae.encode(pixels).latent_dist
        latents = latents.mean + latents.std * sampled
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        timesteps = self.scheduler.timesteps[indices]
        sigma_indices = [(self.scheduler.timesteps == t).nonzero().item() for t in timesteps]
        sigmas = self.scheduler.sigmas[sigma_indices].view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        prediction = pipe.transformer(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=texts,
            pooled_projections=pooled, return_dict=False,
        )[0]  # fmt: skip
        weighting_kind = "none" if self.spec.flow is None else self.spec.flow.weighting
        if weighting_kind == "sigma_squared":  # `--precondition_outputs=1`
            prediction, target, weighting_kind = prediction * (-sigmas) + noisy, latents, "none"
        else:
            target = noise - latents
        weighting = compute_loss_weighting_for_sd3(weighting_kind, sigmas)
        errors = (weighting.float() * (prediction.float() - target.float()) ** 2).reshape(
            len(prediction), -1
        )
        return errors.mean(1).mean()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Train once, with SGD, as Adam would amplify rounding differences."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_recipe(
        folder, "sd3", task={"validation_prompts": PROMPTS, "caption_dropout": 0.2},
        data={"validation": "validation"},
        train={"max_steps": N_STEPS, "optimizer": {"type": "sgd", "learning_rate": RATE},
               "scheduler": {"type": "constant"}, "max_grad_norm": 1e9},
        evaluate={"every_steps": 10, "baseline": True},
    )  # fmt: skip
    return TrainedRun(folder, path, run(path))


def test_losses_of_20_steps_equal_diffusers_script(trained: TrainedRun) -> None:
    script = ReferenceScript(trained.path)
    assert_losses_equal(script, script.peft_parameters.values(), trained.out)
    assert any(
        any(example["dropped"]) for step in range(1, 6) for example in script.prepared([0, 1], step)
    )
    assert_tensors_equal(script.pipe.transformer, trained.out, "transformer")


PRIOR = {"path": "class", "caption": "a one", "weight": 0.5, "count": 0}
CONTEXT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "without T5": ("sd3 without t5", {"flow": {"weighting": "sigma_squared"}}, TARGETS),
    "T5 left out": ("sd3", {"without_t5": True}, TARGETS),
    "context": ("sd3", {"flow": {"weighting": "cosmap", "timesteps": "mode"}}, TARGETS + CONTEXT),
    "text encoders": ("sd3", {"train_text_encoder": True, "caption_dropout": 0.5}, TARGETS),
    "with pictures of the class": ("sd3", {"prior": PRIOR}, TARGETS),
    "by its share of noise": ("sd3", {"flow": {"weighting": "sigma_sqrt"}}, TARGETS),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow_after(2)
def test_loss_and_gradients_equal_those_of_diffusers(tmp_path: Path, name: str) -> None:
    kind, keys, targets = KINDS[name]
    adapter = {"target_modules": targets + TEXT_TARGETS * ("train_text_encoder" in keys)}
    path = write_recipe(tmp_path, kind, task=keys, adapter=adapter)
    (tmp_path / "class").mkdir()
    for i in range(2):
        tiny_pictures.picture(90 + i).resize((18, 17)).save(tmp_path / f"class/{i}.png")
    script = ReferenceScript(path, targets, not name.endswith(("without T5", "left out")))
    task, model = script.task, script.model
    for parameter in trainable_parameters(model).values():
        parameter.data.normal_(std=0.2)
    script.copy()
    prepared = script.prepared([0, 1, 2], 2)
    if "caption_dropout" in keys:
        assert {is_dropped for example in prepared for is_dropped in example["dropped"]} == {
            True,
            False,
        }
    batch = task.collate(prepared)
    loss = task.loss(model, batch) / batch.n_items
    expected = script.loss([0, 1, 2], 2)
    if "prior" in keys:
        expected = expected + 0.5 * script.loss([0, 1, 2], 2, image_index=1)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in trainable_parameters(model).items():
        expected_gradient = script.peft_parameters[name].grad
        assert expected_gradient is not None
        scale = float(expected_gradient.abs().max())
        # the last block has no text output, so the text's query gets no gradient
        assert scale > 0 or "transformer_blocks.1" in name
        assert float((parameter.grad - expected_gradient).abs().max()) <= 1e-5 * max(scale, 1e-2), (
            name
        )


# ---------------------------------------------------------------------------------------- noise


def flow_scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize(
    "spec",
    [
        FlowSpec(),
        FlowSpec(mean=-0.5, std=1.5),
        FlowSpec(timesteps="uniform"),
        FlowSpec(timesteps="mode"),
        FlowSpec(timesteps="mode", mode_scale=-0.5),
    ],
)
def test_timesteps_are_distributed_as_in_diffusers(spec: FlowSpec) -> None:
    noise, rng = FlowNoise(flow_scheduler(), spec), np.random.default_rng(0)
    steps = [noise.sample_step(rng) for _ in range(20_000)]
    u = compute_density_for_timestep_sampling(
        spec.timesteps, 20_000, spec.mean, spec.std, spec.mode_scale,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    expected_steps = (u * 1000).long().clamp(0, 999)
    # two samples of one distribution exceed this once in a million times
    assert ks_2samp(steps, expected_steps.tolist()).statistic < 0.027
    assert 0 <= min(steps) < max(steps) <= 999


def test_sampled_timesteps_are_valid() -> None:
    for spec in (FlowSpec(mean=1e6, std=1e6), FlowSpec(mean=-1e6), FlowSpec(timesteps="mode")):
        noise, rng = FlowNoise(flow_scheduler(), spec), np.random.default_rng(0)
        assert {noise.sample_step(rng) for _ in range(200)} <= set(range(1000))
        steps = torch.arange(1000)
        assert bool((noise.times(steps) > 0).all())
        assert float(noise.times(steps[:1])) == 1000.0  # pure noise


def test_validation_draws_are_stratified(trained: TrainedRun) -> None:
    script = ReferenceScript(trained.path)
    examples = [script.split.examples[0] | {"draw": i} for i in range(4)]
    prepared = [
        script.task.prepare(dict(example), np.random.default_rng(3), False) for example in examples
    ]
    steps = [example["steps"][0] for example in prepared]
    assert [step // 250 for step in steps] == [0, 1, 2, 3]
    assert len({step % 250 for step in steps}) == 1
    assert len({float(example["noise"].sum()) for example in prepared}) == 4


# ------------------------------------------------------------------------------ evaluation, answers


def test_validation_does_not_depend_on_the_batch_size(trained: TrainedRun) -> None:
    after = trained.report["metrics"]["after"]["validation"]
    changes = [
        "evaluate.micro_batch_size=1", "data.cache_limit=0B", 'task.flow={"timesteps": "uniform"}',
    ]  # fmt: skip
    again = evaluate_adapter(trained.out, load_adapter_recipe(trained.out, changes))
    assert again["validation"] == pytest.approx(after, rel=1e-5)


def max_difference(a: Any, b: Any) -> int:
    max_difference = np.asarray(a, dtype=int) - np.asarray(b, dtype=int)
    return int(np.abs(max_difference).max())


def generate(pipe: Any, prompt: str) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt, num_inference_steps=2, height=SIDE, width=SIDE, guidance_scale=7.5,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip


def test_images_equal_those_of_diffusers(
    trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model, _ = open_adapter(trained.out, load_adapter_recipe(trained.out))
    (image,) = task.draw_pictures(model, PROMPTS[:1])
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(trained.folder / "base")
    base_image = generate(pipe, PROMPTS[0])
    pipe.load_lora_weights(trained.out)
    assert max_difference(generate(pipe, PROMPTS[0]), image) <= 1
    assert max_difference(base_image, image) > 1
    best_image = Image.open(trained.out / "samples/best/0.png")
    assert max_difference(best_image, image) <= 1
    assert max_difference(Image.open(trained.out / "samples/step-000000/0.png"), base_image) <= 1

    merged = merge_adapter(None, trained.out, trained.folder / "merged")
    assert merged.difference is not None
    assert merged.difference < 1e-5
    pipe = diffusers.DiffusionPipeline.from_pretrained(trained.folder / "merged")
    assert type(pipe) is diffusers.StableDiffusion3Pipeline
    assert max_difference(generate(pipe, PROMPTS[0]), image) <= 1
    assert np.asarray(image).std() > 5

    card = (trained.out / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    line = 'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "transformer").eval()'
    assert line in code
    monkeypatch.chdir(trained.out)
    with contextlib.redirect_stderr(io.StringIO()):
        exec(code, {})
    assert max_difference(Image.open(trained.out / "drawn.png"), best_image) <= 1


@pytest.mark.slow
def test_a_base_without_t5_end_to_end(tmp_path: Path) -> None:
    keys = {"train_text_encoder": True, "aspect_ratios": True, "caption_dropout": 0.5}
    run(write_recipe(tmp_path, "sd3 without t5", task=keys))
    parts = sorted(file.parent.name for file in (tmp_path / "out").glob("*/adapter_config.json"))
    assert parts == ["text_encoder", "text_encoder_2", "transformer"]
    merge_adapter(None, tmp_path / "out", tmp_path / "merged")
    index = json.loads((tmp_path / "merged/model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert "text_encoder_3=None, tokenizer_3=None" in (tmp_path / "out/README.md").read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged", **WITHOUT_T5)
    task, model, _ = open_adapter(tmp_path / "out", load_adapter_recipe(tmp_path / "out"))
    (image,) = task.draw_pictures(model, ["a dark one"])
    assert max_difference(generate(pipe, "a dark one"), image) <= 1


@pytest.mark.slow
def test_caching_does_not_change_the_losses(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "sd3 without t5", task={"caption_dropout": 0.5})
    run(path)
    run(path, f"output_dir={tmp_path / 'computed'}", "data.cache_limit=0B")
    cached, computed = logged_losses(tmp_path / "out"), logged_losses(tmp_path / "computed")
    assert cached == pytest.approx(computed, rel=1e-6)


@pytest.mark.slow
def test_losses_do_not_depend_on_other_image_sizes_in_the_batch(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "pictures/train").mkdir(parents=True, exist_ok=True)
        image = tiny_pictures.picture(i).resize(((40, 20), (20, 40))[i % 2])
        image.save(tmp_path / f"pictures/train/{i}.png")
        (tmp_path / f"pictures/train/{i}.txt").write_text(f"no {i}")
    task = {"aspect_ratios": True, "resolution": 24, "upscale": True, "max_aspect_ratio": 2.0}
    script = ReferenceScript(write_recipe(tmp_path, "sd3", task=task))
    batch = script.task.collate(script.prepared([0, 1, 2, 3], 1))
    shapes = {k: tuple(v.shape) for k, v in batch.inputs.items() if k.startswith("noise")}
    assert shapes == {"noise.0": (2, 1, 4, 8, 16), "noise.1": (2, 1, 4, 14, 10)}
    with torch.no_grad():
        output = script.task.forward(script.model, batch)
        batch_losses = script.task.losses(script.model, output, batch)["loss"]
        for i in range(4):
            single = script.task.collate(script.prepared([i], 1))
            assert float(script.task.loss(script.model, single)) == pytest.approx(
                float(batch_losses[i]), rel=1e-5
            )


def test_truncation_depends_on_the_longest_text_encoder(tmp_path: Path) -> None:
    lengths = {}
    for kind in ("sd3", "sd3 without t5"):
        folder = tmp_path / kind.replace(" ", "_")
        folder.mkdir()
        task: Any = build_task(load_recipe(write_recipe(folder, kind)))
        task.load_processor()
        ids = task.ids_of("a b c")
        lengths[kind] = [len(token_ids) for token_ids in ids]
        assert task.is_cut("a " * 60) == (kind != "sd3")
        assert task.is_cut("a " * 300)
    assert lengths == {"sd3": [24, 24, 256], "sd3 without t5": [24, 24]}


@pytest.mark.parametrize("key", ["task.snr_gamma=5.0", "task.noise_offset=0.1"])
def test_keys_of_diffusion_noise_are_rejected(tmp_path: Path, key: str) -> None:
    task = build_task(load_recipe(write_recipe(tmp_path, "sd3 without t5"), [key]))
    with pytest.raises(LoraError, match="learns by flow matching"):
        task.load_processor()


def test_token_lengths_equal_those_of_the_pipeline(tmp_path: Path) -> None:
    """Training uses the lengths that diffusers' pipeline uses by default."""
    base = tiny_diffusion.save(tmp_path / "base", "sd3")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(base)
    texts, _, _, _ = pipe.encode_prompt("a", None, None, do_classifier_free_guidance=False)
    task: Any = build_task(load_recipe(write_recipe(tmp_path, "sd3")))
    task.load_processor()
    lengths = [len(ids) for ids in task.ids_of("a")]
    assert texts.shape == (1, lengths[0] + lengths[2], tiny_diffusion.T5_WIDTH)
