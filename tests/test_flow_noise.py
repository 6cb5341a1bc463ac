"""The noise of models that learn a flow: drawn, added and weighed as diffusers' scripts do it."""

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


def noise(n_steps: int = 1000, **spec: Any) -> FlowNoise:
    return FlowNoise(scheduler(n_steps), FlowSpec(**spec))


def at(value: float) -> Any:
    """Return a generator that draws one number only."""
    return SimpleNamespace(random=lambda: value, standard_normal=lambda: value)


def shares(steps: Tensor, shift: float = 3.0) -> Tensor:
    """Return the share of noise at steps of 1000, by the formula of the shift."""
    plain = (1000.0 - steps.double()) / 1000.0
    return shift * plain / (1 + (shift - 1) * plain)


def test_the_share_of_noise_is_that_of_the_shift() -> None:
    found = noise()
    assert found.steps == 1000
    torch.testing.assert_close(found.times(STEPS).double(), 1000 * shares(STEPS), rtol=1e-5, atol=0)
    assert noise(n_steps=50).steps == 50


def test_noise_is_mixed_in_and_the_direction_to_it_is_learned() -> None:
    x, n = torch.randn(2, 5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    s = shares(STEPS).float().view(5, 1, 1, 1)
    found = noise()
    torch.testing.assert_close(found.noised(x, n, STEPS), s * n + (1 - s) * x)
    torch.testing.assert_close(found.target(x, n, STEPS), n - x)
    assert found.noised(x.bfloat16(), n.bfloat16(), STEPS).dtype == torch.bfloat16
    # along the target, all of the way from the picture to the noise
    torch.testing.assert_close(x + found.target(x, n, STEPS), found.noised(x, n, STEPS[:1]))


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_errors_weigh_as_in_diffusers(weighting: Any) -> None:
    found = noise(weighting=weighting).weights(STEPS)
    wanted = training_utils.compute_loss_weighting_for_sd3(weighting, scheduler().sigmas[STEPS])
    if weighting == "none":
        assert found is None
        assert bool((wanted == 1).all())
        return
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted.float())


def test_the_square_of_the_share_weighs_the_error_of_the_picture() -> None:
    """x = x_s - s (n - x): an error of the flow is one of the picture, times -s."""
    flow, sigma = noise(weighting="sigma_squared"), shares(STEPS).float()
    x, n = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    said = flow.target(x, n, STEPS) + 0.5
    picture = flow.noised(x, n, STEPS) - sigma.view(5, 1, 1, 1) * said
    weights = flow.weights(STEPS)
    assert weights is not None
    errors = ((said - flow.target(x, n, STEPS)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(weights * errors, ((picture - x) ** 2).flatten(1).mean(1))


@pytest.mark.parametrize("place", [0.0, 0.1, 0.37, 0.5, 0.999])
@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.29])
def test_a_place_is_moved_by_the_density_with_a_mode(place: float, scale: float) -> None:
    moved = 1 - place - scale * (math.cos(math.pi * place / 2) ** 2 - 1 + place)
    wanted = min(max(int(moved * 1000), 0), 999)
    found = noise(timesteps="mode", mode_scale=scale).sample_step(at(place))
    assert found == wanted


@pytest.mark.parametrize("normal", [-3.0, -0.4, 0.0, 0.7, 2.0])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.25), (-1.0, 2.0)])
def test_a_place_is_the_logistic_function_of_a_normal_number(
    normal: float, mean: float, std: float
) -> None:
    place = 1 / (1 + math.exp(-(mean + std * normal)))
    found = noise(timesteps="logit_normal", mean=mean, std=std).sample_step(at(normal))
    assert found == int(place * 1000)


def test_uniform_places_are_steps_as_they_are_and_both_ends_are_steps() -> None:
    uniform = noise(timesteps="uniform")
    assert [uniform.sample_step(at(p)) for p in (0.0, 0.25, 0.5004, 0.9999)] == [0, 250, 500, 999]
    assert uniform.sample_step(at(1.0)) == 999
    assert noise(n_steps=10, timesteps="uniform").sample_step(at(0.99)) == 9
    assert uniform._step_at(-0.5) == 0


def test_to_measure_steps_are_one_from_each_equal_part() -> None:
    for spec in ({}, {"timesteps": "mode"}):  # whatever is trained most often
        found = noise(**spec)
        assert [found.validation_step(at(0.5), i, 4) for i in range(4)] == [125, 375, 625, 875]
        assert found.validation_step(at(0.0), 0, 1) == 0
        assert found.validation_step(at(1.0), 3, 4) == 999


def test_without_a_specification_it_is_that_of_the_recipe_s_defaults() -> None:
    assert FlowNoise(scheduler()).spec == FlowSpec()
