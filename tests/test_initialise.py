"""Initial values of A and B: equal to PEFT's, also in training, and saved in both directions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from closeness import assert_close, assert_different, near
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.attach import attach, lora_layers, trainable_parameters
from lora_cli.adapters.initialise import loftq, olora, orthogonal, pissa
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.lora import LoRALayer, LoRALinear
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.peft_format.adapter_folder import read_adapter, save_adapter
from lora_cli.adapters.residual_lora import ResidualLoRALinear
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task

pytestmark = pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights")
CPU = torch.device("cpu")
SAME = 1e-5  # of the largest entry
LINEAR = ["query", "value", "intermediate.dense"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "Linear": (tiny.encoder, LINEAR),
    "Conv1D": (tiny.gpt2, GPT2),
}
IDS = torch.randint(4, 200, (4, 9), generator=torch.Generator().manual_seed(5))


def of_peft(base: nn.Module, **config: Any) -> peft.PeftModel:
    """Return a copy of a base with a new adapter of PEFT, without the adapter's randomness."""
    torch.manual_seed(0)
    values = {"r": 4, "lora_alpha": 6, **config}
    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**values)).eval()


def ours(base: nn.Module, **adapter: Any) -> nn.Module:
    """Return a copy of a base with a new adapter of this tool."""
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    attach(model, tiny.recipe_of("causal_lm", **{"rank": 4, **adapter}))
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    found: Tensor = inner(input_ids=IDS).logits
    return found


def loss_of(model: nn.Module) -> Tensor:
    found = logits(model)
    expected = torch.randn(found.shape, generator=torch.Generator().manual_seed(6))
    return (found - expected).square().mean()


def peft_pairs(model: peft.PeftModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    layers = dict(model.get_base_model().named_modules())
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in layers.items()
        if hasattr(layer, "lora_A")
    }


def our_pairs(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    return {name: (layer.lora_A, layer.lora_B) for name, layer in lora_layers(model).items()}


def assert_trains_alike(one: nn.Module, theirs: peft.PeftModel, steps: int = 20) -> None:
    """Compare outputs, gradients, and the losses of some steps."""
    assert_close(logits(one), logits(theirs), SAME)
    mine, others = our_pairs(one), peft_pairs(theirs)
    assert mine.keys() == others.keys()
    parameters = [p for pair in mine.values() for p in pair]
    references = [p for pair in others.values() for p in pair]
    losses = []
    for model, trained in ((one, parameters), (theirs, references)):
        loss_of(model).backward()
        losses.append([])
        gradients = [p.grad.clone() for p in trained if p.grad is not None]
        if model is one:
            found = gradients
        optimizer = torch.optim.SGD(trained, lr=2e-2, momentum=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert len(found) == len(gradients) == 2 * len(mine)
    largest = max(float(g.abs().max()) for g in gradients)
    for gradient, expected in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=SAME * largest)
    assert losses[0] == near(losses[1], SAME)
    assert losses[1][-1] < 0.95 * losses[1][0]


SCALES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rsLoRA": ({"use_rslora": True}, {"use_rslora": True}),
    "patterns": (
        {"rank_pattern": {r".*[01]\.attn.*c_attn|query": 2}, "alpha_pattern": {"c_fc|value": 3}},
        {"rank_pattern": {r".*[01]\.attn.*c_attn|query": 2}, "alpha_pattern": {"c_fc|value": 3.0}},
    ),
}


@pytest.mark.proves("train", variant="{init}", layer="{kind}", against="PEFT")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("init", "kind"), [("pissa", "Linear"), ("pissa", "Conv1D"),
                                            ("olora", "Linear")])  # fmt: skip
@pytest.mark.slow_after(1)
def test_weight_based_initialisations_train_as_in_peft(init: str, kind: str, scale: str) -> None:
    build, targets = MODELS[kind]
    theirs_say, we_say = SCALES[scale]
    base = build()
    theirs = of_peft(base, init_lora_weights=init, target_modules=targets,
                     fan_in_fan_out=kind == "Conv1D", **theirs_say)  # fmt: skip
    model = ours(base, init=init, target_modules=targets, **we_say)
    assert torch.equal(logits(model), logits(base))  # PEFT's are equal up to rounding
    for name, pair in peft_pairs(theirs).items():
        for matrix, expected in zip(our_pairs(model)[name], pair, strict=True):
            assert_close(matrix, expected, 1e-6)
    assert_trains_alike(model, theirs)


@pytest.mark.proves("train", variant="olora", layer="Conv1D", against="PEFT")
def test_olora_on_conv1d_is_that_of_the_same_linear_layer() -> None:
    """PEFT decomposes the transposed weight in this case, so its matrices have wrong shapes."""
    layer, x = Conv1D(5, 7), torch.randn(3, 7)
    base = nn.Linear(7, 5)
    base.weight.data, base.bias.data = layer.weight.data.T.clone(), layer.bias.data.clone()
    theirs = of_peft(nn.Sequential(base), init_lora_weights="olora", target_modules=["0"])
    model = nn.Sequential(layer)
    attach(model, tiny.recipe_of("causal_lm", rank=4, init="olora", target_modules=["0"]))
    for found, expected in zip(our_pairs(model)["0"], peft_pairs(theirs)["0"], strict=True):
        assert_close(found, expected, 1e-6)
    assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize("rank", [1, 4])
def test_random_initialisations_equal_peft_s_with_the_same_random_numbers(rank: int) -> None:
    theirs = of_peft(nn.Sequential(nn.Linear(7, 9)), target_modules=["0"], r=rank)
    layer = theirs.get_base_model()[0]
    w0, scaling = layer.weight.detach().clone(), layer.scaling["default"]
    torch.manual_seed(3)
    layer.pissa_init("default", "pissa_niter_5")
    torch.manual_seed(3)
    found = pissa(w0, rank, scaling, 5)
    expected = peft_pairs(theirs)["0"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if rank == 4:
        torch.manual_seed(3)
        layer.orthogonal_init("default")
        torch.manual_seed(3)
        found, expected = orthogonal(7, 9, rank), peft_pairs(theirs)["0"]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_weight_based_initialisations_follow_their_definitions() -> None:
    torch.manual_seed(0)
    w0 = torch.randn(9, 7, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(w0, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    for n_iterations, tolerance in ((None, 1e-9), (60, 1e-3)):
        a, b = pissa(w0, 3, 0.5, n_iterations)
        assert_close(0.5 * b @ a, best, tolerance)
    a, b = olora(w0, 7)
    assert_close(b @ a, w0, 1e-12)
    a, b = orthogonal(7, 9, 4)
    assert float((b @ a).abs().max()) < 1e-6 * float(a.abs().max() * b.abs().max())
    assert a.abs().min() > 0


@pytest.mark.proves(
    "write",
    "merge",
    variant=lambda init, **_: init.partition("_")[0],
    layer="{kind}",
    against="PEFT",
)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_3", "olora", "orthogonal"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.slow_after(6)
def test_peft_reads_what_is_saved_on_the_untouched_base(
    init: str, scale: str, kind: str, tmp_path: Path
) -> None:
    build, targets = MODELS[kind]
    base = build()
    adapter = {"rank": 4, "init": init, "target_modules": targets, **SCALES[scale][1]}
    model = ours(base, **adapter)
    stir(model)
    save_adapter(tmp_path, model, tiny.recipe_of("causal_lm", **adapter), [])
    again = copy.deepcopy(base)
    load_adapter(again, read_adapter(tmp_path), [])
    assert not any(isinstance(m, ResidualLoRALinear) for m in again.modules())
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    config.task_type = (
        None  # an encoder does not generate text, as PEFT's class for the task requires
    )
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config).eval()
    found = logits(model)
    assert_different(found, logits(base))
    assert_close(logits(again), found)
    assert_close(logits(theirs), found)
    merge(model)
    assert_close(logits(model), found)


def stir(model: nn.Module) -> None:
    """Change all trained parameters slightly, like a training step."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.proves(
    "read", variant=lambda init: init.partition("_")[0], layer="Linear", against="PEFT"
)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_3", "olora"])
def test_adapters_that_peft_converted_are_read(init: str, tmp_path: Path) -> None:
    base = tiny.encoder()
    theirs = of_peft(base, init_lora_weights=init, target_modules=LINEAR)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for pair in peft_pairs(theirs).values():
            for matrix in pair:
                matrix += 0.1 * torch.randn_like(matrix)
    found = logits(theirs)
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    again = copy.deepcopy(base)
    load_adapter(again, read_adapter(tmp_path / "converted"), [])
    assert {layer.rank for layer in lora_layers(again).values()} == {8}
    assert_close(logits(again), found)


@pytest.mark.proves("read", "merge", variant="mica", layer="{kind}", against="PEFT")
@pytest.mark.parametrize("kind", MODELS)
def test_mica_of_peft_is_read_and_merged(kind: str, tmp_path: Path) -> None:
    """MiCA's B is the minor components of W0, and is frozen; the base's weight is unchanged."""
    build, targets = MODELS[kind]
    base = build()
    theirs = of_peft(base, init_lora_weights="mica", target_modules=targets,
                     fan_in_fan_out=kind == "Conv1D")  # fmt: skip
    assert not any(b.requires_grad for _, b in peft_pairs(theirs).values())
    with torch.no_grad():
        for a, _ in peft_pairs(theirs).values():
            a += torch.randn_like(a)
    theirs.save_pretrained(tmp_path)
    found = logits(theirs)
    assert_different(found, logits(base))
    model = copy.deepcopy(base)
    load_adapter(model, read_adapter(tmp_path), [])
    assert_close(logits(model), found)
    merge(model)
    assert_close(logits(model), found)


def test_the_base_of_a_layer_keeps_its_weight_in_any_dtype() -> None:
    base = tiny.llama().bfloat16()
    model = ours(base, init="pissa", target_modules=["q_proj"])
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.weight, base.get_submodule(name).weight)
        assert layer.lora_A.dtype == layer.initial_A.dtype == torch.float32
    assert torch.equal(logits(model), logits(base))


# ---------------------------------------------------------------------------- what does not fit


def rejected(base: nn.Module, **adapter: Any) -> str:
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(LoraError) as caught:
        attach(base, tiny.recipe_of("causal_lm", **adapter))
    assert {name: type(module) for name, module in base.named_modules()} == before
    return str(caught.value)


def test_weight_based_initialisations_are_saved_as_plain_lora_of_twice_the_rank() -> None:
    base = nn.Linear(6, 5)
    layer, plain = ResidualLoRALinear(base, 2, 8.0), LoRALinear(base, 4, 16.0)
    a, b = torch.randn(4, 6), torch.randn(5, 4)
    for each in (layer, plain):
        each.from_peft("lora_A", a)
        each.from_peft("lora_B", b)
    assert (layer.scaling, layer.saved_rank, layer.saved_alpha) == (4.0, 4, 16.0)
    assert torch.equal(layer.to_peft("lora_A"), a)
    assert torch.equal(layer.to_peft("lora_B"), b)
    assert torch.equal(layer.lora_B, b[:, :2])
    assert torch.equal(layer.initial_B, -b[:, 2:])
    x = torch.randn(3, 6)
    assert_close(layer(x).detach(), plain(x).detach(), 1e-5)
    assert_close(layer.delta_weight(), plain.delta_weight(), 1e-5)
    assert not any("initial" in name for name in layer.state_dict())
    layer.start_at(a[:2], b[:, :2])
    assert_close(layer(x).detach(), base(x).detach(), 1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "eva"])
def test_a_rank_above_that_of_the_weight_is_an_error(init: str) -> None:
    text = rejected(tiny.gpt2(), init=init, rank=33, target_modules=["c_attn"])
    assert f"`init: {init}` cannot have rank 33 at `transformer.h.0.attn.c_attn`" in text
    assert "its weight is 96 x 32" in text
    assert "at most 32" in text


def test_eva_may_have_a_rank_above_the_outputs() -> None:
    base = nn.Sequential(nn.Linear(9, 3))
    adapter = {"rank": 9, "target_modules": ["0"]}
    attach(copy.deepcopy(base), tiny.recipe_of("causal_lm", init="eva", **adapter))
    assert "at most 3" in rejected(base, init="olora", **adapter)


def test_an_odd_rank_is_an_error_for_orthogonal_matrices() -> None:
    text = rejected(
        tiny.encoder(), init="orthogonal", rank=4, rank_pattern={"query": 3},
        target_modules=["query", "value"],
    )  # fmt: skip
    assert "cannot have rank 3 at `bert.encoder.layer.0.attention.self.query`" in text


@pytest.mark.parametrize("init", ["pissa", "orthogonal", "eva"])
def test_targets_without_a_linear_layer_are_an_error(init: str) -> None:
    text = rejected(tiny.ConvNet(), init=init, rank=2, target_modules=["stem", "line"])
    assert f"`init: {init}` is for linear layers, and no target is a linear layer" in text


def test_other_layers_are_initialised_by_default_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tiny.gpt2()
    model = ours(base, init="pissa", target_modules=["wte", "c_attn"])
    assert "`transformer.wte` starts by default: `init: pissa` is for" in capsys.readouterr().err
    assert torch.equal(logits(model), logits(base))
    layers = lora_layers(model)
    assert not layers["transformer.wte"].lora_A.any()
    assert layers["transformer.h.0.attn.c_attn"].lora_B.any()


# --------------------------------------------------------------------------------------- LoftQ


def quantised(tmp_path: Path, kind: str, base: Path, **adapter: Any) -> tuple[nn.Module, Any]:
    values = {"rank": 4, "alpha": 12, "target_modules": "all-linear", **adapter}
    path = tiny.recipe(
        base, tmp_path, model={"name": str(base), "quantization": kind}, adapter=values
    )
    task = build_task(load_recipe(path))
    task.load_processor()
    return task.load_model(CPU)[0].eval(), task


@pytest.mark.proves(
    "train",
    variant="loftq",
    layer=lambda save, **_: "Conv1D" if save is tiny.save_gpt2 else "Linear",
    base="{kind}",
)
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("save", [tiny.save_llama, tiny.save_gpt2])
@torch.no_grad()
def test_loftq_compensates_the_quantisation_error(
    kind: str, save: Callable[[Path], Path], tmp_path: Path
) -> None:
    base = save(tmp_path / "base")
    model, task = quantised(tmp_path, kind, base, init="loftq")
    codes = {n: m.weight.clone() for n, m in model.named_modules() if type(m) is QuantizedLinear}
    plain = type(model).from_pretrained(base, dtype=torch.float32).eval()
    before = (logits(model) - logits(plain)).norm()
    attach(model, task.recipe)
    assert lora_layers(model).keys() == codes.keys()
    for name, layer in lora_layers(model).items():
        w0 = plain.get_submodule(name).weight
        w0 = w0.T if isinstance(plain.get_submodule(name), Conv1D) else w0
        error = w0 - layer.w0()
        left = error - layer.scaling * layer.lora_B @ layer.lora_A
        strengths = torch.linalg.svdvals(error.double())
        assert_close(left.norm().double(), strengths[layer.rank :].norm(), 1e-4)
        assert float(left.norm()) < 0.9 * float(error.norm())
        assert torch.equal(layer.weight, codes[name])
    assert (logits(model) - logits(plain)).norm() < before


def test_loftq_equals_peft_s_if_alpha_is_the_rank() -> None:
    """PEFT's own function needs a GPU (tests/gpu); this is its computation, written out."""
    torch.manual_seed(0)
    w0 = torch.randn(9, 7)
    q = w0 + 0.1 * torch.randn(9, 7)
    u, s, vh = torch.linalg.svd(w0 - q, full_matrices=False)
    a, b = loftq(w0, q, 3, 1.0)
    assert_close(a, torch.sqrt(torch.diag(s)[:3, :]) @ vh, 1e-6)
    assert_close(b, u @ torch.sqrt(torch.diag(s)[:, :3]), 1e-6)


def test_loftq_needs_the_original_weights(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base")
    model, task = quantised(tmp_path, "int8", base, init="loftq")
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.set_weight(torch.randn(layer.out_features, layer.in_features))
    with pytest.raises(IntegrityError, match="no weight of its own for `model"):
        attach(model, task.recipe)


def test_other_layers_of_a_quantised_base_are_initialised_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save_llama(tmp_path / "base")
    targets = ["q_proj", "embed_tokens"]
    model, task = quantised(tmp_path, "int8", base, init="loftq", target_modules=targets)
    attach(model, task.recipe)
    assert "`model.embed_tokens` starts by default" in capsys.readouterr().err
    layers: dict[str, LoRALayer] = lora_layers(model)
    assert not layers["model.embed_tokens"].lora_A.any()
    assert layers["model.layers.0.self_attn.q_proj"].lora_B.any()


@pytest.mark.proves("train", variant="pissa", layer="Linear", base="int8")
def test_weight_based_initialisations_on_a_quantised_base_start_at_the_base(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base")
    model, task = quantised(tmp_path, "int8", base, init="pissa")
    expected = logits(model)
    attach(model, task.recipe)
    assert torch.equal(logits(model), expected)
    layer = next(iter(lora_layers(model).values()))
    a, b = pissa(layer.base.dequantized(), layer.rank, layer.scaling)
    assert torch.equal(layer.lora_A, a)
    assert torch.equal(layer.initial_B, b)
