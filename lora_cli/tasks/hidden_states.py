"""Cached hidden states of examples, and their layout in a batch.

A batch stores them among its inputs. Their key is the name of the module after the prefix `STATES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STATES = "states of "


@dataclass(frozen=True)
class CachedState:
    """The hidden states of one example, (T, …) or of any other shape.

    Args:
        values: Their bytes (N,); a read-only view of a file.
        dtype: Their dtype.
        inner_shape: Their dimensions after the first.
    """

    values: NDArray[np.uint8]
    dtype: torch.dtype
    inner_shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> CachedState:
        """Return the state for a tensor of at least one dimension."""
        flat = tensor.detach().cpu().contiguous()
        return CachedState(
            flat.view(-1).view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape[1:])
        )

    def is_like(self, other: CachedState) -> bool:
        """Return whether two states differ only in their first dimension and their values."""
        return (self.dtype, self.inner_shape) == (other.dtype, other.inner_shape)


def states_of_batch(
    states: Sequence[Mapping[str, CachedState]], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the states of a batch's examples: (B, T, …), with zeros as padding.

    Args:
        states: The states of each example, by the name of the module.
        inputs: The batch's other inputs. If its `attention_mask` (B, T) has as many tokens as the
            states, they are placed where it is 1; otherwise at the beginning of the row.
    """
    mask = inputs.get("attention_mask")
    return {STATES + name: _laid_out([of[name] for of in states], mask) for name in states[0]}


def _laid_out(states: Sequence[CachedState], mask: Tensor | None) -> Tensor:
    first = states[0]
    flat = torch.from_numpy(np.concatenate([state.values for state in states])).view(first.dtype)
    size = int(np.prod(first.inner_shape, dtype=np.int64)) * first.dtype.itemsize
    lengths = [len(state.values) // size for state in states]
    tokens = flat.view(-1, *first.inner_shape)
    if len(set(lengths)) == 1 and (
        mask is None or mask.shape[1] == lengths[0] or not first.inner_shape
    ):
        return tokens.view(len(states), lengths[0], *first.inner_shape)
    if mask is not None and mask.ndim == 2 and mask.sum(-1).tolist() == lengths:
        filled = tokens.new_zeros(*mask.shape, *first.inner_shape)
        filled[mask.bool()] = tokens
        return filled
    filled = tokens.new_zeros(len(states), max(lengths), *first.inner_shape)
    for row, part in zip(filled, torch.split(tokens, lengths), strict=True):
        row[: len(part)] = part
    return filled


def without_states(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs of a batch for the model, and its cached states by module."""
    states = {k.removeprefix(STATES): v for k, v in inputs.items() if k.startswith(STATES)}
    return {k: v for k, v in inputs.items() if not k.startswith(STATES)}, states


def has_states(examples: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether examples have cached states."""
    return bool(examples) and STATES in examples[0]
