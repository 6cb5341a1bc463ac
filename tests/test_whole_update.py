"""LoHa and LoKr compared with PEFT: training, folders in both directions, merging, errors."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from closeness import assert_close, assert_different
from peft.tuners.lokr.layer import factorization
from peft_configs import outputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.attach import attach, lora_layers
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.lokr import factorised
from lora_cli.adapters.make_trainable import make_trainable
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.merge_proof import expected_weights
from lora_cli.adapters.peft_format.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    differences_in_peft,
    read_adapter,
    save_adapter,
)
from lora_cli.adapters.whole_update_proof import whole_update
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.recipe import AdapterSpec, Learned

CONFIGS = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}
SITES = {
    "Linear": (tiny.encoder, ["query", "value", "output.dense"]),
    "convolutions": (tiny.ConvNet, ["stem", "point", "grouped", "dilated", "line"]),
    "without biases": (lambda: tiny.llama(tied=False), ["q_proj", "down_proj", "0.mlp.gate_proj"]),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "loha": {"alpha": 3},
    "loha, kernels": {"alpha": 3, "use_effective_conv2d": True, "rank_dropout": 0.5},
    "loha, patterns": {"rank_pattern": {".*[a-z]e.*": 6}, "alpha_pattern": {".*[a-z]": 2.5}},
    "lokr": {"alpha": 3, "module_dropout": 0.5},
    "lokr, rank 1": {"r": 1, "decompose_both": True},
    "lokr, rank 1, kernels": {"r": 1, "use_effective_conv2d": True, "decompose_factor": 4},
    "lokr, both": {
        "r": 2,
        "decompose_both": True,
        "decompose_factor": 2,
        "use_effective_conv2d": True,
    },
    "lokr, rank 3": {"r": 3, "decompose_both": True},
    "lokr, whole": {"r": 64, "alpha": 2},
    "lokr, patterns": {"rank_pattern": {".*[a-z]e.*": 1}, "alpha_pattern": {".*[a-z]": 2.5}},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS)


def layers_of(site: str) -> list[str]:
    return ["Conv2d", "grouped Conv2d", "Conv1d"] if site == "convolutions" else ["Linear"]


def proves(*what: str) -> pytest.MarkDecorator:
    return pytest.mark.proves(
        *what,
        variant=lambda settings="", kind="", **_: kind or settings[:4],
        layer=lambda site, **_: layers_of(site),
        against="PEFT",
    )


def theirs_on(base: nn.Module, settings: str, targets: list[str], **more: Any) -> peft.PeftModel:
    """Return a copy of a base with PEFT's layers, all of whose factors are drawn at random."""
    config = CONFIGS[settings[:4]]
    values = {"r": 4, "target_modules": targets, **SETTINGS[settings], **more}
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(base), config(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def losses(model: nn.Module, steps: int) -> list[float]:
    """Train what is trainable with torch's own AdamW, and return the loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    found = []
    for step in range(steps):
        logits = with_gradient(model, step % 4).flatten(0, -2)
        loss = F.cross_entropy(logits, torch.arange(len(logits)) % 2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def with_gradient(model: nn.Module, seed: int = 5) -> Tensor:
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    generator = torch.Generator().manual_seed(seed)
    dtype = next(plain.parameters()).dtype
    if isinstance(plain, tiny.ConvNet):
        return plain(torch.randn(4, 3, 12, 12, generator=generator).to(dtype))
    return plain(input_ids=torch.randint(4, 200, (4, 7), generator=generator)).logits


@pytest.mark.parametrize("factor", [-3, -1, 0, 1, 2, 3, 4, 8, 16, 400])
def test_sizes_are_factorised_as_in_peft(factor: int) -> None:
    assert all(factorised(n, factor) == factorization(n, factor) for n in range(1, 200))


class EachLayer(nn.Module):
    """A layer of each kind that can have a whole update; they are not computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.line = nn.Linear(12, 6), nn.Conv1d(4, 6, 5)
        self.kernel, self.point = nn.Conv2d(4, 6, (3, 5)), nn.Conv2d(4, 6, 1)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)


@each_setting
def test_each_layer_s_update_is_that_of_peft(settings: str, tmp_path: Path) -> None:
    base = EachLayer()
    names = [name for name, _ in base.named_children()]
    theirs = theirs_on(base, settings, names)
    theirs.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path)
    load_adapter(base, saved, [])
    layers = lora_layers(base)
    assert sorted(layers) == sorted(names)
    for name, layer in layers.items():
        other: Any = theirs.get_base_model().get_submodule(name)
        expected = other.get_delta_weight("default").reshape(layer.base.weight.shape)
        assert float(expected.detach().abs().max()) > 0
        assert_close(layer.delta_weight(), expected, 1e-6)
        by_the_proof = whole_update(name, layer.base, saved.tensors, saved.config)
        assert by_the_proof is not None
        assert_close(by_the_proof.float(), expected, 1e-6)


@proves("read", "merge")
@pytest.mark.parametrize("site", SITES)
@each_setting
@pytest.mark.slow_after(6)
def test_what_peft_saves_is_read_here_and_merged(site: str, settings: str, tmp_path: Path) -> None:
    base, targets = SITES[site][0](), SITES[site][1]
    theirs = theirs_on(base, settings, targets).eval()
    theirs.save_pretrained(tmp_path)
    ours, saved = copy.deepcopy(base), read_adapter(tmp_path)
    load_adapter(ours, saved, [])
    expected = outputs(theirs)
    assert_close(outputs(ours.eval()), expected, 1e-5)
    assert_different(expected, outputs(base))
    proof = expected_weights(base, saved.tensors, saved.config)
    merge(ours)
    assert proof.disagreement(ours) is None
    assert_close(outputs(ours), expected, 1e-5)
    assert_close(outputs(theirs.merge_and_unload()), expected, 1e-5)


@proves("train")
@pytest.mark.parametrize("site", ["Linear", "convolutions"])
@pytest.mark.parametrize(
    "settings",
    ["loha", "loha, patterns", "lokr, both", "lokr, whole"],
)
@pytest.mark.slow_after(1)
def test_gradients_and_losses_are_those_of_peft(site: str, settings: str, tmp_path: Path) -> None:
    base, targets = SITES[site][0]().double(), SITES[site][1]
    # PEFT has dropout on ranks and modules, and recipes on the input: without, they are the same
    theirs = theirs_on(base, settings, targets, rank_dropout=0.0, module_dropout=0.0).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_adapter(ours, read_adapter(tmp_path), [], trained=True)
    ours, theirs = ours.double().eval(), theirs.double()
    for model in (ours, theirs):
        with_gradient(model).square().mean().backward()
    wrapped = dict(theirs.named_modules())
    for name, layer in lora_layers(ours).items():
        for own, parameter in layer.named_parameters(recurse=False):
            twin = getattr(wrapped[f"base_model.model.{name}"], own)["default"]
            assert_close(parameter.grad, twin.grad, 1e-5)
    ours.zero_grad(), theirs.zero_grad()
    found, expected = losses(ours, 20), losses(theirs, 20)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-6
    assert abs(found[-1] - found[3]) > 1e-4  # there was something to differ in


@proves("write")
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("site", SITES)
def test_peft_reads_what_is_saved_here(kind: str, site: str, tmp_path: Path) -> None:
    base, targets = SITES[site][0](), SITES[site][1]
    adapter = {"rank": 2, "target_modules": targets, "rank_pattern": {".*e.*": 3}}
    recipe = tiny.recipe_of("causal_lm", type=kind, alpha_pattern={".*[a-z]": 2.5}, **adapter)
    ours = copy.deepcopy(base)
    attach(ours, recipe)
    assert torch.equal(outputs(ours.eval()), outputs(base))
    with torch.no_grad():
        for layer in lora_layers(ours).values():
            for parameter in layer.parameters(recurse=False):
                parameter.normal_(std=0.3)
    save_adapter(tmp_path, ours, recipe, [])
    file = tmp_path / CONFIG_FILE
    values = json.loads(file.read_text())
    assert values["peft_type"] == kind.upper()
    assert values["target_modules"] == targets
    file.write_text(json.dumps({**values, "task_type": None}))
    assert differences_in_peft(ours, recipe, [], tmp_path) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT names keys that it does not know
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert_close(outputs(theirs), outputs(ours), 1e-5)
    assert_different(outputs(ours), outputs(base))


@pytest.mark.parametrize(("settings", "part"), [("loha", "hada_w1_a"), ("lokr", "lokr_w2")])
def test_the_proof_of_a_merge_sees_a_wrong_factor(settings: str, part: str, tmp_path: Path) -> None:
    base = tiny.encoder()
    theirs_on(base, settings, ["query"]).save_pretrained(tmp_path)
    saved, ours = read_adapter(tmp_path), copy.deepcopy(base)
    load_adapter(ours, saved, [])
    name = next(name for name in saved.tensors if part in name)
    changed = {**saved.tensors, name: saved.tensors[name] * 1.01}
    merge(ours)
    assert expected_weights(base, changed, saved.config).disagreement(ours) is not None


def _without(part: str) -> Any:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


def _same(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def _scalars(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones(()) for name in tensors}


@pytest.mark.parametrize(
    ("settings", "config", "change", "what"),
    [
        ("loha", {}, _scalars, "has rank 0, its configuration says 4"),
        ("lokr", {}, _scalars, "the model needs"),
        ("loha", {"use_dora": True}, _same, "`use_dora`"),
        ("loha", {"lora_alpha": 32}, _same, "the key `lora_alpha` (32) is not known"),
        ("loha", {"new_key": 1}, _same, "the key `new_key` (1) is not known"),
        ("loha", {"alpha": "8"}, _same, "`alpha` has to be a number"),
        ("lokr", {"decompose_factor": 2.5}, _same, "`decompose_factor` cannot be 2.5"),
        ("lokr", {"decompose_both": 1}, _same, "`decompose_both` cannot be 1"),
        ("loha", {"r": 3}, _same, "has rank 4, its configuration says 3"),
        ("loha", {}, _without("w2_b"), "has only"),
        ("lokr", {}, _without("w2"), "its configuration says"),
        ("lokr, whole", {"decompose_factor": 2}, _same, "the model needs"),
        ("lokr, rank 1", {"decompose_both": False}, _same, "its configuration says"),
        ("loha", {"peft_type": "LORA"}, _same, "the key `alpha` (3) is not known"),
        ("loha", {"peft_type": "LOKR"}, _same, "does not belong to an adapter of type `lokr`"),
        ("loha", {"peft_type": "VERA"}, _same, "LORA, LOHA and LOKR"),
        ("lokr", {"target_modules": ["query", "key"]}, _same, "is missing"),
    ],
)
@pytest.mark.slow_after(8)
def test_a_contradictory_folder_is_rejected(
    settings: str, config: dict[str, Any], change: Any, what: str, tmp_path: Path
) -> None:
    base = tiny.encoder()
    theirs_on(base, settings, ["query"]).save_pretrained(tmp_path)
    file = tmp_path / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    tensors = change(load_file(tmp_path / WEIGHTS_FILE))
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises((LoraError, IntegrityError), match=re.escape(what)):
        load_adapter(base, read_adapter(tmp_path), [])


def test_a_convolution_that_pads_by_reflection_is_rejected(tmp_path: Path) -> None:
    base = tiny.ConvNet()
    theirs_on(base, "lokr", ["reflect"]).save_pretrained(tmp_path)
    with pytest.raises(IntegrityError, match="pads with `reflect`"):
        load_adapter(base, read_adapter(tmp_path), [])


@pytest.mark.parametrize("settings", ["loha", "lokr", "lokr, rank 1"])
def test_an_adapter_of_peft_is_trained_further_if_a_recipe_can_express_it(
    settings: str, tmp_path: Path
) -> None:
    base = tiny.encoder()
    theirs = theirs_on(base, settings, ["query"], modules_to_save=["classifier"]).eval()
    theirs.save_pretrained(tmp_path)
    recipe = tiny.recipe_of()
    recipe = recipe.with_values({"adapter": AdapterSpec(from_=str(tmp_path))})
    ours, learned = copy.deepcopy(base), Learned()
    if settings == "lokr, rank 1":
        with pytest.raises(LoraError, match=r"has `decompose_both`: true, .*no recipe"):
            make_trainable(ours, recipe, ["classifier"], learned=learned)
        return
    make_trainable(ours, recipe, ["classifier"], learned=learned)
    assert learned.adapter is not None
    assert (learned.adapter.type, learned.adapter.alpha) == (settings, 3)
    assert_close(outputs(ours.eval()), outputs(theirs), 1e-5)
    again = copy.deepcopy(base)
    attach(again, learned.completed(recipe), ["classifier"])  # as a resumed run does
    assert [p.shape for p in again.parameters()] == [p.shape for p in ours.parameters()]


@pytest.mark.parametrize("kind", CONFIGS)
def test_factors_are_initialised_within_peft_s_bounds_and_one_is_zero(kind: str) -> None:
    model = tiny.encoder()
    recipe = tiny.recipe_of(type=kind, rank=2, target_modules=["query", "output.dense"])
    torch.manual_seed(0)
    attach(model, recipe)
    largest = []
    for layer in lora_layers(model).values():
        names = [name for name, _ in layer.named_parameters(recurse=False)]
        starts = {"loha": "hada_w2_b", "lokr": "lokr_w1"}[kind]
        assert starts in names
        for name in names:
            factor = layer.get_parameter(name).detach()
            if name == starts:
                assert not factor.any()
                continue
            bound = factor.shape[1] ** -0.5  # kaiming-uniform with a = sqrt(5)
            assert factor.abs().max() <= bound
            largest.append(float(factor.abs().max()) / bound)
    assert max(largest) > 0.97  # of hundreds of draws


@pytest.mark.parametrize("key", ["use_rslora", "bias"])
def test_settings_without_a_key_in_peft_are_rejected(key: str) -> None:
    value = {"use_rslora": True, "bias": "all"}[key]
    with pytest.raises(ValueError, match=f"no `{key}` for adapters of type `loha`"):
        tiny.recipe_of(type="loha", **{key: value})


def test_a_model_without_fitting_layers_is_reported() -> None:
    with pytest.raises(LoraError, match="c_attn"):
        attach(tiny.gpt2(), tiny.recipe_of("causal_lm", type="lokr", target_modules=["c_attn"]))
    with pytest.raises(LoraError, match=r"no module is left to adapt|which no adapter fits"):
        attach(tiny.gpt2(), tiny.recipe_of("causal_lm", type="lokr"))
