"""The expected merged weights, compared with PEFT's own merge for every kind of module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_cli.adapters.merge_proof import expected_weights, weights_of

SITES: dict[str, tuple[Any, list[str]]] = {
    "linear": (lambda: tiny.encoder(None), ["query", "value"]),
    "embedding": (lambda: tiny.encoder(None), ["word_embeddings", "query"]),
    "Conv1D": (tiny.gpt2, ["c_attn", "c_proj"]),
    "convolutions": (tiny.ConvNet, ["stem", "point", "line"]),
}
LAYERS = {
    "linear": ["Linear"], "embedding": ["Embedding", "Linear"], "convolutions": ["Conv2d", "Conv1d"]
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alphas": {"alpha_pattern": 5.0},  # of the first target
    "dora": {"use_dora": True},
}


def adapted(site: str, tmp_path: Path, **settings: Any) -> tuple[nn.Module, nn.Module, Any, Any]:
    """Return a base, the model that PEFT merges, and what PEFT saves of it."""
    build, targets = SITES[site]
    base = build()
    if "alpha_pattern" in settings:
        settings["alpha_pattern"] = {targets[0]: settings["alpha_pattern"]}
    settings["fan_in_fan_out"] = site == "Conv1D"
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, **settings)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    tensors = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    return base, model.merge_and_unload(), tensors, config.to_dict()


@pytest.mark.proves(
    "merge",
    variant=lambda settings, **_: "dora" if settings == "dora" else "lora",
    layer=lambda site, **_: LAYERS.get(site, site),
    against="PEFT",
)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("site", SITES)
def test_weights_are_those_that_peft_merges(site: str, settings: str, tmp_path: Path) -> None:
    base, merged, tensors, config = adapted(site, tmp_path, **SETTINGS[settings])
    expected = expected_weights(base, tensors, config)
    assert expected.disagreement(merged) is None
    assert expected.disagreement(base) is not None
    assert weights_of(base).disagreement(base) is None
    left_out = next(name for name in tensors if name.endswith("lora_B.weight"))
    rest = {name: tensor for name, tensor in tensors.items() if name != left_out}
    if settings != "dora":  # whose magnitudes stay
        place = left_out.removesuffix(".lora_B.weight") + ".weight"
        assert expected_weights(base, rest, config).disagreement(merged) == place


def test_the_update_of_a_grouped_convolution_convolves_as_its_parts_do() -> None:
    """PEFT cannot merge it; in its file A has zeros outside of a group's channels."""
    base = tiny.ConvNet()
    layer = base.grouped  # (8, 4, 3, 3) of two groups
    a, b = torch.randn(4, 4, 3, 3), torch.randn(8, 2, 1, 1)
    x = torch.randn(2, 8, 6, 6)
    parts = torch.nn.functional.conv2d(x, a, padding=1, groups=2)
    wanted = layer(x) + 3.0 * torch.nn.functional.conv2d(parts, b, groups=2)  # alpha 12, rank 4
    saved = torch.zeros(4, 8, 3, 3)
    saved[:2, :4], saved[2:, 4:] = a[:2], a[2:]
    tensors = {"grouped.lora_A.weight": saved, "grouped.lora_B.weight": b}
    expected = expected_weights(base, tensors, heads("", r=4, lora_alpha=12))
    merged = copy.deepcopy(base)
    with torch.no_grad():
        delta = torch.zeros(8, 4, 3, 3)
        for i in range(2):
            own = b[4 * i : 4 * i + 4, :, 0, 0], a[2 * i : 2 * i + 2]
            delta[4 * i : 4 * i + 4] = torch.einsum("or,rchw->ochw", *own)
        merged.grouped.weight += 3.0 * delta
    torch.testing.assert_close(merged.grouped(x), wanted, rtol=1e-4, atol=1e-4)
    assert expected.disagreement(merged) is None
    assert expected.disagreement(base) == "grouped.weight"


def test_a_default_alpha_is_that_of_peft(tmp_path: Path) -> None:
    base, _, tensors, config = adapted("linear", tmp_path)
    del config["lora_alpha"]
    eight = expected_weights(base, tensors, {**config, "lora_alpha": 8}).products
    found = expected_weights(base, tensors, config).products
    assert all(torch.equal(found[name], eight[name]) for name in eight)


@pytest.mark.parametrize("part", ["entry", "row", "sign", "nan"])
def test_one_wrong_weight_is_found(part: str, tmp_path: Path) -> None:
    base, merged, tensors, config = adapted("linear", tmp_path)
    expected = expected_weights(base, tensors, config)
    name = "encoder.layer.1.attention.self.value.weight"
    weight = merged.get_parameter(name).data
    at = int(
        expected.products[name].abs().argmax()
    )  # the tolerance is relative to the largest entry
    if part == "entry":
        weight[at, 2] += 0.01
    elif part == "row":
        weight[[at, at - 1]] = weight[[at - 1, at]]
    elif part == "sign":
        weight.neg_()
    else:
        weight[0, 0] = torch.nan
    assert expected.disagreement(merged) == name


@pytest.mark.parametrize(("size", "found"), [(2e-5, False), (1e-3, True)])
def test_rounding_is_tolerated_at_any_scale(size: float, found: bool) -> None:
    for scale in (1e-3, 1.0, 1e3):
        model = nn.Linear(8, 8)
        with torch.no_grad():
            model.weight.mul_(scale)
        expected = weights_of(model)
        with torch.no_grad():
            model.weight.mul_(1 + size)
        assert (expected.disagreement(model) is not None) is found


def test_a_missing_parameter_is_reported() -> None:
    expected = weights_of(nn.Linear(4, 2))
    assert expected.disagreement(nn.Linear(4, 2, bias=False)) is not None
    names = weights_of(nn.Sequential(nn.Linear(4, 2, bias=False)))
    assert names.disagreement(nn.Linear(4, 2)) == "0.weight"


def heads(task_type: str, **more: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "task_type": task_type, "r": 4, "lora_alpha": 8} | more


def test_parameters_trained_in_full_come_from_the_file() -> None:
    base = tiny.encoder(2)
    names = ["classifier.weight", "classifier.bias", "bert.pooler.dense.weight"]
    tensors: dict[str, Tensor] = {
        name: torch.randn_like(base.get_parameter(name)) for name in names
    }
    bias = "bert.encoder.layer.0.attention.self.query.bias"
    tensors[bias] = torch.randn_like(base.get_parameter(bias))
    wanted = copy.deepcopy(base)
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted.get_parameter(name).copy_(tensor)
    config = heads("SEQ_CLS", modules_to_save=["pooler.dense"])
    found = expected_weights(base, tensors, config)
    assert found.disagreement(wanted) is None
    assert found.disagreement(base) is not None
    old = {  # names in raw state dicts
        name.replace("classifier.", "classifier.modules_to_save.default."): tensor
        for name, tensor in tensors.items()
    }
    old["classifier.original_module.weight"] = torch.zeros(2, 32)
    assert expected_weights(base, old, config).disagreement(wanted) is None


@pytest.mark.parametrize("which", ["both", "one"])
def test_one_of_two_names_of_a_weight_may_be_a_copy(which: str) -> None:
    base = tiny.llama(tied=True)
    new = torch.randn_like(base.lm_head.weight)
    tensors = {"model.embed_tokens.weight": new}
    config = heads("CAUSAL_LM", modules_to_save=["embed_tokens"] if which == "one" else None)
    found = expected_weights(base, tensors, config).products
    alone, together = found["lm_head.weight"], found["model.embed_tokens.weight"]
    assert torch.equal(alone, together) is (which == "both")
    assert torch.equal(together, weights_of(_holding(new)).products["weight"])


def _holding(weight: Tensor) -> nn.Module:
    module = nn.Embedding(*weight.shape)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


def test_a_module_with_two_names_is_checked_under_each() -> None:
    shared = nn.Linear(4, 4)
    base = nn.ModuleDict({"one": shared, "two": shared, "other": nn.Linear(4, 4)})
    found = weights_of(base).products
    assert found.keys() == {f"{at}.{kind}" for at in base for kind in ("weight", "bias")}
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    tensors = {"one.lora_A.weight": a, "one.lora_B.weight": b}
    expected = expected_weights(base, tensors, heads("", r=2, lora_alpha=4))
    merged = nn.ModuleDict({name: copy.deepcopy(module) for name, module in base.items()})
    assert expected.disagreement(merged) == "one.weight"
    with torch.no_grad():
        merged["one"].weight += 2.0 * b @ a
    assert expected.disagreement(merged) is None


ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("as_dict", [True, False])
def test_tied_modules_get_the_rows_of_tokens(tied: bool, as_dict: bool) -> None:
    base = tiny.llama(tied=tied)
    size = base.config.vocab_size
    ids = [5, size - 1]
    named: Any = {"lm_head": [1], "embed_tokens": ids} if as_dict else ids
    rows = torch.randn(2, 32)
    config = heads("CAUSAL_LM", trainable_token_indices=named)
    wanted = copy.deepcopy(base)
    with torch.no_grad():
        wanted.model.embed_tokens.weight[ids] = rows
    assert expected_weights(base, {ROWS: rows}, config).disagreement(wanted) is None
    apart = {ROWS: rows, ROWS.replace("model.embed_tokens", "lm_head"): torch.randn(1, 32)}
    if as_dict:  # the output layer has a row of its own
        found = expected_weights(base, apart, config)
        assert found.disagreement(wanted) == "lm_head.weight"


@pytest.mark.parametrize("ids", [[5], [5, 9, 3], [5, 319], None, {"wte": [5, 9]}, []])
def test_rows_that_do_not_fit_are_left_to_the_loader(ids: Any) -> None:
    base = tiny.llama(tied=True)
    assert base.config.vocab_size == 319
    config = heads("CAUSAL_LM", trainable_token_indices=ids)
    assert expected_weights(base, {ROWS: torch.ones(2, 32)}, config).disagreement(base) is None
    narrow = {ROWS: torch.ones(1, 31)}
    config = heads("CAUSAL_LM", trainable_token_indices=[5])
    assert expected_weights(base, narrow, config).disagreement(base) is None
    nowhere = {ROWS.replace("embed_tokens", "nothing"): torch.ones(1, 32)}
    assert expected_weights(base, nowhere, config).disagreement(base) is None


class Experts(nn.Module):
    """Two parameters with three experts each, and a two-dimensional router."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 4, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 4))
        self.router = nn.Parameter(torch.randn(3, 6))


@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_updates_of_experts_by_hand(is_transposed: bool, use_rslora: bool) -> None:
    base = nn.ModuleDict({"moe": Experts(is_transposed)})
    entries = ["moe.up", "down", "router"]
    config = heads("", target_parameters=entries, use_rslora=use_rslora,
                   alpha_pattern={"moe.down": 3.0})  # fmt: skip
    tensors: dict[str, Tensor] = {}
    merged = copy.deepcopy(base)
    # PEFT nests the layers: that of the first parameter is the innermost
    layers = {"up": "moe.base_layer.base_layer", "down": "moe.base_layer", "router": "moe"}
    for (key, layer), rank in zip(layers.items(), (2, 2, 4), strict=True):
        shape = base["moe"].get_parameter(key).shape
        n_out, n_in = shape[-2:]
        if is_transposed and len(shape) == 3:
            n_out, n_in = n_in, n_out
        count = 3 if len(shape) == 3 else 1
        a, b = torch.randn(rank * count, n_in), torch.randn(n_out, rank * count)
        tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        alpha = 3.0 if key == "down" else 8.0
        scale = alpha / (rank**0.5 if use_rslora else rank)
        with torch.no_grad():
            for e in range(count):
                # a column of B belongs to an expert: PEFT has (out, rank, experts)
                own = b.reshape(n_out, rank, count)[:, :, e] @ a.reshape(count, rank, n_in)[e]
                delta = scale * (own.T if is_transposed and count > 1 else own)
                place = merged["moe"].get_parameter(key)
                (place[e] if count > 1 else place).add_(delta)
    assert expected_weights(base, tensors, config).disagreement(merged) is None
    for name, tensor in tensors.items():
        assert expected_weights(base, {**tensors, name: tensor * 1.1}, config).disagreement(merged)
    too_few = {name: tensor[:, :-1] for name, tensor in tensors.items()}
    assert (
        expected_weights(base, too_few, config).disagreement(base) is None
    )  # the loader reports it


@pytest.mark.parametrize("size", [1e-40, 1.0])
def test_zero_weights_must_match_exactly(size: float) -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    expected = weights_of(model)
    with torch.no_grad():
        model.weight.fill_(size)
    assert expected.disagreement(model) == (None if size < 1e-30 else "weight")


def test_scalar_parameters_are_compared_too() -> None:
    model = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(2.0))})
    expected = weights_of(model)
    assert expected.disagreement(model) is None
    with torch.no_grad():
        model["scale"].fill_(2.1)
    assert expected.disagreement(model) == "scale"
