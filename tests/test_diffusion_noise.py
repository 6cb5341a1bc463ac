"""Tests of diffusion noise, targets and loss weights by the papers' formulas; of class images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lora_cli.errors import LoraError
from lora_cli.recipe.spec import PriorSpec
from lora_cli.tasks.diffusion.diffusion_noise import DiffusionNoise, mean_squared_errors
from lora_cli.tasks.diffusion.drawing import MAX_NAME_LENGTH, picture_name
from lora_cli.tasks.diffusion.prior_pictures import PriorPictures

diffusers = pytest.importorskip("diffusers")
STEPS = torch.tensor([0, 3, 9])


def build_noise(prediction: str, gamma: float | None = None, n_steps: int = 10) -> DiffusionNoise:
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=n_steps, beta_start=0.05, beta_end=0.5, prediction_type=prediction
    )
    return DiffusionNoise(scheduler, gamma)


def signal_shares() -> torch.Tensor:
    """Return the share of signal at each of `STEPS` (`alphas_cumprod`)."""
    betas = torch.linspace(0.05, 0.5, 10, dtype=torch.float64)
    return (1 - betas).cumprod(0)[STEPS]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noisy_latents_and_targets(prediction: str) -> None:
    noise = build_noise(prediction)
    assert (noise.steps, noise.prediction) == (10, prediction)
    x, n = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    a = signal_shares().view(3, 1, 1, 1)
    expected = a.sqrt() * x + (1 - a).sqrt() * n
    torch.testing.assert_close(noise.noised(x, n, STEPS), expected.float())
    velocity = a.sqrt() * n - (1 - a).sqrt() * x
    target = n if prediction == "epsilon" else velocity.float()
    torch.testing.assert_close(noise.target(x, n, STEPS), target)


@pytest.mark.parametrize("gamma", [0.3, 5.0])
def test_min_snr_weights(gamma: float) -> None:
    ratio = signal_shares() / (1 - signal_shares())
    assert float(ratio.min()) < 0.3 < 5.0 < float(ratio.max())
    limited = ratio.clamp(max=gamma)
    weights = build_noise("epsilon", gamma).weights(STEPS)
    assert weights is not None
    torch.testing.assert_close(weights, (limited / ratio).float())
    weights = build_noise("v_prediction", gamma).weights(STEPS)
    assert weights is not None
    torch.testing.assert_close(weights, (limited / (ratio + 1)).float())
    assert build_noise("epsilon").weights(STEPS) is None


def test_min_snr_weights_without_signal() -> None:
    for prediction, weight in (("epsilon", 1.0), ("v_prediction", 0.0)):
        noise = build_noise(prediction, 5.0)
        noise.scheduler.alphas_cumprod[9] = 0.0
        weights = noise.weights(torch.tensor([9]))
        assert weights is not None
        assert weights.tolist() == [weight]


def test_timesteps_are_stratified() -> None:
    noise = build_noise("epsilon", n_steps=1000)

    def sample(share: float, *part: int) -> int:
        rng: Any = SimpleNamespace(random=lambda: share)
        return noise.sample_step(rng, *part)

    assert [sample(share) for share in (0.0, 0.25, 0.9999)] == [0, 250, 999]
    assert [sample(0.5, i, 4) for i in range(4)] == [125, 375, 625, 875]
    assert sample(1.0 - 2**-53, 3, 4) == 999  # rounding would give step 1000
    rng: Any = SimpleNamespace(random=lambda: 0.5)
    assert [noise.validation_step(rng, i, 4) for i in range(4)] == [125, 375, 625, 875]
    random = np.random.default_rng(0)
    steps = [noise.sample_step(random) for _ in range(2000)]
    assert np.histogram(steps, 4, (0, 1000))[0] == pytest.approx(500, rel=0.15)


def test_mean_squared_errors_are_at_least_float32() -> None:
    a, b = torch.full((2, 1, 2, 2), 3.0), torch.zeros(2, 1, 2, 2)
    b[1, 0, 0] = 5.0
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        errors = mean_squared_errors(a.to(dtype), b)
        assert errors.tolist() == [9.0, (2 * 4 + 2 * 9) / 4]
        assert errors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# ------------------------------------------------------------------------------- pictures


def test_file_names_depend_on_text_and_seed() -> None:
    name = picture_name("A red, red bicycle!", 3)
    assert name.startswith("a-red-red-bicycle-")
    assert len(name) == len("a-red-red-bicycle-") + 8 + len(".png")
    assert name == picture_name("A red, red bicycle!", 3) != picture_name("a red red bicycle", 3)
    assert name != picture_name("A red, red bicycle!", 4)
    long = picture_name("word " * 30, 0)
    assert long.rpartition("-")[0] == ("word-" * 30)[:MAX_NAME_LENGTH].rstrip("-")
    assert MAX_NAME_LENGTH == 40
    assert len(picture_name("自転車", 0)) == 8 + len(".png")


class ImageGenerator:
    """Generates files without images, and records the requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[list[str], int]] = []

    def generate(self, prompts: list[str], seed: int) -> list[Any]:
        self.requests.append((prompts, seed))
        return [SimpleNamespace(save=lambda path, kind: Path(path).write_text(kind))]


def build_prior(folder: Path, count: int) -> PriorPictures:
    recipe: Any = SimpleNamespace(at=lambda key: key)
    spec = PriorSpec.model_validate({"path": str(folder), "caption": "a dog", "count": count})
    return PriorPictures(recipe, spec)


def test_missing_class_images_get_unused_names(tmp_path: Path) -> None:
    folder = tmp_path / "of" / "dogs"
    pictures, generator = build_prior(folder, 4), ImageGenerator()
    assert (pictures.files(), pictures.missing) == ([], 4)
    folder.mkdir(parents=True)
    for name in ("own.JPG", "drawn-0001.png", ".hidden.png", "note.txt"):
        (folder / name).write_text("")
    (folder / "folder.png").mkdir()
    assert [file.name for file in pictures.files()] == ["drawn-0001.png", "own.JPG"]
    assert pictures.missing == 2
    pictures.generate_missing(generator, 2**32 - 1)  # type: ignore[arg-type]
    assert generator.requests == [(["a dog"], 2**32 - 1), (["a dog"], 1)]  # of drawn-0000 and -0002
    names = ["drawn-0000.png", "drawn-0001.png", "drawn-0002.png", "own.JPG"]
    assert [file.name for file in pictures.files()] == names
    assert not list(folder.glob("*.tmp"))
    assert pictures.missing == 0
    assert build_prior(folder, 1).missing == 0


def test_class_images_must_exist_or_be_generated(tmp_path: Path) -> None:
    build_prior(tmp_path, 3).read(lambda picture: {}[picture["path"]])  # to be generated later
    with pytest.raises(LoraError, match="there are no pictures in"):
        build_prior(tmp_path, 0).read(lambda picture: "")
    (tmp_path / "one.png").write_text("")
    pictures = build_prior(tmp_path, 0)
    pictures.read(lambda picture: "")
    assert [picture["path"] for picture in pictures.pictures] == [str(tmp_path / "one.png")]
    with pytest.raises(LoraError, match="it is cut off"):
        pictures.read(lambda picture: "it is cut off")


def test_every_class_image_is_paired_with_a_subject_image(tmp_path: Path) -> None:
    pictures = build_prior(tmp_path, 0)
    for count, n_subject_images in ((5, 2), (2, 5), (3, 3)):
        pictures.pictures = [{"path": str(i)} for i in range(count)]
        each = [
            pictures.pictures_of(position, n_subject_images) for position in range(n_subject_images)
        ]
        assert all(each)
        used = [int(one["path"]) for images in each for one in images]
        assert sorted(set(used)) == list(range(count))
        assert len(used) == max(count, n_subject_images)
