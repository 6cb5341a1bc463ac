"""Seed all random number generators, or restore their states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*seed: int) -> None:
    """Seed the generators of torch, numpy and Python with a hash of the given numbers."""
    (state,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    seed_value = int(state >> 1)
    # `torch.manual_seed` spends a millisecond on kinds of devices that are not available
    torch.default_generator.manual_seed(seed_value)
    if torch.accelerator.is_available():
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        getattr(module, "manual_seed_all", module.manual_seed)(seed_value)
    np.random.seed(seed_value % 2**32)  # some models sample masks with it
    random.seed(seed_value)


@contextmanager
def random_state_restored(device: torch.device) -> Iterator[None]:
    """Restore the states of all random generators after the context.

    Args:
        device: The device whose generator is restored too.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
