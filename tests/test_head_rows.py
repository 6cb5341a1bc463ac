"""The rows of a pretrained classifier stand for the labels that config.json says they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from closeness import near
from transformers import AutoModelForSequenceClassification, DistilBertConfig

from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.classification.head_rows import match_rows

OWN = ["positive", "negative", "neutral"]
NEW = None


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        (["negative", "neutral", "positive"], [1, 2, 0]),
        (["Negative", " neutral", "POSITIVE"], [1, 2, 0]),
        (["neutral", "positive"], [2, 0]),
        (["angry", "negative", "neutral", "positive"], [NEW, 1, 2, 0]),
        (["bad", "good"], [NEW, NEW]),
        (["positive", "Positive"], [0, NEW]),
    ],
)
def test_rows_are_matched_by_name(labels: list[str], rows: list[Any]) -> None:
    assert match_rows(OWN, labels) == rows


def test_a_name_in_two_cases_is_matched_only_exactly() -> None:
    assert match_rows(["a", "A"], ["A", "a"]) == [1, 0]
    assert match_rows(["a", "A", "b"], ["á", "b"]) == [NEW, 2]


def logits(folder: Path, tmp_path: Path, **task: Any) -> tuple[dict[str, float], list[str]]:
    """Return the output of each label for one text, and what was said, as training starts."""
    values = {"type": "sequence_classification", **task}
    built = build_task(load_recipe(tiny.recipe(folder, tmp_path, task=values)))
    built.load_processor()
    built.learn_from({})
    torch.manual_seed(0)
    model = built.load_model(torch.device("cpu"))[0].eval()
    with torch.no_grad():
        outputs = model(**built.tokenizer(tiny.CORPUS[0], return_tensors="pt")).logits[0]
    return dict(zip(built.labels, outputs.tolist(), strict=True)), built.notes


def base_logits(folder: Path) -> dict[str, float]:
    """Return the same of the base alone, by transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([tiny.tokenizer()(tiny.CORPUS[0])["input_ids"]])
    with torch.no_grad():
        outputs = model(input_ids=ids).logits[0].tolist()
    return {model.config.id2label[i]: value for i, value in enumerate(outputs)}


@pytest.mark.slow_after(4)
@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize(
    "labels",
    [
        ["negative", "neutral", "positive"],
        ["NEUTRAL", "Positive", "negative"],
        ["negative", "positive"],
        ["angry", "negative", "neutral", "positive"],
        ["furious", "negative", "positive"],  # as many, and one is another
    ],
)
def test_each_label_has_the_row_of_its_name(kind: str, labels: list[str], tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path / "base", OWN, kind)
    ours, notes = logits(folder, tmp_path, labels=labels)
    theirs = base_logits(folder)
    known = [label for label in labels if label.lower() in OWN]
    wanted = {label: theirs[label.lower()] for label in known}
    assert {label: ours[label] for label in known} == near(wanted)
    unknown = [label for label in labels if label not in known]
    said = [f"the rows of `{label}` start at random" for label in unknown]
    assert any(text in note for text in said for note in notes
               ) == bool(unknown)  # fmt: skip


def test_several_labels_a_row_likewise(tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path / "base", OWN)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"problem_type": "single_label_classification"}
    file.write_text(json.dumps(config))
    labels = ["neutral", "negative", "positive"]
    ours, _ = logits(folder, tmp_path, labels=labels, problem="multi_label")
    assert ours == near(base_logits(folder))


@pytest.mark.parametrize(
    ("own", "labels", "said"),
    [
        (["LABEL_0", "LABEL_1"], ["bad", "good"], "labels without names"),
        (["LABEL_0", "LABEL_1"], ["0", "1"], None),
        (["neg", "pos"], ["0", "1"], "0 is `neg`, 1 is `pos`"),
    ],
)
def test_rows_without_a_name_go_by_position_and_that_is_said(
    own: list[str], labels: list[str], said: str | None, tmp_path: Path
) -> None:
    folder = tiny.save_encoder(tmp_path / "base", own)
    ours, notes = logits(folder, tmp_path, labels=labels)
    assert list(ours.values()) == near(base_logits(folder).values())
    assert (said is None and not notes) or any(str(said) in note for note in notes)


def test_a_layer_as_wide_as_there_are_labels_is_not_taken_for_the_last(tmp_path: Path) -> None:
    names = [f"label {i:02}" for i in range(32)]  # the hidden size
    config = DistilBertConfig(
        vocab_size=tiny.vocabulary(), dim=32, n_layers=1, n_heads=4, hidden_dim=48,
        max_position_embeddings=64, pad_token_id=tiny.PAD,
        id2label=dict(enumerate(reversed(names))),
        label2id={name: 31 - i for i, name in enumerate(names)},
    )  # fmt: skip
    folder = tmp_path / "base"
    tiny.enliven(AutoModelForSequenceClassification.from_config(config)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    ours, _ = logits(folder, tmp_path, labels=names)
    assert ours == near(base_logits(folder))


def test_a_base_without_a_classifier_gets_a_new_one(tmp_path: Path) -> None:
    folder = tiny.save_encoder(tmp_path / "base", None)
    ours, notes = logits(folder, tmp_path, labels=["bad", "good"])
    assert set(ours) == {"bad", "good"}
    assert notes == []


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_a_new_label_in_a_loaded_layer_is_drawn_as_transformers_draws(
    kind: str, tmp_path: Path
) -> None:
    folder = tiny.save_encoder(tmp_path / "base", OWN, kind)
    task = {"type": "sequence_classification", "labels": ["furious", "negative", "positive"]}
    built = build_task(load_recipe(tiny.recipe(folder, tmp_path, task=task)))
    built.load_processor()
    built.learn_from({})
    model = built.load_model(torch.device("cpu"))[0]
    named = dict(model.named_parameters())
    (weight,) = [
        p for n, p in named.items() if n.endswith(("classifier.weight", "out_proj.weight"))
    ]
    (bias,) = [p for n, p in named.items() if n.endswith(("classifier.bias", "out_proj.bias"))]
    assert bias[0] == 0.0
    assert all(bias[1:] != 0.0)
    assert 0.0 < float(weight[0].detach().abs().max()) < 6 * model.config.initializer_range
