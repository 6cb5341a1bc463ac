"""Compute the learning rate of each step: the warm-up, and the schedule after it."""

from __future__ import annotations

import math

import numpy as np
import torch

from lora_cli.recipe import SchedulerSpec


def learning_rate_factor(spec: SchedulerSpec, step: int, total_steps: int) -> float:
    """Return the factor by which the recipe's learning rates are multiplied in a step.

    The curves are those of transformers' `get_scheduler`, so that published settings carry over.

    Args:
        spec: The recipe's `train.scheduler`: the schedule and the length of the warm-up.
        step: The number of the step, counted from 1.
        total_steps: The number of steps of the run.
    """
    done = step - 1
    warmup_steps = spec.warmup_steps
    if warmup_steps is None:
        warmup_steps = math.ceil((spec.warmup_ratio or 0.0) * total_steps)
    if done < warmup_steps:
        return done / warmup_steps
    progress = (done - warmup_steps) / (total_steps - warmup_steps)  # 0 <= progress < 1
    match spec.type:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1.0 - progress)
        case "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Multiply each group's initial learning rate by a factor, and return the highest rate.

    For fused optimizers, the rate is rounded to float32: a recorded update reads it from a float32
    tensor, and has to compute the same as an update that is not recorded.
    """
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        group["lr"] = float(np.float32(rate)) if group.get("fused") else rate
    return max(float(group["lr"]) for group in optimizer.param_groups)
