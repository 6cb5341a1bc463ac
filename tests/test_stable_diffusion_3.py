"""Stable Diffusion 3: the computation against plain diffusers and PEFT, and what is drawn."""

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
    Trained,
    logged,
    recipe,
    require_losses_of,
    require_tensors_of,
    run,
    seen,
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
OF_TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
CLIPS = ("text_encoder", "text_encoder_2")
WITHOUT_T5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}


class Script:
    """train_dreambooth_lora_sd3.py of diffusers on given noise, with PEFT's adapter.

    It starts from the numbers of a run of this tool, and is told what was drawn in each step.
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
        loaded = load_recipe(path)
        self.task: Any = build_task(loaded)
        self.task.load_processor()
        self.spec = self.task.spec
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets))
        self.pipe.transformer.add_adapter(config)
        if self.spec.train_text_encoder:
            of_text = peft.LoraConfig(r=2, lora_alpha=4, target_modules=OF_TEXT)
            for name in CLIPS:
                peft.inject_adapter_in_model(of_text, getattr(self.pipe, name))
        self.split = load_data(self.task)["train"]
        seed_everything(0)
        self.model, new = self.task.load_model(CPU)
        attach(self.model, loaded, new)
        self.copy()

    @property
    def theirs(self) -> dict[str, Tensor]:
        """The parameters of PEFT, by this tool's names."""
        named = {
            f"{part}.{name}": parameter
            for part in ("transformer", *CLIPS)
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

    def caption_of(self, file: Path) -> str:
        """Return what a picture shows."""
        text = file.with_suffix(".txt")
        return text.read_text().strip() if text.exists() else str(self.spec.prior.caption)

    def loss(self, positions: Sequence[int], step: int, which: int = 0) -> Tensor:
        """Return the loss of examples in a step: of their pictures, or (1) those of the class."""
        pipe, ready = self.pipe, self.ready(positions, step)
        key = ("image", "prior_image")[which]
        files = [Path(self.split.examples[i][key]["path"]) for i in positions]
        pixels = torch.stack([seen(Image.open(file)) for file in files])
        captions = ["" if one["dropped"][which] else self.caption_of(file)
                    for file, one in zip(files, ready, strict=True)]  # fmt: skip
        noise = torch.stack([one["noise"][which] for one in ready])
        sampled = torch.stack([one["sampled"][which] for one in ready])
        indices = torch.tensor([one["steps"][which] for one in ready])

        texts, _, whole, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False
        )
        latents = pipe.vae.encode(pixels).latent_dist
        latents = latents.mean + latents.std * sampled
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        timesteps = self.scheduler.timesteps[indices]
        places = [(self.scheduler.timesteps == t).nonzero().item() for t in timesteps]
        sigmas = self.scheduler.sigmas[places].view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        pred = pipe.transformer(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=texts,
            pooled_projections=whole, return_dict=False,
        )[0]  # fmt: skip
        kind = "none" if self.spec.flow is None else self.spec.flow.weighting
        if kind == "sigma_squared":  # `--precondition_outputs=1`
            pred, target, kind = pred * (-sigmas) + noisy, latents, "none"
        else:
            target = noise - latents
        weighting = compute_loss_weighting_for_sd3(kind, sigmas)
        errors = (weighting.float() * (pred.float() - target.float()) ** 2).reshape(len(pred), -1)
        return errors.mean(1).mean()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train once: by SGD, which does not divide by rounding noise."""
    folder = tmp_path_factory.mktemp("trained")
    path = recipe(
        folder, "sd3", task={"validation_prompts": PROMPTS, "caption_dropout": 0.2},
        data={"validation": "validation"},
        train={"max_steps": N_STEPS, "optimizer": {"type": "sgd", "learning_rate": RATE},
               "scheduler": {"type": "constant"}, "max_grad_norm": 1e9},
        evaluate={"every_steps": 10, "baseline": True},
    )  # fmt: skip
    return Trained(folder, path, run(path))


def test_twenty_steps_are_those_of_the_training_script_of_diffusers(trained: Trained) -> None:
    script = Script(trained.path)
    require_losses_of(script, script.theirs.values(), trained.out)
    assert any(any(one["dropped"]) for step in range(1, 6) for one in script.ready([0, 1], step))
    require_tensors_of(script.pipe.transformer, trained.out, "transformer")


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
def test_loss_and_gradients_are_those_of_diffusers(tmp_path: Path, name: str) -> None:
    kind, keys, targets = KINDS[name]
    adapter = {"target_modules": targets + OF_TEXT * ("train_text_encoder" in keys)}
    path = recipe(tmp_path, kind, task=keys, adapter=adapter)
    (tmp_path / "class").mkdir()
    for i in range(2):
        tiny_pictures.picture(90 + i).resize((18, 17)).save(tmp_path / f"class/{i}.png")
    script = Script(path, targets, not name.endswith(("without T5", "left out")))
    task, model = script.task, script.model
    for parameter in trainable_parameters(model).values():
        parameter.data.normal_(std=0.2)
    script.copy()
    ready = script.ready([0, 1, 2], 2)
    if "caption_dropout" in keys:
        assert {flag for one in ready for flag in one["dropped"]} == {True, False}
    batch = task.collate(ready)
    loss = task.loss(model, batch) / batch.n_items
    expected = script.loss([0, 1, 2], 2)
    if "prior" in keys:
        expected = expected + 0.5 * script.loss([0, 1, 2], 2, which=1)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in trainable_parameters(model).items():
        wanted = script.theirs[name].grad
        assert wanted is not None
        scale = float(wanted.abs().max())
        # the last block has no output of the text, and no use for its query
        assert scale > 0 or "transformer_blocks.1" in name
        assert float((parameter.grad - wanted).abs().max()) <= 1e-5 * max(scale, 1e-2), name


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
def test_steps_are_drawn_as_often_as_by_diffusers(spec: FlowSpec) -> None:
    noise, rng = FlowNoise(flow_scheduler(), spec), np.random.default_rng(0)
    drawn = [noise.sample_step(rng) for _ in range(20_000)]
    u = compute_density_for_timestep_sampling(
        spec.timesteps, 20_000, spec.mean, spec.std, spec.mode_scale,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    theirs = (u * 1000).long().clamp(0, 999)
    # what two samples of one distribution exceed once in a million times
    assert ks_2samp(drawn, theirs.tolist()).statistic < 0.027
    assert 0 <= min(drawn) < max(drawn) <= 999


def test_the_ends_of_what_is_drawn_are_steps() -> None:
    for spec in (FlowSpec(mean=1e6, std=1e6), FlowSpec(mean=-1e6), FlowSpec(timesteps="mode")):
        noise, rng = FlowNoise(flow_scheduler(), spec), np.random.default_rng(0)
        assert {noise.sample_step(rng) for _ in range(200)} <= set(range(1000))
        steps = torch.arange(1000)
        assert bool((noise.times(steps) > 0).all())
        assert float(noise.times(steps[:1])) == 1000.0  # noise alone


def test_the_draws_of_a_picture_lie_evenly_between_all_steps(trained: Trained) -> None:
    script = Script(trained.path)
    examples = [script.split.examples[0] | {"draw": i} for i in range(4)]
    drawn = [script.task.prepare(dict(e), np.random.default_rng(3), False) for e in examples]
    steps = [one["steps"][0] for one in drawn]
    assert [step // 250 for step in steps] == [0, 1, 2, 3]
    assert len({step % 250 for step in steps}) == 1
    assert len({float(one["noise"].sum()) for one in drawn}) == 4


# ------------------------------------------------------------------------------ evaluation, answers


def test_validation_is_the_same_in_every_batch_and_evaluation(trained: Trained) -> None:
    after = trained.report["metrics"]["after"]["validation"]
    changes = [
        "evaluate.micro_batch_size=1", "data.cache_limit=0B", 'task.flow={"timesteps": "uniform"}',
    ]  # fmt: skip
    again = evaluate_adapter(trained.out, load_adapter_recipe(trained.out, changes))
    assert again["validation"] == pytest.approx(after, rel=1e-5)


def difference(one: Any, other: Any) -> int:
    found = np.asarray(one, dtype=int) - np.asarray(other, dtype=int)
    return int(np.abs(found).max())


def drawn_by(pipe: Any, prompt: str) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt, num_inference_steps=2, height=SIDE, width=SIDE, guidance_scale=7.5,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip


def test_what_is_drawn_is_what_diffusers_draws(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model, _ = open_adapter(trained.out, load_adapter_recipe(trained.out))
    (found,) = task.draw_pictures(model, PROMPTS[:1])
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(trained.folder / "base")
    bare = drawn_by(pipe, PROMPTS[0])
    pipe.load_lora_weights(trained.out)
    assert difference(drawn_by(pipe, PROMPTS[0]), found) <= 1
    assert difference(bare, found) > 1
    best = Image.open(trained.out / "samples/best/0.png")
    assert difference(best, found) <= 1
    assert difference(Image.open(trained.out / "samples/step-000000/0.png"), bare) <= 1

    merged = merge_adapter(None, trained.out, trained.folder / "merged")
    assert merged.difference is not None
    assert merged.difference < 1e-5
    pipe = diffusers.DiffusionPipeline.from_pretrained(trained.folder / "merged")
    assert type(pipe) is diffusers.StableDiffusion3Pipeline
    assert difference(drawn_by(pipe, PROMPTS[0]), found) <= 1
    assert np.asarray(found).std() > 5

    card = (trained.out / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    line = 'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "transformer").eval()'
    assert line in code
    monkeypatch.chdir(trained.out)
    with contextlib.redirect_stderr(io.StringIO()):
        exec(code, {})
    assert difference(Image.open(trained.out / "drawn.png"), best) <= 1


@pytest.mark.slow
def test_a_base_without_t5_from_training_to_what_diffusers_draws(tmp_path: Path) -> None:
    keys = {"train_text_encoder": True, "aspect_ratios": True, "caption_dropout": 0.5}
    run(recipe(tmp_path, "sd3 without t5", task=keys))
    parts = sorted(file.parent.name for file in (tmp_path / "out").glob("*/adapter_config.json"))
    assert parts == ["text_encoder", "text_encoder_2", "transformer"]
    merge_adapter(None, tmp_path / "out", tmp_path / "merged")
    index = json.loads((tmp_path / "merged/model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert "text_encoder_3=None, tokenizer_3=None" in (tmp_path / "out/README.md").read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged", **WITHOUT_T5)
    task, model, _ = open_adapter(tmp_path / "out", load_adapter_recipe(tmp_path / "out"))
    (found,) = task.draw_pictures(model, ["a dark one"])
    assert difference(drawn_by(pipe, "a dark one"), found) <= 1


@pytest.mark.slow
def test_what_is_kept_changes_nothing(tmp_path: Path) -> None:
    path = recipe(tmp_path, "sd3 without t5", task={"caption_dropout": 0.5})
    run(path)
    run(path, f"output_dir={tmp_path / 'computed'}", "data.cache_limit=0B")
    kept, computed = logged(tmp_path / "out"), logged(tmp_path / "computed")
    assert kept == pytest.approx(computed, rel=1e-6)


@pytest.mark.slow
def test_pictures_of_several_sizes_train_as_each_alone(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "pictures/train").mkdir(parents=True, exist_ok=True)
        picture = tiny_pictures.picture(i).resize(((40, 20), (20, 40))[i % 2])
        picture.save(tmp_path / f"pictures/train/{i}.png")
        (tmp_path / f"pictures/train/{i}.txt").write_text(f"no {i}")
    task = {"aspect_ratios": True, "resolution": 24, "upscale": True, "max_aspect_ratio": 2.0}
    script = Script(recipe(tmp_path, "sd3", task=task))
    batch = script.task.collate(script.ready([0, 1, 2, 3], 1))
    shapes = {k: tuple(v.shape) for k, v in batch.inputs.items() if k.startswith("noise")}
    assert shapes == {"noise.0": (2, 1, 4, 8, 16), "noise.1": (2, 1, 4, 14, 10)}
    with torch.no_grad():
        output = script.task.forward(script.model, batch)
        together = script.task.losses(script.model, output, batch)["loss"]
        for i in range(4):
            alone = script.task.collate(script.ready([i], 1))
            assert float(script.task.loss(script.model, alone)) == pytest.approx(
                float(together[i]), rel=1e-5
            )


def test_long_captions_are_those_that_t5_does_not_read(tmp_path: Path) -> None:
    found = {}
    for kind in ("sd3", "sd3 without t5"):
        folder = tmp_path / kind.replace(" ", "_")
        folder.mkdir()
        task: Any = build_task(load_recipe(recipe(folder, kind)))
        task.load_processor()
        ids = task.ids_of("a b c")
        found[kind] = [len(one) for one in ids]
        assert task.is_cut("a " * 60) == (kind != "sd3")
        assert task.is_cut("a " * 300)
    assert found == {"sd3": [24, 24, 256], "sd3 without t5": [24, 24]}


@pytest.mark.parametrize("key", ["task.snr_gamma=5.0", "task.noise_offset=0.1"])
def test_keys_of_other_noise_are_rejected(tmp_path: Path, key: str) -> None:
    task = build_task(load_recipe(recipe(tmp_path, "sd3 without t5"), [key]))
    with pytest.raises(LoraError, match="learns by flow matching"):
        task.load_processor()


def test_the_tokens_are_those_of_the_pipeline(tmp_path: Path) -> None:
    """What is trained is what diffusers' pipeline draws with, at its own lengths."""
    base = tiny_diffusion.save(tmp_path / "base", "sd3")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(base)
    texts, _, _, _ = pipe.encode_prompt("a", None, None, do_classifier_free_guidance=False)
    task: Any = build_task(load_recipe(recipe(tmp_path, "sd3")))
    task.load_processor()
    lengths = [len(one) for one in task.ids_of("a")]
    assert texts.shape == (1, lengths[0] + lengths[2], tiny_diffusion.T5_WIDTH)
