"""Linear layers that read one input are multiplied at once, and nothing else changes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from lora_cli.adapters.lora import LoRALinear
from lora_cli.training.compiled_layers import CompiledLayers
from lora_cli.training.stacked_products import (
    StackedProduct,
    StackedUpdates,
    hidden_of_updates,
    stacked_products,
    stacked_updates,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
ENCODER = {**SIZES, "vocab_size": 40, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PICTURES = {"image_size": 4, "patch_size": 2, "num_channels": 1, "intermediate_size": 24}
QKV = ["query", "key", "value"]
GROUPS: dict[str, tuple[Any, Any, list[list[str]]]] = {
    "roberta": (RobertaModel, RobertaConfig(**ENCODER, **NO_DROPOUT), [QKV] * 3),
    "llama": (
        LlamaModel,
        LlamaConfig(**ENCODER, num_key_value_heads=1),
        [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 3,
    ),
    "albert": (AlbertModel, AlbertConfig(**ENCODER, embedding_size=8, **NO_DROPOUT), [QKV]),
    "vit": (
        ViTModel,
        ViTConfig(**SIZES, **PICTURES, **NO_DROPOUT),
        [["q_proj", "k_proj", "v_proj"]] * 3,
    ),
}  # fmt: skip


def adapted(name: str) -> PreTrainedModel:
    """A model with LoRA on the first and the last layer of each group."""
    architecture, config, groups = GROUPS[name]
    adapted = {group[i] for group in groups for i in (0, -1)}
    torch.manual_seed(0)
    model: PreTrainedModel = architecture(config).requires_grad_(False).train()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.split(".")[-1] in adapted:
            layer = LoRALinear(module, rank=2, alpha=4)
            nn.init.normal_(layer.lora_A)
            nn.init.normal_(layer.lora_B)
            model.set_submodule(path, layer)
    return model


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(3, 1, 4, 4)}
    return {"input_ids": torch.arange(4, 25).view(3, 7)}


def outputs_and_gradients(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    found = model(**inputs).last_hidden_state
    trained = [p for p in model.parameters() if p.requires_grad]
    return [found.detach(), *torch.autograd.grad(found.square().sum(), trained)]


@pytest.mark.parametrize("name", GROUPS)
def test_outputs_and_gradients_are_those_of_separate_products(name: str) -> None:
    model, inputs = adapted(name), inputs_of(name)
    wanted, weights = outputs_and_gradients(model, inputs), dict(model.state_dict())
    products = stacked_products([model], lambda: model(**inputs))
    paths = {module: path for path, module in model.named_modules()}
    names = {module: path.removesuffix(".base").split(".")[-1] for module, path in paths.items()}
    kinds = {
        kind: [p for p in products if isinstance(p, kind)]
        for kind in (StackedProduct, StackedUpdates)
    }
    found = [[names[layer] for layer in product.layers] for product in kinds[StackedProduct]]
    assert found == GROUPS[name][2]
    # Llama's keys and values are fewer than its queries: such updates are computed one by one
    adapted_groups = [
        [group[0], group[-1]] for group in found if group[0] != "q_proj" or name != "llama"
    ]
    found = [[names[layer] for layer in product.layers] for product in kinds[StackedUpdates]]
    assert found == adapted_groups
    for product in products:
        product.__enter__()
    for a, b in zip(outputs_and_gradients(model, inputs), wanted, strict=True):
        torch.testing.assert_close(a, b)
    for product in products:
        assert product.input is None  # nothing of a batch stays in memory
        product.__exit__()
    for product in kinds[StackedProduct]:
        assert product.outputs == []
        assert all(type(layer) is nn.Linear for layer in product.layers)
        assert len({layer.weight.untyped_storage().data_ptr() for layer in product.layers}) == 1
    for product in kinds[StackedUpdates]:
        assert product.updates == []
        assert all(type(layer) is LoRALinear for layer in product.layers)
    for path, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[path]), path
    assert model.state_dict().keys() == weights.keys()
    for a, b in zip(outputs_and_gradients(model, inputs), wanted, strict=True):
        assert torch.equal(a, b)


def test_each_update_has_its_own_dropout() -> None:
    torch.manual_seed(0)
    model = Pair()
    for name in ("one", "two"):
        layer = LoRALinear(getattr(model, name), rank=1, alpha=1, dropout=0.5)
        nn.init.ones_(layer.lora_A)
        nn.init.ones_(layer.lora_B)
        setattr(model, name, layer)
    x = torch.ones(1000, 3)
    products = stacked_products([model], lambda: model(x, "same"))
    (updates,) = [product for product in products if isinstance(product, StackedUpdates)]
    one, two = (update.detach() for update in updates._by_batched_products(x))
    assert not torch.equal(one, two)
    for update in (one, two):  # the sum of three inputs, of which each is doubled or dropped
        assert set(update.unique().tolist()) == {0.0, 2.0, 4.0, 6.0}
        assert abs(update.mean().item() - 3.0) < 0.2
    model.two.alpha, model.two.scaling = 2, 2.0
    kinds = [type(found) for found in stacked_products([model], lambda: model(x, "same"))]
    assert kinds == [StackedProduct]


@pytest.mark.parametrize("name", GROUPS)
def test_updates_of_any_shape_share_one_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted(name), inputs_of(name)
    for path, module in list(model.named_modules()):
        if path.endswith("up_proj.base"):  # another rank and scaling than those of gate_proj
            layer = LoRALinear(module, rank=3, alpha=5)
            nn.init.normal_(layer.lora_A)
            nn.init.normal_(layer.lora_B)
            model.set_submodule(path.removesuffix(".base"), layer)
    wanted = outputs_and_gradients(model, inputs)
    products = stacked_updates([model], lambda: model(**inputs))
    names = {module: path.split(".")[-1] for path, module in model.named_modules()}
    adapted_groups = [[group[0], group[-1]] for group in GROUPS[name][2]]
    assert [[names[layer] for layer in product.layers] for product in products] == adapted_groups
    multiply, ranks = nn.functional.linear, []

    def noted(x: Tensor, weight: Tensor, *bias: Any) -> Tensor:
        ranks.append(len(weight))
        return multiply(x, weight, *bias)

    monkeypatch.setattr(nn.functional, "linear", noted)
    with ExitStack() as stack:
        for product in products:
            stack.enter_context(product)
        found = outputs_and_gradients(model, inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert ranks.count(5) == sum("up_proj" in group for group in adapted_groups)
    assert not {2, 3} & set(ranks)  # no A is multiplied alone
    assert all(product.updates == [] and product.input is None for product in products)
    left_out = [module for module, name in names.items() if name in ("gate_proj", "query")]
    products = stacked_updates([model], lambda: model(**inputs), but=left_out)
    assert not any(set(product.layers) & set(left_out) for product in products)


def test_a_layer_alone_has_its_update_computed_if_it_has_dropout() -> None:
    model, inputs = adapted("llama"), inputs_of("llama")
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    assert all(len(p.layers) > 1 for p in stacked_updates([model], lambda: model(**inputs)))
    for layer in layers:
        layer.dropout.p = 0.1
    products = stacked_updates([model], lambda: model(**inputs))
    assert {layer for product in products for layer in product.layers} == set(layers)
    wanted = outputs_and_gradients(model.eval(), inputs)
    with ExitStack() as stack:
        for product in products:
            stack.enter_context(product)
        for a, b in zip(outputs_and_gradients(model, inputs), wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
def test_without_a_kernel_layers_drop_elements_of_their_input_as_torch_does(
    ranks: tuple[int, int],
) -> None:
    layers = [LoRALinear(nn.Linear(50, 4), rank, alpha=3, dropout=0.4) for rank in ranks]
    for layer in layers:
        nn.init.normal_(layer.lora_A)
    x = torch.randn(20, 50)
    torch.manual_seed(0)
    found = hidden_of_updates(layers, x)
    torch.manual_seed(0)
    for h, layer in zip(found, layers, strict=True):
        dropped = nn.functional.dropout(x, 0.4)
        torch.testing.assert_close(h, dropped @ layer.lora_A.T * (3 / layer.rank))
        layer.eval()
    for h, layer in zip(hidden_of_updates(layers, x), layers, strict=True):
        torch.testing.assert_close(h, x @ layer.lora_A.T * (3 / layer.rank))


class Pair(nn.Module):
    """Two layers, called as `order` says."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.requires_grad_(False)

    def forward(self, x: Tensor, order: str) -> Tensor:
        return {
            "same": lambda: self.one(x) * self.two(x),
            "other": lambda: self.one(x) * self.two(x + 1),
            "chain": lambda: self.two(self.one(x)),
            "twice": lambda: self.one(x) * self.two(x) + self.one(x + 1),
            "again": lambda: self.one(x) * self.one(x),
        }[order]()


@pytest.mark.parametrize(
    ("order", "n_products"), [("same", 1), ("other", 0), ("chain", 0), ("twice", 0), ("again", 0)]
)
def test_only_layers_that_always_read_one_input_are_stacked(order: str, n_products: int) -> None:
    model, x = Pair(), torch.randn(2, 3)
    assert len(stacked_products([model], lambda: model(x, order))) == n_products


def test_layers_with_one_input_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(4, size) for size in (2, 3, 5)]
    x = torch.randn(6, 4)
    wanted = [layer(x) for layer in layers]
    product = StackedProduct(layers)
    multiply, shapes = nn.functional.linear, []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return multiply(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    for _ in range(2):
        with product:
            found = [layer(x) for layer in layers]
        torch.testing.assert_close(found, wanted)
        assert product.input is None  # its memory is free again
        assert not product.outputs
    assert shapes == [(10, 4)] * 2


def test_another_input_later_on_is_noticed() -> None:
    model, x = Pair(), torch.randn(2, 3)
    wanted = {order: model(x, order) for order in ("same", "other")}
    (product,) = stacked_products([model], lambda: model(x, "same"))
    with product:
        for order in ("other", "same", "other"):
            torch.testing.assert_close(model(x, order), wanted[order])


@pytest.mark.parametrize("change", ["trained", "tied", "dtype", "bias", "subclass"])
def test_layers_that_differ_or_are_trained_stay_alone(change: str) -> None:
    model, x = Pair(), torch.randn(2, 3)
    match change:
        case "trained":
            model.two.weight.requires_grad_(True)
        case "tied":
            model.two.weight = model.one.weight
        case "dtype":
            model.two.double()
            model.two.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
        case "bias":
            model.two.bias = None
        case "subclass":
            model.two.__class__ = type("Own", (nn.Linear,), {})
    assert stacked_products([model], lambda: model(x, "same")) == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_one_compilation_serves_all_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, inputs = adapted(name), inputs_of(name)
    model.config.use_cache = False
    wanted = outputs_and_gradients(model, inputs)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic, **_: real(f, backend=counter, dynamic=dynamic)
    )
    layers = CompiledLayers(model, few_shapes=True)
    layers.choose_products(lambda: model(**inputs))
    assert len(layers.products) >= len(GROUPS[name][2])
    with layers.in_use():
        for rows in (2, 4):
            outputs_and_gradients(model, {"input_ids": torch.arange(4, 4 + rows * 7).view(rows, 7)})
        found = outputs_and_gradients(model, inputs)
    assert (
        counter.frame_count == 2
    )  # for any number of rows; the first layer's input has no gradient
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
