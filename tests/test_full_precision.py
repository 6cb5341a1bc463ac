"""Tests that a 16-bit model computes like its float32 copy within `full_precision`."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple

import pytest
import tiny
import torch
from torch import nn
from torch.utils._pytree import tree_map

from lora_cli.models.full_precision import _all_widened, _widened, full_precision

Pair = namedtuple("Pair", "one other")


def test_tensors_in_nested_arguments_are_converted_to_float32() -> None:
    half, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2)
    value = (
        half, [whole, {"a": half.half(), "b": 1, "c": None}], Pair(half, "x"), (), [],
        OrderedDict(d=half), torch.bfloat16, torch.int64, slice(0, 1), ..., 1.5,
        torch.device("cpu"), torch.Size([2]), torch.arange(3),
    )  # fmt: skip
    found = _all_widened(value)
    assert str(found) == str(tree_map(_widened, value))
    assert type(found[2]) is Pair
    assert type(found[5]) is OrderedDict
    assert found[0].dtype == found[1][1]["a"].dtype == found[2].one.dtype == torch.float32
    assert found[1][0] is whole
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_those_of_the_same_weights_in_float32(dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    wide = copy.deepcopy(model).float()
    ids = torch.arange(4, 16).reshape(2, 6)
    with torch.no_grad(), full_precision(model) as computed:
        found = model(input_ids=ids).logits
    assert computed == found.dtype == torch.float32
    with torch.no_grad():
        wanted = wide(input_ids=ids).logits
        assert not torch.allclose(model(input_ids=ids).logits.float(), wanted, atol=1e-6)
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def test_embedding_rows_are_converted_also_with_keyword_arguments() -> None:
    table, ids = torch.randn(5, 4).bfloat16(), torch.tensor([[4, 0], [1, 4]])
    with full_precision(nn.Linear(1, 1).bfloat16()):
        found = torch.embedding(weight=table, indices=ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, table.float()[ids])
