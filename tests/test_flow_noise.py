"""Tests of flow matching noise, timestep sampling and loss weights, against diffusers' scripts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.recipe.spec import FlowSpec
from lora_cli.tasks.diffusion.flow_noise import FlowNoise

diffusers = pytest.importorskip("diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")
STEPS = torch.tensor([0, 1, 250, 500, 999])


def scheduler(n_steps: int = 1000, shift: float = 3.0) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=n_steps, shift=shift)


def build_noise(n_steps: int = 1000, **spec: Any) -> FlowNoise:
    return FlowNoise(scheduler(n_steps), FlowSpec(**spec))


def fixed_random(value: float) -> Any:
    """Return a random generator that always returns the same value."""
    return SimpleNamespace(random=lambda: value, standard_normal=lambda: value)


def noise_shares(steps: Tensor, shift: float = 3.0) -> Tensor:
    """Return the share of noise at timesteps of 1000, by the formula of the shift."""
    unshifted = (1000.0 - steps.double()) / 1000.0
    return shift * unshifted / (1 + (shift - 1) * unshifted)


def test_noise_shares_include_the_shift() -> None:
    noise = build_noise()
    assert noise.steps == 1000
    torch.testing.assert_close(
        noise.times(STEPS).double(), 1000 * noise_shares(STEPS), rtol=1e-5, atol=0
    )
    assert build_noise(n_steps=50).steps == 50


def test_noisy_latents_and_targets() -> None:
    x, n = torch.randn(2, 5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    s = noise_shares(STEPS).float().view(5, 1, 1, 1)
    noise = build_noise()
    torch.testing.assert_close(noise.noised(x, n, STEPS), s * n + (1 - s) * x)
    torch.testing.assert_close(noise.target(x, n, STEPS), n - x)
    assert noise.noised(x.bfloat16(), n.bfloat16(), STEPS).dtype == torch.bfloat16
    # adding the target to the image gives pure noise
    torch.testing.assert_close(x + noise.target(x, n, STEPS), noise.noised(x, n, STEPS[:1]))


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_equal_those_of_diffusers(weighting: Any) -> None:
    weights = build_noise(weighting=weighting).weights(STEPS)
    expected = training_utils.compute_loss_weighting_for_sd3(weighting, scheduler().sigmas[STEPS])
    if weighting == "none":
        assert weights is None
        assert bool((expected == 1).all())
        return
    assert weights is not None
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, expected.float())


def test_sigma_squared_weights_give_the_error_of_the_image() -> None:
    """x = x_s - s (n - x): an error of the velocity times -s is an error of the image."""
    flow, sigma = build_noise(weighting="sigma_squared"), noise_shares(STEPS).float()
    x, n = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    predicted = flow.target(x, n, STEPS) + 0.5
    predicted_image = flow.noised(x, n, STEPS) - sigma.view(5, 1, 1, 1) * predicted
    weights = flow.weights(STEPS)
    assert weights is not None
    errors = ((predicted - flow.target(x, n, STEPS)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(weights * errors, ((predicted_image - x) ** 2).flatten(1).mean(1))


@pytest.mark.parametrize("position", [0.0, 0.1, 0.37, 0.5, 0.999])
@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.29])
def test_mode_sampling(position: float, scale: float) -> None:
    moved = 1 - position - scale * (math.cos(math.pi * position / 2) ** 2 - 1 + position)
    expected = min(max(int(moved * 1000), 0), 999)
    step = build_noise(timesteps="mode", mode_scale=scale).sample_step(fixed_random(position))
    assert step == expected


@pytest.mark.parametrize("normal", [-3.0, -0.4, 0.0, 0.7, 2.0])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.25), (-1.0, 2.0)])
def test_logit_normal_sampling(normal: float, mean: float, std: float) -> None:
    position = 1 / (1 + math.exp(-(mean + std * normal)))
    step = build_noise(timesteps="logit_normal", mean=mean, std=std).sample_step(
        fixed_random(normal)
    )
    assert step == int(position * 1000)


def test_uniform_sampling_is_clamped_to_valid_steps() -> None:
    uniform = build_noise(timesteps="uniform")
    assert [uniform.sample_step(fixed_random(p)) for p in (0.0, 0.25, 0.5004, 0.9999)] == [
        0,
        250,
        500,
        999,
    ]
    assert uniform.sample_step(fixed_random(1.0)) == 999
    assert build_noise(n_steps=10, timesteps="uniform").sample_step(fixed_random(0.99)) == 9
    assert uniform._step_at(-0.5) == 0


def test_validation_steps_are_stratified() -> None:
    for spec in ({}, {"timesteps": "mode"}):  # independent of the sampling in training
        noise = build_noise(**spec)
        assert [noise.validation_step(fixed_random(0.5), i, 4) for i in range(4)] == [
            125,
            375,
            625,
            875,
        ]
        assert noise.validation_step(fixed_random(0.0), 0, 1) == 0
        assert noise.validation_step(fixed_random(1.0), 3, 4) == 999


def test_the_default_specification() -> None:
    assert FlowNoise(scheduler()).spec == FlowSpec()
