"""DoRA against the paper's equation and PEFT: training, folders in both directions, merging."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from closeness import assert_close, assert_different
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.attach import attach, lora_layers, trainable_parameters
from lora_cli.adapters.dora import DORA_LAYERS, DoRALayer, DoRALinear
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.make_trainable import make_trainable
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.merge_proof import expected_weights
from lora_cli.adapters.parameter_groups import parameter_groups
from lora_cli.adapters.peft_format.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_adapter,
    save_adapter,
)
from lora_cli.adapters.variants import layer_for
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.recipe import AdapterSpec, Learned

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
]

# ------------------------------------------------------------------------------- a layer by itself

BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 4, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(3, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 4, 6)),
    "Embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(11, (3, 4))),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1), lambda: torch.randn(2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), 2, 1), lambda: torch.randn(2, 4, 9, 8)),
    "Conv2d, one image": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(4, 9, 8)),
    "Conv2d, reflecting": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 4, 7, 7),
    ),
}


def new_layer(base: nn.Module, dropout: float = 0.0) -> DoRALayer:
    """Return the layer for a base, initialised for training."""
    layer = layer_for(base, DORA_LAYERS)(base, 4, 6.0, dropout)
    layer.reset_parameters()
    assert isinstance(layer, DoRALayer)
    return layer


def stir(model: nn.Module) -> nn.Module:
    """Randomise all trained parameters, except that magnitudes change by a factor."""
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if name.endswith("magnitude") or "lora_magnitude_vector" in name:
                parameter *= torch.rand_like(parameter) + 0.5
            else:
                parameter.normal_(std=0.25)
    return model.eval()


def by_formula(layer: DoRALayer, x: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the layer as a function of A, B and m: its base with the paper's weight."""
    base = layer.base
    is_transposed = isinstance(base, nn.Embedding | Conv1D)

    def output(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        delta = b.flatten(1) @ a.flatten(1)
        delta = (delta.T if is_transposed else delta).reshape(base.weight.shape)
        v = base.weight.detach() + layer.scaling * delta
        dims = [0] if is_transposed else list(range(1, v.ndim))
        length = v.detach().square().sum(dims, keepdim=True).sqrt()
        weight = (m if is_transposed else m.view(-1, *[1] * (v.ndim - 1))) * v / length
        return torch.func.functional_call(base, {"weight": weight}, (x,))

    return output


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_layer_gives_the_base_exactly(kind: str, dtype: torch.dtype) -> None:
    base, x = BASES[kind][0]().to(dtype), BASES[kind][1]()
    x = x.to(dtype) if x.is_floating_point() else x
    layer = new_layer(copy.deepcopy(base), dropout=0.5)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), base(x))
    assert layer.magnitude.dtype == torch.float32
    assert torch.equal(layer.merged_weight(base.weight.detach().float()), base.weight.float())


@pytest.mark.parametrize("kind", BASES)
def test_output_and_gradients_are_those_of_the_equation(kind: str) -> None:
    layer, x = new_layer(BASES[kind][0]().requires_grad_(False).double()).double(), BASES[kind][1]()
    stir(layer)
    x = x.double() if x.is_floating_point() else x
    y, trained = layer(x), (layer.lora_A, layer.lora_B, layer.magnitude)
    reference = by_formula(layer, x)
    assert_close(y, reference(*trained), 1e-12)
    assert_different(y, layer.base(x))
    direction = torch.randn_like(y)
    found = torch.autograd.grad(y, trained, direction)
    wanted = torch.autograd.grad(reference(*trained), trained, direction)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, 1e-12)
    plain = copy.deepcopy(layer.base)
    plain.weight.data = layer.merged_weight(layer.weight.detach())
    assert_close(plain(x), y, 1e-12)


def test_the_magnitude_starts_at_the_norm_of_each_outputs_weights() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    base = nn.Linear(2, 3)
    base.weight.data = weight
    assert_close(new_layer(base).magnitude, torch.tensor([5.0, 2.0, 0.0]))
    table = nn.Embedding(3, 2)
    table.weight.data = weight
    assert_close(new_layer(table).magnitude, torch.tensor([3.0, 20.0**0.5]))


def test_an_output_with_zero_weights_stays_unchanged() -> None:
    """PEFT divides zero by zero there."""
    base = nn.Linear(6, 5).requires_grad_(False)
    base.weight[2] = 0.0
    layer, x = new_layer(base), torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    gradients = (layer.lora_A.grad, layer.lora_B.grad, layer.magnitude.grad)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert layer.magnitude.grad[2] == 0
    assert torch.equal(layer.merged_weight(base.weight), base.weight)


def test_under_autocast_the_norm_is_computed_in_float32() -> None:
    layer, x = new_layer(nn.Linear(64, 48)), torch.randn(3, 64)
    stir(layer)
    length = layer.length(layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.length(layer.weight), length)
        assert layer(x).dtype == torch.bfloat16
    assert_close(layer(x), by_formula(layer, x)(layer.lora_A, layer.lora_B, layer.magnitude))


def test_a_float32_adapter_on_a_bfloat16_base() -> None:
    layer, x = new_layer(nn.Linear(64, 48).bfloat16()), torch.randn(3, 64).bfloat16()
    stir(layer)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), copy.deepcopy(layer).float()(x.float()), 0.02)
    y.float().sum().backward()
    assert layer.magnitude.grad.dtype == torch.float32


def test_a_layer_on_the_meta_device_has_shapes_only() -> None:
    layer = new_layer(nn.Linear(6, 5, device="meta"))
    assert layer.magnitude.is_meta
    assert layer.magnitude.shape == (5,)


def test_constructing_a_layer_draws_nothing() -> None:
    before = torch.get_rng_state()
    layer = DoRALinear(nn.Linear(6, 5, device="meta"), 4, 6.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert [name for name, _ in layer.named_parameters(recurse=False)] == list(layer.peft_names)


# --------------------------------------------------------------------------- models, beside PEFT

LANGUAGE = "CAUSAL_LM"
SITES: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, Any]]] = {
    "Linear": (tiny.encoder, ["query", "value", "dense"], {"exclude_modules": ["pooler.dense"]}),
    "Conv1D": (tiny.gpt2, ["c_attn", "c_proj"], {"fan_in_fan_out": True, "task_type": LANGUAGE}),
    "Conv1d and Conv2d": (tiny.ConvNet, ["stem", "point", "line"], {}),
    "Embedding": (lambda: tiny.llama(tied=False), ["embed_tokens"], {"task_type": LANGUAGE}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns and rsLoRA": {"use_rslora": True, "rank_pattern": {".*[a-z]": 6},
                            "alpha_pattern": {".*[a-z]": 3}},
}  # fmt: skip
each_site = pytest.mark.parametrize("site", SITES)


def proves(*what: str) -> pytest.MarkDecorator:
    return pytest.mark.proves(
        *what,
        variant=lambda settings="plain", **_: (
            "dora" if settings == "plain" else "dora with patterns"
        ),
        layer=lambda site, **_: site.split(" and "),
        against="PEFT",
    )


def ours_on(site: str, base: nn.Module, **adapter: Any) -> tuple[nn.Module, Any]:
    """Return a copy of a base with DoRA attached, and its recipe."""
    _, targets, more = SITES[site]
    more = {key: value for key, value in more.items() if key == "exclude_modules"}
    adapter = {"type": "dora", "rank": 4, "target_modules": targets, **more, **adapter}
    task = "causal_lm" if site in ("Conv1D", "Embedding") else "sequence_classification"
    model, recipe = copy.deepcopy(base), tiny.recipe_of(task, **adapter)
    attach(model, recipe)
    return model, recipe


def theirs_on(site: str, base: nn.Module, **config: Any) -> peft.PeftModel:
    """Return a copy of a base with PEFT's DoRA."""
    _, targets, more = SITES[site]
    config = {"r": 4, "lora_alpha": 6, "target_modules": targets, **more, **config}
    config = copy.deepcopy(config)
    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(use_dora=True, **config))


def twin(ours: nn.Module, theirs: peft.PeftModel) -> None:
    """Copy our A and B into PEFT's layers; both have computed their magnitudes themselves."""
    mine = lora_layers(ours)
    wrapped = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(mine) == set(wrapped)
    with torch.no_grad():
        for name, layer in mine.items():
            for own, tensor in their_parameters(wrapped[name]).items():
                if own == "magnitude":
                    assert_close(tensor.flatten(), layer.magnitude, 1e-6)
                else:
                    tensor.copy_(layer.get_parameter(own))


def their_parameters(layer: Any) -> dict[str, nn.Parameter]:
    if layer.lora_embedding_A:
        pair = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    return {"lora_A": pair[0], "lora_B": pair[1], "magnitude": magnitude}


def batch_of(model: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if not hasattr(model, "config"):
        return {"x": torch.randn(8, 3, 12, 12, generator=generator)}
    return {"input_ids": torch.randint(4, 200, (8, 9), generator=generator)}


def outputs(model: nn.Module, seed: int = 5) -> Tensor:
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    batch = batch_of(plain, seed)
    if "x" in batch:
        return plain(batch["x"].to(next(plain.parameters()).dtype))
    return plain(**batch).logits


def losses(model: nn.Module, steps: int = 20) -> list[float]:
    """Train what is trainable with torch's own AdamW, and return the loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    found = []
    for step in range(steps):
        logits = outputs(model, step % 4).flatten(0, -2)
        loss = F.cross_entropy(logits, torch.arange(len(logits)) % 2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@proves("train")
@each_site
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.slow_after(1)
def test_outputs_gradients_and_losses_are_those_of_peft(site: str, settings: str) -> None:
    base, more = SITES[site][0](), SETTINGS[settings]
    ours, _ = ours_on(site, base, **more)
    theirs = theirs_on(site, base, **more)
    twin(ours, theirs)
    ours.eval(), theirs.eval()
    assert torch.equal(outputs(ours), outputs(base))
    assert_close(outputs(ours), outputs(theirs), 1e-5)

    # a few steps on, where all three have moved
    losses(ours, 3), losses(theirs, 3)
    assert_close(outputs(ours), outputs(theirs), 1e-5)
    for model in (ours, theirs):
        outputs(model).square().mean().backward()
    layers = {n: m for n, m in theirs.named_modules() if hasattr(m, "lora_magnitude_vector")}
    for name, layer in lora_layers(ours).items():
        for own, tensor in their_parameters(layers[f"base_model.model.{name}"]).items():
            gradient = layer.get_parameter(own).grad
            assert_close(gradient, tensor.grad.reshape(gradient.shape), 2e-5)
    for model in (ours, theirs):
        model.zero_grad()

    # in double precision, since rounding grows over the steps, on each processor in its own way
    ours, theirs = ours.double(), theirs.double()
    found, wanted = losses(ours), losses(theirs)
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-5
    assert sum(found[-4:]) < sum(found[:4]) - 0.01  # the losses had room to differ


@pytest.mark.parametrize("site", ["Linear", "Conv1D", "Conv1d and Conv2d"])
def test_dropout_acts_as_in_peft(site: str) -> None:
    base = SITES[site][0]()
    ours, _ = ours_on(site, base, dropout=0.3)
    theirs = theirs_on(site, base, lora_dropout=0.3)
    twin(ours, theirs)
    losses(ours.eval(), 2), losses(theirs.eval(), 2)
    found = []
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, DoRALayer | peft.tuners.lora.LoraLayer):
                module.train()  # and no other dropout
        torch.manual_seed(1)
        found.append(outputs(model))
    assert_close(found[0], found[1], 1e-5)
    assert_different(found[0], outputs(ours.eval()))


# -------------------------------------------------------------------------------- folders, merging


@proves("write", "merge")
@each_site
@pytest.mark.parametrize("settings", SETTINGS)
def test_peft_loads_saved_adapters_and_merges_them_equally(
    site: str, settings: str, tmp_path: Path
) -> None:
    base = SITES[site][0]()
    ours, recipe = ours_on(site, base, **SETTINGS[settings])
    stir(ours)
    save_adapter(tmp_path, ours, recipe, [])
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["use_dora"] is True
    if config["task_type"] == "SEQ_CLS":  # PEFT would look for a classifier that was trained
        config["task_type"] = None
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    with torch.no_grad():
        assert_close(outputs(ours), outputs(theirs), 1e-5)
        merge(ours)
        assert_close(outputs(ours), outputs(theirs), 1e-5)
        assert_close(outputs(ours), outputs(theirs.merge_and_unload()), 1e-5)


@proves("read", "merge")
@each_site
def test_what_peft_saves_is_read_here_and_merged(site: str, tmp_path: Path) -> None:
    base = SITES[site][0]()
    theirs = stir(theirs_on(site, base, use_rslora=True))
    theirs.save_pretrained(tmp_path / "theirs")
    held = read_adapter(tmp_path / "theirs")
    assert held.type == "dora"
    expected = expected_weights(copy.deepcopy(base), held.tensors, held.config)
    ours = copy.deepcopy(base)
    load_adapter(ours, held, [])
    with torch.no_grad():
        assert_close(outputs(ours.eval()), outputs(theirs), 1e-5)
        assert not trainable_parameters(ours)
        merge(ours)
        assert_close(outputs(ours), outputs(theirs), 1e-5)
    assert expected.disagreement(ours) is None

    # saved again, it has the same tensors
    again = copy.deepcopy(base)
    load_adapter(again, held, [], trained=True)
    (tmp_path / "ours").mkdir()
    save_adapter(tmp_path / "ours", again, ours_on(site, base, use_rslora=True)[1], [])
    found, wanted = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("ours", "theirs"))
    wanted = {name: tensor for name, tensor in wanted.items() if "base_layer" not in name}
    assert {name: t.shape for name, t in found.items()} == {n: t.shape for n, t in wanted.items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@each_site
def test_the_proof_of_a_merge_sees_a_wrong_magnitude(site: str, tmp_path: Path) -> None:
    base = SITES[site][0]()
    ours, recipe = ours_on(site, base)
    stir(ours)
    save_adapter(tmp_path, ours, recipe, [])
    held = read_adapter(tmp_path)
    expected = expected_weights(copy.deepcopy(base), held.tensors, held.config)
    with torch.no_grad():
        layer = next(iter(lora_layers(ours).values()))
        layer.magnitude[1] *= 1.01
    name = next(iter(lora_layers(ours)))
    merge(ours)
    assert expected.disagreement(ours) == f"{name}.weight"


@each_site
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_names_of_raw_state_dicts_are_read_and_merged(site: str, kind: str, tmp_path: Path) -> None:
    base = SITES[site][0]()
    ours, recipe = ours_on(site, base, type=kind)
    save_adapter(tmp_path, stir(ours), recipe, [])
    raw = {
        re.sub(r"(\.weight)?$", r".default\1", name, count=1) if "lora_" in name else name: tensor
        for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items()
    }
    save_file(raw, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    saved, again = read_adapter(tmp_path), copy.deepcopy(base)
    expected = expected_weights(copy.deepcopy(base), saved.tensors, saved.config)
    load_adapter(again, saved, [])
    with torch.no_grad():
        assert torch.equal(outputs(again.eval()), outputs(ours))
    merge(again)
    assert expected.disagreement(again) is None


def _without_magnitude(tensors: dict[str, Tensor]) -> None:
    tensors.pop(next(name for name in tensors if name.endswith("lora_magnitude_vector")))


def _short_magnitude(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("lora_magnitude_vector"))
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize(
    ("edit", "config", "message"),
    [
        (_without_magnitude, {}, "has only lora_A, lora_B"),
        (
            _short_magnitude,
            {},
            "magnitude of `bert.encoder.layer.0.attention.output.dense` is (31,)",
        ),
        (lambda tensors: None, {"use_dora": False}, "does not belong to an adapter of type `lora`"),
        (lambda tensors: None, {"use_dora": "yes"}, "`use_dora` cannot be"),
    ],
)
def test_a_contradictory_folder_is_rejected(
    edit: Callable[[dict[str, Tensor]], None],
    config: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    base = tiny.encoder()
    ours, recipe = ours_on("Linear", base)
    save_adapter(tmp_path, stir(ours), recipe, [])
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**written, **config}))
    with pytest.raises(IntegrityError) as caught:
        load_adapter(base, read_adapter(tmp_path), [])
    assert message in str(caught.value)
    assert not lora_layers(base)


def test_an_adapter_with_only_trained_magnitudes_is_not_called_idle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.encoder()
    ours, recipe = ours_on("Linear", base)
    with torch.no_grad():
        for layer in lora_layers(ours).values():
            layer.magnitude *= 1.1
    save_adapter(tmp_path, ours, recipe, [])
    read_adapter(tmp_path)
    assert "changes nothing" not in capsys.readouterr().err


# ------------------------------------------------------------------------ what it does not fit


def test_grouped_convolutions_are_rejected_by_name(tmp_path: Path) -> None:
    recipe = tiny.recipe_of(type="dora", rank=4, target_modules=["stem", "grouped"])
    with pytest.raises(LoraError) as caught:
        attach(tiny.ConvNet(), recipe)
    problem = caught.value.problems[0]
    assert problem.what == "DoRA does not fit a convolution of 2 groups"
    assert problem.at == "module grouped"
    assert "type: lora" in problem.hint
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=["grouped"], use_dora=True)
        peft.get_peft_model(tiny.ConvNet(), config).save_pretrained(tmp_path)
    with pytest.raises(IntegrityError, match="DoRA does not fit a convolution of 2 groups"):
        load_adapter(tiny.ConvNet(), read_adapter(tmp_path), [])


def test_a_base_with_unreadable_quantised_weights_is_rejected() -> None:
    base = nn.Linear(6, 5).requires_grad_(False)
    base.weight.data = base.weight.data.to(torch.int8)
    with pytest.raises(LoraError, match="DoRA needs the length of the base"):
        DoRALinear(base, 4, 6.0)


# ----------------------------------------------------------------------------------- in training


def test_magnitudes_are_not_decayed_and_learn_at_the_adapters_rate() -> None:
    model, recipe = ours_on("Conv1d and Conv2d", tiny.ConvNet())
    settings = {"weight_decay": 0.1, "lora_plus_ratio": 16.0, "groups.adapter.learning_rate": 0.5}
    settings = {f"train.optimizer.{key}": value for key, value in settings.items()}
    groups = parameter_groups(model, recipe.with_values(settings))
    found = {
        name.rpartition(".")[2]: (group["lr"], group["weight_decay"])
        for group in groups
        for name in group["names"]
    }
    assert found == {"lora_A": (0.5, 0.1), "lora_B": (8.0, 0.1), "magnitude": (0.5, 0.0)}


def test_an_adapter_of_peft_is_trained_further(tmp_path: Path) -> None:
    base = tiny.encoder()
    theirs = stir(theirs_on("Linear", base, modules_to_save=["classifier"]))
    theirs.save_pretrained(tmp_path)
    ours, recipe = copy.deepcopy(base), tiny.recipe_of(**{"from": str(tmp_path)})
    recipe = recipe.with_values({"adapter": AdapterSpec(from_=str(tmp_path))})
    learned = Learned()
    make_trainable(ours, recipe, ["classifier"], learned=learned)
    assert learned.adapter is not None
    assert (learned.adapter.type, learned.adapter.rank) == ("dora", 4)
    trained = trainable_parameters(ours)
    assert sum(name.endswith(".magnitude") for name in trained) == len(lora_layers(ours))
    with torch.no_grad():
        assert_close(outputs(ours.eval()), outputs(theirs), 1e-5)
