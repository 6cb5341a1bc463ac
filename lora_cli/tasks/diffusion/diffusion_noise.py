"""How noise is added to a picture's latents, and what a model learns of that.

With a_t the share of the signal that is left at the step t (`alphas_cumprod`), noise n and latents
x, the model sees x_t = sqrt(a_t) x + sqrt(1 - a_t) n and learns

    epsilon        n
    v_prediction   sqrt(a_t) n - sqrt(1 - a_t) x    (Salimans and Ho 2022)

The mean squared error of a picture may be weighted by its ratio of signal to noise,
s = a_t / (1 - a_t), cut off at gamma (Min-SNR, Hang et al. 2023): min(s, gamma) / s for epsilon,
and min(s, gamma) / (s + 1) for v_prediction, whose error is that of x times 1 + s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class DiffusionNoise:
    """The noise of one scheduler.

    Args:
        scheduler: A DDPMScheduler of diffusers with the configuration of the base.
        snr_gamma: Where the ratio of signal to noise is cut off; None weighs all steps the same.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        self.scheduler, self.snr_gamma = scheduler, snr_gamma

    @property
    def steps(self) -> int:
        """How many steps of noise there are."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def prediction(self) -> str:
        """What the model learns: `epsilon` or `v_prediction`."""
        return str(self.scheduler.config.prediction_type)

    def draw_step(self, rng: np.random.Generator, draw: int = 0, of: int = 1) -> int:
        """Return a step of noise, of several draws one from each equal part of all steps."""
        return min(int((draw + rng.random()) / of * self.steps), self.steps - 1)

    def spread_step(self, rng: np.random.Generator, draw: int, of: int) -> int:
        """Return a step to measure: steps to train are spread evenly too."""
        return self.draw_step(rng, draw, of)

    def times(self, steps: Tensor) -> Tensor:
        """Return what the model reads of the steps (B,): their numbers."""
        return steps

    def noised(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Return latents (B, C, H, W) with noise, at the steps (B,)."""
        noisy: Tensor = self.scheduler.add_noise(latents, noise, steps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Return what the model has to say of it (B, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        velocity: Tensor = self.scheduler.get_velocity(latents, noise, steps)
        return velocity

    def weights(self, steps: Tensor) -> Tensor | None:
        """Return the weight of each picture's error (B,); None where all are 1."""
        if self.snr_gamma is None:
            return None
        signal = self.scheduler.alphas_cumprod.to(steps.device)[steps].double()
        limited = torch.minimum(signal / (1 - signal), torch.full_like(signal, self.snr_gamma))
        if self.prediction == "epsilon":
            # by s = a / (1 - a), and 1 where no signal is left, as both go to 0 together
            weights = torch.where(signal > 0, limited * (1 - signal) / signal, 1.0)
        else:
            weights = limited * (1 - signal)
        return weights.float()


def error_of(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each picture (B,), at least in float32."""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return (predicted.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
