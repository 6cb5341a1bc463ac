"""How pictures are drawn: what a pipeline is asked for, and what becomes of its latents."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.errors import NumericsError
from lora_cli.recipe.spec import DrawingSpec
from lora_cli.tasks.diffusion.drawing import ImageGenerator


class Vae:
    """Makes of each latent a pixel of thrice its value."""

    dtype = torch.float64

    def __init__(self, **config: Any) -> None:
        self.config = SimpleNamespace(scaling_factor=0.5, **config)

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        assert latents.dtype == torch.float64
        assert not torch.is_autocast_enabled("cpu")  # in fp16 it would overflow
        return (3 * latents,)


class Pipeline:
    """Draws the first random numbers of each generator, and notes what it is asked for."""

    def __init__(self, vae: Vae) -> None:
        self.vae, self.asked = vae, dict[str, Any]()
        self.image_processor = SimpleNamespace(postprocess=self._pictures)
        self.factor = 1.0

    def __call__(self, prompts: list[str], **asked: Any) -> Any:
        self.prompts, self.asked = prompts, asked
        noise = [torch.randn(1, 2, 2, generator=g) for g in asked["generator"]]
        return SimpleNamespace(images=self.factor * torch.stack(noise))

    def _pictures(self, pixels: Tensor, output_type: str) -> list[Tensor]:
        assert output_type == "pil"
        assert pixels.dtype == torch.float32
        return list(pixels)


def drawing(
    side: int = 24, vae: Vae | None = None, **settings: Any
) -> tuple[ImageGenerator, Pipeline]:
    pipeline = Pipeline(vae or Vae())
    seen: list[int] = []

    def latents_of(drawn: Tensor, side: int) -> Tensor:
        seen.append(side)
        return drawn + 10

    made = ImageGenerator(pipeline, DrawingSpec(**settings), side, latents_of)
    made.seen = seen  # type: ignore[attr-defined]
    return made, pipeline


def noise(seed: int) -> Tensor:
    return torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seeds", [(7,), (7, 8, 9)])
def test_each_text_starts_from_noise_of_its_own_seed(seeds: tuple[int, ...]) -> None:
    made, pipeline = drawing(steps=3, guidance_scale=2.5)
    found = made.generate(["a", "b", "c"], *seeds)
    each = seeds * 3 if len(seeds) == 1 else seeds
    for picture, seed in zip(found, each, strict=True):
        assert torch.allclose(picture, 3 * (noise(seed) + 10) / 0.5)
    assert pipeline.prompts == ["a", "b", "c"]
    asked = {key: value for key, value in pipeline.asked.items() if key != "generator"}
    assert asked == {
        "negative_prompt": None, "height": 24, "width": 24, "num_inference_steps": 3,
        "guidance_scale": 2.5, "output_type": "latent",
    }  # fmt: skip
    assert made.seen == [24]  # type: ignore[attr-defined]


def test_pixels_are_decoded_in_the_autoencoder_s_own_precision() -> None:
    made, _ = drawing()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = made.generate(["a"], 7)
    assert torch.allclose(found, 3 * (noise(7) + 10) / 0.5)


def test_one_text_is_the_same_whatever_is_drawn_with_it() -> None:
    made, _ = drawing()
    assert torch.equal(made.generate(["a", "b"], 1, 2)[1], made.generate(["b"], 2)[0])


def test_a_negative_prompt_is_one_for_each_text() -> None:
    made, pipeline = drawing(negative_prompt="blurred")
    made.generate(["a", "b"], 1)
    assert pipeline.asked["negative_prompt"] == ["blurred", "blurred"]


@pytest.mark.parametrize(("config", "shift"), [({}, 0.0), ({"shift_factor": None}, 0.0),
                                               ({"shift_factor": 0.25}, 0.25)])  # fmt: skip
def test_latents_are_scaled_and_shifted_as_the_autoencoder_says(
    config: dict[str, Any], shift: float
) -> None:
    made, _ = drawing(vae=Vae(**config))
    (found,) = made.generate(["a"], 5)
    assert torch.allclose(found, 3 * ((noise(5) + 10) / 0.5 + shift))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_and_no_picture(factor: float) -> None:
    made, pipeline = drawing()
    pipeline.factor = factor
    with pytest.raises(NumericsError, match="numbers that are not finite") as caught:
        made.generate(["a"], 1)
    assert caught.value.problems[0].at == "train.precision"
