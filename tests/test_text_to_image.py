"""Tests of text-to-image training: losses, gradients and images against diffusers and PEFT."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import tiny
import tiny_diffusion
import tiny_pictures
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from closeness import assert_close
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lora_cli.adapters.attach import attach, trainable_parameters
from lora_cli.data.captions import shuffle_tags
from lora_cli.data.find_files import files_of
from lora_cli.data.load_rows import load_rows
from lora_cli.data.picture_sizes import apply_crop, crop_to, nearest_size, sizes_for
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.predict import answer_file
from lora_cli.export.merge import merge_adapter
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.diffusion.diffusion_noise import DiffusionNoise
from lora_cli.training import train
from lora_cli.training.batches import Batches, prepared_for
from lora_cli.training.seeds import seed_everything

CPU = torch.device("cpu")
SIDE = tiny_diffusion.SIDE
V = {"prediction_type": "v_prediction"}
RATE, N_STEPS, GAMMA = 0.05, 20, 5.0
PROMPTS = ["a dark one", "a light one"]


def write_recipe(folder: Path, kind: str = "sd", noise: Any = None, **sections: Any) -> Path:
    """Write a base, captioned images and a recipe to a folder, and return the recipe's path."""
    if not (folder / "base").exists():
        tiny_diffusion.save(folder / "base", kind, noise)
    if not (folder / "pictures").exists():
        tiny_diffusion.write_folder(folder / "pictures", {"train": 4, "validation": 2})
    values: dict[str, Any] = {
        "model": {"name": "./base"},
        "task": {"type": "text_to_image", "resolution": SIDE},
        "data": {"path": "pictures"},
        "adapter": {"rank": 2, "alpha": 4},
        "train": {"max_steps": 2, "micro_batch_size": 2, "log_every_steps": 1},
        "evaluate": {"drawing": {"steps": 2}, "baseline": False, "every_steps": 100},
        "checkpoint": {"every_steps": 100},
        "output_dir": str(folder / "out"),
    }
    return tiny.write_recipe(folder, values, sections)


def run(path: Path, *overrides: str) -> dict[str, Any]:
    with contextlib.redirect_stderr(io.StringIO()):
        return train(load_recipe(path, list(overrides)))


def load_task(path: Path) -> Any:
    """Return the task of a recipe, with its processor."""
    task = build_task(load_recipe(path))
    task.load_processor()
    return task


def logged_losses(folder: Path) -> list[float]:
    """Return the loss of each step of a run."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line and "learning_rate" in line]


# ------------------------------------------------------------------- diffusers' training script


class ReferenceScript:
    """Diffusers' train_text_to_image_lora.py, on given noise, with PEFT's adapter.

    It starts with the weights of a run of this tool, and uses the same random numbers.
    """

    def __init__(self, path: Path, gamma: float | None) -> None:
        self.path, self.gamma = path, gamma
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(path.parent / "base")
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(
            path.parent / "base", subfolder="scheduler"
        )
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        names = ["to_k", "to_q", "to_v", "to_out.0"]
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=names)
        self.pipe.unet.add_adapter(config)
        recipe = load_recipe(path)
        self.task: Any = build_task(recipe)
        self.task.load_processor()
        self.split = load_data(self.task)["train"]
        seed_everything(0)
        self.model, new_parameters = self.task.load_model(CPU)
        attach(self.model, recipe, new_parameters)
        peft_parameters = dict(self.pipe.unet.named_parameters())
        for name, parameter in trainable_parameters(self.model).items():
            peft_parameters[self.peft_name(name)].data.copy_(parameter.data)

    def peft_name(self, own_name: str) -> str:
        """Return PEFT's name for a parameter."""
        name = own_name.removeprefix("unet.")
        for matrix in ("lora_A", "lora_B"):
            name = name.replace(matrix, f"{matrix}.default.weight")
        return name

    def xl_inputs(self, ids: Tensor, files: Sequence[Path]) -> tuple[Tensor, dict[str, Any]]:
        """Return the U-Net's text states and extra inputs, as the script for SDXL does."""
        states, pooled = [], None
        for encoder in (self.pipe.text_encoder, self.pipe.text_encoder_2):
            outputs = encoder(ids, output_hidden_states=True, return_dict=False)
            pooled = outputs[0]
            states.append(outputs[-1][-2])
        sizes = []
        for file in files:
            with Image.open(file) as image:
                width, height = image.size
            scale = SIDE / min(width, height)
            top, left = (round((round(x * scale) - SIDE) / 2) for x in (height, width))
            sizes.append([height, width, top, left, SIDE, SIDE])
        xl_inputs = {"text_embeds": pooled, "time_ids": torch.tensor(sizes)}
        return torch.cat(states, dim=-1), {"added_cond_kwargs": xl_inputs}

    def caption_of(self, file: Path) -> str:
        """Return the caption of an image."""
        text_file = file.with_suffix(".txt")
        spec = self.task.spec
        if text_file.exists():
            return text_file.read_text().strip()
        return str(spec.prior.caption)

    def prepared(self, positions: Sequence[int], step: int) -> list[Any]:
        """Return examples as this tool prepares them for a step."""
        return [prepared_for(self.task, self.split.examples[i], 0, step) for i in positions]

    def loss(self, positions: Sequence[int], step: int, image_index: int = 0) -> Tensor:
        """Return the loss of examples in a step: of the subject's images (0) or the class's (1)."""
        pipe, prepared = self.pipe, self.prepared(positions, step)
        key = ("image", "prior_image")[image_index]
        files = [Path(self.split.examples[i][key]["path"]) for i in positions]
        pixels = torch.stack([preprocess(Image.open(file)) for file in files])
        captions = [self.caption_of(file) for file in files]
        ids = pipe.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt",
            max_length=pipe.tokenizer.model_max_length,
        ).input_ids  # fmt: skip
        noise = torch.stack([example["noise"][image_index] for example in prepared])
        sampled = torch.stack([example["sampled"][image_index] for example in prepared])
        timesteps = torch.tensor([example["steps"][image_index] for example in prepared])

        latents = pipe.vae.encode(pixels).latent_dist
        latents = (latents.mean + latents.std * sampled) * pipe.vae.config.scaling_factor
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        extra_inputs: dict[str, Any] = {}
        if isinstance(pipe, diffusers.StableDiffusionXLPipeline):
            texts, extra_inputs = self.xl_inputs(ids, files)
        else:
            texts = pipe.text_encoder(ids, return_dict=False)[0]
        is_v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
        prediction = pipe.unet(noisy, timesteps, texts, return_dict=False, **extra_inputs)[0]
        if self.gamma is None:
            return F.mse_loss(prediction.float(), target.float(), reduction="mean")
        snr = compute_snr(self.scheduler, timesteps)
        weights = torch.stack([snr, self.gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        weights = weights / (snr + 1 if is_v else snr)
        loss = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return (loss.mean(dim=list(range(1, loss.ndim))) * weights).mean()


def preprocess(image: Image.Image) -> Tensor:
    """Resize an image to fit the shorter side, and crop its centre, as the script does."""
    scale = SIDE / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    image = image.crop((left, top, left + SIDE, top + SIDE))
    values = torch.tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1) / 255
    return (values - 0.5) / 0.5


@dataclass
class TrainedRun:
    """A finished run."""

    folder: Path
    path: Path
    report: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.folder / "out"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Train once, with SGD, as Adam would amplify rounding differences."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_recipe(
        folder, task={"snr_gamma": GAMMA, "validation_prompts": PROMPTS},
        data={"validation": "validation"},
        train={"max_steps": N_STEPS, "optimizer": {"type": "sgd", "learning_rate": RATE},
               "scheduler": {"type": "constant"}, "max_grad_norm": 1e9},
        evaluate={"every_steps": 10, "baseline": True},
    )  # fmt: skip
    return TrainedRun(folder, path, run(path))


def assert_losses_equal(script: Any, parameters: Iterable[Tensor], out: Path) -> None:
    """Assert that the losses of a run equal those of a script on the same examples."""
    samples = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    expected = []
    for step, sample in enumerate(samples, 1):
        loss = script.loss(sample["examples"], step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert len(expected) == N_STEPS
    assert logged_losses(out) == pytest.approx(expected, rel=1e-5)
    assert max(expected) > 1.1 * min(expected)  # as noise and timesteps differ


def assert_tensors_equal(part: Any, out: Path, name_of_part: str) -> None:
    """Assert that a checkpoint's tensors equal those that PEFT would save for a part."""
    saved = load_file(out / f"checkpoints/step-000020/{name_of_part}/adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(part)
    assert len(state) == len(saved)
    for name, tensor in state.items():
        saved_tensor, scale = saved[f"base_model.model.{name}"], float(tensor.abs().max())
        assert scale > 1e-5
        assert float((saved_tensor - tensor).abs().max()) <= 1e-5 * max(scale, 1e-3), name


def test_losses_of_20_steps_equal_diffusers_script(trained: TrainedRun) -> None:
    script = ReferenceScript(trained.path, GAMMA)
    parameters = [p for p in script.pipe.unet.parameters() if p.requires_grad]
    assert_losses_equal(script, parameters, trained.out)
    assert_tensors_equal(script.pipe.unet, trained.out, "unet")


PRIOR = {"path": "class", "caption": "a one", "weight": 0.5, "count": 0}
KINDS = {
    "epsilon": ("sd", None, {}),
    "velocity": ("sd", V, {"noise_offset": 0.1}),
    "velocity by its signal": ("sd", V, {"snr_gamma": GAMMA}),
    "xl": ("xl", None, {"snr_gamma": GAMMA}),
    "with pictures of the class": ("sd", None, {"prior": PRIOR}),
}


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_equal_those_of_diffusers(tmp_path: Path, name: str) -> None:
    kind, noise, keys = KINDS[name]
    path = write_recipe(tmp_path, kind, noise, task=keys)
    (tmp_path / "class").mkdir()
    for i in range(2):
        tiny_pictures.picture(90 + i).resize((18, 17)).save(tmp_path / f"class/{i}.png")
    script = ReferenceScript(path, keys.get("snr_gamma"))
    task, model = script.task, script.model
    peft_parameters = dict(script.pipe.unet.named_parameters())
    for name, parameter in trainable_parameters(model).items():
        parameter.data.normal_(std=0.2)
        peft_parameters[script.peft_name(name)].data.copy_(parameter.data)
    batch = task.collate(script.prepared([0, 1, 2], 1))
    loss = task.loss(model, batch) / batch.n_items
    expected = script.loss([0, 1, 2], 1)
    if "prior" in keys:
        assert len(script.split) == 4  # each image once per epoch
        expected = expected + 0.5 * script.loss([0, 1, 2], 1, image_index=1)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in trainable_parameters(model).items():
        expected_gradient = peft_parameters[script.peft_name(name)].grad
        scale = float(expected_gradient.abs().max())
        assert scale > 0
        assert float((parameter.grad - expected_gradient).abs().max()) <= 1e-5 * max(scale, 1e-2), (
            name
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_are_finite_without_signal(prediction: str) -> None:
    scheduler = diffusers.DDPMScheduler(
        prediction_type=prediction, rescale_betas_zero_snr=True, num_train_timesteps=100
    )
    assert float(scheduler.alphas_cumprod[-1]) == 0.0
    weights = DiffusionNoise(scheduler, 5.0).weights(torch.arange(100))
    assert weights is not None
    assert bool(weights.isfinite().all())
    assert float(weights[-1]) == (1.0 if prediction == "epsilon" else 0.0)


# ------------------------------------------------------------------------------ evaluation, answers


def test_validation_does_not_depend_on_the_batch_size(trained: TrainedRun) -> None:
    after = trained.report["metrics"]["after"]["validation"]
    for changes in ([], ["evaluate.micro_batch_size=1", "data.cache_limit=0B"]):
        again = evaluate_adapter(trained.out, load_adapter_recipe(trained.out, changes))
        assert again["validation"] == pytest.approx(after, rel=1e-5)
    lines = (trained.out / "predictions/validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["n_items"] for line in lines] == [4.0, 4.0]  # draws per image


def test_validation_draws_are_stratified(trained: TrainedRun) -> None:
    script = ReferenceScript(trained.path, None)
    examples = [script.split.examples[0] | {"draw": i} for i in range(4)]
    prepared = [
        script.task.prepare(dict(example), np.random.default_rng(3), False) for example in examples
    ]
    steps = [example["steps"][0] for example in prepared]
    assert [step // 250 for step in steps] == [0, 1, 2, 3]
    assert len({step % 250 for step in steps}) == 1
    assert len({float(example["noise"].sum()) for example in prepared}) == 4


def test_predicted_images_equal_those_of_diffusers(trained: TrainedRun) -> None:
    task, model, accelerator = open_adapter(trained.out, load_adapter_recipe(trained.out))
    (trained.folder / "asked.csv").write_text("text,more\na dark one,1\na light one,2\n")
    target = trained.folder / "drawn.csv"
    assert answer_file(model, task, trained.folder / "asked.csv", target, accelerator) == (2, [])
    rows = target.read_text().splitlines()
    assert rows[0] == "text,more,picture"
    files = [trained.folder / row.rpartition(",")[2] for row in rows[1:]]
    assert [file.parent.name for file in files] == ["drawn_pictures"] * 2

    merged = merge_adapter(None, trained.out, trained.folder / "merged")
    assert merged.difference is not None
    assert merged.difference < 1e-5
    pipe = diffusers.DiffusionPipeline.from_pretrained(trained.folder / "merged")
    assert type(pipe) is diffusers.StableDiffusionPipeline
    pipe.set_progress_bar_config(disable=True)
    for prompt, file in zip(PROMPTS, files, strict=True):
        expected = pipe(
            prompt, num_inference_steps=2, height=SIDE, width=SIDE,
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
        difference = np.asarray(expected, dtype=int) - np.asarray(Image.open(file), dtype=int)
        assert np.abs(difference).max() <= 1
        assert np.asarray(expected).std() > 5
    assert files[0].read_bytes() != files[1].read_bytes()
    text = (trained.folder / "merged/unet/config.json").read_text()
    assert str(trained.folder) not in text  # no local path


def test_the_model_card_s_code_generates_the_report_s_image(
    trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (trained.out / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'pipe.unet = PeftModel.from_pretrained(pipe.unet, "unet").eval()' in code
    monkeypatch.chdir(trained.out)
    with contextlib.redirect_stderr(io.StringIO()):
        exec(code, {})
    image, best_image = (
        np.asarray(Image.open(trained.out / name), dtype=int)
        for name in ("drawn.png", "samples/best/0.png")
    )
    assert np.abs(image - best_image).max() <= 1


def test_sample_images_before_during_and_after_training(trained: TrainedRun) -> None:
    samples = trained.out / "samples"
    folders = ["best", "step-000000", "step-000010"]
    assert sorted(p.name for p in samples.iterdir() if p.is_dir()) == folders
    for folder in folders:
        assert sorted(p.name for p in (samples / folder).iterdir()) == ["0.png", "1.png"]
    page = (trained.out / "report.html").read_text()
    for text in ("before training", "step 10", "with the best adapter", *PROMPTS):
        assert text in page
    assert page.count('<img src="data:image/jpeg;base64,') >= 6
    task, model, _ = open_adapter(trained.out, load_adapter_recipe(trained.out))
    (image,) = task.draw_pictures(model, PROMPTS[:1])
    best_image = np.asarray(Image.open(samples / "best/0.png"), dtype=int)
    assert np.abs(np.asarray(image, dtype=int) - best_image).max() <= 1


# ------------------------------------------------------------------------------------ other keys


def test_full_fine_tuning_yields_a_diffusers_pipeline(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path, data={"validation": "validation"},
        # the highest loss counts as the best, so that it is not that of the last step
        evaluate={"every_steps": 1, "best": {"metric": "loss", "mode": "max"}},
        train={"max_steps": 3, "optimizer": {"learning_rate": 0.01}},
    )  # fmt: skip
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "adapter": {"type": "full"}}))
    report = run(path)
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation"]["loss"] for line in lines if "validation" in line]
    assert max(losses) > losses[-1], "the last step is the best: nothing is restored"
    after = report["metrics"]["after"]["validation"]["loss"]
    assert after == pytest.approx(max(losses), rel=1e-5)
    metrics = evaluate_adapter(out, load_adapter_recipe(out), "validation")["validation"]
    assert metrics["loss"] == pytest.approx(after, rel=1e-5)

    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPTS[0], num_inference_steps=2, height=SIDE, width=SIDE,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    task, model, _ = open_adapter(out, load_adapter_recipe(out))
    (image,) = task.draw_pictures(model, PROMPTS[:1])
    assert np.abs(np.asarray(expected, int) - np.asarray(image, int)).max() <= 1
    base = load_file(tmp_path / "base/unet/diffusion_pytorch_model.safetensors")
    trained = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    assert all(not torch.equal(base[name], tensor) for name, tensor in trained.items())
    vae_file = "vae/diffusion_pytorch_model.safetensors"
    frozen, base = load_file(out / vae_file), load_file(tmp_path / "base" / vae_file)
    assert all(torch.equal(base[name], tensor) for name, tensor in frozen.items())
    card = (out / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "With `diffusers`:" in card


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        # a folder that is not a split does not hide those that are
        (["train/1", "val/2", "class/3"], "train", ["train/1"]),
        (["train/1", "val/2", "class/3"], "validation", ["val/2"]),
        (["1", "2", "test/3"], "train", ["1", "2"]),
        (["1", "2", "test/3"], "test", ["test/3"]),
        (["ann/1", "bob/2"], "train", ["ann/1", "bob/2"]),
        (["ann/1", "bob/2", "val/ann/3"], "train", ["ann/1", "bob/2"]),
        # class images are not rows
        (["1", "prior/2"], "train", ["1"]),
    ],
)
def test_folders_of_images_are_splits(
    files: list[str], split: str, expected: list[str], tmp_path: Path
) -> None:
    for i, file in enumerate(files):
        picture = tmp_path / "pictures" / f"{file}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        tiny_pictures.picture(i).save(picture)
        picture.with_suffix(".txt").write_text("a dark one")
    prior = {"path": "pictures/prior", "caption": "a one", "count": 0}
    data = {split: split} if split != "train" else {}
    path = write_recipe(tmp_path, data=data, task={"prior": prior})
    image_files = files_of(load_recipe(path), split, split)
    root = tmp_path / "pictures"
    assert [f.relative_to(root).with_suffix("").as_posix() for f in image_files] == expected


def test_images_outside_of_splits_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "pictures" / "more").mkdir()
    tiny_pictures.picture(1).save(tmp_path / "pictures" / "more" / "a.png")
    load_rows(load_recipe(path))
    stderr = capsys.readouterr().err
    assert "lies in no folder of a split and is left out, the first is more/a.png" in stderr


def test_captions_without_an_image_and_empty_captions_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "pictures/train/alone.txt").write_text("a dark one")
    load_rows(load_recipe(path))
    stderr = capsys.readouterr().err
    assert "1 text file in" in stderr
    assert "has no picture of the same name next to it, the first is train/alone.txt" in stderr
    (tmp_path / "pictures/train/0.txt").write_text(" \n")
    with pytest.raises(LoraError, match=r"`0\.png` has an empty caption: write"):
        load_data(load_task(path))


def test_captions_may_be_in_caption_files(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    expected = [row["text"] for row in load_rows(load_recipe(path))["train"]]
    first = sorted((tmp_path / "pictures" / "train").glob("*.txt"))[0]
    first.rename(first.with_suffix(".caption"))
    assert [row["text"] for row in load_rows(load_recipe(path))["train"]] == expected
    first.write_text("of both it counts")
    assert load_rows(load_recipe(path))["train"][0]["text"] == "of both it counts"


def test_one_caption_for_all_needs_no_text_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_rows(load_recipe(write_recipe(tmp_path, task={"caption": "a sks one"})))
    assert "warning" not in capsys.readouterr().err


def test_truncated_texts_are_reported(tmp_path: Path) -> None:
    long_text, prior = "a " * 40, {"path": "class", "caption": "one " * 30, "count": 0}
    task = load_task(
        write_recipe(tmp_path, task={"validation_prompts": ["a one", long_text], "prior": prior})
    )
    keys = "task.validation_prompts.1, task.prior.caption"
    note = "2 texts have more than 24 tokens, of which the model reads the first"
    assert f"warning: {note}: {keys}" in task.notes
    task.draw_pictures = lambda model, prompts: [Image.new("RGB", (2, 2))] * len(prompts)
    task.answer_folder = tmp_path / "drawn"
    task.answer(None, [{"text": "a one"}, {"text": long_text}])
    assert task.take_warnings() == [note.replace("2 texts have", "1 text has")]
    assert task.take_warnings() == []


def test_crop_coordinates_of_flipped_images(tmp_path: Path) -> None:
    task = load_task(write_recipe(tmp_path, "xl", task={"crop": "random", "flip": True}))
    value = {"bytes": None, "path": str(tmp_path / "wide.png")}
    column_values = np.arange(2 * SIDE, dtype=np.uint8)  # each column has its own value
    wide = np.broadcast_to(column_values[None, :, None], (SIDE, 2 * SIDE, 3))
    Image.fromarray(np.ascontiguousarray(wide)).save(value["path"])
    preprocess = [
        task._prepare_image(value, (SIDE, SIDE), np.random.default_rng(seed), only_sizes=False)
        for seed in range(12)
    ]
    n_mirrored = 0
    for image in preprocess:
        first = round((float(image.pixels[0, 0, 0]) + 1) * 127.5)
        second = round((float(image.pixels[0, 0, 1]) + 1) * 127.5)
        # column n is 2 * SIDE - 1 - n in the mirrored image
        n_mirrored += second < first
        assert image.sizes[3] == (2 * SIDE - 1 - first if second < first else first)
    assert 0 < n_mirrored < len(preprocess)


def test_missing_class_images_are_generated(tmp_path: Path) -> None:
    prior = {"path": "class", "caption": "a one", "count": 6}
    task = {"caption": "a sks one", "prior": prior}
    path = write_recipe(
        tmp_path, task=task, data={"validation": "validation"}, train={"max_steps": 1}
    )
    (tmp_path / "class").mkdir()
    tiny_pictures.picture(90).resize((18, 17)).save(tmp_path / "class/mine.png")
    report = run(path)
    names = sorted(file.name for file in (tmp_path / "class").iterdir())
    assert names == [*(f"drawn-{i:04d}.png" for i in range(5)), "mine.png"]
    assert report["data"]["train"]["examples"] == 6  # each class image once, with one of 4 images
    after = report["metrics"]["after"]["validation"]
    assert set(after) == {"loss"}  # only the subject's images are evaluated
    log = [
        json.loads(line) for line in (path.parent / "out/metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in log if "loss_prior" in line]
    assert steps
    assert all({"loss", "loss_pictures"} <= line.keys() for line in steps)
    assert not any("loss_loss" in line or "loss_labels" in line for line in log)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a one", num_inference_steps=2, height=SIDE, width=SIDE,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    generated = np.asarray(Image.open(tmp_path / "class/drawn-0003.png"), dtype=int)
    assert np.abs(np.asarray(expected, dtype=int) - generated).max() <= 1
    before = {name: (tmp_path / "class" / name).read_bytes() for name in names}
    run(path, f"output_dir={tmp_path / 'again'}")
    assert {name: (tmp_path / "class" / name).read_bytes() for name in names} == before
    weights = [
        (tmp_path / out / "unet/adapter_model.safetensors").read_bytes() for out in ("out", "again")
    ]
    assert weights[0] == weights[1]


def test_biases_and_train_modules_are_those_of_trained_parts(
    tmp_path: Path,
) -> None:
    """The autoencoder has biases, and a module of the same name, too."""
    adapter = {"rank": 2, "bias": "all", "train_modules": ["conv_norm_out"]}
    path = write_recipe(tmp_path, adapter=adapter, train={"optimizer": {"learning_rate": 0.05}})
    run(path)
    out = tmp_path / "out"
    assert not (out / "vae").exists()
    merge_adapter(None, out, tmp_path / "merged")
    merged = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged/unet").state_dict()
    base = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base/unet")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = peft.PeftModel.from_pretrained(base, out / "unet").merge_and_unload().state_dict()
    for name in ("conv_in.bias", "conv_norm_out.weight", "mid_block.attentions.0.proj_in.bias"):
        assert not torch.equal(merged[name], before[name]), name
    for name, tensor in merged.items():
        assert_close(tensor, expected[name])
    for name in ("encoder.conv_norm_out", "final_layer_norm"):
        with pytest.raises(LoraError, match="in a part of the model that is used as it is"):
            run(path, f"adapter.train_modules=[{name}]", f"output_dir={tmp_path / 'none'}")


def test_stable_diffusion_xl_end_to_end(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "xl", task={"train_text_encoder": True, "caption_dropout": 0.5})
    run(path)
    parts = ["text_encoder", "text_encoder_2", "unet"]
    assert [p for p in parts if (tmp_path / "out" / p / "adapter_config.json").exists()] == parts
    merge_adapter(None, tmp_path / "out", tmp_path / "merged")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(pipe) is diffusers.StableDiffusionXLPipeline
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a dark one", num_inference_steps=2, height=SIDE, width=SIDE, guidance_scale=7.5,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    task, model, _ = open_adapter(tmp_path / "out", load_adapter_recipe(tmp_path / "out"))
    (image,) = task.draw_pictures(model, ["a dark one"])
    difference = np.asarray(expected, dtype=int) - np.asarray(image, dtype=int)
    assert np.abs(difference).max() <= 1


def test_caching_does_not_change_the_losses(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, task={"caption_dropout": 0.5})
    run(path)
    run(path, f"output_dir={tmp_path / 'computed'}", "data.cache_limit=0B")
    cached, computed = logged_losses(tmp_path / "out"), logged_losses(tmp_path / "computed")
    assert cached == pytest.approx(computed, rel=1e-6)


def test_streamed_rows_can_be_trained(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, data={"path": "pictures/train"}, train={"max_steps": 1})
    report = run(path, "data.streaming=true")
    assert report["training"]["steps"] == 1
    assert len(logged_losses(tmp_path / "out")) == 1


def test_batches_have_images_of_one_size(tmp_path: Path) -> None:
    for i in range(8):
        size = ((40, 20), (20, 40))[i % 2]
        (tmp_path / "pictures/train").mkdir(parents=True, exist_ok=True)
        tiny_pictures.picture(i).resize(size).save(tmp_path / f"pictures/train/{i}.png")
        (tmp_path / f"pictures/train/{i}.txt").write_text(f"no {i}")
    task = {"aspect_ratios": True, "resolution": 24, "upscale": True}
    path = write_recipe(tmp_path, task=task, train={"max_steps": 4, "micro_batch_size": 2})
    script = ReferenceScript(path, None)
    split, plan = script.split, Batches(script.task, script.split, Accelerator()).plan
    sizes = [
        (example["width"], example["height"]) for example in (split.examples[i] for i in range(8))
    ]
    assert sizes == [(32, 16), (16, 32)] * 4
    steps = [[sizes[i] for i in step] for step in plan.epoch(0)]
    assert all(len(set(step)) == 1 for step in steps)
    # the losses of images of two sizes in a batch equal those of each image alone
    batch = script.task.collate(script.prepared([0, 1, 2, 3], 1))
    shapes = {k: tuple(v.shape) for k, v in batch.inputs.items() if k.startswith("noise")}
    assert shapes == {"noise.0": (2, 1, 4, 8, 16), "noise.1": (2, 1, 4, 16, 8)}
    with torch.no_grad():
        batch_losses = script.task.losses(
            script.model, script.task.forward(script.model, batch), batch
        )["loss"]
        for i in range(4):
            single = script.task.collate(script.prepared([i], 1))
            assert float(script.task.loss(script.model, single)) == pytest.approx(
                float(batch_losses[i]), rel=1e-5
            )


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (31, 17), (16, 16), (900, 7)])
def test_resized_images_cover_the_crop(width: int, height: int) -> None:
    sizes = sizes_for(24, 8, 2.0)
    assert all(w * h <= 24 * 24 and max(w / h, h / w) <= 2 for w, h in sizes)
    crop = crop_to(width, height, nearest_size(width, height, sizes))
    assert crop.resized[0] >= crop.width
    assert crop.resized[1] >= crop.height
    assert crop.resized[0] == crop.width or crop.resized[1] == crop.height
    image = apply_crop(Image.new("RGB", (width, height)), crop)
    assert image.size == (crop.width, crop.height)


def test_tags_are_shuffled_except_for_the_first() -> None:
    rng = np.random.default_rng(0)
    captions = {shuffle_tags("sks, a, b ,c", 1, rng) for _ in range(50)}
    assert len(captions) == 6
    assert all(sorted(caption.split(", ")) == ["a", "b", "c", "sks"] for caption in captions)
    assert all(caption.startswith("sks, ") for caption in captions)
