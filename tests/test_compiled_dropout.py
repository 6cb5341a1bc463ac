"""The backward pass of compiled layers has the masks of dropout of the forward pass."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_cli.adapters.lora import LoRALinear
from lora_cli.training.compiled_layers import CHECKPOINTING_BUDGET, GATED_BUDGET, CompiledLayers

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the compiler needs g++"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # in torch's own modules
]


@torch.library.custom_op("lora_cli_tests::by_seed", mutates_args=())
def by_seed(x: Tensor, seed: Tensor) -> Tensor:
    """Drop half of the elements as a kernel does, whose mask is determined by a seed."""
    draw = torch.rand(x.shape, generator=torch.Generator().manual_seed(int(seed)))
    return x * (draw >= 0.5) * 2


@by_seed.register_fake
def _(x: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(x)


def keep_seed(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


by_seed.register_autograd(
    lambda ctx, slope: (by_seed(slope.contiguous(), ctx.saved_tensors[0]), None),
    setup_context=keep_seed,
)


class Layer(nn.Module):
    def __init__(self, kind: str, checkpointing: bool) -> None:
        super().__init__()
        self.linear = LoRALinear(nn.Linear(32, 48).requires_grad_(False), rank=2, alpha=4)
        nn.init.normal_(self.linear.lora_A)
        nn.init.normal_(self.linear.lora_B)
        self.kind, self.gradient_checkpointing = kind, checkpointing

    def before(self, x: Tensor) -> Tensor:
        """Return numbers above 0, by operations that are cheaper to repeat than to keep."""
        hidden: Tensor = self.linear(x).relu().sin().exp()
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        if self.kind == "torch":
            return nn.functional.dropout(hidden, 0.5)
        return by_seed(hidden, torch.randint(2**63 - 1, (1,)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["torch", "kernel"])
@pytest.mark.parametrize(
    ("budget", "checkpointing"),
    [(1.0, False), (GATED_BUDGET, False), (0.1, False), (CHECKPOINTING_BUDGET, True)],
)
def test_gradients_are_those_of_the_masks_that_the_outputs_show(
    kind: str, budget: float, checkpointing: bool
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(kind, checkpointing) for _ in range(2))
    compiled = CompiledLayers(nn.Sequential(layers), few_shapes=False)
    assert (compiled.memory_budget == CHECKPOINTING_BUDGET) is checkpointing
    compiled.memory_budget = budget
    layer: Any = layers[0]
    trained = [layer.linear.lora_A, layer.linear.lora_B]
    x, masks = torch.randn(64, 32), []
    for _ in range(3):
        with compiled.in_use():
            y = layer(x)
        found = torch.autograd.grad(y.sum(), trained)
        masks.append(y.detach() != 0)
        wanted = torch.autograd.grad((layer.before(x) * masks[-1] * 2).sum(), trained)
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert not torch.equal(masks[0], masks[1])
    assert 0.45 < masks[0].double().mean() < 0.55
