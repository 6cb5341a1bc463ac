"""Gated MLPs are handed to the kernel with the right matrices; tests/gpu has the kernel itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP

from lora_cli.adapters.dora import DoRALinear
from lora_cli.adapters.lora import LoRALinear

SIZES: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
MODULE = "lora_cli.training.gated_mlp"
calls: list[bool] = []


def by_equations(
    gate: Tensor, up: Tensor, gate_h: Tensor, up_h: Tensor, gate_b: Tensor, up_b: Tensor,
    down_a: Tensor | None, down_seed: Tensor | None, down_p: float, is_gelu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Stands for the kernel, which needs Triton. Its mask is that of `masked`."""
    calls.append(is_gelu)
    act = nn.GELU(approximate="tanh") if is_gelu else nn.SiLU()
    y = act(gate + gate_h @ gate_b.T) * (up + up_h @ up_b.T)
    if down_a is None:
        return y, gate.new_empty(0)
    return y, (y if down_seed is None else masked(y, down_seed, down_p)) @ down_a.T


def masked(x: Tensor, seed: Tensor, p: float) -> Tensor:
    draw = torch.rand(x.shape, generator=torch.Generator().manual_seed(int(seed)))
    return x * (draw >= p) / (1 - p)


@pytest.fixture
def gated_mlp(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    calls.clear()
    kernel = SimpleNamespace(gated_product=by_equations)
    monkeypatch.setitem(sys.modules, "lora_cli.training.gated_mlp_kernel", kernel)
    with_triton = sys.modules.pop(MODULE, None)
    module = importlib.import_module(MODULE)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    yield module
    del sys.modules[MODULE]
    if with_triton is not None:
        sys.modules[MODULE] = with_triton


def adapted(mlp: nn.Module, **dropout: float) -> nn.Module:
    torch.manual_seed(0)
    mlp.to(torch.bfloat16).requires_grad_(False)
    for name, rank in (("gate_proj", 2), ("up_proj", 3), ("down_proj", 4)):
        if hasattr(mlp, name):
            base = getattr(mlp, name)
            layer = LoRALinear(base, rank=rank, alpha=5, dropout=dropout.get(name, 0.0))
            nn.init.normal_(layer.lora_A, std=0.3)
            nn.init.normal_(layer.lora_B, std=0.3)
            setattr(mlp, name, layer)
    return mlp.train()


MLPS: dict[str, tuple[Any, Any, list[bool]]] = {
    "silu": (LlamaMLP, LlamaConfig(**SIZES), [False]),
    "gelu": (GemmaMLP, GemmaConfig(**SIZES, hidden_activation="gelu_pytorch_tanh"), [True]),
    "another activation": (LlamaMLP, LlamaConfig(**SIZES, hidden_act="gelu"), []),
    "another equation": (Phi3MLP, Phi3Config(**SIZES), []),
}


@pytest.mark.parametrize("kind", MLPS)
@pytest.mark.parametrize("off", [None, "gate_proj", "down_proj"])
def test_an_mlp_equals_that_of_its_architecture(
    kind: str, off: str | None, gated_mlp: ModuleType
) -> None:
    architecture, config, uses = MLPS[kind]
    mlp = adapted(architecture(config))
    gated = gated_mlp.GatedMLPs([nn.Sequential(mlp)])
    assert [type(found) for found, _ in gated.replaced] == [architecture] * len(uses)
    if off is not None and hasattr(mlp, off):  # after the choice
        getattr(mlp, off).enabled = False
    x = torch.randn(2, 5, 12, dtype=torch.bfloat16)
    wanted = mlp(x)
    with gated:
        found = mlp(x)
    assert calls == uses
    assert type(mlp) is architecture
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()
    with gated:  # numbers of 32 bits are not the kernel's
        assert torch.equal(mlp.float()(x.float()), mlp(x.float()))
    assert calls == uses


def test_each_layer_drops_elements_of_its_input(
    gated_mlp: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp: Any = adapted(LlamaMLP(LlamaConfig(**SIZES)), gate_proj=0.5, up_proj=0.3, down_proj=0.4)
    x, seed = torch.randn(2, 5, 12, dtype=torch.bfloat16), torch.tensor([7])
    monkeypatch.setattr(gated_mlp, "new_seed", lambda x: seed)
    torch.manual_seed(3)
    with gated_mlp.GatedMLPs([mlp]):
        found = mlp(x)
    torch.manual_seed(3)
    y = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    wanted = mlp.down_proj.base(y) + mlp.down_proj.update(masked(y, seed, 0.4))
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()
    mlp.eval()
    with gated_mlp.GatedMLPs([mlp]):
        found = mlp(x)
    assert (found - mlp(x)).abs().max() <= 0.03 * wanted.abs().max()
    assert calls == [False] * 2


@pytest.mark.parametrize("lacks", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("why", ["no adapter", "another adapter", "large rank"])
def test_the_compiler_leaves_to_the_kernel_the_updates_before_the_gate(
    lacks: str, why: str, gated_mlp: ModuleType
) -> None:
    mlp = adapted(LlamaMLP(LlamaConfig(**SIZES)))
    x = torch.randn(2, 5, 12, dtype=torch.bfloat16)
    base = getattr(mlp, lacks).base
    other = {
        "no adapter": base,
        "another adapter": DoRALinear(base, rank=2, alpha=3),
        "large rank": LoRALinear(base, rank=65, alpha=3),
    }[why]
    nn.init.normal_(getattr(other, "lora_B", torch.empty(1)))
    setattr(mlp, lacks, other)
    by_compiler = gated_mlp.GatedMLPs([mlp], compiled=True)
    assert len(by_compiler.replaced) == (lacks == "down_proj")
    wanted = mlp.eval()(x)
    with gated_mlp.GatedMLPs([mlp]):  # one that is not compiled has the kernel in any case
        found = mlp(x)
    assert calls == [False]
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()
