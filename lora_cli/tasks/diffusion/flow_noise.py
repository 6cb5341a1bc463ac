"""How noise is added to a picture's latents by a model that learns a flow, and what it learns.

With s from 0 to 1, noise n and latents x, the model sees x_s = s n + (1 - s) x and learns n - x, a
direction from the picture to the noise (rectified flow: Liu et al. 2022; Esser et al. 2024).

A step is a position in the scheduler's list of s, which begins with 1, noise alone: step 0 of 1000.
The list is that of the base, with its shift (3 in Stable Diffusion 3: more steps of much noise).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from lora_cli.recipe.spec import FlowSpec


class FlowNoise:
    """The noise of one scheduler.

    Args:
        scheduler: A FlowMatchEulerDiscreteScheduler of diffusers with the configuration of the
            base, which is not drawn with.
        spec: How steps are drawn in training, and weighted.
    """

    def __init__(self, scheduler: Any, spec: FlowSpec | None = None) -> None:
        self.scheduler, self.spec = scheduler, spec or FlowSpec()

    @property
    def steps(self) -> int:
        """How many steps of noise there are."""
        return int(self.scheduler.config.num_train_timesteps)

    def draw_step(self, rng: np.random.Generator) -> int:
        """Return a step of noise to train."""
        spec = self.spec
        if spec.timesteps == "logit_normal":
            logit = spec.mean + spec.std * rng.standard_normal()
            place = 0.5 + 0.5 * math.tanh(logit / 2)  # the logistic function, for any number
        else:
            place = rng.random()
        if spec.timesteps == "mode":
            scale = spec.mode_scale
            place = 1 - place - scale * (math.cos(math.pi * place / 2) ** 2 - 1 + place)
        return self._step_at(place)

    def spread_step(self, rng: np.random.Generator, draw: int, of: int) -> int:
        """Return a step to measure: of several draws, one from each equal part of all steps."""
        return self._step_at((draw + rng.random()) / of)

    def _step_at(self, place: float) -> int:
        """Return the step at a place from 0 (noise alone) to 1 (the picture)."""
        return min(max(int(place * self.steps), 0), self.steps - 1)

    def times(self, steps: Tensor) -> Tensor:
        """Return what the model reads of the steps (B,): how much noise there is, up to 1000."""
        found: Tensor = self.scheduler.timesteps.to(steps.device)[steps]
        return found

    def _shares(self, steps: Tensor) -> Tensor:
        """Return the share of noise at steps (B,)."""
        found: Tensor = self.scheduler.sigmas.to(steps.device)[steps]
        return found

    def noised(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Return latents (B, C, H, W) with noise, at the steps (B,)."""
        share = self._shares(steps).view(-1, 1, 1, 1).to(latents.dtype)
        return share * noise + (1.0 - share) * latents

    def target(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Return what the model has to say of it (B, C, H, W)."""
        return noise - latents

    def weights(self, steps: Tensor) -> Tensor | None:
        """Return the weight of each picture's error (B,); None where all are 1."""
        share = self._shares(steps).double()
        if self.spec.weighting == "sigma_sqrt":
            return (share**-2).float()
        if self.spec.weighting == "sigma_squared":
            return (share**2).float()
        if self.spec.weighting == "cosmap":
            return (2 / (math.pi * (1 - 2 * share + 2 * share**2))).float()
        return None
