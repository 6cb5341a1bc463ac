"""Merging tensor by tensor writes the same files as merging the whole model, bit for bit."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapter_folders
import pytest
import tiny
import tiny_experts
import torch
from closeness import assert_close
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertLMHeadModel,
)
from typer.testing import CliRunner

from lora_cli import machine_memory
from lora_cli.cli.app import app
from lora_cli.errors import IntegrityError, LoraError, NumericsError
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.export import merge_in_pieces, merge_plan
from lora_cli.export.merge import MergeResult, merge_adapter
from lora_cli.models.stored_tensors import Stored
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.tensorfile import TensorEntry
from lora_cli.training import train

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LORA = {"rank": 4, "alpha": 6.0}
EXPERTS = {"target_modules": ["o_proj"], "target_parameters": tiny_experts.EXPERTS}
TEXTS = {"type": "causal_lm", "text_column": "text", "max_length": 32}


def base_of(kind: str, folder: Path, dtype: torch.dtype | None = None) -> Path:
    match kind:
        case "bart" | "t5":
            base = tiny.save_encoder_decoder(folder / "base", kind)
        case "gpt2":
            base = tiny.save_gpt2(folder / "base")
        case "encoder" | "bert":
            base = tiny.save_encoder(folder / "base", kind="bert" if kind == "bert" else "roberta")
        case "tied" | "untied":
            base = tiny.save_llama(folder / "base", kind == "tied")
        case _:
            base = tiny_experts.save(folder / "base", kind)
    if dtype is not None:
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    return base


def adapter_on(base: Path, folder: Path, kind: str = "", **sections: Any) -> Path:
    if kind in tiny_experts.CONFIGS:
        sections["task"] = TEXTS
    if "model" in sections:
        sections["model"] = {"name": str(base), **sections["model"]}
    sections["adapter"] = {**LORA, **sections["adapter"]}
    return adapter_folders.make(folder, "adapter", base, std=0.1, **sections)


def in_pieces(base: Path | None, adapter: Path, to: Path) -> MergeResult:
    return merge_adapter(None if base is None else str(base), adapter, to, low_memory=True)


BFLOAT = torch.bfloat16
CASES: dict[str, tuple[str, torch.dtype | None, dict[str, Any]]] = {
    "linear": ("untied", BFLOAT, {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "a base without its prefix": ("bert", None, {"target_modules": "all-linear"}),
    "three places of a tie": ("t5", None, {"target_modules": "all-linear"}),
    "a copy of one side": (
        "tied", None,
        {"target_modules": ["q_proj"], "train_modules": ["lm_head"], "ensure_weight_tying": False},
    ),
    "experts in a tensor each": ("mixtral", BFLOAT, EXPERTS),
    "a head and biases": ("encoder", None, {"target_modules": "all-linear", "bias": "all"}),
    "Conv1D": ("gpt2", None, {"target_modules": "all-linear", "bias": "all"}),
    "a decoder and a head": ("bart", None, {"target_modules": "all-linear", "init": "pissa"}),
    "biases alone": ("bert", None, {"type": "bitfit"}),
    "DoRA": ("untied", BFLOAT, {"type": "dora", "target_modules": ["q_proj", "down_proj"]}),
    "LoHa": ("untied", torch.float16, {"type": "loha", "target_modules": ["q_proj"]}),
    "LoKr": ("untied", None, {"type": "lokr", "target_modules": ["q_proj", "down_proj"]}),
    "one side of a tie": ("tied", BFLOAT, {"target_modules": ["lm_head"]}),
    "rows of tokens": ("untied", BFLOAT, {"target_modules": ["q_proj"], "train_tokens": [7, 9]}),
    "experts in one tensor": ("gpt_oss", None, EXPERTS),
    "experts trained in full": (
        "qwen3_moe", BFLOAT, {"target_modules": ["o_proj"], "train_modules": ["mlp.experts"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow_after(5)
def test_the_same_files_as_of_the_whole_model(tmp_path: Path, case: str) -> None:
    kind, dtype, settings = CASES[case]
    base = base_of(kind, tmp_path, dtype)
    adapter = adapter_on(base, tmp_path, kind, adapter=settings)
    whole = merge_adapter(str(base), adapter, tmp_path / "whole")
    found = in_pieces(base, adapter, tmp_path / "pieces")
    _require_same_files(tmp_path)
    assert found.weights == whole.weights
    assert (found.untied, found.merged_modules, found.dtype) == (
        whole.untied, whole.merged_modules, whole.dtype,
    )  # fmt: skip
    assert found.difference is None
    assert whole.difference is not None


def test_experts_that_were_trained_in_full_come_from_the_adapter(tmp_path: Path) -> None:
    base = base_of("mixtral", tmp_path)
    settings = {"target_modules": ["o_proj"], "train_modules": ["mlp.experts"]}
    adapter = adapter_on(base, tmp_path, "mixtral", adapter=settings)
    trained = load_file(adapter / "adapter_model.safetensors")
    for to, low_memory in (("whole", False), ("pieces", True)):
        merge_adapter(None, adapter, tmp_path / to, low_memory=low_memory)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / to)
        for name in ("gate_up_proj", "down_proj"):
            found = merged.get_parameter(f"model.layers.1.mlp.experts.{name}")
            expected = trained[f"base_model.model.model.layers.1.mlp.experts.{name}"]
            assert torch.equal(found, expected)


@pytest.mark.parametrize("words", ["", " film"], ids=["layers", "rows of tokens"])
def test_weights_that_are_separate_in_the_files_but_tied_by_the_configuration(
    tmp_path: Path, words: str
) -> None:
    base = base_of("tied", tmp_path)
    tokens = sorted(tiny.tokenizer("llama")(words, add_special_tokens=False)["input_ids"])
    weights = load_file(base / WEIGHTS)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, base / WEIGHTS, metadata={"format": "pt"})
    adapter = {**LORA, "target_modules": ["q_proj"], "train_tokens": tokens}
    train(load_recipe(tiny.recipe(base, tmp_path, adapter=adapter)))
    _, ours, _ = open_adapter(tmp_path / "out", load_adapter_recipe(tmp_path / "out"))
    merge_adapter(None, tmp_path / "out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    before = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        found = ours(tiny_experts.ids()).logits
        assert_close(merged(tiny_experts.ids()).logits, found)
        assert not torch.equal(before(tiny_experts.ids()).logits, found)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        is_old = (merged.get_parameter(name) == before.get_parameter(name)).all(dim=1)
        assert [i for i, same in enumerate(is_old.tolist()) if not same] == tokens
    with pytest.raises(LoraError, match=r"its files have several values of `model\.embed_tokens"):
        in_pieces(None, tmp_path / "out", tmp_path / "pieces")


@pytest.mark.parametrize("targets", ["word_embeddings", "predictions.decoder"])
@pytest.mark.parametrize("low_memory", [False, True], ids=["whole", "in pieces"])
def test_a_tie_that_stays_is_written_where_another_ends(
    tmp_path: Path, targets: str, low_memory: bool
) -> None:
    config = BertConfig(
        vocab_size=tiny.vocabulary("llama"), hidden_size=32, num_hidden_layers=1, is_decoder=True,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=tiny.POSITIONS,
    )  # fmt: skip
    model = tiny.enliven(BertLMHeadModel(config))  # it shares a weight and a bias
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer("llama").save_pretrained(tmp_path / "base")
    adapter = {**LORA, "target_modules": [targets]}
    folder = adapter_folders.make(tmp_path, "a", tmp_path / "base", adapter=adapter, task=TEXTS)
    merge_adapter(None, folder, tmp_path / "merged", low_memory=low_memory)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, folder).eval()(tiny_experts.ids()).logits
        merged = BertLMHeadModel.from_pretrained(tmp_path / "merged").eval()
        assert_close(merged(tiny_experts.ids()).logits, expected)


@pytest.mark.parametrize("changed", [True, False])
def test_adapted_integer_tensors_need_the_whole_model_and_others_are_copied(changed: bool) -> None:
    stored = Stored(Path("base"), "w", TensorEntry("I8", (2, 2), 0, 4))
    planned = merge_plan.PlannedTensor("w", "I8", (2, 2), stored, ["w"])
    plan: Any = SimpleNamespace(
        changed={"w"} if changed else {"other"}, changes=[], head_rows=None, heads=()
    )
    if not changed:
        merge_plan._Planner._require_simple(plan, planned)
        return
    with pytest.raises(merge_plan.NeedsWholeModelError, match="`w` is stored as I8"):
        merge_plan._Planner._require_simple(plan, planned)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens(tmp_path: Path, tied: bool) -> None:
    base = base_of("tied" if tied else "untied", tmp_path, BFLOAT)
    sections = {"model": {"add_tokens": ["<a>", "<b>"]}, "adapter": {"target_modules": ["q_proj"]}}
    adapter = adapter_on(base, tmp_path, **sections)
    merge_adapter(None, adapter, tmp_path / "whole")
    in_pieces(None, adapter, tmp_path / "pieces")
    _require_same_files(tmp_path)


def test_a_vocabulary_bias_that_is_enlarged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BART keeps it as a buffer, which transformers would not load with too few entries."""
    base = base_of("bart", tmp_path)
    adapter = adapter_on(
        base, tmp_path, task={"type": "seq2seq_lm"}, model={"add_tokens": ["<a>", "<b>"]},
        adapter={"target_modules": ["q_proj"]},
    )  # fmt: skip
    with pytest.raises(LoraError, match="`final_logits_bias` gets entries that no file has"):
        in_pieces(None, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(machine_memory, "available_bytes", lambda: 0)
    merge_adapter(None, adapter, tmp_path / "merged")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    size = merged.get_input_embeddings().weight.shape[0]
    assert merged.final_logits_bias.shape == (1, size)


def _require_same_files(folder: Path) -> None:
    expected, found = (load_file(folder / name / WEIGHTS) for name in ("whole", "pieces"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name
    for file in (folder / "whole").iterdir():
        other = folder / "pieces" / file.name
        assert other.is_file(), file.name
        if file.name not in (WEIGHTS, "merge.json", "manifest.json"):
            assert other.read_bytes() == file.read_bytes(), file.name
    assert len(list((folder / "whole").iterdir())) == len(list((folder / "pieces").iterdir()))


def divided(folder: Path, extra: dict[str, Tensor] | None = None) -> Path:
    """Return a Llama in four files, with metadata of its own and a tensor that no model reads."""
    base = base_of("untied", folder, BFLOAT)
    tensors = {**load_file(base / WEIGHTS), **(extra or {})}
    (base / WEIGHTS).unlink()
    places = {}
    for i, name in enumerate(sorted(tensors)):
        places[name] = f"part-{i % 4}.safetensors"
    for file in set(places.values()):
        own = {n: t for n, t in tensors.items() if places[n] == file}
        save_file(own, base / file, {"format": "pt", "note": file})
    index = {"metadata": {"total_size": 1, "made_by": "a test"}, "weight_map": places}
    (base / INDEX).write_text(json.dumps(index))
    return base


def test_sharded_files_keep_their_tensors_and_metadata(tmp_path: Path) -> None:
    unread = {"model.layers.9.mtp.weight": torch.arange(6.0).reshape(2, 3)}
    base = divided(tmp_path, unread)
    adapter = adapter_on(base, tmp_path, adapter={"target_modules": ["q_proj", "down_proj"]})
    in_pieces(base, adapter, tmp_path / "merged")
    own = load_file(adapter / "adapter_model.safetensors")
    before, after = (json.loads((f / INDEX).read_text()) for f in (base, tmp_path / "merged"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["made_by"] == "a test"
    total, adapted = 0, 0
    for file in set(before["weight_map"].values()):
        old, new = load_file(base / file), load_file(tmp_path / "merged" / file)
        with safe_open(tmp_path / "merged" / file, "pt") as handle:
            assert handle.metadata() == {"format": "pt", "note": file}
        assert old.keys() == new.keys()
        for name, tensor in old.items():
            site = f"base_model.model.{name.removesuffix('weight')}"
            expected = tensor
            if f"{site}lora_A.weight" in own:
                a, b = own[f"{site}lora_A.weight"], own[f"{site}lora_B.weight"]
                expected = (tensor.float() + 6.0 / 4 * (b @ a)).bfloat16()
                adapted += 1
            assert torch.equal(new[name], expected), name
            total += expected.numel() * expected.element_size()
    assert adapted == 4
    assert after["metadata"]["total_size"] == total
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = divided(tmp_path)
    adapter = adapter_on(base, tmp_path, adapter={"target_modules": ["q_proj", "down_proj"]})
    real, alive, together = Stored.read, [], []

    def counted(stored: Stored) -> Tensor:
        together.append(sum(tensor() is not None for tensor in alive))
        tensor = real(stored)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Stored, "read", counted)
    in_pieces(base, adapter, tmp_path / "merged")
    # only adapted tensors are read, to merge them and to compare the result
    assert len(together) == 3 * 4
    assert max(together) == 1


def test_less_memory_than_the_model_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("tied", tmp_path, BFLOAT)
    adapter = adapter_on(base, tmp_path, adapter={"target_modules": ["q_proj"]})
    monkeypatch.setattr(machine_memory, "available_bytes", lambda: 2**29)
    arguments = ["merge", "--adapter", str(adapter), "--to", str(tmp_path / "merged")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    why = "outputs: not compared, as the model in float32 would take 0.50 GiB, and 0.50 GiB are"
    assert f"{why} available\n" in result.stdout
    assert "adapted tensors equal W0 + s B A rounded once" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("memory: "))
    assert "for the largest tensor that it changes (`model.layers.0.self_attn.q_proj" in line
    facts = json.loads((tmp_path / "merged/merge.json").read_text())
    assert facts["proof"]["outputs"] == {"not_compared": why.partition("as ")[2] + " available"}
    assert facts["proof"]["weights"]["adapted"] == 2
    memory = facts["memory"]
    entries = load_file(base / WEIGHTS)["model.layers.0.self_attn.q_proj.weight"].numel()
    assert memory["tensor_bytes"] == 16 * entries
    parts = ("start_bytes", "adapters_bytes", "tensor_bytes")
    assert memory["expected_bytes"] == sum(memory[part] for part in parts)
    assert memory["peak_bytes"] >= memory["start_bytes"] - 2**24
    # with more memory, the outputs are compared
    monkeypatch.setattr(machine_memory, "available_bytes", lambda: 2**40)
    assert merge_adapter(None, adapter, tmp_path / "whole").difference is not None


@pytest.mark.parametrize("pieces", [True, False])
def test_a_base_that_has_to_be_loaded(
    tmp_path: Path,
    pieces: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A head whose labels are in another order is reordered when the model is loaded."""
    from lora_cli.adapters.peft_format.adapter_folder import WEIGHTS_FILE

    base = tiny.save_encoder(tmp_path / "base", labels=["good", "bad"])
    adapter = adapter_on(base, tmp_path, adapter={"target_modules": ["query"]})
    file = adapter / WEIGHTS_FILE
    kept = {n: t for n, t in load_file(file).items() if "classifier" not in n}
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(kept, file, {"format": "pt"})
    (adapter / "manifest.json").unlink()
    monkeypatch.setattr(machine_memory, "available_bytes", lambda: 0)
    if pieces:
        with pytest.raises(LoraError, match="tensor by tensor: the outputs of its head are put"):
            in_pieces(base, adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    else:
        result = merge_adapter(str(base), adapter, tmp_path / "merged")
        assert result.difference is not None
        assert (
            "it is loaded as a whole all the same, since the outputs of" in capsys.readouterr().err
        )


def test_a_base_of_another_adapter(tmp_path: Path) -> None:
    base = base_of("untied", tmp_path)
    adapter = adapter_on(base, tmp_path, adapter={"target_modules": ["q_proj"]})
    tensors = load_file(base / WEIGHTS)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    with pytest.raises(IntegrityError, match="is not the base that"):
        in_pieces(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_weight_too_large_for_fp16(tmp_path: Path) -> None:
    base = base_of("untied", tmp_path, torch.float16)
    adapter = adapter_folders.make(
        tmp_path, "adapter", base, std=300.0, adapter={**LORA, "target_modules": ["down_proj"]}
    )
    with pytest.raises(NumericsError, match=r"down_proj\.weight` has entries that float16"):
        in_pieces(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_wrong_bit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("untied", tmp_path, BFLOAT)
    adapter = adapter_on(base, tmp_path, adapter={"target_modules": ["q_proj"]})
    real = merge_in_pieces._merged

    def wrong(*arguments: Any) -> Tensor:
        tensor = real(*arguments)
        tensor[0, 0] *= 1 + 2**-6
        return tensor

    monkeypatch.setattr(merge_in_pieces, "_merged", wrong)
    with pytest.raises(IntegrityError, match="in 2 tensors: the largest difference is"):
        in_pieces(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_copies_of_base_weights_that_peft_wrote(tmp_path: Path) -> None:
    """PEFT writes the weight of an adapted embedding; another base's is rejected."""
    base = base_of("untied", tmp_path)
    adapter = adapter_on(base, tmp_path, adapter={"target_modules": ["embed_tokens"]})
    for name in ("manifest.json", "base.json"):
        (adapter / name).unlink()
    file = adapter / "adapter_model.safetensors"
    name, tensors = "model.embed_tokens", load_file(file)
    tensors[f"base_model.model.{name}.base_layer.weight"] = load_file(base / WEIGHTS)[
        f"{name}.weight"
    ].bfloat16()
    save_file(tensors, file, {"format": "pt"})
    assert in_pieces(base, adapter, tmp_path / "merged").weights.adapted == 1
    shutil.rmtree(tmp_path / "merged")
    tensors[f"base_model.model.{name}.base_layer.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(IntegrityError, match="of the base is not the one it was trained on"):
        in_pieces(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("stored", "may_grow", "fits"),
    [
        ((5, 3), False, True), ((4, 3), False, False), ((4, 3), True, True), ((6, 3), True, False),
        ((5, 2), True, False), ((4, 2), True, False), (None, True, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("names", [["a"], ["other", "a"]])
def test_a_parameter_is_missing_if_no_file_has_it_in_its_shape_or_with_fewer_rows(
    names: list[str], stored: tuple[int, int] | None, may_grow: bool, fits: bool
) -> None:
    found: Any = object.__new__(merge_plan._StoredParameters)
    found.groups, found.parameters = [names], {name: torch.zeros(5, 3) for name in names}
    found.by_name = (
        {} if stored is None else {"a": Stored(Path(), "a", TensorEntry("F32", stored, 0, 0))}
    )
    found.rows = {}
    assert found.missing(may_grow) == ([] if fits else [names[0]])


@pytest.mark.parametrize(("rows", "fits"), [(6, True), (5, False), (12, False)])
def test_experts_are_complete_if_the_files_have_the_rows_of_all(rows: int, fits: bool) -> None:
    found: Any = object.__new__(merge_plan._StoredParameters)
    found.groups, found.parameters = [["a"]], {"a": torch.zeros(2, 3, 4)}
    found.by_name, found.rows = {}, {"a": rows}
    assert found.is_in_parts("a") is fits
    assert found.missing(False) == ([] if fits else ["a"])
