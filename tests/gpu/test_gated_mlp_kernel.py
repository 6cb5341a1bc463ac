"""Tests of the kernel for gated MLPs, against its equations and a model without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lora_dropout_kernel import masks
from test_precision import pytestmark as on_a_gpu
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralConfig, MistralMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3MLP

from lora_cli.adapters.lora import LoRALinear
from lora_cli.training.stacked_products import new_seed

pytestmark = on_a_gpu
SIZES = {"hidden_size": 96, "intermediate_size": 136}


def reference(
    tensors: list[Tensor | None], is_gelu: bool, kept: Tensor | float = 1.0
) -> tuple[Tensor, Tensor | None]:
    gate, up, gate_h, up_h, gate_b, up_b, a = tensors
    act = nn.GELU(approximate="tanh") if is_gelu else nn.SiLU()
    y = act(gate + gate_h @ gate_b.T) * (up + up_h @ up_b.T)
    return y, None if a is None else (y * kept) @ a.T


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "n", "ranks"),
    [
        ((2, 128), 256, (16, 16, 16)), ((3, 37), 136, (4, 7, 3)), ((1, 1), 8, (1, 1, 9)),
        ((2, 65), 130, (33, 64, 17)), ((2, 40), 200, (8, 8, None)),
        ((2, 33), 96, (0, 0, None)), ((2, 33), 96, (4, 0, 8)),  # layers without an update
        ((1, 0), 16, (2, 2, 2)),  # an expert without tokens
        ((3, 1025), 136, (8, 4, 16)), ((1, 2100), 72, (40, 8, 8)),  # several segments of tokens
    ],
)  # fmt: skip
def test_results_and_gradients_equal_those_of_the_equations(
    shape: tuple[int, int], n: int, ranks: tuple[Any, ...], dtype: torch.dtype, is_gelu: bool,
    p: float,
) -> None:  # fmt: skip
    from lora_cli.training.gated_mlp_kernel import gated_product

    torch.manual_seed(0)
    sizes = [(*shape, n), (*shape, n), (*shape, ranks[0]), (*shape, ranks[1]), (n, ranks[0]),
             (n, ranks[1]), (ranks[2], n) if ranks[2] else None]  # fmt: skip
    given: list[Tensor | None] = [
        torch.randn(size, device="cuda").to(dtype).requires_grad_() if size else None
        for size in sizes
    ]
    exact = [x if x is None else x.detach().double().requires_grad_() for x in given]
    seed, kept = None, 1.0
    if p:
        seed = new_seed(given[0])
        kept = masks(seed, 1, shape[0] * shape[1], n, p)[0].view(*shape, n) / (1 - p)
    y, h = gated_product(*given, seed, p, is_gelu)
    wanted_y, wanted_h = reference(exact, is_gelu, kept)
    slopes = [torch.randn_like(x) if x is not None else None for x in (wanted_y, wanted_h)]
    found, wanted = [y], [wanted_y]
    for tensors, results, kept in ((given, (y, h), found), (exact, (wanted_y, wanted_h), wanted)):
        pairs = [(r, s.to(r.dtype)) for r, s in zip(results, slopes, strict=True) if s is not None]
        results, slope = zip(*pairs, strict=True)
        kept += torch.autograd.grad(results, [x for x in tensors if x is not None], slope)
    assert h.shape == ((*shape, ranks[2]) if ranks[2] else (0,))
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        if not a.any() and not b.any():
            continue
        a, b = a.double().flatten(), b.flatten()
        assert torch.nn.functional.cosine_similarity(a, b, 0) > 0.9999
        assert (a - b).abs().max() <= (0.02 if dtype == torch.bfloat16 else 0.003) * b.abs().max()


def adapted(kind: str, **given: Any) -> nn.Module:
    architecture: Any
    architecture, config = {
        "llama": (LlamaMLP, LlamaConfig(**SIZES)),
        "mistral": (MistralMLP, MistralConfig(**SIZES)),
        "qwen3": (Qwen3MLP, Qwen3Config(**SIZES)),
        "gemma": (GemmaMLP, GemmaConfig(**SIZES, hidden_activation="gelu_pytorch_tanh")),
        "exact gelu": (LlamaMLP, LlamaConfig(**SIZES, hidden_act="gelu")),
    }[kind]
    torch.manual_seed(0)
    mlp: nn.Module = architecture(config).to(torch.bfloat16).requires_grad_(False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        if name not in given.get("without", ()):
            dropout = given.get("dropout", {}).get(name, 0.0)
            layer = LoRALinear(getattr(mlp, name), rank=4, alpha=6, dropout=dropout)
            nn.init.normal_(layer.lora_A, std=0.2)
            nn.init.normal_(layer.lora_B, std=0.2)
            layer.enabled = name not in given.get("off", ())
            setattr(mlp, name, layer)
    return mlp.cuda().train()


def outputs_and_gradients(mlp: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    y = mlp(x)
    layers = [layer for layer in mlp.modules() if isinstance(layer, LoRALinear) and layer.enabled]
    trained = [matrix for layer in layers for matrix in (layer.lora_A, layer.lora_B)]
    slope = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], slope.to(y.dtype))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("kind", "given", "uses"),
    [
        ("llama", {}, True), ("mistral", {}, True), ("qwen3", {}, True),
        ("gemma", {}, True), ("exact gelu", {}, False),
        ("llama", {"without": ["up_proj"]}, True), ("llama", {"without": ["down_proj"]}, True),
        ("llama", {"off": ["gate_proj"]}, True), ("llama", {"off": ["down_proj"]}, True),
    ],
)  # fmt: skip
def test_an_mlp_equals_that_of_its_architecture(
    kind: str, given: dict[str, Any], uses: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_cli.training import gated_mlp

    torch._dynamo.reset()
    real, calls = gated_mlp.gated_product, []
    if not compiled:
        monkeypatch.setattr(
            gated_mlp, "gated_product", lambda *parts: (calls.append(1), real(*parts))[1]
        )
    mlp = adapted(kind, **given)
    x = torch.randn(2, 33, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = outputs_and_gradients(mlp, x)
    own = type(mlp)
    with gated_mlp.GatedMLPs([mlp]):
        found = outputs_and_gradients(torch.compile(mlp) if compiled else mlp, x)
    assert type(mlp) is own
    assert compiled or bool(calls) is uses
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 0.03 * b.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
def test_each_layer_drops_elements_of_its_input(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_cli.training import gated_mlp, stacked_products

    torch._dynamo.reset()
    mlp: Any = adapted("llama", dropout={"gate_proj": 0.5, "up_proj": 0.5, "down_proj": 0.4})
    x = torch.randn(2, 33, 96, device="cuda", dtype=torch.bfloat16)
    seeds = [torch.tensor([seed], device="cuda") for seed in (5, 9)]
    monkeypatch.setattr(stacked_products, "new_seed", lambda x: seeds[0])
    monkeypatch.setattr(gated_mlp, "new_seed", lambda x: seeds[1])
    with gated_mlp.GatedMLPs([mlp], compiled=compiled):
        found = (torch.compile(mlp) if compiled else mlp)(x)

    def output(layer: Any, x: Tensor, seed: Tensor, place: int) -> Tensor:
        p, n = layer.dropout.p, x.shape[-1]
        kept = masks(seed, 2, 66, n, p)[place].view(2, 33, n)
        y: Tensor = layer.base(x)
        return y + layer.update(kept * x / (1 - p)).to(y.dtype)

    gate, up = output(mlp.gate_proj, x, seeds[0], 0), output(mlp.up_proj, x, seeds[0], 1)
    wanted = output(mlp.down_proj, nn.functional.silu(gate) * up, seeds[1], 0)
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()
