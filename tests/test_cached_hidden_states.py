"""Tests that training with cached hidden states equals training that computes all layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import tiny_pictures
import tiny_translators
import torch
from closeness import assert_close
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import lora_cli.training.run as training_run
from lora_cli.adapters.frozen_lower_layers import FrozenLayers
from lora_cli.recipe import load_recipe
from lora_cli.tasks.hidden_states import STATES, CachedState, states_of_batch
from lora_cli.training import load_trainable_model

Json = dict[str, Any]
RATE = {"type": "sgd", "learning_rate": 0.1}
STEPS: Json = {
    "max_steps": 8, "micro_batch_size": 4, "log_every_steps": 1, "optimizer": RATE,
    "scheduler": {"type": "constant"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "lora"


class Layers:
    """Counts how often a run computes the frozen layers, and how often it skips them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded = self.skipped = 0
        recording, skipping = FrozenLayers.recording, FrozenLayers.skipping

        def record(layers: FrozenLayers) -> Any:
            self.recorded += 1
            return recording(layers)

        def enter(layers: FrozenLayers, states: Any) -> Any:
            self.skipped += 1
            return skipping(layers, states)

        monkeypatch.setattr(FrozenLayers, "recording", record)
        monkeypatch.setattr(FrozenLayers, "skipping", enter)


def base(folder: Path, kind: str, dropout: float = 0.5) -> Path:
    """Save a small model with much dropout of hidden states, and return its folder.

    Its layers are three, so that there are frozen ones below others.
    """
    if kind in ("bert", "roberta"):
        tiny.save_encoder(folder, kind=kind, layers=3)
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    elif kind == "gpt2":
        tiny.save_gpt2(folder)
        names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    elif kind == "llama":
        tiny.save_llama(folder)
        names = ("attention_dropout", "attention_dropout")
    elif kind == "vit":
        tiny_pictures.save("vit", folder)
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    else:
        tiny_translators.save(folder, kind)
        names = ("dropout", "attention_dropout")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(names, dropout)))
    return folder


def rows(folder: Path, texts: list[str], name: str = "rows.jsonl") -> None:
    lines = [json.dumps({"text": t, "label": i % 2, "en": t, "de": t[::-1]}) for i, t in
             enumerate(texts)]  # fmt: skip
    (folder / name).write_text("".join(f"{line}\n" for line in lines))


def trained(
    folder: Path, model: Path, limit: str, **sections: Any
) -> tuple[Json, dict[str, Tensor]]:
    """Train, and return the report and the trained parameters."""
    sections["data"] = {"path": "rows.jsonl", "cache_limit": limit, **sections.get("data", {})}
    recipe = load_recipe(tiny.recipe(model, folder, **{"train": STEPS, **sections}))
    report = training_run.train(recipe.with_values({"output_dir": str(folder / f"out-{limit}")}))
    name = "model" if recipe.adapter.type == "full" else "adapter_model"
    return report, load_file(folder / f"out-{limit}" / f"{name}.safetensors")


UPPER = {"adapter": {"layers": [2], "rank": 4}}
UPPER_IN_FULL = {"type": "full", "freeze": ["embeddings", "0-1"]}
RUNS: dict[str, tuple[str, Json]] = {
    "a head": ("bert", {"adapter": {"type": "none"}}),
    "a head of two layers": ("roberta", {"adapter": {"type": "none"}}),
    "adapters in upper layers": ("bert", UPPER),
    "adapters with dropout": ("bert", {"adapter": {**UPPER["adapter"], "dropout": 0.5}}),
    "frozen lower layers": (
        "roberta", {"adapter": {"type": "full", "freeze": ["embeddings", "0-1"]}}
    ),
    "a language model": ("llama", {"adapter": {"layers": [1], "rank": 4}}),
    "a language model in full": (
        "gpt2", {"adapter": {"type": "full", "freeze": ["embeddings", 0]}}
    ),
    "a translator": (
        "bart",
        {"adapter": {"target_modules": r".*decoder\..*q_proj", "rank": 4},
         "task": {"type": "seq2seq_lm", "source_column": "en", "target_column": "de"}},
    ),
    "checkpointed layers": ("bert", {**UPPER, "train": {**STEPS, "gradient_checkpointing": True}}),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow_after(1)
def test_training_is_the_same_with_cached_and_computed_states(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, sections = RUNS[name]
    model = base(tmp_path / "base", kind)
    rows(tmp_path, tiny.CORPUS)
    sections = {"evaluate": {"metrics": []}, **sections}
    sections["data"] = {"validation": {"from": "train", "fraction": 0.25}}
    layers = Layers(monkeypatch)
    report, kept = trained(tmp_path, model, "16GB", **sections)
    assert "train: kept, " in report["kernels"]["frozen_layers"]
    assert "validation: kept, " in report["kernels"]["frozen_layers"]
    assert layers.skipped > STEPS["max_steps"]
    layers.skipped = 0
    computed_report, computed = trained(tmp_path, model, "0B", **sections)
    assert layers.skipped == 0
    assert computed_report["kernels"]["frozen_layers"] == (
        f"layers: {report['kernels']['frozen_layers'].split(':')[1].split(';')[0].strip()}; "
        "train: not kept: `data.cache_limit` is 0; validation: not kept: `data.cache_limit` is 0"
    )
    assert kept.keys() == computed.keys()
    for key, tensor in kept.items():
        assert_close(tensor, computed[key], 1e-4)
    ours, theirs = (r["metrics"]["after"]["validation"]["loss"] for r in (report, computed_report))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("adapter", [{"type": "none"}, UPPER["adapter"]])
def test_batches_of_equal_shapes_give_identical_bits(adapter: Json, tmp_path: Path) -> None:
    model = base(tmp_path / "base", "bert")
    rows(tmp_path, ["a good film", "a dull film", "a fine plot", "a slow plot"] * 3)
    tokens = AutoTokenizer.from_pretrained(model)(["a good film", "a slow plot"])["input_ids"]
    shape = {"adapter": adapter, "evaluate": {"micro_batch_size": 4}}
    if len({len(ids) for ids in tokens}) > 1:
        rows(tmp_path, ["a good film"] * 12)
    _, kept = trained(tmp_path, model, "16GB", **shape)
    _, computed = trained(tmp_path, model, "0B", **shape)
    assert all(torch.equal(tensor, computed[key]) for key, tensor in kept.items())


def test_adapters_in_upper_layers_train_as_in_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    model = base(tmp_path / "base", "bert", dropout=0.0)
    rows(tmp_path, tiny.CORPUS)
    torch.manual_seed(3)
    drawn = torch.randn(4, 32)
    real = load_trainable_model.make_trainable

    def attach(model: nn.Module, *rest: Any) -> Any:
        found = real(model, *rest)
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                if name.endswith("lora_A"):
                    parameter.copy_(drawn)
                elif name.startswith("classifier.weight"):
                    parameter.copy_(drawn[:2])
        return found

    monkeypatch.setattr(load_trainable_model, "make_trainable", attach)
    _, ours = trained(tmp_path, model, "16GB", **UPPER)

    theirs: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value"], layers_to_transform=[2],
        task_type="SEQ_CLS",
    )  # fmt: skip
    theirs = get_peft_model(theirs, config).train()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_A" in name:
                parameter.copy_(drawn)
            elif "modules_to_save.default.weight" in name:
                parameter.copy_(drawn[:2])
            elif "modules_to_save.default.bias" in name:
                parameter.zero_()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (tmp_path / "out-16GB/samples.jsonl").read_text().splitlines()
    for line in lines:
        chosen = json.loads(line)["examples"]
        batch = tokenizer([tiny.CORPUS[i] for i in chosen], padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        theirs(**batch, labels=torch.tensor([i % 2 for i in chosen])).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert len(lines) == STEPS["max_steps"]
    wanted = {n.replace(".default", ""): p for n, p in theirs.named_parameters()}
    wanted = {n.replace("modules_to_save.", ""): p for n, p in wanted.items() if p.requires_grad}
    assert ours.keys() == wanted.keys()
    for name, tensor in ours.items():
        assert_close(tensor, wanted[name].detach(), 1e-4)


def test_a_split_that_takes_more_than_the_limit_is_computed_in_every_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = base(tmp_path / "base", "bert")
    rows(tmp_path, tiny.CORPUS)
    report, _ = trained(tmp_path, model, "2kB", **UPPER)
    said = report["kernels"]["frozen_layers"]
    assert said.startswith("layers: 2 in evaluation mode; train: not kept: it takes about ")
    assert said.endswith("2.0 kB are left of `data.cache_limit` (2kB)")
    assert f"frozen {said}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_cache_depends_on_the_frozen_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base(tmp_path / "base", "bert")
    rows(tmp_path, tiny.CORPUS)
    layers = Layers(monkeypatch)
    losses, recorded = [], []
    for changed in (False, False, True):
        if changed:
            tensors = load_file(model / "model.safetensors")
            (name,) = (n for n in tensors if n.endswith("layer.0.output.dense.weight"))
            tensors[name] *= 1.5
            (model / "model.safetensors").unlink()
            save_file(tensors, model / "model.safetensors", {"format": "pt"})
        layers.recorded = 0
        trained(tmp_path, model, "16GB", **UPPER, evaluate={"baseline": False})
        lines = (tmp_path / "out-16GB/metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[0])["loss"])
        recorded.append(layers.recorded)
        shutil.rmtree(tmp_path / "out-16GB")
    assert recorded[0] == recorded[2] > recorded[1]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_states_that_are_used_once_or_augmented_are_not_cached(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "vit")
    tiny_pictures.draw_folders(tmp_path / "pictures", {"train": 4, "validation": 2, "test": 2})
    sections: Json = {
        "task": {"type": "image_classification", "augmentation": {"flip": True}},
        "adapter": {"type": "none"},
        "evaluate": {"baseline": False},
        "data": {
            "path": str(tmp_path / "pictures"),
            **{split: split for split in ("train", "validation", "test")},
        },
    }
    report, _ = trained(tmp_path, model, "16GB", **sections)
    said = report["kernels"]["frozen_layers"]
    assert "train: not kept: training draws the inputs anew in every epoch" in said
    assert "validation: kept, " in said
    assert "test: not kept: the run computes it once" in said
    sections["task"] = {"type": "image_classification"}
    report, _ = trained(tmp_path, model, "17GB", **sections)
    assert "train: kept, " in report["kernels"]["frozen_layers"]


def test_states_of_packs_are_not_cached(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "llama")
    rows(tmp_path, tiny.CORPUS)
    train = {**STEPS, "packing": True}
    report, _ = trained(tmp_path, model, "16GB", adapter={"layers": [1], "rank": 4}, train=train)
    assert "train: not kept: `train.packing`" in report["kernels"]["frozen_layers"]


@pytest.mark.slow
def test_states_whose_first_dimension_is_not_the_batch_are_not_cached(tmp_path: Path) -> None:
    config = XLNetConfig(
        d_model=32, n_layer=3, n_head=4, d_inner=48, vocab_size=tiny.vocabulary(), pad_token_id=1
    )
    XLNetForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    rows(tmp_path, tiny.CORPUS)
    report, _ = trained(tmp_path, tmp_path / "base", "16GB", adapter=UPPER_IN_FULL)
    said = report["kernels"]["frozen_layers"]
    assert "train: not kept: its layers do not compute a block for each example" in said


def test_there_is_no_note_if_all_layers_are_trained(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "bert")
    rows(tmp_path, tiny.CORPUS)
    report, _ = trained(tmp_path, model, "16GB")
    assert "frozen_layers" not in report["kernels"]


# ------------------------------------------------------------------------------------ in batches


def states(*tensors: Tensor) -> Iterator[dict[str, CachedState]]:
    for tensor in tensors:
        yield {"layer": CachedState.of(tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_are_padded_like_the_tokens(dtype: torch.dtype) -> None:
    short, long = torch.randn(2, 3).to(dtype), torch.randn(4, 3).to(dtype)
    pair = list(states(short, long))
    zeros = torch.zeros(2, 3, dtype=dtype)
    right = {"attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])}
    left = {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
    wide = {"attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    for inputs, expected in (
        (right, [torch.cat([short, zeros]), long]),
        (left, [torch.cat([zeros, short]), long]),
        (
            wide,
            [torch.cat([short, zeros]), long],
        ),  # of other tokens, such as those of a source text
        ({}, [torch.cat([short, zeros]), long]),
    ):
        found = states_of_batch(pair, inputs)[f"{STATES}layer"]
        assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("shape", [(5,), (2, 3), (3, 2, 2)])
def test_states_of_one_shape_are_stacked(shape: tuple[int, ...]) -> None:
    tensors = [torch.randn(shape) for _ in range(3)]
    found = states_of_batch(list(states(*tensors)), {})[f"{STATES}layer"]
    assert torch.equal(found, torch.stack(tensors))
