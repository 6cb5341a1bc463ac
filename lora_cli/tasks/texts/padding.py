"""How rows of different lengths become one batch, which is decided by trying the model.

What a row means must not depend on the rows next to it. Whether that holds is a matter of the
architecture: XLNet reads the last position of a row, so filling on the right changes its answer;
RWKV and convolutions know no mask; absolute positions shift when a row is filled on the left. So a
short row is computed alone and next to a long one, and the first way of filling that gives the same
outputs, near rounding, is taken: that of the tokenizer, then the other side. Where none does, only
rows of the same length are computed together.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

ROUNDING = {torch.float32: 128, torch.float16: 16, torch.bfloat16: 8}  # times eps and the scale
NOISE = 8  # times what the same row differs by when it is computed again, next to a copy of itself
MOST_NOISE = 1e-2  # of the outputs: more than that is no rounding


@dataclass(frozen=True)
class Padding:
    """A way to pad rows: on which side, and whether to pass positions and a mask.

    `none` computes only rows of the same length together.
    """

    side: Literal["right", "left", "none"] = "right"
    positions: bool = False
    mask: bool = True

    def __str__(self) -> str:
        if self.side == "none":
            return "rows of the same length together"
        with_positions = " with positions" if self.positions else ""
        return f"on the {self.side}{with_positions}" + ("" if self.mask else " without a mask")


RIGHT, NONE = Padding(), Padding("none")
WITHOUT_MASK = Padding(mask=False)  # causal attention on right-padded rows needs no mask


def longest_with_equal_positions(model: nn.Module) -> int:
    """Return up to which length of the longest row the positions of the others do not depend on it.

    If the longest row has more tokens, LongRoPE scales the positions of the whole batch.
    """
    config: Any = getattr(model, "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    rope = rope if isinstance(rope, dict) else {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return 10**9
    n_original = rope.get("original_max_position_embeddings")
    n_original = n_original or getattr(config, "original_max_position_embeddings", None)
    return int(n_original) if n_original else 0


def fill(
    rows: Sequence[Sequence[int] | NDArray[Any]],
    value: int,
    multiple: int,
    padding: Padding = RIGHT,
) -> Tensor:
    """Return rows of numbers as one tensor (B, T), padded to a multiple of some length."""
    length = max(len(row) for row in rows)
    length = -(-length // multiple) * multiple
    result = np.full((len(rows), length), value, dtype=np.int64)
    for i, row in enumerate(rows):
        start = length - len(row) if padding.side == "left" else 0
        result[i, start : start + len(row)] = row
    return torch.from_numpy(result)


def mask_of(
    rows: Sequence[Sequence[int] | NDArray[Any]], multiple: int, padding: Padding = RIGHT
) -> Tensor:
    """Return the attention mask (B, T) of padded rows: 1 for tokens, 0 for padding."""
    return fill([np.ones(len(row), dtype=np.int64) for row in rows], 0, multiple, padding)


def positions_of(mask: Tensor) -> Tensor:
    """Return the position of each token in its own row, given the attention mask (B, T)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def takes_positions(model: nn.Module) -> bool:
    """Return whether a model's forward accepts the positions of the tokens."""
    return "position_ids" in inspect.signature(model.forward).parameters


def candidates(model: nn.Module, tokenizer_side: str, without_mask: bool) -> Iterator[Padding]:
    """Yield ways to pad rows, the tokenizer's own side first.

    Args:
        model: The model that reads them.
        tokenizer_side: `left` or `right`.
        without_mask: Whether to try first to give no mask, which is for models that look back only.
    """
    if without_mask:
        yield WITHOUT_MASK
    other = {"left": "right", "right": "left"}[tokenizer_side]
    sides: list[Literal["right", "left"]] = [
        "left" if side == "left" else "right" for side in (tokenizer_side, other)
    ]
    for side in sides:
        yield Padding(side)
        if side == "left" and takes_positions(model):
            yield Padding(side, positions=True)


def logits_by_length(
    model: nn.Module, inputs: Mapping[str, Tensor], lengths: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """Return the logits of right-padded rows, computing rows of the same length together.

    Args:
        model: A model that does not support padding.
        inputs: Tensors (B, T).
        lengths: Tokens of each row (B,).
        options: Other arguments of its forward.

    Returns:
        (B, C), or (B, T, V) with zeros where a row is filled.
    """
    width = next(iter(inputs.values())).shape[1]
    result: Tensor | None = None
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero().squeeze(1)
        part = {key: value[rows, :length] for key, value in inputs.items()}
        logits = model(**part, **options).logits
        if result is None:
            shape = [len(lengths), *logits.shape[1:]]
            if logits.ndim == 3:
                shape[1] = width
            result = logits.new_zeros(shape)
        if logits.ndim == 3:
            result[rows, :length] = logits
        else:
            result[rows] = logits
    assert result is not None
    return result


def tolerance(alone: Tensor, noise: Tensor | float, dtype: torch.dtype) -> float:
    """Return how much equal outputs may differ because of rounding.

    Args:
        alone: The outputs of a row computed alone.
        noise: The largest difference that computing it twice made.
        dtype: The dtype of the computation.
    """
    scale = float(alone.abs().max())
    eps = torch.finfo(dtype).eps
    return max(ROUNDING.get(dtype, 128) * eps * scale, NOISE * float(noise))
