"""Hidden states that an example brings along, and how they lie in a batch.

A batch has them among its inputs, under the name of the module with `STATES` before it.
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
class KeptState:
    """The hidden states of one example, (T, …) or of any other shape.

    Args:
        values: Their bytes (N,); a view of a file, which cannot be written.
        dtype: What they are.
        rest: The dimensions behind the first.
    """

    values: NDArray[np.uint8]
    dtype: torch.dtype
    rest: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> KeptState:
        """Return a tensor of at least one dimension as its bytes."""
        flat = tensor.detach().cpu().contiguous()
        return KeptState(
            flat.view(-1).view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape[1:])
        )

    def is_like(self, other: KeptState) -> bool:
        """Return whether two differ in nothing but the first dimension and the numbers."""
        return (self.dtype, self.rest) == (other.dtype, other.rest)


def states_of_batch(
    states: Sequence[Mapping[str, KeptState]], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the states of a batch's examples: (B, T, …), zero where rows are filled.

    Args:
        states: Of each example, by the name of the module.
        inputs: The batch's other inputs; where its `attention_mask` (B, T) has as many tokens as
            the states, they lie where it is 1, else at the beginning of the row.
    """
    mask = inputs.get("attention_mask")
    return {STATES + name: _laid_out([of[name] for of in states], mask) for name in states[0]}


def _laid_out(states: Sequence[KeptState], mask: Tensor | None) -> Tensor:
    first = states[0]
    flat = torch.from_numpy(np.concatenate([state.values for state in states])).view(first.dtype)
    size = int(np.prod(first.rest, dtype=np.int64)) * first.dtype.itemsize
    lengths = [len(state.values) // size for state in states]
    tokens = flat.view(-1, *first.rest)
    if len(set(lengths)) == 1 and (mask is None or mask.shape[1] == lengths[0] or not first.rest):
        return tokens.view(len(states), lengths[0], *first.rest)
    if mask is not None and mask.ndim == 2 and mask.sum(-1).tolist() == lengths:
        filled = tokens.new_zeros(*mask.shape, *first.rest)
        filled[mask.bool()] = tokens
        return filled
    filled = tokens.new_zeros(len(states), max(lengths), *first.rest)
    for row, part in zip(filled, torch.split(tokens, lengths), strict=True):
        row[: len(part)] = part
    return filled


def without_states(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs of a batch that the model takes, and its states by module."""
    states = {k.removeprefix(STATES): v for k, v in inputs.items() if k.startswith(STATES)}
    return {k: v for k, v in inputs.items() if not k.startswith(STATES)}, states


def has_states(examples: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether examples bring states along."""
    return bool(examples) and STATES in examples[0]
