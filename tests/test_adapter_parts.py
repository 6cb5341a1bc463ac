"""Details of adapter folders: names, ranks, alphas, and adapters without effect."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_experts
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BartForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.attach import attach, lora_layers
from lora_cli.adapters.lora_parameter import LoRAParameter
from lora_cli.adapters.peft_format import adapter_folder, trained_config
from lora_cli.adapters.peft_format.adapter_folder import (
    adapter_config,
    adapter_tensors,
    differences_in_peft,
    peft_owner,
    ranks_of,
    restore,
    save_adapter,
)
from lora_cli.models.quantized_linear import QuantizedLinear

ONE, NONE = torch.ones(2, 2), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("tensors", "idle"),
    [
        ({"a.lora_A.weight": ONE, "a.lora_B.weight": NONE}, True),
        ({"a.lora_A.weight": NONE, "a.lora_B.weight": ONE}, True),
        ({"a.lora_A.weight": ONE, "a.lora_B.weight": ONE}, False),
        ({"a.lora_A.weight": ONE, "a.lora_B.weight": NONE,
          "b.lora_A.weight": ONE, "b.lora_B.weight": NONE}, True),
        ({"a.lora_A.weight": ONE, "a.lora_B.weight": NONE,
          "b.lora_A.weight": ONE, "b.lora_B.weight": ONE}, False),
        ({"a.lora_A.weight": ONE, "a.lora_B.weight": NONE, "head.weight": NONE}, True),
        ({"a.lora_A.weight": ONE, "a.lora_B.weight": NONE,
          "a.lora_magnitude_vector.weight": ONE}, False),  # DoRA: its magnitudes may have changed
        ({"a.lora_A.weight": ONE, "a.lora_B.weight": NONE,
          "e.token_adapter.trainable_tokens_delta": ONE}, False),
        ({"head.weight": NONE}, False),
        ({}, False),
    ],
)  # fmt: skip
def test_which_adapters_change_nothing(tensors: dict[str, torch.Tensor], idle: bool) -> None:
    assert adapter_folder._is_idle(tensors) == idle


def test_peft_s_names_of_layers_and_of_parameters_in_their_bases() -> None:
    layers = ["a", "b", "b.base", "base"]
    for name, theirs in (
        ("a", "a"), ("a.base", "a.base_layer"), ("b.base", "b.base_layer"),
        ("b.base.base", "b.base_layer.base_layer"), ("c.base", "c.base"), ("base", "base"),
    ):  # fmt: skip
        assert peft_owner(name, layers) == theirs
    for name, theirs in (
        ("a.base.bias", "a.base_layer.bias"), ("b.base.base.bias", "b.base_layer.base_layer.bias"),
        ("c.bias", "c.bias"), ("c.base.bias", "c.base.bias"), ("bias", "bias"),
    ):  # fmt: skip
        assert adapter_folder._plain_name(name, layers) == theirs


def test_ranks_are_the_rows_of_a(tmp_path: Path) -> None:
    prefix = "base_model.model."
    tensors = {
        "x.q.lora_A.weight": (3, 8), "x.q.lora_B.weight": (5, 3), "emb.lora_embedding_A": (4, 9),
        "emb.lora_embedding_B": (7, 4), "experts.lora_A": (6, 2), "head.weight": (2, 2),
    }  # fmt: skip
    named = {prefix + name: torch.zeros(shape) for name, shape in tensors.items()}
    save_file(named, tmp_path / adapter_folder.WEIGHTS_FILE)
    assert ranks_of(tmp_path) == {"x.q": 3, "emb": 4, "experts": 6}


def test_the_files_of_tensors_and_their_hashes(tmp_path: Path) -> None:
    def sha(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    one, parts, single = (tmp_path / name for name in ("one", "parts", "single"))
    for folder in (one, parts / "unet", parts / "text_encoder"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        save_file({folder.name: ONE}, folder / adapter_folder.WEIGHTS_FILE)
    single.mkdir()
    save_file({"a": ONE}, single / "style.safetensors")
    assert adapter_folder.weight_files(one) == ["adapter_model.safetensors"]
    assert adapter_folder.weights_sha256(one) == sha(one / "adapter_model.safetensors")
    assert adapter_folder.weight_files(single) == ["style.safetensors"]
    assert adapter_folder.weights_sha256(single) == sha(single / "style.safetensors")
    file = single / "style.safetensors"
    assert adapter_folder.weight_files(file) == [""]
    assert adapter_folder.weights_sha256(file) == sha(file)
    names = adapter_folder.weight_files(parts)
    assert sorted(names) == [f"{p}/adapter_model.safetensors" for p in ("text_encoder", "unet")]
    said = ", ".join(f"{name}: {sha(parts / name)}" for name in names)
    assert adapter_folder.weights_sha256(parts) == said


def layer(rank: int, alpha: float) -> Any:
    return SimpleNamespace(saved_rank=rank, saved_alpha=alpha)


def test_ranks_that_an_initialisation_changed_are_listed_by_name_longest_first() -> None:
    layers = {
        "a": layer(4, 8.0), "a.b.c": layer(2, 4.0), "a.b": layer(4, 2.5), "d": layer(4, 8.0),
        "e.f": layer(8, 8.0),
    }  # fmt: skip
    spec: Any = SimpleNamespace(
        init="eva", rank=99, alpha=99.0, rank_pattern={"x": 1}, alpha_pattern={"x": 2.0}
    )
    found = trained_config._ranks_and_alphas(spec, layers)
    assert found == {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"a.b.c": 2, "e.f": 8},
        "alpha_pattern": {"a.b.c": 4, "a.b": 2.5},
    }  # fmt: skip
    assert list(found["rank_pattern"]) == ["a.b.c", "e.f"]
    spec.init = "default"
    assert trained_config._ranks_and_alphas(spec, layers) == {
        "r": 99, "lora_alpha": 99, "rank_pattern": {"x": 1}, "alpha_pattern": {"x": 2},
    }  # fmt: skip
    assert isinstance(found["lora_alpha"], int)


def test_which_weights_are_stored_transposed() -> None:
    def quantized(transposed: bool) -> QuantizedLinear:
        found = QuantizedLinear.__new__(QuantizedLinear)
        nn.Module.__init__(found)
        found.transposed = transposed
        return found

    plain = nn.Linear(2, 2)
    plain.transposed = True  # type: ignore[assignment]
    cases = (
        (Conv1D(2, 2), True),
        (plain, False),
        (quantized(True), True),
        (quantized(False), False),
    )
    for base, stored in cases:
        assert trained_config._stored_transposed(base) is stored


def test_a_baseline_is_saved_with_a_type_that_peft_does_not_have() -> None:
    for kind, name in (("none", "HEAD_ONLY"), ("bitfit", "BITFIT")):
        model, recipe = tiny.encoder(), tiny.recipe_of(type=kind)
        attach(model, recipe, ["classifier"])
        assert adapter_config(model, recipe, ["classifier"]) == {
            "peft_type": name, "base_model_name_or_path": "base", "revision": "main",
            "task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "inference_mode": True,
        }  # fmt: skip


@pytest.mark.parametrize("short", [True, False])
def test_adapted_parameters_are_written_by_the_recipe_s_suffixes_or_in_full(
    short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_experts.model("mixtral")
    recipe = tiny.recipe_of(
        "causal_lm", rank=2, target_modules=["q_proj"], target_parameters=tiny_experts.EXPERTS
    )
    attach(model, recipe)
    modules = [n for n, of in lora_layers(model).items() if not isinstance(of, LoRAParameter)]
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in names.values():
            p.normal_()
    if not short:  # as if the suffixes matched fewer parameters than are adapted
        monkeypatch.setattr(trained_config, "places_of", lambda *_: [])
    config = adapter_config(model, recipe, [])
    assert config["target_modules"] == ["q_proj"]
    in_full = [f"model.layers.{i}.{name}" for i in (0, 1) for name in tiny_experts.EXPERTS]
    assert config["target_parameters"] == (tiny_experts.EXPERTS if short else sorted(in_full))
    monkeypatch.undo()
    experts = "base_model.model.model.layers.0.mlp.experts"
    written = adapter_tensors(model)
    assert {name for name in written if name.startswith(experts)} == {
        f"{experts}.{place}lora_{side}.weight" for place in ("", "base_layer.") for side in "AB"
    }
    assert len(written) == 2 * (len(modules) + len(in_full))
    save_adapter(tmp_path, model, recipe, [])
    assert differences_in_peft(model, recipe, []) == differences_in_peft(
        model, recipe, [], tmp_path
    ) == []  # fmt: skip
    before = {name: p.detach().clone() for name, p in names.items()}
    with torch.no_grad():
        for p in names.values():
            p.zero_()
    restore(model, adapter_folder.read_tensors(tmp_path))
    assert all(torch.equal(p, before[name]) for name, p in names.items())


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tokens_are_saved_and_restored(tied: bool, tmp_path: Path) -> None:
    recipe = tiny.recipe_of(
        "causal_lm", rank=2, target_modules=["q_proj"], train_tokens=[9, 5],
        train_modules=["model.norm"],
    )  # fmt: skip

    def attached(seed: int) -> nn.Module:
        model = tiny.llama(tied)
        attach(model, recipe, token_ids=[5, 9])
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        return model

    model, other = attached(1), attached(2)
    save_adapter(tmp_path, model, recipe, ["model.norm"])
    written = {"model.norm.weight": model.get_parameter("model.norm.weight")}
    delta = "token_adapter.trainable_tokens_delta"
    written[f"model.embed_tokens.{delta}"] = model.get_parameter("model.embed_tokens.rows")
    if not tied:
        written[f"lm_head.{delta}"] = model.get_parameter("lm_head.rows")
        assert not torch.equal(*(t for name, t in written.items() if delta in name))
    for name, of in lora_layers(model).items():
        written[f"{name}.lora_A.weight"] = of.lora_A
        written[f"{name}.lora_B.weight"] = of.lora_B
    found = adapter_folder.read_tensors(tmp_path)
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
    restore(other, found)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(other.eval()(ids).logits, model.eval()(ids).logits)
    with pytest.raises(AssertionError, match="belong to another recipe"):
        restore(other, {name: t for name, t in found.items() if "norm" not in name})


def test_rows_that_two_modules_share_are_written_under_both_names_where_peft_asks_for_both(
    tmp_path: Path,
) -> None:
    """As in a sequence classifier of an encoder-decoder, of which PEFT ties nothing."""
    recipe = tiny.recipe_of(rank=2, target_modules=["q_proj"], train_tokens=[9, 5])
    models = []
    for seed in (1, 2):
        model = BartForSequenceClassification(tiny.encoder_decoder().config)
        tiny.enliven(model)
        attach(model, recipe, ["classification_head"], token_ids=[5, 9])
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        models.append(model)
    save_adapter(tmp_path, models[0], recipe, ["classification_head"])
    found = adapter_folder.read_tensors(tmp_path)
    rows = {name: t for name, t in found.items() if "token_adapter" in name}
    sides = [f"model.{side}.embed_tokens" for side in ("encoder", "decoder")]
    assert {name.partition(".token_adapter")[0] for name in rows} >= set(sides)
    for tensor in rows.values():
        assert torch.equal(tensor, models[0].get_parameter(f"{sides[0]}.rows"))
    restore(models[1], found)
    for name, parameter in models[0].named_parameters():
        if parameter.requires_grad:
            assert torch.equal(models[1].get_parameter(name), parameter), name
