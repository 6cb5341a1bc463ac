"""Merging several adapters into one base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapter_folders
import pytest
import tiny
import torch
from closeness import assert_close
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.cli.merge_command import split_weight
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.export.merge import merge_adapter

WEIGHTS = "model.safetensors"
IDS = torch.arange(5, 65).reshape(4, 15)


def llama(folder: Path, tied: bool = False) -> Path:
    base = tiny.save_llama(folder / "base", tied)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    return base


def two(folder: Path, base: Path, **settings: Any) -> tuple[Path, Path]:
    """Write two adapters of other ranks, scales and targets."""
    a = {"rank": 4, "alpha": 6.0, "target_modules": ["q_proj", "up_proj"], **settings}
    b = {"rank": 8, "alpha": 8.0, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
    return (
        adapter_folders.make(folder, "a", base, seed=1, std=0.1, adapter=a),
        adapter_folders.make(folder, "b", base, seed=2, std=0.1, adapter={**b, **settings}),
    )


def test_updates_are_added_in_float32_and_rounded_once(tmp_path: Path) -> None:
    """Like PEFT when it merges one after the other: W0 + w1 s1 B1 A1, then + w2 s2 B2 A2."""
    base = llama(tmp_path)
    a, b = two(tmp_path, base)
    merged = tmp_path / "merged"
    arguments = ["merge", "--adapter", str(a), "--adapter", f"{b}:0.3", "--to", str(merged)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    own = [load_file(folder / "adapter_model.safetensors") for folder in (a, b)]
    before, after, adapted = load_file(base / WEIGHTS), load_file(merged / WEIGHTS), 0
    for name, tensor in before.items():
        site, expected = f"base_model.model.{name.removesuffix('weight')}", tensor.float()
        for tensors, s in zip(own, (6.0 / 4, 0.3 * (8.0 / 8**0.5)), strict=True):
            if f"{site}lora_A.weight" in tensors:
                expected += s * (tensors[f"{site}lora_B.weight"] @ tensors[f"{site}lora_A.weight"])
        adapted += not torch.equal(expected, tensor.float())
        assert torch.equal(after[name], expected.bfloat16()), name
    assert "merged 6 modules of 2 adapters into" in result.stdout
    line = f"{adapted} of {adapted} adapted tensors equal W0 + the sum of w s B A rounded once"
    assert line in result.stdout
    facts = json.loads((merged / "merge.json").read_text())
    assert [one["weight"] for one in facts["adapters"]] == [1.0, 0.3]
    assert all(len(one["sha256"]) == 64 for one in facts["adapters"])
    card = (merged / "README.md").read_text()
    assert "head" not in facts
    assert f"- `{b}`, weight 0.3, SHA-256 `{facts['adapters'][1]['sha256']}`" in card


@torch.no_grad()
def test_the_result_equals_peft_with_both_adapters_active(tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny.save_llama(tmp_path / "base", tied=False)
    a, b = two(tmp_path, base)
    merge_adapter(None, [a, b], tmp_path / "merged", weights=[1.0, -0.5])
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), a, "a")
    wrapped.load_adapter(b, "b")
    wrapped.base_model.set_adapter(["a", "b"])
    for module in wrapped.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and "b" in scaling:
            scaling["b"] *= -0.5
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(found(IDS).logits, wrapped.eval()(IDS).logits)


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"], ["embed_tokens"]])
@pytest.mark.slow_after(1)
def test_merging_tensor_by_tensor_gives_the_same_files(tmp_path: Path, targets: list[str]) -> None:
    base = llama(tmp_path, tied=True)
    a, b = two(tmp_path, base)
    c = adapter_folders.make(
        tmp_path, "c", base, seed=3, std=0.1, adapter={"rank": 2, "target_modules": targets}
    )
    weights = [1.0, 2.0, 0.25]
    whole = merge_adapter(None, [a, b, c], tmp_path / "whole", weights=weights)
    found = merge_adapter(None, [a, b, c], tmp_path / "p", weights=weights, low_memory=True)
    assert whole.weights == found.weights
    assert whole.untied == found.untied
    assert bool(found.untied) == (targets != ["q_proj"])
    expected, pieces = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "p" / WEIGHTS)
    assert expected.keys() == pieces.keys()
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("low_memory", [False, True])
@torch.no_grad()
def test_copies_of_base_weights_are_compared_before_any_adapter_is_merged(
    low_memory: bool, tmp_path: Path
) -> None:
    """PEFT writes the weight of an adapted embedding or output layer into each adapter."""
    base = tiny.save_llama(tmp_path / "base", tied=False)
    expected = AutoModelForCausalLM.from_pretrained(base)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        layer = model.base_model.model.lm_head
        layer.lora_B["default"].weight.normal_()
        expected.lm_head.weight += layer.get_delta_weight("default")
        model.save_pretrained(folder, save_embedding_layers=True)
    copied = "base_model.model.lm_head.base_layer.weight"
    assert all(copied in load_file(folder / "adapter_model.safetensors") for folder in folders)
    merge_adapter(str(base), folders, tmp_path / "merged", low_memory=low_memory)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(found.lm_head.weight, expected.lm_head.weight)
    tensors = load_file(folders[1] / "adapter_model.safetensors")
    tensors[copied][3, 3] += 1
    save_file(tensors, folders[1] / "adapter_model.safetensors")
    with pytest.raises(IntegrityError, match="of the base is not the one it was trained on"):
        merge_adapter(str(base), folders, tmp_path / "other", low_memory=low_memory)


def test_one_adapter_with_a_weight(tmp_path: Path) -> None:
    base = llama(tmp_path)
    a, _ = two(tmp_path, base)
    result = merge_adapter(None, a, tmp_path / "merged", weights=[0.5])
    assert "equal W0 + w s B A rounded once" in result.weights.in_words
    own, name = load_file(a / "adapter_model.safetensors"), "model.layers.0.self_attn.q_proj."
    delta = (
        own[f"base_model.model.{name}lora_B.weight"] @ own[f"base_model.model.{name}lora_A.weight"]
    )
    expected = load_file(base / WEIGHTS)[f"{name}weight"].float() + 0.5 * 6.0 / 4 * delta
    assert torch.equal(
        load_file(tmp_path / "merged" / WEIGHTS)[f"{name}weight"], expected.bfloat16()
    )


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.slow_after(1)
def test_heads_are_chosen_and_not_averaged(tmp_path: Path, low_memory: bool) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    a, b = (
        adapter_folders.make(
            tmp_path, name, base, seed, 0.1, adapter={"rank": 4, "target_modules": ["query"]}
        )
        for seed, name in enumerate("ab")
    )
    options: dict[str, Any] = {"low_memory": low_memory}
    with pytest.raises(LoraError, match=r"(?s)trained in full, differs.*`--head .*/a`"):
        merge_adapter(None, [a, b], tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()
    for chosen in (a, b):
        to = tmp_path / f"with_{chosen.name}"
        merge_adapter(None, [a, b], to, head=chosen, **options)
        own = load_file(chosen / "adapter_model.safetensors")
        model = AutoModelForSequenceClassification.from_pretrained(to)
        head = own["base_model.model.classifier.out_proj.weight"]
        assert torch.equal(model.classifier.out_proj.weight, head)
        assert f"modules trained in full from `{chosen}`" in (to / "README.md").read_text()


def test_a_weight_is_written_after_the_last_colon(tmp_path: Path) -> None:
    folder = tmp_path / "run:2"
    assert split_weight(f"{folder}:0.5") == (str(folder), 0.5)
    assert split_weight(str(folder)) == (str(tmp_path / "run"), 2.0)
    folder.mkdir()
    assert split_weight(str(folder)) == (str(folder), 1.0)  # there is such a folder
    assert split_weight("hf://user/name") == ("hf://user/name", 1.0)
    assert split_weight("user/name@v1:-1e-1") == ("user/name@v1", -0.1)
    assert split_weight("C:run") == ("C:run", 1.0)
