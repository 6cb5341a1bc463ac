"""A merged folder equals base + adapter, and plain transformers load it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from closeness import assert_close
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from typer.testing import CliRunner

from lora_cli.adapters.attach import lora_layers
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.peft_format.adapter_folder import read_adapter
from lora_cli.cli.app import app
from lora_cli.errors import IntegrityError, LoraError, NumericsError
from lora_cli.export import merge as merging
from lora_cli.export.merge import merge_adapter
from lora_cli.export.target_folder import locked_target
from lora_cli.files import write_manifest
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.training import run as training_run
from lora_cli.training import train
from lora_cli.training.engine import Engine

IDS = torch.arange(5, 65).reshape(4, 15)
IDS[:, -1] = tiny.EOS  # BART and T5 classify at this token
WEIGHTS = "model.safetensors"


def base_of(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a base model in a dtype."""
    match kind:
        case "encoder":
            path = tiny.save_encoder(folder / "base")
        case "bert":
            path = tiny.save_encoder(folder / "base", kind="bert")
        case "bart" | "t5":
            path = tiny.save_encoder_decoder(folder / "base", kind)
        case "gpt2":
            path = tiny.save_gpt2(folder / "base")
        case _:
            path = tiny.save_llama(folder / "base", tied=kind == "tied")
    if dtype != torch.float32:
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).save_pretrained(path)
    return path


def trained(folder: Path, base: Path, **adapter: Any) -> Path:
    """Return the output folder of a run on the base, with a large update."""
    path = tiny.recipe(base, folder, adapter={"rank": 4, "alpha": 8, **adapter})
    with pytest.MonkeyPatch.context() as patch:
        real = training_run.train_step

        def step(engine: Engine, batches: Any) -> Any:
            result = real(engine, batches)
            tiny.wake(engine.model, std=0.1)
            return result

        patch.setattr(training_run, "train_step", step)
        train(load_recipe(path))
    return folder / "out"


def adapted(base: Path, out: Path) -> PreTrainedModel:
    """Return base + adapter in float32."""
    recipe = load_recipe(out / "recipe.yaml")
    task = build_task(recipe)
    task.load_processor()
    model, new = task.load_model(torch.device("cpu"), torch.float32)
    load_adapter(model, read_adapter(out), new)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def plain(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a folder with plain transformers."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = AutoModelForSequenceClassification if "Sequence" in kind else AutoModelForCausalLM
    return auto.from_pretrained(folder, **options).eval()


def stored(folder: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(folder / WEIGHTS).items()}


@pytest.mark.slow
def test_the_base_is_the_one_that_the_adapter_names(tmp_path: Path) -> None:
    base = base_of("encoder", tmp_path)
    out = trained(tmp_path, base)
    merge_adapter(str(base), out, tmp_path / "named")
    merge_adapter(None, out, tmp_path / "found")
    for name in (
        "recipe.yaml",
        "computation.json",
        "manifest.json",
    ):  # files that PEFT does not write
        (out / name).rename(tmp_path / name)
    merge_adapter(None, out, tmp_path / "peft")
    named = logits(plain(tmp_path / "named"))
    for folder in ("found", "peft"):
        assert torch.equal(logits(plain(tmp_path / folder)), named)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("encoder", ["query", "value", "dense"]),
        ("bert", "all-linear"),
        ("bart", "all-linear"),
        ("t5", ["q", "v", "wo"]),
        ("gpt2", ["c_attn", "c_proj"]),
        ("gpt2", "all-linear"),
        ("tied", "all-linear"),
        ("untied", "all-linear"),
        ("untied", ["q_proj", "lm_head", "embed_tokens"]),
    ],
)
@pytest.mark.slow_after(1)
def test_the_merged_model_equals_base_plus_adapter(tmp_path: Path, kind: str, targets: Any) -> None:
    base = base_of(kind, tmp_path)
    out = trained(tmp_path, base, target_modules=targets, bias="lora_only")
    result = merge_adapter(str(base), out, tmp_path / "merged")
    expected = logits(adapted(base, out))
    found = logits(plain(tmp_path / "merged"))
    scale = float(expected.abs().max())
    assert_close(found, expected)
    assert result.difference <= 5e-5
    assert result.untied == []
    assert result.verified
    if kind not in ("encoder", "bert", "bart", "t5"):  # the adapter has an effect
        assert float((found - logits(plain(base))).abs().max()) > 1e-2 * scale
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    theirs = AutoTokenizer.from_pretrained(base)
    assert tokenizer("a warm film").input_ids == theirs("a warm film").input_ids
    assert not any("lora" in name for name in stored(tmp_path / "merged"))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["encoder", "bert"])
def test_the_merged_folder_knows_the_labels(tmp_path: Path, kind: str) -> None:
    base = base_of(kind, tmp_path)
    merge_adapter(str(base), trained(tmp_path, base), tmp_path / "merged")
    model = plain(tmp_path / "merged")
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.label2id == {"bad": 0, "good": 1}
    assert (tmp_path / "merged/tokenizer.json").is_file()
    assert not [p for p in (tmp_path / "merged").iterdir() if "adapter" in p.name]


def test_a_tie_without_adapters_stays(tmp_path: Path) -> None:
    base = base_of("tied", tmp_path)
    out = trained(tmp_path, base, target_modules=["q_proj"])
    assert merge_adapter(str(base), out, tmp_path / "merged").untied == []
    model = plain(tmp_path / "merged")
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert stored(tmp_path / "merged").keys() == stored(base).keys()
    assert (tmp_path / "merged" / WEIGHTS).stat().st_size == pytest.approx(
        (base / WEIGHTS).stat().st_size, rel=0.02
    )


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
@pytest.mark.parametrize("which", ["embedding", "head"])
@pytest.mark.slow_after(1)
def test_adapting_one_of_two_tied_weights_unties_them(
    tmp_path: Path, kind: str, which: str
) -> None:
    base = base_of(kind, tmp_path)
    embedding, head = {"tied": "embed_tokens", "gpt2": "wte"}[kind], "lm_head"
    out = trained(tmp_path, base, target_modules=[embedding if which == "embedding" else head])
    arguments = ["--base", str(base), "--adapter", str(out), "--to", str(tmp_path / "merged")]
    result = CliRunner().invoke(app, ["merge", *arguments])
    assert result.exit_code == 0, result.output
    said = next(line for line in result.stdout.splitlines() if line.startswith("untied "))
    assert embedding in said
    assert head in said
    assert said.endswith("the adapter changes them differently, so each has its own weight now")
    model = plain(tmp_path / "merged")
    assert model.config.tie_word_embeddings is False
    ours, theirs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert not torch.equal(ours, theirs)
    untouched = theirs if which == "embedding" else ours
    assert torch.equal(untouched, plain(base).get_input_embeddings().weight)
    expected = logits(adapted(base, out))
    assert_close(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt2", "tied", "untied"])
@pytest.mark.slow_after(1)
def test_the_dtype_of_the_base_checkpoint_is_kept(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    base = base_of(kind, tmp_path, dtype)
    assert set(stored(base).values()) == {dtype}
    out = trained(tmp_path, base, target_modules="all-linear")
    result = merge_adapter(str(base), out, tmp_path / "merged")
    assert result.dtype == dtype
    assert stored(tmp_path / "merged") == stored(base)
    assert plain(tmp_path / "merged", dtype="auto").dtype == dtype
    assert result.difference <= 5e-5
    expected = logits(adapted(base, out))
    found = logits(plain(tmp_path / "merged", dtype=torch.float32))
    # every weight is rounded once, from float32
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    assert 0 < result.rounding < 0.1


def test_weights_are_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    base = base_of("untied", tmp_path, torch.bfloat16)
    out = trained(tmp_path, base, target_modules=["q_proj"])
    merge_adapter(str(base), out, tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj"
    adapter = read_adapter(out).tensors
    delta = 2.0 * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
    weight = load_file(base / WEIGHTS)[f"{name}.weight"].float() + delta
    assert torch.equal(
        load_file(tmp_path / "merged" / WEIGHTS)[f"{name}.weight"], weight.bfloat16()
    )


def test_a_weight_too_large_for_fp16_is_refused(tmp_path: Path) -> None:
    base = base_of("untied", tmp_path, torch.float16)
    out = trained(tmp_path, base, target_modules=["down_proj"])
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t * 1e3 for n, t in tensors.items()}, file, metadata={"format": "pt"})
    write_manifest(out)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        NumericsError, match=r"down_proj\.weight` has entries that float16"
    ) as caught:
        merge_adapter(str(base), out, tmp_path / "merged")
    assert caught.value.exit_code == 3
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------------- adapters of PEFT's own


def peft_adapter(base: Path, folder: Path, task_type: str, **options: Any) -> nn.Module:
    """Save an adapter that PEFT made, and return its model."""
    from peft import LoraConfig, get_peft_model

    if task_type == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(base, **options)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["query"], task_type=task_type)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type=task_type)
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_peft_adapters_are_merged_without_a_recipe(tmp_path: Path, task_type: str) -> None:
    base = base_of("encoder" if task_type == "SEQ_CLS" else "tied", tmp_path)
    options = {"num_labels": 3} if task_type == "SEQ_CLS" else {}
    theirs = peft_adapter(base, tmp_path / "adapter", task_type, **options)
    result = merge_adapter(str(base), tmp_path / "adapter", tmp_path / "merged")
    assert not result.verified
    model = plain(tmp_path / "merged")
    assert_close(logits(model), logits(theirs))
    if task_type == "SEQ_CLS":
        assert model.config.id2label == {i: f"LABEL_{i}" for i in range(3)}


def test_labels_of_a_base_that_classifies_already_are_kept(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base", labels=["bad", "good"])
    peft_adapter(base, tmp_path / "adapter", "SEQ_CLS")
    merge_adapter(str(base), tmp_path / "adapter", tmp_path / "merged")
    assert plain(tmp_path / "merged").config.id2label == {0: "bad", 1: "good"}


def test_a_peft_adapter_of_one_output_is_a_regression(tmp_path: Path) -> None:
    base = base_of("encoder", tmp_path)
    theirs = peft_adapter(base, tmp_path / "adapter", "SEQ_CLS", num_labels=1)
    merge_adapter(str(base), tmp_path / "adapter", tmp_path / "merged")
    model = plain(tmp_path / "merged")
    assert model.config.problem_type == "regression"
    assert_close(logits(model), logits(theirs))


def test_peft_adapters_are_merged_with_a_recipe(tmp_path: Path) -> None:
    base = base_of("encoder", tmp_path)
    peft_adapter(base, tmp_path / "adapter", "SEQ_CLS")
    path = tiny.recipe(base, tmp_path)
    arguments = ["--base", str(base), "--adapter", str(tmp_path / "adapter")]
    arguments += ["--to", str(tmp_path / "merged"), "--recipe", str(path)]
    result = CliRunner().invoke(app, ["merge", *arguments])
    assert result.exit_code == 0, result.output
    assert "merged 2 modules" in result.stdout
    assert "no manifest" in result.stderr
    assert plain(tmp_path / "merged").config.id2label == {0: "bad", 1: "good"}


def test_a_peft_adapter_without_a_task_needs_a_recipe(tmp_path: Path) -> None:
    base = base_of("encoder", tmp_path)
    peft_adapter(base, tmp_path / "adapter", "SEQ_CLS")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": None}))
    with pytest.raises(LoraError, match="--recipe"):
        merge_adapter(str(base), tmp_path / "adapter", tmp_path / "merged")


# --------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("run")
    base = base_of("tied", folder)
    return base, trained(folder, base, target_modules=["q_proj"])


def test_a_target_that_is_not_empty_is_refused(
    tmp_path: Path, llama_run: tuple[Path, Path]
) -> None:
    base, out = llama_run
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    for target in (tmp_path / "full", tmp_path / "full/notes.txt"):
        with pytest.raises(LoraError, match="is not empty") as caught:
            merge_adapter(str(base), out, target)
        assert caught.value.exit_code == 2
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    merge_adapter(str(base), out, tmp_path / "empty")
    assert (tmp_path / "empty" / WEIGHTS).is_file()


def test_a_fully_trained_model_is_refused(tmp_path: Path) -> None:
    base = base_of("encoder", tmp_path)
    out = trained(tmp_path, base, type="full")
    with pytest.raises(LoraError, match="already a complete model"):
        merge_adapter(str(base), out, tmp_path / "merged")
    (out / "recipe.yaml").unlink()
    with pytest.raises(LoraError, match="a model, not an adapter"):
        merge_adapter(str(base), out, tmp_path / "merged")


@pytest.mark.parametrize("error", ["another base", "damaged", "difference", "disk"])
def test_nothing_is_left_behind_after_an_error(
    tmp_path: Path, llama_run: tuple[Path, Path], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = llama_run
    kind: type[Exception] = IntegrityError
    if error == "another base":
        base = base_of("gpt2", tmp_path)
    elif error == "damaged":
        real = PreTrainedModel.save_pretrained

        def save(model: PreTrainedModel, folder: Path, **options: Any) -> None:
            with torch.no_grad():
                next(model.parameters()).add_(1.0)
            real(model, folder, **options)

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    elif error == "difference":
        merge = merging.merge_and_untie

        def wrong(model: nn.Module, ties: Any) -> list[str]:
            next(iter(lora_layers(model).values())).lora_A.data *= 1.1
            return merge(model, ties)

        monkeypatch.setattr(merging, "merge_and_untie", wrong)
    else:
        kind = OSError

        def full(*_: Any, **__: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind):
        merge_adapter(str(base), out, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["none", "bitfit"])
def test_heads_and_biases_without_matrices_are_merged(tmp_path: Path, kind: str) -> None:
    base = base_of("encoder", tmp_path)
    out = trained(tmp_path, base, type=kind)
    assert merge_adapter(str(base), out, tmp_path / "merged").merged_modules == 0
    expected = logits(adapted(base, out))
    assert torch.equal(logits(plain(tmp_path / "merged")), expected)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_merges_into_one_folder_exclude_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at once used to "succeed", and one of two different merges ended in a traceback."""
    to = tmp_path / "merged"
    locked, lock = os.pipe()
    wait, go_on = os.pipe()
    other = os.fork()
    if other == 0:
        os.close(go_on)
        with locked_target(to):
            os.write(lock, b"locked")
            os.read(wait, 1)
        os._exit(0)
    os.close(wait)
    try:
        assert os.read(locked, 6) == b"locked"
        what = f"(?s)process {other} on .* is writing to {to}.*another folder with `--to DIR`"
        with pytest.raises(LoraError, match=what):
            merge_adapter("base", tmp_path / "adapter", to)
    finally:
        os.close(go_on)
        assert os.waitpid(other, 0)[1] == 0
    with locked_target(to):
        to.mkdir()
        (to / "config.json").touch()
    with (
        pytest.raises(LoraError, match="is not empty"),
        locked_target(tmp_path / "." / "merged"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
