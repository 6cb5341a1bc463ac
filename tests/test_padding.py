"""Rows are filled on their side, with masks and positions as transformers' own tokenizers give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from lora_cli.tasks.texts.padding import (
    NONE,
    RIGHT,
    WITHOUT_MASK,
    Padding,
    candidates,
    fill,
    logits_by_length,
    mask_of,
    positions_of,
    takes_positions,
    tolerance,
)

LEFT = Padding("left")
WITH_POSITIONS = Padding("left", positions=True)


@pytest.mark.parametrize("padding", [RIGHT, LEFT, NONE])
@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("lengths", [[3, 5, 1], [4, 8], [8]])
def test_rows_and_masks_are_those_of_the_tokenizer(
    padding: Padding, multiple: int, lengths: list[int]
) -> None:
    rows = [list(range(5, 5 + length)) for length in lengths]
    side = "left" if padding is LEFT else "right"
    wanted = tiny.tokenizer().pad(
        {"input_ids": rows}, padding_side=side, pad_to_multiple_of=multiple, return_tensors="pt"
    )
    assert torch.equal(fill(rows, tiny.PAD, multiple, padding), wanted["input_ids"])
    mask = mask_of(rows, multiple, padding)
    assert torch.equal(mask, wanted["attention_mask"])
    positions = positions_of(mask)
    for row, kept, length in zip(positions, mask.bool(), lengths, strict=True):
        assert row[kept].tolist() == list(range(length))
        assert row.min() == 0


def test_the_tokenizer_s_side_is_tried_first_and_positions_where_the_model_takes_them() -> None:
    encoder, decoder = nn.Linear(1, 1), tiny.gpt2()
    assert not takes_positions(encoder)
    assert takes_positions(decoder)
    assert list(candidates(encoder, "right", False)) == [RIGHT, LEFT]
    assert list(candidates(encoder, "left", False)) == [LEFT, RIGHT]
    assert list(candidates(decoder, "right", False)) == [RIGHT, LEFT, WITH_POSITIONS]
    assert list(candidates(decoder, "left", False)) == [LEFT, WITH_POSITIONS, RIGHT]
    assert list(candidates(decoder, "right", True)) == [WITHOUT_MASK, RIGHT, LEFT, WITH_POSITIONS]


def test_each_way_is_named() -> None:
    assert [str(way) for way in (RIGHT, WITHOUT_MASK, LEFT, WITH_POSITIONS, NONE)] == [
        "on the right",
        "on the right without a mask",
        "on the left",
        "on the left with positions",
        "rows of the same length together",
    ]


class Lengths(nn.Module):
    """Answers each token, or each row, with its numbers and the width of the batch."""

    def __init__(self, per_token: bool) -> None:
        super().__init__()
        self.per_token, self.widths = per_token, []

    def forward(self, input_ids: Any, scale: float) -> Any:
        self.widths.append(tuple(input_ids.shape))
        width = torch.full_like(input_ids, input_ids.shape[1])
        logits = torch.stack([input_ids * scale, width], -1)
        return SimpleNamespace(logits=logits if self.per_token else logits.sum(1))


@pytest.mark.parametrize("per_token", [True, False])
def test_rows_of_the_same_length_are_computed_together_without_what_fills_them(
    per_token: bool,
) -> None:
    rows = [[5, 6, 7], [8], [9, 10, 11], [12, 13]]
    lengths = torch.tensor([len(row) for row in rows])
    model = Lengths(per_token)
    found = logits_by_length(model, {"input_ids": fill(rows, 99, 4)}, lengths, {"scale": 2.0})
    assert model.widths == [(1, 1), (1, 2), (2, 3)]
    for row, answer in zip(rows, found, strict=True):
        tokens = torch.tensor([[2.0 * token, len(row)] for token in row])
        if per_token:
            assert torch.equal(answer, torch.cat([tokens, torch.zeros(4 - len(row), 2)]))
        else:
            assert torch.equal(answer, tokens.sum(0))


@pytest.mark.parametrize(
    ("dtype", "units"),
    [(torch.float32, 128), (torch.float16, 16), (torch.bfloat16, 8), (torch.float64, 128)],
)
def test_rounding_is_so_many_units_of_the_largest_output(dtype: torch.dtype, units: int) -> None:
    alone = torch.tensor([-4.0, 1.0])
    last_bit = torch.finfo(dtype).eps
    assert tolerance(alone, 0.0, dtype) == pytest.approx(4 * units * last_bit, abs=0.0)
    noise = torch.tensor(100 * last_bit * 4)
    assert tolerance(alone, noise, dtype) == pytest.approx(8 * float(noise), abs=0.0)
