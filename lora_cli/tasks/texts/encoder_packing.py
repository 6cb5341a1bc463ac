"""Encoders without padding: several texts share a row, and a mask keeps them apart.

More than half of a padded batch of sentences is padding, which a GPU computes like everything else.
Here the texts of a batch are put one behind the other into rows of the same width, longest first,
each into the first row with room for it. Attention gets a mask by which a token sees the tokens of
its own text alone, and each text's positions start anew. Rows are nine tenths full, and there are
few different shapes, which is what a captured graph needs.

Whether an architecture computes the same in this way is found by trying it (`padding_check.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

WIDTH = 128  # the width of rows is a multiple of this, or the number of the model's positions
TEXT_OF_TOKEN = "text_of_token"  # (R, W): which text of the batch a token belongs to, or -1
TOKENS = "tokens"  # (B,): where each text begins in the flattened rows; or (B, T): all its tokens
NOT_FOR_THE_MODEL = (TEXT_OF_TOKEN, TOKENS)


def row_width(lengths: Sequence[int], most: int | None, multiple: int) -> int:
    """Return the width of the rows for texts of some lengths.

    Args:
        lengths: Tokens of each text.
        most: The number of the model's positions, if it is limited.
        multiple: The width is a multiple of this, for the speed of GPUs.
    """
    longest, total = max(lengths), -(-sum(lengths) // multiple) * multiple
    return max(longest, min(-(-longest // WIDTH) * WIDTH, total, most or total))


def place(lengths: Sequence[int], width: int) -> tuple[NDArray[np.int64], int]:
    """Return where each text begins in the flattened rows (B,), and the number of rows."""
    starts = np.empty(len(lengths), dtype=np.int64)
    used: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, n in enumerate(used) if n + lengths[i] <= width), len(used))
        if row == len(used):
            used.append(0)
        starts[i] = row * width + used[row]
        used[row] += lengths[i]
    return starts, len(used)


def share_rows(
    texts: Mapping[str, Sequence[Sequence[int] | NDArray[Any]]],
    fill_with: Mapping[str, int],
    width: int,
    first_position: int,
    n_answers: int | None,
) -> dict[str, Tensor]:
    """Return the texts of a batch in shared rows.

    Args:
        texts: For `input_ids`, and whatever else a token has, one sequence a text.
        fill_with: The values of padding.
        width: Tokens of a row.
        first_position: The position of each text's first token.
        n_answers: How many answers each text gets, one for each token (T); None: the text as a
            whole gets one.

    Returns:
        `input_ids`, `position_ids`, the others of `texts`, and `text_of_token`, each (R, W); and
        `tokens`, (B,) or (B, T), which says where the answers are.
    """
    lengths = np.array([len(text) for text in texts["input_ids"]])
    starts, n_rows = place(lengths.tolist(), width)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    where = np.repeat(starts, lengths) + within

    def rows_of(values: NDArray[Any], empty: int) -> Tensor:
        rows = np.full(n_rows * width, empty, dtype=np.int64)
        rows[where] = values
        return torch.from_numpy(rows.reshape(n_rows, width))

    inputs = {key: rows_of(np.concatenate(all_), fill_with[key]) for key, all_ in texts.items()}
    inputs["position_ids"] = rows_of(within + first_position, first_position)
    inputs[TEXT_OF_TOKEN] = rows_of(np.repeat(np.arange(len(lengths)), lengths), -1)
    tokens = starts
    if n_answers is not None:
        tokens = starts[:, None] + np.minimum(np.arange(n_answers), lengths[:, None] - 1)
    inputs[TOKENS] = torch.from_numpy(tokens)
    return inputs


def logits_of_shared_rows(
    model: nn.Module, inputs: Mapping[str, Tensor], options: Mapping[str, Any]
) -> Tensor:
    """Return the model's logits for texts in shared rows: (B, C), or (B, T, C) for every token.

    After the last token of a text, its answers are repeated.
    """
    given = dict(inputs)
    text, tokens = given.pop(TEXT_OF_TOKEN), given.pop(TOKENS)
    given["attention_mask"] = attention_mask(text, _dtype_of_attention(model))
    if tokens.ndim == 2:
        logits: Tensor = model(**given, **options).logits
        return logits.flatten(0, 1)[tokens]

    def keep_first_tokens(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        # the following layers read the first token of each row, so from here on a row is a text
        if isinstance(output, Tensor):
            return output.flatten(0, 1)[tokens].unsqueeze(1)
        hidden = output[0].flatten(0, 1)[tokens].unsqueeze(1)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    hook = _layers_of(model).register_forward_hook(keep_first_tokens)
    try:
        pooled: Tensor = model(**given, **options).logits
    finally:
        hook.remove()
    return pooled


def attention_mask(text_of_token: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask (R, 1, W, W): 0 within a text, otherwise the minimum."""
    apart = text_of_token[:, None, :, None] != text_of_token[:, None, None, :]
    mask = torch.zeros(apart.shape, dtype=dtype, device=apart.device)
    return mask.masked_fill_(apart, torch.finfo(dtype).min)


def _dtype_of_attention(model: nn.Module) -> torch.dtype:
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    return dtype


def _layers_of(model: nn.Module) -> nn.Module:
    """Return the module whose output has a row for each row of the input: the encoder itself.

    A pooler after it reads only the first token of each row.
    """
    body = model.base_model
    assert isinstance(body, nn.Module)
    if getattr(body, "pooler", None) is None:
        return body
    layers = getattr(body, "encoder", body)
    assert isinstance(layers, nn.Module)
    return layers
