"""Which attention layers the kernel for short rows supports; tests/gpu has the kernel itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MODULE = "lora_cli.training.short_attention"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "vocab_size": 9,
}


@pytest.fixture
def short_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    # the module of the kernel needs Triton
    kernel = SimpleNamespace(HEAD_DIMS=(32, 64), MAX_TOKENS=128, short_attention=None)
    monkeypatch.setitem(sys.modules, "lora_cli.training.short_attention_kernel", kernel)
    with_triton = sys.modules.pop(MODULE, None)
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE]
    if with_triton is not None:
        sys.modules[MODULE] = with_triton


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "n_tokens", "used"),
    [
        (torch.bfloat16, True, 5, True), (torch.float16, True, 128, True),
        (torch.float32, True, 5, False), (torch.bfloat16, True, 129, False),
        (torch.bfloat16, False, 5, False),
    ],
)  # fmt: skip
def test_it_is_used_for_short_rows_in_16_bits_on_a_gpu(
    dtype: torch.dtype, on_gpu: bool, n_tokens: int, used: bool, short_attention: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = BertModel(BertConfig(**SIZES, max_position_embeddings=130)).to(dtype).eval()
    tokens = torch.ones(1, n_tokens, dtype=torch.long)
    before, wanted = ALL_ATTENTION_FUNCTIONS["sdpa"], model(tokens).last_hidden_state
    outputs = []

    def compute() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "is_cuda", on_gpu)
            outputs.append(model(tokens).last_hidden_state)

    assert short_attention.uses_short_attention(compute) is used
    assert torch.equal(outputs[0], wanted)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_it_is_not_used_for_causal_attention(
    short_attention: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LlamaModel(LlamaConfig(**SIZES)).to(torch.bfloat16)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    tokens = torch.ones(1, 5, dtype=torch.long)
    assert short_attention.uses_short_attention(lambda: model(tokens)) is False
