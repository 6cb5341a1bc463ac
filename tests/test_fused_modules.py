"""Gated MLPs and RMS norms by kernels: which modules, what they compute, and what else stays."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lora_cli.adapters.lora import LoRALinear
from lora_cli.training import fused_modules
from lora_cli.training.fused_modules import FusedModules, ReplacedForward, RMSNorms, has_code_of


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let tensors say that they are on a GPU, and count the uses of torch's kernel."""
    found: list[tuple[int, ...]] = []
    real = F.rms_norm

    def counting(x: Tensor, *others: Any) -> Tensor:
        found.append(tuple(x.shape))
        return real(x, *others)

    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(F, "rms_norm", counting)
    return found


def norm(architecture: Any, **given: Any) -> nn.Module:
    found: nn.Module = architecture(8, **given).to(torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    return found


@pytest.mark.parametrize("architecture", [LlamaRMSNorm, Qwen3RMSNorm, Olmo2RMSNorm, GemmaRMSNorm])
def test_norms_that_compute_as_llama_s_do_are_computed_by_the_kernel(
    architecture: Any, uses: list[tuple[int, ...]]
) -> None:
    given = norm(architecture, eps=0.3)
    norms = RMSNorms(nn.Sequential(nn.Linear(2, 2), given))
    x = torch.randn(2, 3, 8).to(torch.bfloat16).requires_grad_()
    exact = given.float()(x.float()) if architecture is not GemmaRMSNorm else given(x)
    given.to(torch.bfloat16)
    wanted, slope = given(x), torch.randn(2, 3, 8)
    with norms:
        found = given(x)
    assert type(given) is architecture
    is_llama_s = architecture in (LlamaRMSNorm, Qwen3RMSNorm)
    assert uses == ([(2, 3, 8)] if is_llama_s else [])
    assert len(norms.replaced) == is_llama_s
    assert (found - exact).abs().max() <= (wanted - exact).abs().max() + 1e-6
    gradients = [torch.autograd.grad(y, x, slope.to(y.dtype))[0] for y in (found, wanted)]
    assert (gradients[0] - gradients[1]).abs().max() <= 0.02 * gradients[1].abs().max()


def test_a_norm_that_is_trained_or_computes_in_32_bits_stays(uses: list[tuple[int, ...]]) -> None:
    given = norm(LlamaRMSNorm)
    assert RMSNorms(norm(LlamaRMSNorm).requires_grad_()).replaced == []
    assert RMSNorms(norm(LlamaRMSNorm).float()).replaced == []
    x = torch.randn(2, 8)
    with RMSNorms(given):
        assert given(x).dtype == torch.float32  # the weight has 16 bits, and the product more
        assert uses == []
        given(x.to(torch.bfloat16))
    assert uses == [(2, 8)]


def test_code_is_the_same_only_with_the_same_numbers() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Raise to a power."""
            return x.pow(2)

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Do as One does."""
            return x.pow(2)

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.pow(3)

    assert has_code_of(Same(), One)
    assert not has_code_of(Other(), One)
    wrapped = Same()
    wrapped.forward = wrapped.forward  # type: ignore[method-assign] # as a wrapper leaves it
    assert not has_code_of(wrapped, One)


def test_a_model_runs_by_kernels_only_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class ByKernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(type(self).__name__)
            return super().forward(x)  # type: ignore[no-any-return, misc]

    class GatedMLPs(ReplacedForward):
        def __init__(self, modules: list[nn.Module]) -> None:
            mlps = [part for part in modules[0].modules() if type(part).__name__ == "LlamaMLP"]
            super().__init__(mlps, ByKernel)
            self.layers = [mlp.get_submodule("gate_proj") for mlp in mlps]

    seen: list[str] = []
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 9}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3)).requires_grad_(False)
    assert FusedModules(model, autocast=True).layers == [], "Triton is not there"
    monkeypatch.setattr(fused_modules, "has_triton", lambda: True)
    stub = SimpleNamespace(GatedMLPs=GatedMLPs)  # the module itself needs Triton
    monkeypatch.setitem(sys.modules, "lora_cli.training.gated_mlp", stub)
    assert FusedModules(model, autocast=False).layers == [], "all is computed in 32 bits"
    assert FusedModules(model, autocast=True).kind == "3 gated MLPs by one kernel each"
    model.to(torch.bfloat16)
    fused = FusedModules(model, autocast=False)
    assert fused.kind == "3 gated MLPs and 7 norms by one kernel each"
    assert len(fused.layers) == 10
    tokens = torch.tensor([[1, 2, 3]])
    wanted = model(tokens).logits
    assert seen == []
    with fused.in_use():
        found = model(tokens).logits
    assert seen == ["LlamaMLP"] * 3
    assert torch.equal(found, wanted)
    model(tokens)
    assert len(seen) == 3
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "v_proj"),
                             (layer.mlp, "gate_proj"), (layer.mlp, "up_proj")):  # fmt: skip
            setattr(parent, name, LoRALinear(getattr(parent, name), rank=2, alpha=4))
    fused = FusedModules(model, autocast=False)
    fused.choose_products(lambda: model(tokens))
    groups = [product.layers for product in fused.updates]  # the kernel has those of the gates
    parts = [layer.self_attn for layer in model.model.layers]
    assert groups == [[part.q_proj, part.v_proj] for part in parts]
    with fused.in_use():
        assert all(type(layer) is not LoRALinear for group in groups for layer in group)
    assert all(type(layer) is LoRALinear for group in groups for layer in group)
