"""Tests of image generation: the arguments of the pipeline, and the decoding of latents."""

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
    """An autoencoder whose pixels are three times the latents."""

    dtype = torch.float64

    def __init__(self, **config: Any) -> None:
        self.config = SimpleNamespace(scaling_factor=0.5, **config)

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        assert latents.dtype == torch.float64
        assert not torch.is_autocast_enabled("cpu")  # in fp16 it would overflow
        return (3 * latents,)


class Pipeline:
    """A pipeline that returns the generators' first random numbers, and records its options."""

    def __init__(self, vae: Vae) -> None:
        self.vae, self.options = vae, dict[str, Any]()
        self.image_processor = SimpleNamespace(postprocess=self._postprocess)
        self.factor = 1.0

    def __call__(self, prompts: list[str], **options: Any) -> Any:
        self.prompts, self.options = prompts, options
        noise = [torch.randn(1, 2, 2, generator=g) for g in options["generator"]]
        return SimpleNamespace(images=self.factor * torch.stack(noise))

    def _postprocess(self, pixels: Tensor, output_type: str) -> list[Tensor]:
        assert output_type == "pil"
        assert pixels.dtype == torch.float32
        return list(pixels)


def build_generator(
    side: int = 24, vae: Vae | None = None, **settings: Any
) -> tuple[ImageGenerator, Pipeline]:
    pipeline = Pipeline(vae or Vae())
    sides: list[int] = []

    def latents_of(outputs: Tensor, side: int) -> Tensor:
        sides.append(side)
        return outputs + 10

    generator = ImageGenerator(pipeline, DrawingSpec(**settings), side, latents_of)
    generator.sides = sides  # type: ignore[attr-defined]
    return generator, pipeline


def noise(seed: int) -> Tensor:
    return torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seeds", [(7,), (7, 8, 9)])
def test_each_image_starts_from_noise_of_its_seed(seeds: tuple[int, ...]) -> None:
    generator, pipeline = build_generator(steps=3, guidance_scale=2.5)
    images = generator.generate(["a", "b", "c"], *seeds)
    image_seeds = seeds * 3 if len(seeds) == 1 else seeds
    for image, seed in zip(images, image_seeds, strict=True):
        assert torch.allclose(image, 3 * (noise(seed) + 10) / 0.5)
    assert pipeline.prompts == ["a", "b", "c"]
    options = {key: value for key, value in pipeline.options.items() if key != "generator"}
    assert options == {
        "negative_prompt": None, "height": 24, "width": 24, "num_inference_steps": 3,
        "guidance_scale": 2.5, "output_type": "latent",
    }  # fmt: skip
    assert generator.sides == [24]  # type: ignore[attr-defined]


def test_the_autoencoder_decodes_without_autocast() -> None:
    generator, _ = build_generator()
    with torch.autocast("cpu", torch.bfloat16):
        (image,) = generator.generate(["a"], 7)
    assert torch.allclose(image, 3 * (noise(7) + 10) / 0.5)


def test_an_image_does_not_depend_on_the_other_prompts() -> None:
    generator, _ = build_generator()
    assert torch.equal(generator.generate(["a", "b"], 1, 2)[1], generator.generate(["b"], 2)[0])


def test_the_negative_prompt_is_repeated_for_each_text() -> None:
    generator, pipeline = build_generator(negative_prompt="blurred")
    generator.generate(["a", "b"], 1)
    assert pipeline.options["negative_prompt"] == ["blurred", "blurred"]


@pytest.mark.parametrize(("config", "shift"), [({}, 0.0), ({"shift_factor": None}, 0.0),
                                               ({"shift_factor": 0.25}, 0.25)])  # fmt: skip
def test_latents_are_scaled_and_shifted_by_the_autoencoder_s_config(
    config: dict[str, Any], shift: float
) -> None:
    generator, _ = build_generator(vae=Vae(**config))
    (image,) = generator.generate(["a"], 5)
    assert torch.allclose(image, 3 * ((noise(5) + 10) / 0.5 + shift))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(factor: float) -> None:
    generator, pipeline = build_generator()
    pipeline.factor = factor
    with pytest.raises(NumericsError, match="numbers that are not finite") as caught:
        generator.generate(["a"], 1)
    assert caught.value.problems[0].at == "train.precision"
