"""The noise of pictures, what is learned of it and how it is weighed, by the papers' formulas."""

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


def noise_of(prediction: str, gamma: float | None = None, n_steps: int = 10) -> DiffusionNoise:
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=n_steps, beta_start=0.05, beta_end=0.5, prediction_type=prediction
    )
    return DiffusionNoise(scheduler, gamma)


def signal_left() -> torch.Tensor:
    """Return the share of the signal that is left after each of the steps."""
    betas = torch.linspace(0.05, 0.5, 10, dtype=torch.float64)
    return (1 - betas).cumprod(0)[STEPS]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_is_added_and_learned_as_in_the_papers(prediction: str) -> None:
    noise = noise_of(prediction)
    assert (noise.steps, noise.prediction) == (10, prediction)
    x, n = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    a = signal_left().view(3, 1, 1, 1)
    wanted = a.sqrt() * x + (1 - a).sqrt() * n
    torch.testing.assert_close(noise.noised(x, n, STEPS), wanted.float())
    velocity = a.sqrt() * n - (1 - a).sqrt() * x
    target = n if prediction == "epsilon" else velocity.float()
    torch.testing.assert_close(noise.target(x, n, STEPS), target)


@pytest.mark.parametrize("gamma", [0.3, 5.0])
def test_errors_are_weighed_by_the_ratio_of_signal_to_noise(gamma: float) -> None:
    ratio = signal_left() / (1 - signal_left())
    assert float(ratio.min()) < 0.3 < 5.0 < float(ratio.max())
    limited = ratio.clamp(max=gamma)
    found = noise_of("epsilon", gamma).weights(STEPS)
    assert found is not None
    torch.testing.assert_close(found, (limited / ratio).float())
    found = noise_of("v_prediction", gamma).weights(STEPS)
    assert found is not None
    torch.testing.assert_close(found, (limited / (ratio + 1)).float())
    assert noise_of("epsilon").weights(STEPS) is None


def test_a_step_without_any_signal_counts_once_for_noise_and_not_for_velocity() -> None:
    for prediction, weight in (("epsilon", 1.0), ("v_prediction", 0.0)):
        noise = noise_of(prediction, 5.0)
        noise.scheduler.alphas_cumprod[9] = 0.0
        found = noise.weights(torch.tensor([9]))
        assert found is not None
        assert found.tolist() == [weight]


def test_steps_are_drawn_evenly_from_equal_parts() -> None:
    noise = noise_of("epsilon", n_steps=1000)

    def drawn(share: float, *part: int) -> int:
        rng: Any = SimpleNamespace(random=lambda: share)
        return noise.sample_step(rng, *part)

    assert [drawn(share) for share in (0.0, 0.25, 0.9999)] == [0, 250, 999]
    assert [drawn(0.5, i, 4) for i in range(4)] == [125, 375, 625, 875]
    assert drawn(1.0 - 2**-53, 3, 4) == 999  # where rounding would give one step more
    rng: Any = SimpleNamespace(random=lambda: 0.5)
    assert [noise.validation_step(rng, i, 4) for i in range(4)] == [125, 375, 625, 875]
    random = np.random.default_rng(0)
    steps = [noise.sample_step(random) for _ in range(2000)]
    assert np.histogram(steps, 4, (0, 1000))[0] == pytest.approx(500, rel=0.15)


def test_the_error_of_a_picture_is_its_mean_square_in_single_precision_at_least() -> None:
    a, b = torch.full((2, 1, 2, 2), 3.0), torch.zeros(2, 1, 2, 2)
    b[1, 0, 0] = 5.0
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        found = mean_squared_errors(a.to(dtype), b)
        assert found.tolist() == [9.0, (2 * 4 + 2 * 9) / 4]
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# ------------------------------------------------------------------------------- pictures


def test_a_picture_is_named_after_its_text_and_seed() -> None:
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


def prior(folder: Path, count: int) -> PriorPictures:
    recipe: Any = SimpleNamespace(at=lambda key: key)
    spec = PriorSpec.model_validate({"path": str(folder), "caption": "a dog", "count": count})
    return PriorPictures(recipe, spec)


def test_missing_pictures_are_drawn_under_names_that_are_free(tmp_path: Path) -> None:
    folder = tmp_path / "of" / "dogs"
    pictures, generator = prior(folder, 4), ImageGenerator()
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
    assert prior(folder, 1).missing == 0


def test_without_pictures_some_have_to_be_drawn(tmp_path: Path) -> None:
    prior(tmp_path, 3).read(lambda picture: {}[picture["path"]])  # they are drawn later
    with pytest.raises(LoraError, match="there are no pictures in"):
        prior(tmp_path, 0).read(lambda picture: "")
    (tmp_path / "one.png").write_text("")
    pictures = prior(tmp_path, 0)
    pictures.read(lambda picture: "")
    assert [picture["path"] for picture in pictures.pictures] == [str(tmp_path / "one.png")]
    with pytest.raises(LoraError, match="it is cut off"):
        pictures.read(lambda picture: "it is cut off")


def test_every_picture_of_the_class_is_trained_with_one_of_the_subject(tmp_path: Path) -> None:
    pictures = prior(tmp_path, 0)
    for count, of in ((5, 2), (2, 5), (3, 3)):
        pictures.pictures = [{"path": str(i)} for i in range(count)]
        each = [pictures.pictures_of(position, of) for position in range(of)]
        assert all(each)
        seen = [int(one["path"]) for some in each for one in some]
        assert sorted(set(seen)) == list(range(count))
        assert len(seen) == max(count, of)
