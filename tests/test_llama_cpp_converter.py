"""llama.cpp's own converter takes our adapters, and writes what `lora export --for gguf` writes.

`LORA_LLAMA_CPP` names a folder with `convert_lora_to_gguf.py` and what it imports, such as
`vendor/llama.cpp` in the source archive of llama-cpp-python:

    pip download llama-cpp-python --no-binary llama-cpp-python --no-deps
    tar xzf llama_cpp_python-*.tar.gz
    LORA_LLAMA_CPP=llama_cpp_python-*/vendor/llama.cpp pytest tests/test_llama_cpp_converter.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapter_folders
import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lora_cli.export.export_adapter import export_adapter

LLAMA_CPP = Path(os.environ.get("LORA_LLAMA_CPP", "")).resolve()
CONVERTER = LLAMA_CPP / "convert_lora_to_gguf.py"
pytestmark = pytest.mark.skipif(
    not CONVERTER.is_file(), reason="LORA_LLAMA_CPP names no folder with llama.cpp's converter"
)
SIZES: dict[str, Any] = {
    "vocab_size": tiny.vocabulary("llama"), "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": tiny.POSITIONS, "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "mistral": MistralConfig(**SIZES, head_dim=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma2": Gemma2Config(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES),
}
UNEVEN = {
    "rank": 4, "alpha": 6, "target_modules": "all-linear", "use_rslora": True,
    "rank_pattern": {".*down_proj": 2}, "alpha_pattern": {".*o_proj": 3.0},
}  # fmt: skip
CASES = {
    "llama": ("llama", {"rank": 4, "alpha": 6, "target_modules": "all-linear"}),
    "llama, embeddings": ("llama", {"rank": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "llama, several ranks and scales": ("llama", UNEVEN),
    **{kind: (kind, {"rank": 4, "alpha": 6, "target_modules": "all-linear"}) for kind in FAMILIES},
}


def save_base(folder: Path, family: str) -> Path:
    if family == "llama":
        return tiny.save_llama(folder, tied=False)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(folder)
    tiny.tokenizer("llama").save_pretrained(folder)
    return folder


def tensors_of(file: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the alpha and the tensors of a file, read by llama.cpp's package."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    return alpha, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


@pytest.mark.proves(
    "export",
    variant=lambda case: "rslora" if CASES[case][1] is UNEVEN else "lora",
    layer=lambda case: "Embedding" if "embeddings" in case else "Linear",
    against="llama.cpp's converter",
)
@pytest.mark.parametrize("case", CASES)
def test_the_converter_writes_what_the_export_writes(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    base = save_base(tmp_path / "base", family)
    task = {"type": "causal_lm", "text_column": "text", "max_length": 32}
    adapter = adapter_folders.make(tmp_path, "adapter", base, task=task, adapter=settings)
    export_adapter(adapter, tmp_path / "gguf", "gguf", say=lambda line: None)
    # the converter knows neither rsLoRA nor patterns; a plain export has folded them
    plain = adapter
    if settings is UNEVEN:
        export_adapter(adapter, tmp_path / "plain", "plain", say=lambda line: None)
        plain = tmp_path / "plain"
    out = tmp_path / "converted.gguf"
    command = [sys.executable, str(CONVERTER), "--base", str(base), "--outtype", "f32"]
    done = subprocess.run(
        [*command, "--outfile", str(out), str(plain)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (found_alpha, found), (alpha, wanted) = (
        tensors_of(out),
        tensors_of(tmp_path / "gguf/adapter.gguf"),
    )
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        if name.endswith(".lora_a"):
            assert torch.equal(tensor, wanted[name]), name
            continue
        # llama.cpp scales by alpha / rank, and the rank is the same; ours has that folded into B
        ours, theirs = alpha * wanted[name], found_alpha * tensor
        largest = float(ours.abs().max())
        assert largest > 0.0
        assert float((theirs - ours).abs().max()) <= 1e-6 * largest, name
