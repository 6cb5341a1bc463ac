"""Seed all generators of random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(*seed: int) -> None:
    """Seed the generators of torch, numpy and Python with a mix of the numbers."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    if torch.accelerator.is_available():
        torch.manual_seed(mixed)
    else:  # `torch.manual_seed` would take a millisecond for devices that do not exist
        torch.default_generator.manual_seed(mixed)
    np.random.seed(mixed % 2**32)  # some models draw masks from it
    random.seed(mixed)
