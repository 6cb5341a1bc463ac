"""Compares tensors within the rounding of float32, whatever processor rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 5e-5) -> None:
    """Compare whole tensors within a share of the largest entry.

    Rounding grows with what is added up, so an absolute tolerance, or one relative to each entry
    (which may be what is left of a sum that cancels), holds on one machine and fails on another.
    """
    scale = max(float(wanted.detach().abs().max()), 1e-30)
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=tolerance * scale)


def assert_different(found: Tensor, other: Tensor, share: float = 1e-3) -> None:
    """Fail unless two tensors differ by more than a share of the largest entry."""
    scale = float(other.detach().abs().max())
    assert float((found - other).detach().abs().max()) > share * scale


def near(values: Mapping[str, float] | Iterable[float], tolerance: float = 5e-5) -> Any:
    """Return what equals numbers, or numbers by name, within a share of the largest of them."""
    values = dict(values) if isinstance(values, Mapping) else list(values)
    largest = max(map(abs, values.values() if isinstance(values, dict) else values), default=0.0)
    return pytest.approx(values, rel=0.0, abs=tolerance * largest)
