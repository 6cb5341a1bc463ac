"""Tests of quantising a base while it is loaded, against transformers, bitsandbytes and PEFT."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)
from transformers.modeling_utils import get_total_byte_count

from lora_cli.adapters.attach import lora_layers
from lora_cli.adapters.count_parameters import parameter_table
from lora_cli.errors import LoraError
from lora_cli.models import base_model
from lora_cli.models.fingerprint import fingerprint_of
from lora_cli.models.quantize_on_load import QuantizeOnLoad, _Quantizer
from lora_cli.models.quantized_linear import QuantizedLinear
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.training import train

pytest.importorskip("bitsandbytes")
NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)  # fmt: skip
LANGUAGE = {"type": "causal_lm", "pad_token": "<pad>"}


def opened(base: Path, tmp_path: Path, kind: str | None, **sections: Any) -> tuple[Task, Any]:
    """Return the task of a recipe and its base, quantised to `kind`."""
    model = {"name": str(base), **({} if kind is None else {"quantization": kind})}
    task = build_task(load_recipe(tiny.recipe(base, tmp_path, model=model, **sections)))
    task.load_processor()
    task.learn_from({})
    return task, task.load_model(torch.device("cpu"))[0].eval()


def wide(model: Any) -> Any:
    """Return a model like a tiny one, with 64 or 128 inputs to each layer.

    On CPUs with AVX-512, bitsandbytes 0.50 gives wrong weights for other numbers than multiples
    of its block.
    """
    names = ("n_embd",) if model.config.model_type == "gpt2" else ("hidden_size",)
    settings = {**dict.fromkeys(names, 64), "intermediate_size": 128}
    settings |= {"head_dim": None} if hasattr(model.config, "head_dim") else {}
    config = type(model.config)(**{**model.config.to_dict(), **settings})
    return tiny.enliven(type(model)(config), 0)


@pytest.fixture
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bitsandbytes multiply by the dequantised weights.

    On CPUs with AVX-512 for bfloat16 it rounds the scales to bfloat16 instead.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gpt2"])
@pytest.mark.usefixtures("plain_products")
@torch.no_grad()
def test_a_language_model_in_nf4_equals_that_of_transformers(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    if kind == "gpt2":
        tiny.save_gpt2(base)
        wide(tiny.gpt2()).save_pretrained(base)
    else:
        tiny.save_llama(base, tied=kind == "llama-tied")
        wide(tiny.llama(tied=kind == "llama-tied")).save_pretrained(base)
    task = {"type": "causal_lm"} if kind == "gpt2" else LANGUAGE
    _, model = opened(base, tmp_path, "nf4", task=task)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=NF4, dtype=torch.float32
    ).eval()
    names = [n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"]
    assert quantized_names(model) == names
    assert names
    assert not any("lm_head" in name for name in names)
    ids = torch.randint(5, 20, (2, 12))
    ours, wanted = model(input_ids=ids).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    # and they differ from those of the original base
    _, plain = opened(base, tmp_path, None, task=task)
    assert float((plain(input_ids=ids).logits - ours).abs().max()) > 1e-3


def test_the_task_s_new_head_is_not_quantised(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    _, model = opened(base, tmp_path, "nf4")
    names = quantized_names(model)
    assert names
    assert not any(name.startswith("classifier") for name in names)
    assert all(p.dtype == torch.float32 for p in model.classifier.parameters())


def test_modules_trained_in_full_are_not_quantised(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base")
    adapter = {"target_modules": ["q_proj"], "train_modules": ["o_proj"]}
    _, model = opened(base, tmp_path, "int8", task=LANGUAGE, adapter=adapter)
    names = {name.rpartition(".")[2] for name in quantized_names(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_weight_is_close_to_that_of_the_checkpoint(
    kind: str, precision: str, tmp_path: Path
) -> None:
    base = tiny.save_gpt2(tmp_path / "base")
    train = {"precision": precision}
    _, model = opened(base, tmp_path, kind, task={"type": "causal_lm"}, train=train)
    stored = load_file(base / "model.safetensors")
    names = quantized_names(model)
    assert len(names) == 8
    for name in names:
        layer = model.get_submodule(name)
        assert (
            layer.weight.dtype == {"nf4": torch.uint8, "int8": torch.int8, "fp8": torch.uint8}[kind]
        )
        weight = stored[f"{name}.weight"].T  # GPT-2 stores (in, out)
        error = (layer.dequantized() - weight).norm() / weight.norm()
        assert 0 < float(error) < {"nf4": 0.1, "int8": 0.01, "fp8": 0.03}[kind]


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_a_quantised_base_has_the_fingerprint_and_count_of_the_original(
    kind: str, tmp_path: Path
) -> None:
    base = tiny.save_llama(tmp_path / "base", tied=False)
    found = []
    for how in (kind, None):
        task, model = opened(base, tmp_path, how, task=LANGUAGE)
        found.append((
            fingerprint_of(task.recipe, model, []),
            sum(row.count for row in parameter_table(model)),
            task.base_facts,
        ))  # fmt: skip
    assert found[0] == found[1]


@pytest.mark.proves(
    "train", variant="{variant}", layer="Linear", base="nf4", against="PEFT on bitsandbytes"
)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.usefixtures("plain_products")
def test_twenty_steps_equal_those_of_peft_and_bitsandbytes(variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny.save_llama(tmp_path / "base")
    wide(tiny.llama()).save_pretrained(base)
    sections = {
        "task": LANGUAGE,
        "adapter": {"type": variant, "rank": 4, "alpha": 8, "target_modules": "all-linear"},
    }
    _, model = opened(base, tmp_path, "nf4", **sections)
    from lora_cli.adapters.attach import attach, trainable_parameters

    recipe = load_recipe(tmp_path / "recipe.yaml")
    attach(model, recipe)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=NF4, dtype=torch.float32
    )
    targets = sorted(lora_layers(model))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=variant == "dora")
    theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            other = theirs.get_submodule(f"base_model.model.{name}")
            other.lora_A["default"].weight.copy_(layer.lora_A)
    ids = torch.randint(5, 20, (20, 2, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for one, parameters in (
        (model, list(trainable_parameters(model).values())),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        one.eval()  # no dropout
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses.append([])
        for batch in ids:
            loss = one(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_a_run_on_a_quantised_base(kind: str, precision: str, tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    path = tiny.recipe(
        base, tmp_path, model={"name": str(base), "quantization": kind},
        adapter={"rank": 4, "alpha": 8, "target_modules": "all-linear"},
        train={"max_steps": 4, "precision": precision},
    )  # fmt: skip
    report = train(load_recipe(path))
    assert report["training"]["steps"] == 4
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(
    ("on_a_gpu", "precision", "why"),
    [
        (False, "bf16", "this device does not multiply in fp8"),
        (True, "fp32", "`train.precision: fp32` rounds nothing to fp8"),
        (True, "bf16", ""),
    ],
)
def test_a_warning_reports_that_fp8_products_are_not_supported(
    on_a_gpu: bool,
    precision: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(base_model, "has_fp8_products", lambda device: on_a_gpu)
    base = tiny.save_llama(tmp_path / "base")
    opened(base, tmp_path, "fp8", task=LANGUAGE, train={"precision": precision})
    said = capsys.readouterr().err
    text = f"warning: `quantization: fp8`: {why}, so the weights are dequantised for each product"
    assert (text in said) if why else ("fp8" not in said)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_only_the_memory_of_the_codes_is_preallocated(kind: Any, tmp_path: Path) -> None:
    base, gpu = tiny.save_llama(tmp_path / "base"), torch.device("cuda", 0)
    model = wide(tiny.llama())
    model.save_pretrained(base)
    _, loaded = opened(base, tmp_path, kind, task=LANGUAGE)
    quantizer = _Quantizer(QuantizeOnLoad(kind))
    quantizer._process_model_before_weight_loading(model.to("meta"))
    asked = get_total_byte_count(model, {n: gpu for n, _ in model.named_parameters()}, quantizer)
    tensors = [*loaded.parameters(), *loaded.buffers()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert 0.95 * needed <= asked[gpu] <= 1.1 * needed


def test_a_full_fine_tuning_of_a_quantised_base_is_rejected(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    path = tiny.recipe(
        base, tmp_path, model={"name": str(base), "quantization": "nf4"}, adapter={"type": "full"}
    )
    with pytest.raises(LoraError, match="trains all weights, and quantised ones cannot be trained"):
        load_recipe(path)


def test_without_bitsandbytes_nf4_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name)
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    base = tiny.save_encoder(tmp_path / "base")
    with pytest.raises(LoraError, match="`quantization: nf4` needs bitsandbytes"):
        opened(base, tmp_path, "nf4")
    path = tiny.recipe(base, tmp_path, train={"optimizer": {"type": "adamw_8bit"}})
    with pytest.raises(LoraError, match="`adamw_8bit` needs bitsandbytes"):
        train(load_recipe(path))


@pytest.mark.usefixtures("plain_products")
def test_an_encoder_has_the_outputs_of_transformers(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    wide(AutoModelForMaskedLM.from_pretrained(base)).save_pretrained(base)
    _, model = opened(base, tmp_path, "nf4")
    theirs = AutoModelForSequenceClassification.from_pretrained(
        base, quantization_config=NF4, dtype=torch.float32
    ).eval()
    ids = torch.randint(5, 20, (2, 12))
    prefix = model.base_model_prefix
    ours, wanted = (
        getattr(m, prefix)(input_ids=ids).last_hidden_state.detach() for m in (model, theirs)
    )
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
