"""The generators of random numbers: all seeded at once, or left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*seed: int) -> None:
    """Seed the generators of torch, numpy and Python with a mix of the numbers."""
    (drawn,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    mixed = int(drawn >> 1)
    # `torch.manual_seed` would take a millisecond for kinds of devices that do not exist
    torch.default_generator.manual_seed(mixed)
    if torch.accelerator.is_available():
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        getattr(module, "manual_seed_all", module.manual_seed)(mixed)
    np.random.seed(mixed % 2**32)  # some models draw masks from it
    random.seed(mixed)


@contextmanager
def random_state_restored(device: torch.device) -> Iterator[None]:
    """After the context, let all generators continue as if nothing had been drawn in it.

    Args:
        device: Its generator is restored too.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
