"""An adapter of PEFT without a head: the head is the base's, if its checkpoint holds one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import tiny
import tiny_pictures
import torch
from closeness import assert_close, assert_different
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
)

from lora_cli.accelerator import start_accelerator
from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.adapters.peft_format.adapter_folder import read_adapter
from lora_cli.errors import LoraError
from lora_cli.evaluation.open_adapter import load_adapted, open_task
from lora_cli.export.adapter_task import adapter_task
from lora_cli.export.merge import merge_adapter
from lora_cli.recipe import load_recipe

LABELS = ("bad", "good")
TAGS = ("O", "B-PER", "I-PER")
TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "classifier.dense"],  # in the head too
    "bart": ["q_proj", "fc1"],
    "t5": ["q", "wo"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "down_proj"],
    "tokens": ["query"],
    "vit": ["q_proj"],
    "resnet": ["convolution"],
}
NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
AUTO = {
    "tokens": (AutoModelForTokenClassification, "token_classification"),
    "vit": (AutoModelForImageClassification, "image_classification"),
    "resnet": (AutoModelForImageClassification, "image_classification"),
}


def save_base(kind: str, folder: Path) -> Path:
    """Save a base whose checkpoint holds a head for the two labels."""
    if kind in ("bert", "roberta"):
        return tiny.save_encoder(folder, LABELS, kind)
    if kind in ("vit", "resnet"):
        return tiny_pictures.save(kind, folder, LABELS)

    def save(place: Path) -> None:
        if kind == "tokens":
            names = {
                "id2label": dict(enumerate(TAGS)),
                "label2id": {n: i for i, n in enumerate(TAGS)},
            }
            config = BertConfig.from_dict(tiny.encoder(2).config.to_dict() | names)
            tiny.enliven(BertForTokenClassification(config)).save_pretrained(place)
            tiny.tokenizer().save_pretrained(place)
            return
        makers = {"gpt2": tiny.gpt2, "llama": tiny.llama}
        made = makers[kind]() if kind in makers else tiny.encoder_decoder(kind)
        config = type(made.config).from_dict(made.config.to_dict() | NAMED)
        config.pad_token_id = 0 if kind == "gpt2" else tiny.PAD
        model = AutoModelForSequenceClassification.from_config(config)
        tiny.enliven(model).save_pretrained(place)
        tiny.tokenizer(kind if kind in makers else "encoder").save_pretrained(place)

    return tiny.saved_once(folder, ("head of base", kind), save)


def save_with_peft(kind: str, base: Path, folder: Path, **config: object) -> Tensor:
    """Save an adapter without a head as PEFT does, and return what PEFT computes with it."""
    auto = AUTO.get(kind, (AutoModelForSequenceClassification,))[0]
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 4, "target_modules": TARGETS[kind], **config}
        model = peft.get_peft_model(auto.from_pretrained(base), peft.LoraConfig(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(auto.from_pretrained(base), folder).eval()
    return outputs(again, kind)


def outputs(model: torch.nn.Module, kind: str) -> Tensor:
    """Return the logits of a fixed input."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if kind in ("vit", "resnet"):
            size = tiny_pictures.SIZE
            return model(torch.randn(2, 3, size, size, generator=generator)).logits
        ids = torch.randint(4, 200, (2, 9), generator=generator)
        ids[:, -1] = tiny.EOS  # where BART and T5 read their answer
        return model(input_ids=ids).logits


def recipe(kind: str, base: Path, tmp_path: Path, labels: Sequence[str] = LABELS) -> Path:
    """Write the recipe that a user gives for such an adapter."""
    of_kind = AUTO.get(kind, (None, "sequence_classification"))[1]
    task = {"type": of_kind, "labels": list(labels)}
    if of_kind == "token_classification":
        task["labels"] = list(TAGS)
    if kind == "gpt2":
        task["pad_token"] = tiny.END_OF_TEXT
    return tiny.recipe(base, tmp_path, task=task)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.slow_after(2)
def test_the_head_is_the_one_of_the_base_as_in_peft(kind: str, tmp_path: Path) -> None:
    base, folder = save_base(kind, tmp_path / "base"), tmp_path / "a"
    wanted = save_with_peft(kind, base, folder)
    task = open_task(folder, load_recipe(recipe(kind, base, tmp_path)))
    model = load_adapted(folder, task, start_accelerator(task.recipe))
    assert_close(outputs(model, kind).cpu(), wanted)


def test_its_rows_go_by_the_names_of_the_labels(tmp_path: Path) -> None:
    base, folder = save_base("bart", tmp_path / "base"), tmp_path / "a"
    wanted = save_with_peft("bart", base, folder)
    path = recipe("bart", base, tmp_path, labels=LABELS[::-1])
    task = open_task(folder, load_recipe(path))
    model = load_adapted(folder, task, start_accelerator(task.recipe))
    assert_close(outputs(model, "bart").cpu(), wanted.flip(-1))


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_merging_keeps_the_head_of_the_base_and_its_labels(
    problem: str | None, tmp_path: Path
) -> None:
    base, folder = save_base("t5", tmp_path / "base"), tmp_path / "a"
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"problem_type": problem}))
    wanted = save_with_peft("t5", base, folder, task_type="SEQ_CLS")
    task, _ = adapter_task(folder, None, str(base))
    assert task.recipe.task.problem == ("multi_label" if problem else "single_label")
    merge_adapter(None, folder, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged, "t5"), wanted)
    assert list(merged.config.id2label.values()) == list(LABELS)


@pytest.mark.parametrize("labels", [["good", "bad"], ["Good"], ["good", "BAD"]])
@pytest.mark.parametrize("target", ["fc1", "out_proj"])
@pytest.mark.slow_after(1)
def test_merging_keeps_the_head_of_the_base_in_the_order_of_the_labels(
    labels: list[str], target: str, tmp_path: Path
) -> None:
    base, folder = save_base("bart", tmp_path / "base"), tmp_path / "a"
    wanted = save_with_peft("bart", base, folder, target_modules=[target])
    path = recipe("bart", base, tmp_path, labels)
    if len(labels) == 1 and target == "out_proj":
        pytest.skip("the adapter has both outputs")
    if len(labels) == 1:
        path.write_text(path.read_text().replace("labels:", "problem: multi_label\n  labels:"))
    result = merge_adapter(None, folder, tmp_path / "merged", path)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    if target == "fc1":
        assert_close(outputs(merged, "bart"), wanted.flip(-1)[:, : len(labels)])
    assert result.weights.adapted > 0
    assert not result.weights.unknown


@pytest.mark.parametrize(
    ("labels", "lacking"),
    [
        (["bad", "fine", "good"], "classifier.out_proj.weight"),  # one row is new
        (["dull", "warm"], "classifier.out_proj.weight"),
    ],
)
def test_a_row_of_the_head_that_is_drawn_at_random_is_an_error(
    labels: list[str], lacking: str, tmp_path: Path
) -> None:
    base, folder = save_base("roberta", tmp_path / "base"), tmp_path / "a"
    save_with_peft("roberta", base, folder)
    task = open_task(folder, load_recipe(recipe("roberta", base, tmp_path, labels)))
    with pytest.raises(LoraError, match=rf"`{lacking}` is missing: the base's checkpoint"):
        load_adapted(folder, task, start_accelerator(task.recipe))


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_head_that_neither_holds_is_an_error(kind: str, tmp_path: Path) -> None:
    base = tiny.save_encoder_decoder(tmp_path / "base", kind)
    save_with_peft(kind, base, tmp_path / "a")
    task = open_task(tmp_path / "a", load_recipe(recipe(kind, base, tmp_path)))
    with pytest.raises(LoraError, match=r"modules_to_save=\['classification_head'\]"):
        load_adapted(tmp_path / "a", task, start_accelerator(task.recipe))


def test_a_head_that_the_configuration_promises_must_be_in_the_adapter(tmp_path: Path) -> None:
    base, folder = save_base("bert", tmp_path / "base"), tmp_path / "a"
    save_with_peft("bert", base, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": ["classifier"]}))
    task = open_task(folder, load_recipe(recipe("bert", base, tmp_path)))
    with pytest.raises(LoraError, match=r"`classifier.weight` is missing: the configuration"):
        load_adapted(folder, task, start_accelerator(task.recipe))


def test_trained_further_the_head_of_the_base_is_trained_too(tmp_path: Path) -> None:
    base, folder = save_base("bart", tmp_path / "base"), tmp_path / "a"
    wanted = save_with_peft("bart", base, folder)
    task = open_task(folder, load_recipe(recipe("bart", base, tmp_path)))
    model, new = task.load_model(torch.device("cpu"))
    load_adapter(model, read_adapter(folder), new, trained=True, drawn=task.drawn)
    assert_close(outputs(model, "bart"), wanted)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {
        n for n, _ in model.named_parameters() if n.startswith("classification_head.")
    }
    assert_different(
        outputs(model, "bart"), outputs(task.load_model(torch.device("cpu"))[0], "bart")
    )
