"""The forward process of diffusion models: noisy latents, prediction targets, loss weights.

With the share of signal a_t at timestep t (`alphas_cumprod`), noise n and latents x, the model's
input is x_t = sqrt(a_t) x + sqrt(1 - a_t) n, and its target is

    epsilon        n
    v_prediction   sqrt(a_t) n - sqrt(1 - a_t) x    (Salimans and Ho 2022)

An image's mean squared error may be weighted by its signal-to-noise ratio s = a_t / (1 - a_t),
clipped at gamma (Min-SNR, Hang et al. 2023): by min(s, gamma) / s for epsilon, and by
min(s, gamma) / (s + 1) for v_prediction, whose error is 1 + s times that of x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class DiffusionNoise:
    """The noise schedule of a diffusion model.

    Args:
        scheduler: A diffusers `DDPMScheduler` with the base's configuration.
        snr_gamma: The value at which the signal-to-noise ratio is clipped; None weights all
            timesteps equally.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        self.scheduler, self.snr_gamma = scheduler, snr_gamma

    @property
    def steps(self) -> int:
        """The number of timesteps."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def prediction(self) -> str:
        """The prediction target: `epsilon` or `v_prediction`."""
        return str(self.scheduler.config.prediction_type)

    def sample_step(self, rng: np.random.Generator, index: int = 0, n_draws: int = 1) -> int:
        """Return a random timestep from the `index`-th of `n_draws` equal ranges."""
        return min(int((index + rng.random()) / n_draws * self.steps), self.steps - 1)

    def validation_step(self, rng: np.random.Generator, index: int, n_draws: int) -> int:
        """Return a random timestep for evaluation; training samples uniformly too."""
        return self.sample_step(rng, index, n_draws)

    def times(self, steps: Tensor) -> Tensor:
        """Return the model's timestep input (B,): the timesteps themselves."""
        return steps

    def noised(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Add noise to latents (B, C, H, W) at timesteps (B,)."""
        noisy: Tensor = self.scheduler.add_noise(latents, noise, steps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Return the prediction target (B, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        velocity: Tensor = self.scheduler.get_velocity(latents, noise, steps)
        return velocity

    def weights(self, steps: Tensor) -> Tensor | None:
        """Return the weight of each image's error (B,); None if all weights are 1."""
        if self.snr_gamma is None:
            return None
        signal = self.scheduler.alphas_cumprod.to(steps.device)[steps].double()
        limited = torch.minimum(signal / (1 - signal), torch.full_like(signal, self.snr_gamma))
        if self.prediction == "epsilon":
            # min(s, gamma) / s; its limit is 1 where no signal is left
            weights = torch.where(signal > 0, limited * (1 - signal) / signal, 1.0)
        else:
            weights = limited * (1 - signal)
        return weights.float()


def mean_squared_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each image (B,), in float32 or higher precision."""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return (predicted.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
