"""Text to image: the computation against plain diffusers and PEFT, and what rows become."""

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
from lora_cli.data.captions import shuffled
from lora_cli.data.find_files import files_of
from lora_cli.data.load_rows import load_rows
from lora_cli.data.picture_sizes import apply_cut, cut_to, nearest_size, sizes_for
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


def recipe(folder: Path, kind: str = "sd", noise: Any = None, **sections: Any) -> Path:
    """Write a base, captioned pictures and a recipe into a folder, and return the recipe."""
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


def built(path: Path) -> Any:
    """Return the task of a recipe, with its processor."""
    task = build_task(load_recipe(path))
    task.load_processor()
    return task


def logged(folder: Path) -> list[float]:
    """Return the loss of each step of a run."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line and "learning_rate" in line]


# ------------------------------------------------------------------- diffusers' training script


class Script:
    """train_text_to_image_lora.py of diffusers on given noise, with PEFT's adapter.

    It starts from the numbers of a run of this tool, and is told what was drawn in each step.
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
        loaded = load_recipe(path)
        self.task: Any = build_task(loaded)
        self.task.load_processor()
        self.split = load_data(self.task)["train"]
        seed_everything(0)
        self.model, new = self.task.load_model(CPU)
        attach(self.model, loaded, new)
        theirs = dict(self.pipe.unet.named_parameters())
        for name, parameter in trainable_parameters(self.model).items():
            theirs[self.name_of(name)].data.copy_(parameter.data)

    def name_of(self, ours: str) -> str:
        """Return PEFT's name of a parameter."""
        name = ours.removeprefix("unet.")
        for matrix in ("lora_A", "lora_B"):
            name = name.replace(matrix, f"{matrix}.default.weight")
        return name

    def told(self, ids: Tensor, files: Sequence[Path]) -> tuple[Tensor, dict[str, Any]]:
        """Return what the script for Stable Diffusion XL tells the U-Net of texts and pictures."""
        states, pooled = [], None
        for encoder in (self.pipe.text_encoder, self.pipe.text_encoder_2):
            found = encoder(ids, output_hidden_states=True, return_dict=False)
            pooled = found[0]
            states.append(found[-1][-2])
        sizes = []
        for file in files:
            with Image.open(file) as image:
                width, height = image.size
            scale = SIDE / min(width, height)
            top, left = (round((round(x * scale) - SIDE) / 2) for x in (height, width))
            sizes.append([height, width, top, left, SIDE, SIDE])
        told = {"text_embeds": pooled, "time_ids": torch.tensor(sizes)}
        return torch.cat(states, dim=-1), {"added_cond_kwargs": told}

    def caption_of(self, file: Path) -> str:
        """Return what a picture shows."""
        beside = file.with_suffix(".txt")
        spec = self.task.spec
        if beside.exists():
            return beside.read_text().strip()
        return str(spec.prior.caption)

    def ready(self, positions: Sequence[int], step: int) -> list[Any]:
        """Return the examples as this tool prepares them in a step."""
        return [prepared_for(self.task, self.split.examples[i], 0, step) for i in positions]

    def loss(self, positions: Sequence[int], step: int, which: int = 0) -> Tensor:
        """Return the loss of examples in a step: of their pictures, or (1) those of the class."""
        pipe, ready = self.pipe, self.ready(positions, step)
        key = ("image", "prior_image")[which]
        files = [Path(self.split.examples[i][key]["path"]) for i in positions]
        pixels = torch.stack([seen(Image.open(file)) for file in files])
        captions = [self.caption_of(file) for file in files]
        ids = pipe.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt",
            max_length=pipe.tokenizer.model_max_length,
        ).input_ids  # fmt: skip
        noise = torch.stack([one["noise"][which] for one in ready])
        sampled = torch.stack([one["sampled"][which] for one in ready])
        timesteps = torch.tensor([one["steps"][which] for one in ready])

        latents = pipe.vae.encode(pixels).latent_dist
        latents = (latents.mean + latents.std * sampled) * pipe.vae.config.scaling_factor
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        more: dict[str, Any] = {}
        if isinstance(pipe, diffusers.StableDiffusionXLPipeline):
            texts, more = self.told(ids, files)
        else:
            texts = pipe.text_encoder(ids, return_dict=False)[0]
        is_v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
        pred = pipe.unet(noisy, timesteps, texts, return_dict=False, **more)[0]
        if self.gamma is None:
            return F.mse_loss(pred.float(), target.float(), reduction="mean")
        snr = compute_snr(self.scheduler, timesteps)
        weights = torch.stack([snr, self.gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        weights = weights / (snr + 1 if is_v else snr)
        loss = F.mse_loss(pred.float(), target.float(), reduction="none")
        return (loss.mean(dim=list(range(1, loss.ndim))) * weights).mean()


def seen(picture: Image.Image) -> Tensor:
    """Return what the script makes of a picture: the shorter side fits, the middle is left."""
    scale = SIDE / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    picture = picture.crop((left, top, left + SIDE, top + SIDE))
    values = torch.tensor(np.array(picture), dtype=torch.float32).permute(2, 0, 1) / 255
    return (values - 0.5) / 0.5


@dataclass
class Trained:
    """A run, and what it left."""

    folder: Path
    path: Path
    report: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.folder / "out"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train once: by SGD, which does not divide by rounding noise."""
    folder = tmp_path_factory.mktemp("trained")
    path = recipe(
        folder, task={"snr_gamma": GAMMA, "validation_prompts": PROMPTS},
        data={"validation": "validation"},
        train={"max_steps": N_STEPS, "optimizer": {"type": "sgd", "learning_rate": RATE},
               "scheduler": {"type": "constant"}, "max_grad_norm": 1e9},
        evaluate={"every_steps": 10, "baseline": True},
    )  # fmt: skip
    return Trained(folder, path, run(path))


def require_losses_of(script: Any, parameters: Iterable[Tensor], out: Path) -> None:
    """Fail if the losses of a run are not those of a script that takes the same examples."""
    samples = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    theirs = []
    for step, sample in enumerate(samples, 1):
        loss = script.loss(sample["examples"], step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    assert len(theirs) == N_STEPS
    assert logged(out) == pytest.approx(theirs, rel=1e-5)
    assert max(theirs) > 1.1 * min(theirs)  # noise and steps differ


def require_tensors_of(part: Any, out: Path, name_of_part: str) -> None:
    """Fail if a checkpoint's tensors are not those that PEFT would save of a part."""
    saved = load_file(out / f"checkpoints/step-000020/{name_of_part}/adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(part)
    assert len(state) == len(saved)
    for name, tensor in state.items():
        own, scale = saved[f"base_model.model.{name}"], float(tensor.abs().max())
        assert scale > 1e-5
        assert float((own - tensor).abs().max()) <= 1e-5 * max(scale, 1e-3), name


def test_twenty_steps_are_those_of_the_training_script_of_diffusers(trained: Trained) -> None:
    script = Script(trained.path, GAMMA)
    parameters = [p for p in script.pipe.unet.parameters() if p.requires_grad]
    require_losses_of(script, parameters, trained.out)
    require_tensors_of(script.pipe.unet, trained.out, "unet")


PRIOR = {"path": "class", "caption": "a one", "weight": 0.5, "count": 0}
KINDS = {
    "epsilon": ("sd", None, {}),
    "velocity": ("sd", V, {"noise_offset": 0.1}),
    "velocity by its signal": ("sd", V, {"snr_gamma": GAMMA}),
    "xl": ("xl", None, {"snr_gamma": GAMMA}),
    "with pictures of the class": ("sd", None, {"prior": PRIOR}),
}


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_those_of_diffusers(tmp_path: Path, name: str) -> None:
    kind, noise, keys = KINDS[name]
    path = recipe(tmp_path, kind, noise, task=keys)
    (tmp_path / "class").mkdir()
    for i in range(2):
        tiny_pictures.picture(90 + i).resize((18, 17)).save(tmp_path / f"class/{i}.png")
    script = Script(path, keys.get("snr_gamma"))
    task, model = script.task, script.model
    theirs = dict(script.pipe.unet.named_parameters())
    for name, parameter in trainable_parameters(model).items():
        parameter.data.normal_(std=0.2)
        theirs[script.name_of(name)].data.copy_(parameter.data)
    batch = task.collate(script.ready([0, 1, 2], 1))
    loss = task.loss(model, batch) / batch.n_items
    expected = script.loss([0, 1, 2], 1)
    if "prior" in keys:
        assert len(script.split) == 4  # an epoch has each picture once
        expected = expected + 0.5 * script.loss([0, 1, 2], 1, which=1)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in trainable_parameters(model).items():
        wanted = theirs[script.name_of(name)].grad
        scale = float(wanted.abs().max())
        assert scale > 0
        assert float((parameter.grad - wanted).abs().max()) <= 1e-5 * max(scale, 1e-2), name


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_are_finite_where_no_signal_is_left(prediction: str) -> None:
    scheduler = diffusers.DDPMScheduler(
        prediction_type=prediction, rescale_betas_zero_snr=True, num_train_timesteps=100
    )
    assert float(scheduler.alphas_cumprod[-1]) == 0.0
    weights = DiffusionNoise(scheduler, 5.0).weights(torch.arange(100))
    assert weights is not None
    assert bool(weights.isfinite().all())
    assert float(weights[-1]) == (1.0 if prediction == "epsilon" else 0.0)


# ------------------------------------------------------------------------------ evaluation, answers


def test_validation_is_the_same_in_every_batch_and_evaluation(trained: Trained) -> None:
    after = trained.report["metrics"]["after"]["validation"]
    for changes in ([], ["evaluate.micro_batch_size=1", "data.cache_limit=0B"]):
        again = evaluate_adapter(trained.out, load_adapter_recipe(trained.out, changes))
        assert again["validation"] == pytest.approx(after, rel=1e-5)
    lines = (trained.out / "predictions/validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["n_items"] for line in lines] == [4.0, 4.0]  # draws of each picture


def test_the_draws_of_a_picture_lie_evenly_between_all_steps(trained: Trained) -> None:
    script = Script(trained.path, None)
    examples = [script.split.examples[0] | {"draw": i} for i in range(4)]
    drawn = [script.task.prepare(dict(e), np.random.default_rng(3), False) for e in examples]
    steps = [one["steps"][0] for one in drawn]
    assert [step // 250 for step in steps] == [0, 1, 2, 3]
    assert len({step % 250 for step in steps}) == 1
    assert len({float(one["noise"].sum()) for one in drawn}) == 4


def test_what_is_predicted_is_what_diffusers_draws(trained: Trained) -> None:
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
    assert str(trained.folder) not in text  # no path of this machine


def test_the_code_of_the_model_card_draws_what_the_report_shows(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (trained.out / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'pipe.unet = PeftModel.from_pretrained(pipe.unet, "unet").eval()' in code
    monkeypatch.chdir(trained.out)
    with contextlib.redirect_stderr(io.StringIO()):
        exec(code, {})
    found, best = (
        np.asarray(Image.open(trained.out / name), dtype=int)
        for name in ("drawn.png", "samples/best/0.png")
    )
    assert np.abs(found - best).max() <= 1


def test_texts_are_drawn_before_while_and_after_training(trained: Trained) -> None:
    samples = trained.out / "samples"
    places = ["best", "step-000000", "step-000010"]
    assert sorted(p.name for p in samples.iterdir() if p.is_dir()) == places
    for place in places:
        assert sorted(p.name for p in (samples / place).iterdir()) == ["0.png", "1.png"]
    page = (trained.out / "report.html").read_text()
    for text in ("before training", "step 10", "with the best adapter", *PROMPTS):
        assert text in page
    assert page.count('<img src="data:image/jpeg;base64,') >= 6
    task, model, _ = open_adapter(trained.out, load_adapter_recipe(trained.out))
    (again,) = task.draw_pictures(model, PROMPTS[:1])
    best = np.asarray(Image.open(samples / "best/0.png"), dtype=int)
    assert np.abs(np.asarray(again, dtype=int) - best).max() <= 1


# ------------------------------------------------------------------------------------ other keys


def test_a_model_that_is_trained_in_full_is_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, data={"validation": "validation"},
        # the highest loss counts as the best, as it falls: the last step's is not
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
    found = evaluate_adapter(out, load_adapter_recipe(out), "validation")["validation"]
    assert found["loss"] == pytest.approx(after, rel=1e-5)

    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPTS[0], num_inference_steps=2, height=SIDE, width=SIDE,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    task, model, _ = open_adapter(out, load_adapter_recipe(out))
    (drawn,) = task.draw_pictures(model, PROMPTS[:1])
    assert np.abs(np.asarray(expected, int) - np.asarray(drawn, int)).max() <= 1
    base = load_file(tmp_path / "base/unet/diffusion_pytorch_model.safetensors")
    trained = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    assert all(not torch.equal(base[name], tensor) for name, tensor in trained.items())
    kept = "vae/diffusion_pytorch_model.safetensors"
    frozen, base = load_file(out / kept), load_file(tmp_path / "base" / kept)
    assert all(torch.equal(base[name], tensor) for name, tensor in frozen.items())
    card = (out / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "With `diffusers`:" in card


@pytest.mark.parametrize(
    ("files", "split", "wanted"),
    [
        # a folder of no split does not hide those of splits
        (["train/1", "val/2", "class/3"], "train", ["train/1"]),
        (["train/1", "val/2", "class/3"], "validation", ["val/2"]),
        (["1", "2", "test/3"], "train", ["1", "2"]),
        (["1", "2", "test/3"], "test", ["test/3"]),
        (["ann/1", "bob/2"], "train", ["ann/1", "bob/2"]),
        (["ann/1", "bob/2", "val/ann/3"], "train", ["ann/1", "bob/2"]),
        # the pictures of the class are no rows
        (["1", "prior/2"], "train", ["1"]),
    ],
)
def test_folders_of_pictures_are_splits_and_no_classes(
    files: list[str], split: str, wanted: list[str], tmp_path: Path
) -> None:
    for i, file in enumerate(files):
        picture = tmp_path / "pictures" / f"{file}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        tiny_pictures.picture(i).save(picture)
        picture.with_suffix(".txt").write_text("a dark one")
    prior = {"path": "pictures/prior", "caption": "a one", "count": 0}
    data = {split: split} if split != "train" else {}
    path = recipe(tmp_path, data=data, task={"prior": prior})
    found = files_of(load_recipe(path), split, split)
    root = tmp_path / "pictures"
    assert [f.relative_to(root).with_suffix("").as_posix() for f in found] == wanted


def test_pictures_of_no_split_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path)
    (tmp_path / "pictures" / "more").mkdir()
    tiny_pictures.picture(1).save(tmp_path / "pictures" / "more" / "a.png")
    load_rows(load_recipe(path))
    said = capsys.readouterr().err
    assert "lies in no folder of a split and is left out, the first is more/a.png" in said


def test_captions_without_a_picture_and_empty_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path)
    (tmp_path / "pictures/train/alone.txt").write_text("a dark one")
    load_rows(load_recipe(path))
    said = capsys.readouterr().err
    assert "1 text file in" in said
    assert "has no picture of the same name next to it, the first is train/alone.txt" in said
    (tmp_path / "pictures/train/0.txt").write_text(" \n")
    with pytest.raises(LoraError, match=r"`0\.png` has an empty caption: write"):
        load_data(built(path))


def test_captions_may_stand_in_files_as_kohya_s_scripts_name_them(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    wanted = [row["text"] for row in load_rows(load_recipe(path))["train"]]
    first = sorted((tmp_path / "pictures" / "train").glob("*.txt"))[0]
    first.rename(first.with_suffix(".caption"))
    assert [row["text"] for row in load_rows(load_recipe(path))["train"]] == wanted
    first.write_text("of both it counts")
    assert load_rows(load_recipe(path))["train"][0]["text"] == "of both it counts"


def test_one_caption_for_all_needs_no_text_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_rows(load_recipe(recipe(tmp_path, task={"caption": "a sks one"})))
    assert "warning" not in capsys.readouterr().err


def test_texts_that_are_longer_than_is_read_of_them_are_named(tmp_path: Path) -> None:
    long, prior = "a " * 40, {"path": "class", "caption": "one " * 30, "count": 0}
    task = built(recipe(tmp_path, task={"validation_prompts": ["a one", long], "prior": prior}))
    named = "task.validation_prompts.1, task.prior.caption"
    note = "2 texts have more than 24 tokens, of which the model reads the first"
    assert f"warning: {note}: {named}" in task.notes
    task.draw_pictures = lambda model, prompts: [Image.new("RGB", (2, 2))] * len(prompts)
    task.answer_folder = tmp_path / "drawn"
    task.answer(None, [{"text": "a one"}, {"text": long}])
    assert task.take_warnings() == [note.replace("2 texts have", "1 text has")]
    assert task.take_warnings() == []


def test_the_place_of_a_cut_is_that_in_the_mirrored_picture(tmp_path: Path) -> None:
    task = built(recipe(tmp_path, "xl", task={"crop": "random", "flip": True}))
    value = {"bytes": None, "path": str(tmp_path / "wide.png")}
    numbers = np.arange(2 * SIDE, dtype=np.uint8)  # of each column
    wide = np.broadcast_to(numbers[None, :, None], (SIDE, 2 * SIDE, 3))
    Image.fromarray(np.ascontiguousarray(wide)).save(value["path"])
    seen = [
        task._prepare_image(value, (SIDE, SIDE), np.random.default_rng(seed), only_sizes=False)
        for seed in range(12)
    ]
    mirrored = 0
    for one in seen:
        first = round((float(one.pixels[0, 0, 0]) + 1) * 127.5)
        second = round((float(one.pixels[0, 0, 1]) + 1) * 127.5)
        # of the picture, or of the mirrored one, in which column n is 2 * SIDE - 1 - n
        mirrored += second < first
        assert one.sizes[3] == (2 * SIDE - 1 - first if second < first else first)
    assert 0 < mirrored < len(seen)


def test_the_class_is_drawn_by_the_base_where_its_pictures_are_missing(tmp_path: Path) -> None:
    prior = {"path": "class", "caption": "a one", "count": 6}
    task = {"caption": "a sks one", "prior": prior}
    path = recipe(tmp_path, task=task, data={"validation": "validation"}, train={"max_steps": 1})
    (tmp_path / "class").mkdir()
    tiny_pictures.picture(90).resize((18, 17)).save(tmp_path / "class/mine.png")
    report = run(path)
    names = sorted(file.name for file in (tmp_path / "class").iterdir())
    assert names == [*(f"drawn-{i:04d}.png" for i in range(5)), "mine.png"]
    assert report["data"]["train"]["examples"] == 6  # each of the class once, with one of 4
    after = report["metrics"]["after"]["validation"]
    assert set(after) == {"loss"}  # measured on the subject alone
    log = [
        json.loads(line) for line in (path.parent / "out/metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in log if "loss_prior" in line]
    assert steps
    assert all({"loss", "loss_pictures"} <= line.keys() for line in steps)
    assert not any("loss_loss" in line or "loss_labels" in line for line in log)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        "a one", num_inference_steps=2, height=SIDE, width=SIDE,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    kept = np.asarray(Image.open(tmp_path / "class/drawn-0003.png"), dtype=int)
    assert np.abs(np.asarray(found, dtype=int) - kept).max() <= 1
    before = {name: (tmp_path / "class" / name).read_bytes() for name in names}
    run(path, f"output_dir={tmp_path / 'again'}")
    assert {name: (tmp_path / "class" / name).read_bytes() for name in names} == before
    weights = [
        (tmp_path / out / "unet/adapter_model.safetensors").read_bytes() for out in ("out", "again")
    ]
    assert weights[0] == weights[1]


def test_what_is_trained_besides_is_read_merged_and_that_of_the_trained_parts_alone(
    tmp_path: Path,
) -> None:
    """The autoencoder has biases, and a module of this name, too."""
    adapter = {"rank": 2, "bias": "all", "train_modules": ["conv_norm_out"]}
    path = recipe(tmp_path, adapter=adapter, train={"optimizer": {"learning_rate": 0.05}})
    run(path)
    out = tmp_path / "out"
    assert not (out / "vae").exists()
    merge_adapter(None, out, tmp_path / "merged")
    merged = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged/unet").state_dict()
    base = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base/unet")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    theirs = peft.PeftModel.from_pretrained(base, out / "unet").merge_and_unload().state_dict()
    for name in ("conv_in.bias", "conv_norm_out.weight", "mid_block.attentions.0.proj_in.bias"):
        assert not torch.equal(merged[name], before[name]), name
    for name, tensor in merged.items():
        assert_close(tensor, theirs[name])
    for name in ("encoder.conv_norm_out", "final_layer_norm"):
        with pytest.raises(LoraError, match="in a part of the model that is used as it is"):
            run(path, f"adapter.train_modules=[{name}]", f"output_dir={tmp_path / 'none'}")


def test_stable_diffusion_xl_from_training_to_what_diffusers_draws(tmp_path: Path) -> None:
    path = recipe(tmp_path, "xl", task={"train_text_encoder": True, "caption_dropout": 0.5})
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
    (found,) = task.draw_pictures(model, ["a dark one"])
    difference = np.asarray(expected, dtype=int) - np.asarray(found, dtype=int)
    assert np.abs(difference).max() <= 1


def test_what_is_kept_changes_nothing(tmp_path: Path) -> None:
    path = recipe(tmp_path, task={"caption_dropout": 0.5})
    run(path)
    run(path, f"output_dir={tmp_path / 'computed'}", "data.cache_limit=0B")
    kept, computed = logged(tmp_path / "out"), logged(tmp_path / "computed")
    assert kept == pytest.approx(computed, rel=1e-6)


def test_rows_that_are_streamed_train_as_others(tmp_path: Path) -> None:
    path = recipe(tmp_path, data={"path": "pictures/train"}, train={"max_steps": 1})
    report = run(path, "data.streaming=true")
    assert report["training"]["steps"] == 1
    assert len(logged(tmp_path / "out")) == 1


def test_pictures_of_one_size_stand_together_and_are_seen_in_their_shape(tmp_path: Path) -> None:
    for i in range(8):
        size = ((40, 20), (20, 40))[i % 2]
        (tmp_path / "pictures/train").mkdir(parents=True, exist_ok=True)
        tiny_pictures.picture(i).resize(size).save(tmp_path / f"pictures/train/{i}.png")
        (tmp_path / f"pictures/train/{i}.txt").write_text(f"no {i}")
    task = {"aspect_ratios": True, "resolution": 24, "upscale": True}
    path = recipe(tmp_path, task=task, train={"max_steps": 4, "micro_batch_size": 2})
    script = Script(path, None)
    split, plan = script.split, Batches(script.task, script.split, Accelerator()).plan
    sizes = [(e["width"], e["height"]) for e in (split.examples[i] for i in range(8))]
    assert sizes == [(32, 16), (16, 32)] * 4
    steps = [[sizes[i] for i in step] for step in plan.epoch(0)]
    assert all(len(set(step)) == 1 for step in steps)
    # pictures of two sizes in one batch are those of each alone
    batch = script.task.collate(script.ready([0, 1, 2, 3], 1))
    shapes = {k: tuple(v.shape) for k, v in batch.inputs.items() if k.startswith("noise")}
    assert shapes == {"noise.0": (2, 1, 4, 8, 16), "noise.1": (2, 1, 4, 16, 8)}
    with torch.no_grad():
        together = script.task.losses(
            script.model, script.task.forward(script.model, batch), batch
        )["loss"]
        for i in range(4):
            alone = script.task.collate(script.ready([i], 1))
            assert float(script.task.loss(script.model, alone)) == pytest.approx(
                float(together[i]), rel=1e-5
            )


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (31, 17), (16, 16), (900, 7)])
def test_a_picture_fills_its_size(width: int, height: int) -> None:
    sizes = sizes_for(24, 8, 2.0)
    assert all(w * h <= 24 * 24 and max(w / h, h / w) <= 2 for w, h in sizes)
    cut = cut_to(width, height, nearest_size(width, height, sizes))
    assert cut.resized[0] >= cut.width
    assert cut.resized[1] >= cut.height
    assert cut.resized[0] == cut.width or cut.resized[1] == cut.height
    image = apply_cut(Image.new("RGB", (width, height)), cut)
    assert image.size == (cut.width, cut.height)


def test_tags_change_places_but_for_the_first() -> None:
    rng = np.random.default_rng(0)
    found = {shuffled("sks, a, b ,c", 1, rng) for _ in range(50)}
    assert len(found) == 6
    assert all(sorted(one.split(", ")) == ["a", "b", "c", "sks"] for one in found)
    assert all(one.startswith("sks, ") for one in found)
