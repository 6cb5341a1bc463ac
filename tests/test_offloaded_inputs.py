"""Tests that exactly the inputs of layers are offloaded, and gradients stay the same."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from lora_cli.models import offloaded_inputs
from lora_cli.models.gradient_checkpointing import enable_gradient_checkpointing
from lora_cli.models.offloaded_inputs import OffloadedInputs, OffloadingCheckpoint, offload_inputs

NO_RECIPE: Any = None  # only needed for error messages


class Bench:
    """A stand-in for a GPU: copies are synchronous, and recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out: list[Tensor] = []
        self.back: list[Tensor] = []
        monkeypatch.setattr(Tensor, "is_cuda", True)
        monkeypatch.setattr(OffloadedInputs, "_to_host", self._to_host)
        monkeypatch.setattr(OffloadedInputs, "_to_device", self._to_device)

    def _to_host(self, x: Tensor) -> Any:
        self.out.append(x.clone())
        return offloaded_inputs._Offloaded(x.clone(), None)

    def _to_device(self, kept: Any) -> Tensor:
        self.back.append(kept.host)
        return kept.host


def model() -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=40, use_cache=False,
    )  # fmt: skip
    return LlamaModel(config).train()


def gradients(found: nn.Module) -> list[Tensor]:
    y = found(input_ids=torch.arange(4, 18).view(2, 7)).last_hidden_state
    return list(torch.autograd.grad(y.square().sum(), list(found.parameters())))


def test_exactly_the_inputs_of_layers_are_offloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, inputs = model(), []
    wanted = gradients(found)
    enable_gradient_checkpointing(found, NO_RECIPE, "offload")
    assert all(
        isinstance(layer._gradient_checkpointing_func, OffloadingCheckpoint)
        for layer in found.layers
    )
    bench = Bench(monkeypatch)
    for layer in found.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].clone()))
    for a, b in zip(gradients(found), wanted, strict=True):
        assert torch.equal(a, b)
    assert len(bench.out) == len(bench.back) == 3
    for a, b in zip(bench.out, inputs[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(bench.back, bench.out[::-1], strict=True):  # from the last layer to the first
        assert torch.equal(a, b)


def test_other_saved_tensors_are_not_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    x = torch.randn(4, 4, requires_grad=True)
    kept = x * 1
    with OffloadedInputs().saved_on_host(kept):
        y = kept * torch.randn(4, 4, requires_grad=True)  # saves both factors
        y = y * kept[:2].repeat(2, 1)
    y.sum().backward()
    assert [tuple(tensor.shape) for tensor in bench.out] == [(4, 4)]
    assert torch.equal(bench.out[0], kept)


def test_an_offloaded_input_is_freed_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Bench(monkeypatch)
    x = torch.randn(4, 4, requires_grad=True)
    kept = x * 1
    alive = weakref.ref(kept)
    with OffloadedInputs().saved_on_host(kept):
        y = kept * kept
    del kept
    assert alive() is None
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x)


def test_nothing_is_offloaded_on_a_cpu() -> None:
    found = model()
    enable_gradient_checkpointing(found, NO_RECIPE, True)
    wanted = gradients(found)
    offload_inputs(found)
    for a, b in zip(gradients(found), wanted, strict=True):
        assert torch.equal(a, b)
