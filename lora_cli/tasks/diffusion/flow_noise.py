"""The forward process of flow matching models: noisy latents, targets, loss weights.

With the share of noise s from 0 to 1, noise n and latents x, the model's input is
x_s = s n + (1 - s) x, and its target is the velocity n - x (rectified flow: Liu et al. 2022; Esser
et al. 2024).

A timestep is an index into the scheduler's sigmas s, which start at 1 (pure noise, step 0). They
include the base's shift (3 in Stable Diffusion 3, which moves steps towards more noise).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from lora_cli.recipe.spec import FlowSpec


class FlowNoise:
    """The noise schedule of a flow matching model.

    Args:
        scheduler: A diffusers `FlowMatchEulerDiscreteScheduler` with the base's configuration. It
            must not be the pipeline's own, which `set_timesteps` changes.
        spec: How timesteps are sampled in training, and weighted.
    """

    def __init__(self, scheduler: Any, spec: FlowSpec | None = None) -> None:
        self.scheduler, self.spec = scheduler, spec or FlowSpec()

    @property
    def steps(self) -> int:
        """The number of timesteps."""
        return int(self.scheduler.config.num_train_timesteps)

    def sample_step(self, rng: np.random.Generator) -> int:
        """Return a random timestep for training."""
        spec = self.spec
        if spec.timesteps == "logit_normal":
            logit = spec.mean + spec.std * rng.standard_normal()
            position = 0.5 + 0.5 * math.tanh(logit / 2)  # the logistic function, without overflow
        else:
            position = rng.random()
        if spec.timesteps == "mode":
            scale = spec.mode_scale
            position = 1 - position - scale * (math.cos(math.pi * position / 2) ** 2 - 1 + position)
        return self._step_at(position)

    def validation_step(self, rng: np.random.Generator, index: int, n_draws: int) -> int:
        """Return a random timestep for evaluation, from the `index`-th of `n_draws` ranges."""
        return self._step_at((index + rng.random()) / n_draws)

    def _step_at(self, position: float) -> int:
        """Return the timestep at a position from 0 (pure noise) to 1 (the image)."""
        return min(max(int(position * self.steps), 0), self.steps - 1)

    def times(self, steps: Tensor) -> Tensor:
        """Return the model's timestep input (B,): the share of noise, scaled to 0 to 1000."""
        times: Tensor = self.scheduler.timesteps.to(steps.device)[steps]
        return times

    def _noise_shares(self, steps: Tensor) -> Tensor:
        """Return the share of noise at each timestep (B,)."""
        shares: Tensor = self.scheduler.sigmas.to(steps.device)[steps]
        return shares

    def noised(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Add noise to latents (B, C, H, W) at timesteps (B,)."""
        share = self._noise_shares(steps).view(-1, 1, 1, 1).to(latents.dtype)
        return share * noise + (1.0 - share) * latents

    def target(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Return the prediction target (B, C, H, W)."""
        return noise - latents

    def weights(self, steps: Tensor) -> Tensor | None:
        """Return the weight of each image's error (B,); None if all weights are 1."""
        share = self._noise_shares(steps).double()
        if self.spec.weighting == "sigma_sqrt":
            return (share**-2).float()
        if self.spec.weighting == "sigma_squared":
            return (share**2).float()
        if self.spec.weighting == "cosmap":
            return (2 / (math.pi * (1 - 2 * share + 2 * share**2))).float()
        return None
