"""The low-rank layers: the equation, its gradients, merging, and training parity with PEFT."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.attach import attach, disabled, lora_layers, trainable_parameters
from lora_cli.adapters.lora import LoRAEmbedding, LoRALayer, LoRALinear
from lora_cli.adapters.lora_conv import LoRAConv
from lora_cli.adapters.variants import LORA_LAYERS, layer_for
from lora_cli.errors import LoraError

# ------------------------------------------------------------------------------- layers to try


def conv1d_gpt2(n_in: int, n_out: int) -> Conv1D:
    base = Conv1D(n_out, n_in)
    nn.init.normal_(base.bias)
    return base


BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(3, 6)),
    "Conv1D of GPT-2": (lambda: conv1d_gpt2(6, 5), lambda: torch.randn(3, 4, 6)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(11, (3, 4))),
    "embedding with padding": (
        lambda: nn.Embedding(11, 6, padding_idx=1),
        lambda: torch.randint(11, (3, 4)),
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), 2, 1), lambda: torch.randn(2, 4, 9, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: torch.randn(2, 4, 5, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 6, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: torch.randn(2, 4, 6, 6)),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), lambda: torch.randn(2, 4, 9, 9)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: torch.randn(2, 4, 7, 7)),
    "conv2d reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"),
        lambda: torch.randn(2, 4, 7, 7),
    ),
}
KINDS = sorted(BASES)


def new_layer(
    base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False
) -> LoRALayer:
    """Return the low-rank layer for `base`, initialised for training."""
    fitting = layer_for(base, LORA_LAYERS)
    assert fitting is not None
    layer = fitting(base, rank, alpha, dropout, use_rslora)
    layer.reset_parameters()
    return layer


def adapted(
    base: nn.Module, rank: int = 4, alpha: float = 6.0, dropout: float = 0.0, rslora: bool = False
) -> LoRALayer:
    """Return a low-rank layer on `base` with non-zero A and B."""
    layer = new_layer(base, rank, alpha, dropout, rslora)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return layer


def merged(layer: LoRALayer) -> nn.Module:
    """Return a plain copy of the layer's base that has the merged weight."""
    plain = copy.deepcopy(layer.base)
    with torch.no_grad():
        plain.weight.copy_(layer.merged_weight(layer.weight.detach().float()))
    return plain


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 5e-5) -> None:
    """Compare whole tensors, relative to the largest entry."""
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale)


# ---------------------------------------------------------------------------- step 0 is the base


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_layer_gives_the_base_exactly(kind: str, dtype: torch.dtype) -> None:
    base, x = BASES[kind][0]().to(dtype), BASES[kind][1]()
    x = x.to(dtype) if x.is_floating_point() else x
    layer = new_layer(copy.deepcopy(base), 4, 8.0, dropout=0.5)
    assert torch.equal(layer(x), base(x))
    assert layer(x).dtype == dtype
    first, zero = (layer.lora_A, layer.lora_B)
    if isinstance(layer, LoRAEmbedding):
        first, zero = zero, first
    assert torch.count_nonzero(first) == first.numel()
    assert torch.count_nonzero(zero) == 0
    assert torch.equal(layer.merged_weight(layer.weight.detach().float()), base.weight.float())


@pytest.mark.parametrize("kind", KINDS)
def test_constructing_a_layer_draws_nothing(kind: str) -> None:
    base, before = BASES[kind][0](), torch.get_rng_state()
    layer = layer_for(base, LORA_LAYERS)(base, 4, 8.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.count_nonzero(layer.lora_A) == torch.count_nonzero(layer.lora_B) == 0


def test_a_is_drawn_kaiming_uniform_and_the_seed_decides() -> None:
    def draw() -> Tensor:
        torch.manual_seed(3)
        return new_layer(nn.Linear(400, 5), 50, 8.0).lora_A.detach()

    a, bound = draw(), 400**-0.5  # gain sqrt(1/3) times sqrt(3 / fan_in)
    assert torch.equal(a, draw())
    assert a.abs().max() <= bound
    assert math.isclose(a.std().item(), bound / math.sqrt(3), rel_tol=0.02)
    b = new_layer(nn.Embedding(9, 400), 50, 8.0).lora_B.detach()
    assert math.isclose(b.std().item(), 1.0, rel_tol=0.02)


def test_a_layer_on_the_meta_device_has_shapes_only() -> None:
    with torch.device("meta"):
        base = nn.Linear(6, 5)
    layer = new_layer(base, 4, 8.0)
    assert layer.lora_A.is_meta
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 6), (5, 4))


# ----------------------------------------------------------------------- the equation written out


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_bias_of_the_base_is_that_of_the_layer(has_bias: bool) -> None:
    base = nn.Linear(3, 2, bias=has_bias)
    assert LoRALinear(base, 1, 2.0).bias is base.bias


def test_linear_is_the_equation() -> None:
    base, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    layer = adapted(base, rank=4, alpha=6.0)
    expected = torch.empty(2, 3, 5)
    for i in range(2):
        for j in range(3):
            low = layer.lora_A @ x[i, j]
            expected[i, j] = base.weight @ x[i, j] + base.bias + 6 / 4 * layer.lora_B @ low
    assert_close(layer(x), expected)


def test_gpt2_conv1d_is_the_equation_transposed() -> None:
    base, x = conv1d_gpt2(6, 5), torch.randn(2, 3, 6)
    layer = adapted(base, rank=4, alpha=6.0)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 6), (5, 4))
    expected = x @ base.weight + base.bias + 1.5 * (x @ layer.lora_A.T) @ layer.lora_B.T
    assert_close(layer(x), expected)


def test_embedding_is_the_equation() -> None:
    base, x = nn.Embedding(11, 6), torch.tensor([[3, 0, 10], [3, 3, 7]])
    layer = adapted(base, rank=4, alpha=6.0)
    table = base.weight + 1.5 * (layer.lora_B @ layer.lora_A).T
    assert_close(layer(x), table[x])


def test_convolution_is_the_equation() -> None:
    """Position by position: each output is a dot product with a patch of the padded input."""
    base, x = nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2), torch.randn(1, 2, 8, 8)
    layer = adapted(base, rank=4, alpha=6.0)
    kernel = torch.empty(3, 2, 3, 3)
    for o in range(3):
        for i in range(2):
            kernel[o, i] = sum(layer.lora_B[o, r, 0, 0] * layer.lora_A[r, i] for r in range(4))
    padded = F.pad(x, (1, 1, 1, 1))
    expected = torch.empty(1, 3, 3, 3)
    for row in range(3):
        for column in range(3):
            patch = padded[0, :, 2 * row : 2 * row + 5 : 2, 2 * column : 2 * column + 5 : 2]
            weight = base.weight + 1.5 * kernel
            expected[0, :, row, column] = (weight * patch).sum((1, 2, 3)) + base.bias
    assert_close(layer(x), expected)


def test_a_grouped_convolution_is_its_groups_side_by_side() -> None:
    base, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 6, 6)
    layer = adapted(base, rank=4)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 2, 3, 3), (6, 2, 1, 1))
    halves = []
    for g in range(2):
        part = nn.Conv2d(2, 3, 3)
        part.weight.data, part.bias.data = base.weight[3 * g :][:3], base.bias[3 * g :][:3]
        half = LoRAConv(part, 2, 6.0 / 2)  # the same scaling with half the rank
        half.lora_A.data, half.lora_B.data = layer.lora_A[2 * g :][:2], layer.lora_B[3 * g :][:3]
        halves.append(half(x[:, 2 * g :][:, :2]))
    assert_close(layer(x), torch.cat(halves, 1))


def test_scaling_is_alpha_over_rank_or_over_its_root() -> None:
    assert LoRALinear(nn.Linear(4, 4), 16, 8.0).scaling == 0.5
    assert LoRALinear(nn.Linear(4, 4), 16, 8.0, use_rslora=True).scaling == 2.0
    plain, x = adapted(nn.Linear(6, 5), 4, 8.0), torch.randn(3, 6)
    rooted = copy.deepcopy(plain)
    rooted.scaling = LoRALinear(nn.Linear(6, 5), 4, 8.0, use_rslora=True).scaling
    assert_close(rooted(x) - plain.base(x), 2 * (plain(x) - plain.base(x)))
    for base in (nn.Embedding(9, 6), nn.Conv1d(4, 4, 3), conv1d_gpt2(4, 4)):
        assert new_layer(base, 4, 8.0, use_rslora=True).scaling == 4.0


# -------------------------------------------------------------------------------------- gradients


def _reference(layer: LoRALayer, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the layer as a function of only A and B: the base with the merged weight."""
    base, s = layer.base, layer.scaling

    def output(a: Tensor, b: Tensor) -> Tensor:
        if isinstance(base, nn.Embedding):
            delta = (b @ a).T
        elif isinstance(base, nn.Conv1d | nn.Conv2d):
            groups = base.groups
            parts = zip(a.chunk(groups), b.flatten(1).chunk(groups), strict=True)
            delta = torch.cat([torch.tensordot(bg, ag, 1) for ag, bg in parts])
        else:
            delta = (b @ a).T if isinstance(base, Conv1D) else b @ a
        return torch.func.functional_call(base, {"weight": base.weight + s * delta}, (x,))

    return output


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_and_b_match_a_plain_reference(kind: str) -> None:
    layer, x = adapted(BASES[kind][0]().double()), BASES[kind][1]()
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.double(), layer.lora_B.data.double()
    x = x.double() if x.is_floating_point() else x
    y = layer(x)
    direction = torch.randn_like(y)
    actual = torch.autograd.grad(y, (layer.lora_A, layer.lora_B), direction)
    point = (layer.lora_A.detach(), layer.lora_B.detach())
    _, expected = torch.autograd.functional.vjp(_reference(layer, x), point, direction)
    for ours, theirs in zip(actual, expected, strict=True):
        assert theirs.abs().max() > 0.1
        assert_close(ours, theirs, 1e-12)


def test_the_gradient_passes_through_to_the_input() -> None:
    layer, x = adapted(nn.Linear(6, 5)), torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.merged_weight(layer.weight.detach().float()).sum(0).expand(3, 6)
    assert_close(x.grad, expected)


# ------------------------------------------------------------------------------ merged = unmerged


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    rank=st.integers(1, 6),
    bias=st.booleans(),
    transposed=st.booleans(),
    rslora=st.booleans(),
)
def test_a_merged_linear_equals_the_unmerged(
    shape: list[int], n_in: int, n_out: int, rank: int, bias: bool, transposed: bool, rslora: bool
) -> None:
    base = conv1d_gpt2(n_in, n_out) if transposed else nn.Linear(n_in, n_out, bias)
    layer, x = adapted(base, rank, rslora=rslora), torch.randn(*shape, n_in)
    assert_close(merged(layer)(x), layer(x))


@given(
    vocabulary=st.integers(1, 12),
    dim=st.integers(1, 9),
    rank=st.integers(1, 6),
    padding=st.booleans(),
    rslora=st.booleans(),
)
def test_a_merged_embedding_equals_the_unmerged(
    vocabulary: int, dim: int, rank: int, padding: bool, rslora: bool
) -> None:
    base = nn.Embedding(vocabulary, dim, padding_idx=0 if padding else None)
    layer, x = adapted(base, rank, rslora=rslora), torch.arange(vocabulary).view(1, -1)
    assert_close(merged(layer)(x), layer(x))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor, int]:
    """Draw a convolution, an input for it and a rank that its groups divide."""
    dims, groups = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    n_in, n_out, rank = (groups * draw(st.integers(1, 3)) for _ in range(3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    padding: Any = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    if draw(st.booleans()) and set(stride) == {1}:
        padding = draw(st.sampled_from(["same", "valid"]))
    base = (nn.Conv1d if dims == 1 else nn.Conv2d)(
        n_in, n_out, kernel, stride, padding,
        dilation=tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )  # fmt: skip
    return base, torch.randn(2, n_in, *(draw(st.integers(7, 10)) for _ in range(dims))), rank


def _example(base: nn.Module, *size: int) -> tuple[nn.Module, Tensor, int]:
    return base, torch.randn(2, base.in_channels, *size), 2 * base.groups


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@given(convolutions())
@example(_example(nn.Conv2d(4, 6, 3, 2, 1, dilation=2, groups=2, padding_mode="reflect"), 9, 9))
@example(_example(nn.Conv1d(6, 6, 3, padding="same", groups=3, padding_mode="circular"), 8))
def test_a_merged_convolution_equals_the_unmerged(drawn: tuple[nn.Module, Tensor, int]) -> None:
    base, x, rank = drawn
    layer = adapted(base, rank)
    assert_close(merged(layer)(x), layer(x))


def test_an_a_over_all_channels_of_a_grouped_convolution_is_used_but_not_merged() -> None:
    layer, x = adapted(nn.Conv2d(4, 6, 3, groups=2), rank=4), torch.randn(2, 4, 6, 6)
    layer.lora_A = nn.Parameter(torch.randn(4, 4, 3, 3))
    low = F.conv2d(x, layer.lora_A)
    assert_close(layer(x), layer.base(x) + 1.5 * F.conv2d(low, layer.lora_B, groups=2))
    with pytest.raises(LoraError, match="cannot be merged"):
        layer.merged_weight(layer.weight.detach().float())


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(LoraError, match="rank 3 cannot be divided among the 2 groups") as caught:
        LoRAConv(nn.Conv2d(4, 6, 3, groups=2), 3, 6.0)
    assert "2 divides" in caught.value.problems[0].hint


# ---------------------------------------------------------------------------- dropout and dtypes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "embedding" not in kind])
def test_dropout_acts_in_training_and_on_the_low_rank_path_alone(kind: str) -> None:
    layer, x = adapted(BASES[kind][0](), dropout=0.5), BASES[kind][1]()
    without = adapted(copy.deepcopy(layer.base))
    without.load_state_dict(layer.state_dict())
    layer.eval()
    assert torch.equal(layer(x), without(x))
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    assert not torch.allclose(y, without(x), atol=1e-2)
    assert_close(y, layer.base(x) + without.update(dropped))


def test_an_embedding_has_no_dropout() -> None:
    layer, x = adapted(nn.Embedding(11, 6), dropout=0.9).train(), torch.randint(11, (3, 4))
    assert torch.equal(layer(x), copy.deepcopy(layer).eval()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_adapter_on_a_bfloat16_base(kind: str) -> None:
    base, x = BASES[kind][0]().bfloat16(), BASES[kind][1]()
    x = x.bfloat16() if x.is_floating_point() else x
    layer = adapted(base)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    y = layer(x)
    assert y.dtype == torch.bfloat16
    # the low-rank path computes in the dtype of its input: no copy of x in float32 is kept
    update = layer.update(x)
    assert update.dtype == (torch.float32 if kind.startswith("embedding") else torch.bfloat16)
    assert torch.equal(y, base(x) + update.bfloat16())
    exact = layer.float()(x.float() if x.is_floating_point() else x)
    assert_close(y.float(), exact, 0.05)
    layer.lora_A.grad = None
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_chooses_the_dtype(kind: str, dtype: torch.dtype) -> None:
    base, x = BASES[kind][0]().to(dtype), BASES[kind][1]()
    layer = adapted(base)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == base(x).dtype
        if not isinstance(base, nn.Embedding):
            # the products of the low-rank path run in bfloat16 too: that is what makes it fast
            assert layer.update(x).dtype == torch.bfloat16
    x = x.to(dtype) if x.is_floating_point() else x
    assert_close(y.float(), layer(x).float(), 0.05)


# ---------------------------------------------------------------------------- disabled and models


def test_disabled_is_the_base_bit_for_bit() -> None:
    model = tiny.llama()
    ids = torch.randint(4, 200, (2, 7))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        attach(model, tiny.recipe_of(rank=4, target_modules=[*LLAMA_LINEAR, "embed_tokens"]))
        tiny.wake(model)
        after = model(input_ids=ids).logits
        with disabled(model):
            assert torch.equal(model(input_ids=ids).logits, before)
        assert not torch.allclose(after, before, atol=1e-2)
        assert torch.equal(model(input_ids=ids).logits, after)
        first = next(iter(lora_layers(model).values()))
        first.enabled = False
        with pytest.raises(KeyError), disabled(model):
            raise KeyError
        assert not first.enabled  # what was off stays off, even after an error
        assert all(layer.enabled for layer in list(lora_layers(model).values())[1:])


LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ------------------------------------------------------------------- parity with PEFT in training

STEPS = 50


def text_batches(labels: bool, vocabulary: int = 200) -> list[dict[str, Tensor]]:
    batches = []
    for _ in range(5):
        ids = torch.randint(4, vocabulary, (8, 10))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["attention_mask"][::2, 7:] = 0
        batch["labels"] = (ids[:, 1] > vocabulary // 2).long() if labels else ids
        batches.append(batch)
    return batches * (STEPS // 5)  # few enough to be memorised


def image_batches() -> list[dict[str, Tensor]]:
    images = [torch.randn(8, 3, 12, 12) for _ in range(5)]
    batches = [{"x": x, "labels": (x.mean((1, 2, 3)) > 0).long()} for x in images]
    return batches * (STEPS // 5)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if "x" in batch:
        dtype = next(model.parameters()).dtype
        return F.cross_entropy(model(batch["x"].to(dtype)), batch["labels"])
    return model(**batch).loss


def train(
    model: nn.Module, batches: list[dict[str, Tensor]], rate: float, decay: float
) -> list[float]:
    """Train what is trainable with torch's own AdamW, and return the loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def peft_twin(model: nn.Module, ours: nn.Module, config: peft.LoraConfig) -> nn.Module:
    """Return PEFT's adapter on a copy of the base, with the initial A and B of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd")
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
    mine = lora_layers(ours)
    wrapped = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(mine) == set(wrapped)
    with torch.no_grad():
        for name, layer in mine.items():
            if isinstance(layer, LoRAEmbedding):
                wrapped[name].lora_embedding_A["default"].copy_(layer.lora_A)
                wrapped[name].lora_embedding_B["default"].copy_(layer.lora_B)
            else:
                wrapped[name].lora_A["default"].weight.copy_(layer.lora_A)
                wrapped[name].lora_B["default"].weight.copy_(layer.lora_B)
            assert wrapped[name].scaling["default"] == pytest.approx(layer.scaling, rel=1e-12)
    return theirs


CASES: dict[str, dict[str, Any]] = {
    "Linear, and a classifier in full": {
        "build": tiny.encoder,
        "ours": {"rank": 4, "target_modules": ["query", "value"], "train_modules": ["classifier"]},
        "theirs": {
            "r": 4,
            "target_modules": ["query", "value"],
            "modules_to_save": ["classifier"],
            "task_type": "SEQ_CLS",
        },
        "batches": lambda: text_batches(labels=True),
    },
    "Conv1D": {
        "build": tiny.gpt2,
        "ours": {"rank": 4, "target_modules": ["c_attn"]},
        "layers": ["Conv1D"],
        "theirs": {
            "r": 4,
            "target_modules": ["c_attn"],
            "fan_in_fan_out": True,
            "task_type": "CAUSAL_LM",
        },
        "batches": lambda: text_batches(labels=False),
    },
    "Conv1d, Conv2d": {
        "build": tiny.ConvNet,
        "ours": {"rank": 4, "target_modules": ["stem", "point", "line"]},
        "theirs": {"r": 4, "target_modules": ["stem", "point", "line"]},
        "layers": ["Conv1d", "Conv2d"],
        "batches": image_batches,
        "rate": 3e-3,
    },
    "Embedding": {
        "build": tiny.llama,
        "ours": {"rank": 4, "target_modules": ["embed_tokens"]},
        "theirs": {"r": 4, "target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"},
        "layers": ["tied Embedding"],
        "batches": lambda: text_batches(labels=False),
    },
    "weight decay, rsLoRA, patterns, biases": {
        "build": tiny.encoder,
        "ours": {
            "rank": 4,
            "target_modules": ["query", "value", "dense"],
            "exclude_modules": ["pooler.dense"],
            "use_rslora": True,
            "rank_pattern": {"value": 2, r"layer\.1\.output\.dense": 6},
            "alpha_pattern": {"query": 3.0},
            "bias": "lora_only",
        },
        "theirs": {
            "r": 4,
            "target_modules": ["query", "value", "dense"],
            "exclude_modules": ["pooler.dense"],
            "use_rslora": True,
            "rank_pattern": {"value": 2, r"layer\.1\.output\.dense": 6},
            "alpha_pattern": {"query": 3},
            "bias": "lora_only",
        },
        "batches": lambda: text_batches(labels=True),
        "decay": 0.1,
        "variants": ["rslora", "patterns", "bias of adapted modules"],
    },
}


@pytest.mark.slow_after(1)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.proves(
    "train",
    variant=lambda name: CASES[name].get("variants", "lora"),
    layer=lambda name: CASES[name].get("layers", "Linear"),
    against="PEFT",
)
@pytest.mark.parametrize("name", list(CASES))
def test_fifty_steps_have_the_losses_of_peft(name: str) -> None:
    case = CASES[name]
    base, batches = case["build"](), case["batches"]()
    ours = copy.deepcopy(base)
    attach(ours, tiny.recipe_of(**case["ours"]))
    theirs = peft_twin(base, ours, peft.LoraConfig(lora_alpha=6, lora_dropout=0, **case["theirs"]))
    theirs.eval()  # like ours: a frozen BatchNorm keeps its running statistics
    # in float32 rounding grows over 50 steps, on each processor in its own way
    base, ours, theirs = base.double(), ours.double(), theirs.double()
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in trainable_parameters(ours).values()) == count
    rate, decay = case.get("rate", 1e-3), case.get("decay", 0.0)
    our_losses = train(ours, batches, rate, decay)
    their_losses = train(theirs, batches, rate, decay)
    differences = [abs(a - b) for a, b in zip(our_losses, their_losses, strict=True)]
    assert max(differences) < 1e-6
    with torch.no_grad():
        untrained = [loss_of(base, batch).item() for batch in batches[-5:]]
    assert sum(our_losses[-5:]) < sum(untrained) - 0.1  # the losses had room to differ


def test_fifty_steps_of_a_dilated_reflecting_convolution_follow_torch_itself() -> None:
    """PEFT ignores dilation and padding mode, so the reference is a plain merged weight."""
    for groups in (1, 2):
        base = nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="reflect", groups=groups)
        layer = new_layer(copy.deepcopy(base).requires_grad_(False), 4, 6.0).double()
        a, b = (nn.Parameter(m.detach().clone()) for m in (layer.lora_A, layer.lora_B))
        x, goal = torch.randn(2, 4, 4, 6, 6, dtype=torch.float64)
        reference = _reference(copy.deepcopy(layer), x)
        ours = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2)
        plain = torch.optim.AdamW([a, b], lr=1e-2)
        first = None
        for _ in range(STEPS):
            losses = F.mse_loss(layer(x), goal), F.mse_loss(reference(a, b), goal)
            for loss, optimizer in zip(losses, (ours, plain), strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            assert abs(losses[0].item() - losses[1].item()) < 1e-6
            first = first or losses[0].item()
        assert losses[0].item() < first - 0.05


@pytest.mark.parametrize("base", [nn.Linear(4, 3), nn.Embedding(5, 4), nn.Conv1d(4, 4, 3)], ids=str)
def test_rank_and_alpha_alone_make_a_layer_of_plain_lora(base: nn.Module) -> None:
    kind = layer_for(base, LORA_LAYERS)
    assert kind is not None
    layer = kind(base, 4, 8.0)
    assert (layer.scaling, layer.dropout.p) == (2.0, 0.0)
    assert kind(base, 4, 8.0, 0.0, True).scaling == 4.0  # rsLoRA: divided by the root of the rank
    assert kind(base, 4, 8.0, 0.5).dropout.p == (0.0 if isinstance(base, nn.Embedding) else 0.5)


def test_the_rank_is_read_from_a_and_scalars_have_none() -> None:
    assert LoRALinear.rank_of({"lora_A": torch.zeros(3, 5)}) == 3
    assert LoRALinear.rank_of({"lora_A": torch.zeros(())}) == 0


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_peft_stores_an_a_over_all_channels_for_grouped_convolutions(groups: int) -> None:
    base = nn.Conv2d(2 * groups, 5 * groups, 3, groups=groups)
    layer, rank = LoRAConv(base, 2 * groups, 6.0), 2 * groups
    narrow, b = torch.randn(rank, 2, 3, 3), torch.randn(5 * groups, 2, 1, 1)
    wide = torch.zeros(rank, 2 * groups, 3, 3)
    for row in range(rank):  # two rows and two channels per group
        wide[row, 2 * (row // 2) : 2 * (row // 2) + 2] = narrow[row]
    layer.from_peft("lora_A", wide)
    layer.from_peft("lora_B", b)
    assert torch.equal(layer.lora_A, narrow)
    assert torch.equal(layer.lora_B, b)
    assert torch.equal(layer.to_peft("lora_A"), wide)
    assert torch.equal(layer.to_peft("lora_B"), b)
    x = torch.randn(2, 2 * groups, 7, 7)
    with torch.no_grad():
        update = F.conv2d(F.conv2d(x, wide), b, groups=groups) * 6.0 / rank
        assert_close(layer(x), base(x) + update)
        if groups == 1:
            return
        wide += 0.1  # PEFT trained the other channels too, so they are kept
        layer.from_peft("lora_A", wide)
        assert torch.equal(layer.to_peft("lora_A"), wide)
        update = F.conv2d(F.conv2d(x, wide), b, groups=groups) * 6.0 / rank
        assert_close(layer(x), base(x) + update)
        with pytest.raises(LoraError, match="spans all channels"):
            layer.delta_weight()


def test_w0_returns_the_base_weight_as_out_by_in_in_float32() -> None:
    linear, transposed = nn.Linear(4, 3).bfloat16(), conv1d_gpt2(4, 3)
    assert torch.equal(LoRALinear(linear, 2, 4.0).w0(), linear.weight.float())
    assert torch.equal(LoRALinear(transposed, 2, 4.0).w0(), transposed.weight.T)
