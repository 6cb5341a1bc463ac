"""The tensors of a merged folder are compared bit by bit with the files of base and adapter."""

from __future__ import annotations

import json
import math
import re
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapter_folders
import peft
import pytest
import tiny
import tiny_experts
import tiny_translators as translators
import torch
from closeness import assert_close
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)
from typer.testing import CliRunner

from lora_cli.adapters.attach import attach
from lora_cli.adapters.lora import LoRALinear
from lora_cli.adapters.merge_layers import merge
from lora_cli.adapters.peft_format.peft_tokens import SavedRows
from lora_cli.cli.app import app
from lora_cli.errors import IntegrityError
from lora_cli.export.merge import merge_adapter
from lora_cli.export.merged_weights import WeightsProof, _difference, _Sources, formula_of

WEIGHTS = "model.safetensors"
LORA = {"rank": 4, "alpha": 6.0}


def llama(folder: Path, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    base = tiny.save_llama(folder / "base", tied)
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    return base


def merged(folder: Path, base: Path, **adapter: Any) -> tuple[WeightsProof, dict[str, Tensor]]:
    """Merge a random adapter; return the result of the comparison and the written tensors."""
    made = adapter_folders.make(folder, "adapter", base, std=0.1, adapter={**LORA, **adapter})
    result = merge_adapter(str(base), made, folder / "merged")
    return result.weights, load_file(folder / "merged" / WEIGHTS)


def test_each_tensor_is_computed_from_the_files_and_rounded_once(tmp_path: Path) -> None:
    base = llama(tmp_path)
    before = load_file(base / WEIGHTS)
    proof, after = merged(tmp_path, base, target_modules=["q_proj", "up_proj"], use_rslora=True)
    own = load_file(tmp_path / "adapter/adapter_model.safetensors")
    adapted = 0
    for name, tensor in after.items():
        a = own.get(f"base_model.model.{name.removesuffix('weight')}lora_A.weight")
        expected = before[name]
        if a is not None:
            b = own[f"base_model.model.{name.removesuffix('weight')}lora_B.weight"]
            expected = (
                expected.float() + 6.0 / 2 * (b @ a)
            ).bfloat16()  # divided by 2, the root of the rank
            adapted += 1
        assert torch.equal(tensor, expected), name
    assert proof == WeightsProof("W0 + s B A", adapted, identical=len(after) - adapted)
    assert adapted > 0
    facts = json.loads((tmp_path / "merged/merge.json").read_text())["proof"]
    assert facts["weights"]["adapted"] == adapted
    assert facts["weights"]["identical"] == len(after) - adapted
    assert facts["outputs"]["difference"] < 1e-5


def test_one_line_says_what_was_compared(tmp_path: Path) -> None:
    base = llama(tmp_path)
    made = adapter_folders.make(
        tmp_path, "adapter", base, adapter={**LORA, "target_modules": ["q_proj"]}
    )
    arguments = ["merge", "--base", str(base), "--adapter", str(made)]
    result = CliRunner().invoke(app, [*arguments, "--to", str(tmp_path / "merged")])
    layers = sum("q_proj" in name for name in load_file(base / WEIGHTS))
    others = len(load_file(base / WEIGHTS)) - layers
    line = f"weights: {layers} of {layers} adapted tensors equal W0 + s B A rounded once"
    assert f"{line}; {others} others bit-identical to the base's\n" in result.output


@pytest.mark.proves("merge", variant="{kind}", layer="Linear")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
@pytest.mark.slow_after(2)
def test_each_variant_in_each_dtype(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base = llama(tmp_path, dtype=dtype)
    proof, after = merged(tmp_path, base, type=kind, target_modules=["q_proj", "down_proj"])
    assert proof.adapted > 0
    assert proof.adapted + proof.identical == len(after)
    assert not proof.reason
    assert not proof.unknown


@pytest.mark.parametrize("kind", ["encoder", "bert", "gpt2", "tied", "bart", "t5"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "bias": "all"},
        {"target_modules": "all-linear", "init": "pissa"},
        {"type": "bitfit"},
    ],
    ids=["all-linear", "pissa", "bitfit"],
)
@pytest.mark.slow_after(1)
def test_heads_biases_ties_and_doubled_ranks(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    base = _base(kind, tmp_path)
    if kind in ("tied", "t5") and settings.get("type") == "bitfit":
        pytest.skip("it has no bias")
    proof, after = merged(tmp_path, base, **settings)
    assert proof.adapted + proof.trained + proof.identical == len(after)
    assert not proof.reason
    assert bool(proof.adapted) == (settings.get("type") != "bitfit")
    assert proof.identical > 0


@pytest.mark.parametrize("which", ["embed_tokens", "lm_head"])
def test_both_weights_of_a_tie_that_ended(tmp_path: Path, which: str) -> None:
    proof, after = merged(tmp_path, llama(tmp_path, tied=True), target_modules=[which])
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(after)
    assert (proof.adapted, proof.identical) == (1, len(after) - 1)


def test_a_copy_of_one_tied_weight(tmp_path: Path) -> None:
    base = llama(tmp_path, tied=True)
    settings = {"target_modules": ["q_proj"], "train_modules": ["lm_head"]}
    proof, after = merged(tmp_path, base, **settings, ensure_weight_tying=False)
    assert proof.trained == 1
    assert proof.adapted + proof.identical == len(after) - 1


@pytest.mark.proves(
    "merge",
    variant="rows of tokens",
    layer=lambda tied, **_: "tied Embedding" if tied else "Embedding",
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.slow_after(1)
def test_rows_of_tokens(tmp_path: Path, tied: bool, new: bool) -> None:
    base = llama(tmp_path, tied)
    sections: dict[str, Any] = {"adapter": {**LORA, "target_modules": ["q_proj"]}}
    if new:
        sections["model"] = {"name": str(base), "add_tokens": ["<a>", "<b>"]}
    else:
        sections["adapter"]["train_tokens"] = ["<s>", 7]
    made = adapter_folders.make(tmp_path, "adapter", base, **sections)
    proof = merge_adapter(None, made, tmp_path / "merged").weights
    after = load_file(tmp_path / "merged" / WEIGHTS)
    assert proof.of_tokens == (1 if tied else 2)
    assert proof.of_tokens + proof.adapted + proof.identical == len(after)
    assert "the adapter's rows of tokens" in proof.in_words


@pytest.mark.parametrize("kind", ["bart", "marian", "t5", "nllb"])
@pytest.mark.slow_after(1)
def test_new_tokens_of_an_encoder_decoder(tmp_path: Path, kind: str) -> None:
    base = translators.save(tmp_path / "base", kind)
    columns = {"source_column": "text", "target_column": "label"}
    made = adapter_folders.make(
        tmp_path, "adapter", base,
        task={"type": "seq2seq_lm", **columns, **translators.languages(kind)},
        adapter={**LORA, "target_modules": ["q_proj" if kind != "t5" else "q"]},
        model={"name": str(base), "add_tokens": ["<a>", "<b>"]},
    )  # fmt: skip
    proof = merge_adapter(None, made, tmp_path / "merged").weights
    assert proof.of_tokens
    assert not proof.unknown
    if kind == "marian":  # once transformers has resized it, PEFT finds one of its embeddings alone
        return
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(base)
    theirs.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(theirs, str(made)).eval()
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    ids = tokenizer("a <a> film <b>", return_tensors="pt")["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<b>") in ids
    options = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    with torch.no_grad():
        assert_close(model(**options).logits, theirs(**options).logits, 1e-5)


@pytest.mark.parametrize("kind", tiny_experts.CONFIGS)
@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.slow_after(1)
def test_experts(tmp_path: Path, kind: str, experts: bool) -> None:
    """Files that have a tensor for each expert are compared with its part of the update of all."""
    base = tiny_experts.save(tmp_path / "base", kind)
    targets = {"target_parameters": tiny_experts.EXPERTS} if experts else {}
    adapter = {**LORA, "target_modules": ["o_proj"], **targets}
    task = {"type": "causal_lm", "text_column": "text", "max_length": 32}
    made = adapter_folders.make(tmp_path, "adapter", base, adapter=adapter, task=task)
    proof = merge_adapter(None, made, tmp_path / "merged").weights
    after = load_file(tmp_path / "merged" / WEIGHTS)
    assert not proof.reason
    assert proof.adapted + proof.identical == len(after)
    assert not proof.unknown
    of_experts = [name for name in after if ".experts." in name and "bias" not in name]
    others = sum(name.endswith("o_proj.weight") for name in after)
    assert proof.adapted == others + (len(of_experts) if experts else 0)


def test_a_checkpoint_that_is_loaded_in_another_dtype(tmp_path: Path) -> None:
    base = llama(tmp_path)
    file = base / WEIGHTS
    save_file({n: t.float() + 1e-4 for n, t in load_file(file).items()}, file, {"format": "pt"})
    proof, after = merged(tmp_path, base, target_modules=["q_proj"])
    assert proof.loaded_as == len(after)
    assert "had another dtype in the base's file" in proof.in_words


@pytest.mark.parametrize("which", ["adapted", "untouched", "sign"])
def test_a_single_wrong_bit_is_found(
    tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single bit is far below the tolerances of the comparisons of outputs and of products."""
    base = llama(tmp_path)
    real = PreTrainedModel.float

    def wrong(model: PreTrainedModel) -> PreTrainedModel:  # in what the merge reads, not the file
        model = real(model)
        layer = model.model.layers[0]  # type: ignore[operator,index,union-attr]
        name = "q_proj" if which == "adapted" else "k_proj"
        weight = getattr(layer.self_attn, name).weight.data  # type: ignore[union-attr]
        if which == "sign":
            weight[0, 0] = -0.0
        else:
            weight[0, 0] *= 1 + 2**-6  # some units in the last place of bfloat16
        return model

    if which == "sign":
        tensors = load_file(base / WEIGHTS)
        tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] = 0.0
        save_file(tensors, base / WEIGHTS, {"format": "pt"})
    monkeypatch.setattr(PreTrainedModel, "float", wrong)
    name = "q_proj" if which == "adapted" else "k_proj"
    what = f"in 1 tensor: the largest difference is .*, of `layers.0.self_attn.{name}.weight`"
    with pytest.raises(IntegrityError, match=what):
        merged(tmp_path, base, target_modules=["q_proj"])
    assert not (tmp_path / "merged").exists()


def test_weights_are_merged_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """All merged weights together would take as much memory as the base."""
    model = tiny.llama(False)
    attach(model, tiny.recipe_of("causal_lm", target_modules="all-linear"))
    real, alive, together = LoRALinear.merged_weight, [], []

    def counted(layer: LoRALinear, w0: Tensor) -> Tensor:
        together.append(sum(weight() is not None for weight in alive))
        merged = real(layer, w0)
        alive.append(weakref.ref(merged))
        return merged

    monkeypatch.setattr(LoRALinear, "merged_weight", counted)
    merge(model)
    assert len(together) > 4
    assert max(together) <= 1


def _base(kind: str, folder: Path) -> Path:
    match kind:
        case "bart" | "t5":
            return tiny.save_encoder_decoder(folder / "base", kind)
        case "gpt2":
            return tiny.save_gpt2(folder / "base")
        case "tied":
            return tiny.save_llama(folder / "base")
        case _:
            return tiny.save_encoder(folder / "base", kind="bert" if kind == "bert" else "roberta")


# --------------------------------------------------------------------- one comparison at a time


def test_tensors_are_compared_bit_by_bit_after_rounding() -> None:
    written = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    near = torch.tensor([1.001, -2.0])  # bfloat16 cannot represent it
    assert _difference(written, near) == 0.0
    assert _difference(written, torch.tensor([1.0, -1.5])) == 0.5
    assert _difference(written, torch.tensor([[1.0, -2.0]])) == math.inf
    zero = torch.zeros(2)
    assert 0.0 < _difference(zero, -zero) < 1e-300  # only the sign
    nan = torch.tensor([math.nan, 0.0])
    assert _difference(nan, nan) == 0.0
    assert math.isnan(_difference(nan, zero))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"a": 0.5, "c": 2.0, "d": 1.0}, "in 3 tensors: the largest difference is 2.0e+00, of `c`"),
        ({"a": 0.5, "b": math.nan, "c": 2.0}, "the largest difference is nan, of `b`"),
    ],
)
def test_the_tensor_that_differs_most_is_named(wrong: dict[str, float], said: str) -> None:
    sources = _Sources(torch.nn.Linear(1, 1), [], [], {})
    sources.require_equal()
    sources.wrong = wrong
    with pytest.raises(IntegrityError, match=re.escape(said)):
        sources.require_equal()


def test_a_head_is_also_read_in_the_order_of_the_labels() -> None:
    sources = _Sources(torch.nn.Linear(1, 1), [], [], {})
    sources.enter("", torch.nn.Linear(1, 1), [])
    sources.rows, sources.heads = [2, 0], ("classifier.",)
    sized = [torch.arange(2.0), torch.arange(3.0), torch.arange(8.0).view(4, 2)]
    tensors = [torch.tensor(5.0), *sized]
    stored: Any = [SimpleNamespace(read=lambda tensor=tensor: tensor) for tensor in tensors]
    found = sources._read(stored, ["classifier.weight"])
    # tensors with a row per label: not scales or layers between the body and the labels
    expected = [*tensors, torch.tensor([2.0, 0.0]), torch.tensor([[4.0, 5.0], [0.0, 1.0]])]
    assert [tensor.tolist() for tensor in found] == [tensor.tolist() for tensor in expected]
    assert sources._read(stored, ["body.weight"]) == tensors
    sources.rows = []
    assert sources._read(stored, ["classifier.weight"]) == tensors


def test_an_enlarged_vocabulary_is_compared_where_a_file_has_its_rows() -> None:
    compare = _Sources(torch.nn.Linear(1, 1), [], [], {})._from_base
    base, new = torch.randn(2, 3), torch.randn(3, 3)
    written = torch.cat([base, new])
    assert compare(base, written, None, None, None) == 0.0  # no file has the three new rows
    rows = SavedRows("embed_tokens", [1, 4], torch.stack([base[1], new[2]]), [])
    assert compare(base, written, None, rows, None) == 0.0
    for row, is_compared in ((0, True), (1, True), (2, False), (3, False), (4, True)):
        other = written.clone()
        other[row, 1] += 0.5
        assert compare(base, other, None, rows, None) == pytest.approx(0.5 * is_compared)
    assert compare(written, base, None, None, None) == math.inf  # rows are missing
    for shape in ((2, 4), (2, 3, 1), (3,)):
        assert compare(base, torch.zeros(shape), None, None, None) == math.inf
    assert compare(torch.tensor(2.0), torch.tensor(2.5), None, None, None) == 0.5  # no dimensions


def test_an_enlarged_vocabulary_bias_is_compared_entry_by_entry() -> None:
    """BART's is stored as a row, (1, vocabulary)."""
    compare = _Sources(torch.nn.Linear(1, 1), [], [], {})._from_base
    base = torch.randn(1, 3)
    larger = torch.cat([base, torch.ones(1, 2)], dim=1)
    assert compare(base, larger, None, None, None) == 0.0
    larger[0, 2] += 0.5
    assert compare(base, larger, None, None, None) == pytest.approx(0.5)
    assert compare(base, base + 0.5, None, None, None) == pytest.approx(0.5)
    assert compare(larger, base, None, None, None) == math.inf


def test_the_line_counts_each_kind_of_tensor() -> None:
    proof = WeightsProof("W0 + s B A", identical=1200)
    assert proof.in_words == "weights: 1,200 others bit-identical to the base's"
    proof = WeightsProof("W0 + s B A", 1, 2, 3, 4, 5, 6, ["x", "y"])
    assert proof.in_words == (
        "weights: 1 of 1 adapted tensor equal W0 + s B A rounded once; 2 equal the adapter's file; "
        "3 equal the base's with the adapter's rows of tokens; 5 equal the dequantised base; "
        "4 others bit-identical to the base's; 6 had another dtype in the base's file; "
        "2 not compared, since neither file has the name (`x`)"
    )


def test_the_formula_depends_on_the_adapters() -> None:
    def adapter(kind: str, weight: float = 1.0) -> Any:
        return SimpleNamespace(saved=SimpleNamespace(type=kind), weight=weight)

    assert formula_of([adapter("lora")]) == "W0 + s B A"
    assert formula_of([adapter("lora", 0.5)]) == "W0 + w s B A"
    assert formula_of([adapter("lora"), adapter("lora")]) == "W0 + the sum of w s B A"
    assert "B A" not in formula_of([adapter("lokr")])
