"""An exported adapter, read like its reader does, has the outputs of base + adapter."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapter_folders
import pytest
import tiny
import tiny_experts
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.export import mlx_reader, peft_readers
from lora_cli.export.export_adapter import export_adapter
from lora_cli.export.merge import merge_adapter
from lora_cli.export.reader_names import READERS

IDS = torch.arange(5, 65).reshape(4, 15)
UNEVEN = {
    "rank": 4,
    "target_modules": ["q_proj", "k_proj", "layers.1.mlp.down_proj"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"k_proj": 3.0},
    "use_rslora": True,
}


def adapter_of(top: Path, kind: str = "llama", **adapter: Any) -> tuple[Path, Path]:
    """Return a base and an adapter of it."""
    save = {"llama": lambda p: tiny.save_llama(p, tied=False), "gpt2": tiny.save_gpt2,
            "tied": tiny.save_llama, "encoder": tiny.save_encoder}[kind]  # fmt: skip
    base = save(top / "base")
    return base, adapter_folders.make(top, "a", base, 1, adapter={"rank": 4, **adapter})


def export(adapter: Path, to: Path, reader: str) -> tuple[list[str], list[str]]:
    said: list[str] = []
    return export_adapter(adapter, to, reader, say=said.append), said


@torch.no_grad()
def outputs(base: Path, adapter: Path) -> Tensor:
    """Return PEFT's outputs with an adapter."""
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, str(adapter)).eval()(IDS).logits


@torch.no_grad()
def read_simply(base: Path, adapter: Path) -> Tensor:
    """Return the outputs of a reader that uses only A, B, r and lora_alpha."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = model.get_submodule(
            name.removeprefix("base_model.model.")[: -len(".lora_A.weight")]
        )
        a, b = tensors.pop(name), tensors.pop(name.replace("lora_A", "lora_B"))
        assert a.shape[0] == config["r"]
        module.weight += config["lora_alpha"] / config["r"] * b @ a
    assert not tensors
    return model(IDS).logits


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("reader", ["plain", "vllm"])
def test_a_single_scale_and_rank_give_the_same_outputs(tmp_path: Path, reader: str) -> None:
    base, adapter = adapter_of(tmp_path, **UNEVEN)
    compared, said = export(adapter, tmp_path / "out", reader)
    expected = outputs(base, adapter)
    assert close(read_simply(base, tmp_path / "out"), expected)
    assert close(outputs(base, tmp_path / "out"), expected)
    assert "PEFT" in compared[1]
    assert "rsLoRA" in said[0]
    assert "the ranks 2 and 4 become 4" in said[2]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (
        False,
        {},
        {},
    )
    assert config["lora_alpha"] == config["r"] == 4
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_plain_adds_zeros_for_module_types_that_a_layer_lacks(tmp_path: Path) -> None:
    _, adapter = adapter_of(tmp_path, target_modules=["q_proj"], layers=[1])
    _, said = export(adapter, tmp_path / "out", "plain")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    zeros = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert "TGI and LoRAX leave out" in said[0]
    assert not tensors[zeros].any()
    assert tensors[zeros.replace("layers.0", "layers.1")].any()


@pytest.mark.parametrize(
    "adapter",
    [{"type": "dora"}, {"bias": "lora_only"}, {"train_modules": ["lm_head"]}, UNEVEN],
    ids=["dora", "bias", "head", "uneven"],
)
def test_peft_keeps_everything(tmp_path: Path, adapter: dict[str, Any]) -> None:
    base, folder = adapter_of(tmp_path, **{"target_modules": ["q_proj"], **adapter})
    export(folder, tmp_path / "out", "peft")
    assert torch.equal(outputs(base, tmp_path / "out"), outputs(base, folder))
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_what_peft_takes_for_experts_is_exported_only_for_others(tmp_path: Path) -> None:
    base = tiny_experts.save(tmp_path / "base", "deepseek_v3")
    task = {"type": "causal_lm", "text_column": "text", "max_length": 32}
    targets = {"rank": 4, "target_modules": ["mlp.up_proj"]}
    adapter = adapter_folders.make(tmp_path, "a", base, 1, adapter=targets, task=task)
    with pytest.raises(LoraError, match="PEFT would not adapt `model") as caught:
        export(adapter, tmp_path / "peft", "peft")
    assert all("lora merge" in problem.hint for problem in caught.value.problems)
    assert not (tmp_path / "peft").exists()
    compared, _ = export(adapter, tmp_path / "plain", "plain")
    assert compared[1].startswith("not compared with PEFT: PEFT would not adapt")
    merge_adapter(None, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert close(read_simply(base, tmp_path / "plain"), merged(IDS).logits.detach())


def test_a_classifier_keeps_its_head_for_plain_readers(tmp_path: Path) -> None:
    base, folder = adapter_of(tmp_path, "encoder", use_rslora=True)
    _, said = export(folder, tmp_path / "out", "plain")
    assert "modules trained in full are kept for PEFT" in said[-1]
    found = []
    for path in (folder, tmp_path / "out"):
        model = AutoModelForSequenceClassification.from_pretrained(base)
        with torch.no_grad():
            found.append(PeftModel.from_pretrained(model, str(path)).eval()(IDS).logits)
    assert close(*found)


def test_gpt2s_transposed_layers(tmp_path: Path) -> None:
    base, folder = adapter_of(
        tmp_path, "gpt2", target_modules=["c_attn", "c_proj"], use_rslora=True
    )
    export(folder, tmp_path / "out", "plain")
    assert close(outputs(base, tmp_path / "out"), outputs(base, folder))


# ------------------------------------------------------------------------------- what is rejected


@pytest.mark.parametrize(
    ("reader", "kind", "adapter", "said"),
    [
        ("vllm", "encoder", {}, "modules that were trained in full"),
        ("vllm", "encoder", {}, "SEQ_CLS"),
        ("vllm", "llama", {"type": "dora"}, "type `dora`"),
        ("vllm", "llama", {"type": "bitfit"}, "type `bitfit`"),
        ("vllm", "gpt2", {"bias": "all"}, "biases"),
        ("vllm", "llama", {"train_modules": ["norm"]}, "trained in full"),
        ("vllm", "llama", {"rank": 513}, "512 at the most"),
        ("plain", "llama", {"type": "dora"}, "type `dora`"),
        ("plain", "gpt2", {"bias": "lora_only"}, "biases"),
        ("peft", "gpt2", {"type": "bitfit"}, "no adapters of type `bitfit`"),
        ("peft", "encoder", {"type": "none"}, "no adapters of type `none`"),
        ("gguf", "gpt2", {}, "`gpt2` models"),
        ("gguf", "encoder", {}, "`roberta` models"),
        ("gguf", "tied", {"target_modules": ["embed_tokens"]}, "one weight for"),
        ("mlx", "gpt2", {}, "`gpt2` models"),
        ("mlx", "llama", {"train_modules": ["lm_head"], "target_modules": ["q_proj"]}, "in full"),
        ("mlx", "tied", {"target_modules": ["embed_tokens"]}, "as one"),
    ],
)
@pytest.mark.slow_after(3)
def test_unsupported_adapters_are_rejected(
    tmp_path: Path, reader: str, kind: str, adapter: dict[str, Any], said: str
) -> None:
    if adapter.get("type") == "bitfit" and kind == "llama":
        kind = "gpt2"  # Llama has no biases
    _, folder = adapter_of(tmp_path, kind, **adapter)
    with pytest.raises(LoraError) as caught:
        export(folder, tmp_path / "out", reader)
    assert said in str(caught.value)
    assert all("lora merge" in (problem.hint or "") for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["plain", "mlx"])
def test_an_export_with_different_outputs_is_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    _, folder = adapter_of(tmp_path, **UNEVEN)
    module = mlx_reader if reader == "mlx" else peft_readers

    def wrong(pairs: dict[str, Any]) -> dict[str, Any]:
        rank = max(pair.rank for pair in pairs.values())
        return {name: pair.padded(rank) for name, pair in pairs.items()}  # the scale is lost

    monkeypatch.setattr(module, "with_equal_ranks", wrong)
    with pytest.raises(IntegrityError, match="the outputs differ by"):
        export(folder, tmp_path / "out", reader)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- other files


def test_gguf_has_the_names_and_rows_of_llama_cpp(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    _, folder = adapter_of(tmp_path, **{**UNEVEN, "target_modules": "all-linear"})
    compared, _ = export(folder, tmp_path / "out", "gguf")
    assert "outputs differ" in compared[0]
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 4.0
    assert fields["general.name"] == "a for base"  # no local path
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"} <= set(tensors)
    # llama.cpp's own rule for the rows of query and key, written out row by row
    source = load_file(folder / "adapter_model.safetensors")
    b = source["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    heads, width = 2, 8
    rows = [h * width + half * width // 2 + i
            for h in range(heads) for i in range(width // 2) for half in (0, 1)]  # fmt: skip
    assert torch.allclose(tensors["blk.0.attn_k.weight.lora_b"], 3 / 2 * b[rows])


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = adapter_of(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoraError, match="pip install gguf"):
        export(folder, tmp_path / "out", "gguf")


def test_mlx_gets_transposed_matrices_and_the_scale(tmp_path: Path) -> None:
    base, folder = adapter_of(tmp_path, **UNEVEN)
    export(folder, tmp_path / "out", "mlx")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        for name in config["lora_parameters"]["keys"]:
            a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
            factor = config["lora_parameters"]["scale"]
            model.get_submodule(name).weight += factor * (a @ b).T
        assert not tensors
        assert close(model(IDS).logits, outputs(base, folder))


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (Qwen2Config, {}, ["with 1e+06 where this base has 10000"]),
        (Qwen2Config, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, []),
        (LlamaConfig, {}, []),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
            ["with 10000 where this base has 500000", "scales its positions (`linear`)"],
        ),
        (Qwen3Config, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, []),
    ],
)
@pytest.mark.parametrize("style", ["nested", "by itself"])
def test_settings_that_mlx_lm_does_not_read_are_reported(
    tmp_path: Path,
    config: Any,
    changes: dict[str, Any],
    said: list[str],
    style: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_base = config(**changes)
    of_base.save_pretrained(tmp_path)
    if style == "by itself":
        file = tmp_path / "config.json"
        values = json.loads(file.read_text())
        rope = values.pop("rope_parameters")
        scaling = {"rope_scaling": rope} if rope["rope_type"] != "default" else {}
        file.write_text(json.dumps({**values, "rope_theta": rope["rope_theta"], **scaling}))
    written = json.loads((tmp_path / "config.json").read_text())
    monkeypatch.setattr(mlx_reader, "config_as_written", lambda recipe: written)
    source: Any = SimpleNamespace(task=SimpleNamespace(config=of_base, recipe=None))
    found = mlx_reader._unread_rope_settings(source)
    expected = said if style == "nested" else []
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))


def test_mlx_lm_itself_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    import mlx_lm

    base, folder = adapter_of(tmp_path, **UNEVEN)
    export(folder, tmp_path / "out", "mlx")
    model, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "out"))
    found = torch.tensor(model(mx.array(IDS.tolist())).tolist())
    assert float((found - outputs(base, folder)).abs().max()) <= 1e-4 * float(found.abs().max())


# ------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("reader", ["peft", "vllm", "mlx", "plain"])
def test_the_command(tmp_path: Path, reader: str) -> None:
    _, folder = adapter_of(tmp_path, use_rslora=True)
    to = tmp_path / "out"
    arguments = ["export", "--adapter", str(folder), "--for", reader, "--to", str(to)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "checked: " in result.output
    card = (to / "README.md").read_text()
    assert "outputs differ by" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front.get("library_name") == ("mlx" if reader == "mlx" else "peft")


def test_every_reader_is_offered_and_an_unknown_one_is_not(tmp_path: Path) -> None:
    from lora_cli.cli.export_command import offer_readers

    assert dict(offer_readers("")) == READERS
    assert [name for name, _ in offer_readers("v")] == ["vllm"]
    result = CliRunner().invoke(app, ["export", "--adapter", "x", "--for", "vlm", "--to", "y"])
    assert "did you mean `vllm`" in str(result.exception)


@pytest.mark.parametrize("reader", ["peft", "plain", "vllm"])
def test_the_code_of_a_card_runs_in_the_exported_folder(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = adapter_of(tmp_path, target_modules=["q_proj", "v_proj"])
    export(adapter, tmp_path / "to", reader)
    card = (tmp_path / "to" / "README.md").read_text()
    assert "lora eval" not in card  # there is no recipe in the folder
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "to")
    names: dict[str, Any] = {}
    exec(code, names)
    found = names["model"](IDS).logits.detach()
    assert close(found, outputs(base, adapter))


@pytest.mark.parametrize("kind", ["untied", "tied", "encoder"])
@pytest.mark.slow_after(1)
def test_the_code_of_a_card_reads_new_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_encoder(tmp_path / "base") if kind == "encoder" else tiny.save_llama(
        tmp_path / "base", tied=kind == "tied"
    )  # fmt: skip
    model = {"name": str(base), "add_tokens": ["<a>", "<b>"]}
    adapter = adapter_folders.make(tmp_path, "a", base, 1, adapter={"rank": 4}, model=model)
    export(adapter, tmp_path / "to", "peft")
    merge_adapter(None, adapter, tmp_path / "merged")
    code = (tmp_path / "to" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "to")
    names: dict[str, Any] = {}
    exec(code, names)
    ids = names["tokenizer"]("a <a> b<b> film", return_tensors="pt")
    new = names["tokenizer"].convert_tokens_to_ids(["<a>", "<b>"])
    assert set(new) <= set(ids["input_ids"][0].tolist())
    merged = type(names["model"].get_base_model()).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert close(names["model"](**ids).logits, merged(**ids).logits)


def test_the_card_for_mlx_names_its_own_command(tmp_path: Path) -> None:
    _, adapter = adapter_of(tmp_path)
    export(adapter, tmp_path / "to", "mlx")
    card = (tmp_path / "to" / "README.md").read_text()
    assert "mlx_lm.generate" in card
    assert "lora eval" not in card
    assert "from peft" not in card


@pytest.mark.parametrize("reader", ["gguf", "mlx", "vllm"])
def test_the_commands_of_a_card_name_a_base_whose_folder_has_spaces(
    reader: str, tmp_path: Path
) -> None:
    if reader == "gguf":
        pytest.importorskip("gguf")
    base = tiny.save_llama(tmp_path / "it's my base", tied=False)
    adapter = adapter_folders.make(tmp_path, "a", base, 1, adapter={"rank": 4})
    export(adapter, tmp_path / "to", reader)
    card = (tmp_path / "to" / "README.md").read_text()
    words = shlex.split(card.split("```bash\n")[1].split("```")[0])
    assert str(base) in words
    for option, file in (("--adapter-path", "."), ("--lora", "adapter.gguf")):
        if option in words:
            assert words[words.index(option) + 1] == file
            assert (tmp_path / "to" / file).exists()
