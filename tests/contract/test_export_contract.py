"""What an exported adapter of every type computes, read by PEFT and by a reader that knows less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_folders
import pytest
import tiny
import tiny_experts
import torch
from closeness import assert_close, assert_different
from kinds import ADAPTERS
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_cli.export.export_adapter import export_adapter

IDS = torch.arange(5, 65).reshape(4, 15)
BASES: dict[str, Callable[[Path], Path]] = {
    "Linear": lambda folder: tiny.save_llama(folder, tied=False),
    "Conv1D": tiny.save_gpt2,
    "Embedding": lambda folder: tiny.save_llama(folder, tied=False),
    "experts": lambda folder: tiny_experts.save(folder, "mixtral"),
}
TARGETS = {
    "Embedding": {"target_modules": ["embed_tokens"]},
    "experts": {"target_modules": ["o_proj"], "target_parameters": tiny_experts.EXPERTS},
}
MORE = {"loftq": {"init": "loftq"}, "rows of tokens": {"train_tokens": [5, 9]}}
WITHOUT_MATRICES = ("full", "bitfit", "head alone")
FOR_PEFT_ALONE = ("dora", "dora with patterns", "loha", "lokr", "olora with patterns",
                  "bias of adapted modules", "all biases")  # fmt: skip
CASES = [
    (name, "Linear", "peft" if name in FOR_PEFT_ALONE else "plain", "plain")
    for name in ADAPTERS
    if name not in WITHOUT_MATRICES
]
OTHERS = [
    ("lora", "Conv1D", "plain", "plain"),
    ("pissa", "Conv1D", "plain", "plain"),
    ("dora", "Conv1D", "peft", "plain"),
    ("all biases", "Conv1D", "peft", "plain"),
    ("lora", "Linear", "plain", "int8"),
    ("lora", "Linear", "plain", "nf4"),
    ("loftq", "Linear", "plain", "nf4"),
    ("lora", "Embedding", "plain", "plain"),
    ("lora", "experts", "peft", "plain"),
    ("rows of tokens", "Embedding", "peft", "plain"),
]


@torch.no_grad()
def in_peft(base: Path, adapter: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    found: Tensor = PeftModel.from_pretrained(model, str(adapter)).eval()(IDS).logits
    return found


@torch.no_grad()
def read_simply(base: Path, adapter: Path) -> Tensor:
    """Return what a reader computes that knows A, B, r and lora_alpha, and nothing else."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = model.get_submodule(name[len("base_model.model.") : -len(".lora_A.weight")])
        a, b = tensors.pop(name), tensors.pop(name.replace("lora_A", "lora_B"))
        update = config["lora_alpha"] / config["r"] * b @ a
        module.weight += update.T if config["fan_in_fan_out"] else update
    assert not tensors
    found: Tensor = model(IDS).logits
    return found


@pytest.mark.proves(
    "export", variant="{name}", layer="{site_name}", base="{base_kind}", against="PEFT"
)
@pytest.mark.parametrize(("name", "site_name", "reader", "base_kind"), [*CASES, *OTHERS])
@pytest.mark.slow_after(1)
def test_an_exported_adapter_is_what_was_trained(
    name: str, site_name: str, reader: str, base_kind: str, tmp_path: Path
) -> None:
    base = BASES[site_name](tmp_path / "base")
    sections: dict[str, Any] = {"task": {"type": "causal_lm", "text_column": "text"}}
    if base_kind != "plain":
        pytest.importorskip("bitsandbytes")
        sections["model"] = {"name": str(base), "quantization": base_kind}
    own = MORE[name] if name in MORE else ADAPTERS[name].adapter
    targets = TARGETS.get(site_name, {"target_modules": "all-linear"})
    if name == "rows of tokens":
        targets = {"target_modules": ["q_proj"]}
    sections["adapter"] = {**own, **targets}
    adapter = adapter_folders.make(tmp_path, "adapter", base, **sections)
    export_adapter(adapter, tmp_path / "out", reader, say=lambda line: None)
    # of a quantised base too: the same adapter, here on the base that it was made from
    wanted = in_peft(base, adapter)
    assert_close(in_peft(base, tmp_path / "out"), wanted)
    if reader == "plain" and site_name != "Embedding":
        assert_close(read_simply(base, tmp_path / "out"), wanted)
    with torch.no_grad():
        assert_different(AutoModelForCausalLM.from_pretrained(base).eval()(IDS).logits, wanted)
