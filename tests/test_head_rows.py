"""The rows of a pretrained classifier stand for the labels that config.json says they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from closeness import near
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    PretrainedConfig,
)

from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.classification import head_rows
from lora_cli.tasks.classification.head_rows import (
    arrange_rows,
    base_label_names,
    match_rows,
    rows_of_heads,
)

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
    expected = [f"the rows of `{label}` start at random" for label in unknown]
    assert any(text in note for text in expected for note in notes
               ) == bool(unknown)  # fmt: skip


def test_several_labels_per_row_also_have_the_rows_of_their_names(tmp_path: Path) -> None:
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
def test_rows_without_names_go_by_position_with_a_warning(
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


# ------------------------------------------------------------------------ one value at a time


def config(*names: str, **more: Any) -> PretrainedConfig:
    return PretrainedConfig(id2label=dict(enumerate(names)), **more)


class Classifier(nn.Module):
    """A body and a head, whose last layer has a row for each label and more behind them."""

    def __init__(self, rows: int, hidden: int | None = None) -> None:
        super().__init__()
        self.body = nn.Linear(4, rows)
        self.head = nn.ModuleDict({"last": nn.Linear(4, rows)})
        if hidden is not None:
            self.head["before"] = nn.Linear(4, hidden)
        self.head.register_parameter("scale", nn.Parameter(torch.ones(())))


@pytest.fixture
def arranged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Arrange the rows of a classifier's last layer, without a base on the disk."""
    monkeypatch.setattr(head_rows, "new_modules", lambda _: ["head"])

    def arrange(
        model: nn.Module, missing: set[str], labels: list[str], base: PretrainedConfig,
        extra_outputs: tuple[str, ...] = (), stored: dict[str, torch.Tensor] | None = None,
    ) -> str | None:  # fmt: skip
        monkeypatch.setattr(
            head_rows, "_read_checkpoint_tensor", lambda name, recipe: (stored or {}).get(name)
        )
        recipe: Any = None
        return arrange_rows(model, missing, labels, base, recipe, None, extra_outputs)

    return arrange


def test_extra_outputs_stay_after_the_labels(arranged: Any) -> None:
    """A detector has one for no object: here of a checkpoint with more labels."""
    stored = {
        "head.last.weight": torch.arange(16.0).view(4, 4),
        "head.last.bias": torch.arange(4.0),
    }
    model, missing = Classifier(2), set(stored) | {"other"}
    assert arranged(model, missing, ["b"], config("a", "b", "c"), ("none",), stored) is None
    assert torch.equal(model.head.last.weight, stored["head.last.weight"][[1, 3]])
    assert model.head.last.bias.tolist() == [1.0, 3.0]
    assert missing == {"other"}
    model, missing = Classifier(3), set(stored)
    drawn = model.head.last.weight[1].detach().clone()
    note = arranged(model, missing, ["c", "new"], config("a", "b", "c"), ("none",), stored)
    assert "knows `a`, `b`, `c`: the rows of `new` start at random" in note
    assert torch.equal(model.head.last.weight[[0, 2]], stored["head.last.weight"][[2, 3]])
    assert torch.equal(model.head.last.weight[1], drawn)  # it is drawn already
    assert missing == set(stored)


def test_rows_of_a_loaded_layer_that_have_no_name_are_drawn_anew(arranged: Any) -> None:
    base = config("a", "b", "c", initializer_range=0.5)  # it names three, and the layer has two
    model, missing = Classifier(2), set[str]()
    before = model.head.last.weight.detach().clone()
    note = arranged(model, missing, ["b", "a"], base)
    assert "the rows of `b`, `a` start at random" in note
    assert bool((model.head.last.weight != before).all())
    assert model.head.last.bias.tolist() == [0.0, 0.0]
    assert missing == {"head.last.weight", "head.last.bias"}


@pytest.mark.parametrize(("spread", "found"), [(0.5, 0.5), (None, 0.02), (0.0, 0.02)])
def test_a_new_row_is_drawn_as_widely_as_the_base_says(spread: float | None, found: float) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.full((2, 20_000), 9.0))
    head_rows._copy_rows(parameter, None, [None, None], config("a", initializer_range=spread), True)
    assert float(parameter.detach().std()) == pytest.approx(found, rel=0.05)
    assert abs(float(parameter.detach().mean())) < 0.1 * found


def test_the_last_layer_is_the_one_that_grows_with_the_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_rows, "new_modules", lambda _: ["head"])
    sizes: list[int] = []

    def larger(auto: Any, recipe: Any, config: PretrainedConfig) -> nn.Module:
        sizes.append(config.num_labels)
        return Classifier(config.num_labels + 1, hidden=3)

    monkeypatch.setattr(head_rows, "build_empty", larger)
    recipe: Any = None
    last = {"head.last.weight", "head.last.bias"}
    for hidden, wanted in ((5, []), (None, []), (3, [3])):
        model = Classifier(3, hidden)
        found = head_rows._output_layer(model, ["a", "b"], config("a"), recipe, None, 1)
        assert set(found) == last
        assert sizes == wanted


def test_rows_of_an_adapter_s_head_are_those_of_its_matrices() -> None:
    tensors = {
        "classifier.weight": torch.zeros(3, 4), "classifier.bias": torch.zeros(3),
        "classifiers.weight": torch.zeros(5, 4), "encoder.weight": torch.zeros(7, 4),
        "classifier.dense.lora_A.weight": torch.zeros(2, 4), "score.weight": torch.zeros(6, 4),
    }  # fmt: skip
    assert rows_of_heads(tensors, ["classifier", "score"]) == [3, 6]


def test_names_are_those_of_numbered_outputs_and_five_are_listed() -> None:
    assert base_label_names(config("b", "a")) == ["b", "a"]
    assert base_label_names(PretrainedConfig(id2label={1: "a", 2: "b"})) == []
    base = config("a")
    base.id2label = None
    assert base_label_names(base) == []
    names = ["a", "b", "c", "d", "e"]
    assert head_rows._list_names(names) == "`a`, `b`, `c`, `d`, `e`"
    assert head_rows._list_names([*names, "f", "g"]) == "`a`, `b`, `c`, `d`, `e` and 2 more"


def test_numbers_and_outputs_without_a_name_go_by_position(arranged: Any) -> None:
    model = Classifier(2)
    before = model.head.last.weight.detach().clone()
    unnamed, named = config("LABEL_0", "LABEL_1"), config("neg", "pos")
    for base, labels, missing, said in (
        (unnamed, ["x", "1"], set[str](), "its outputs stand for `x`, `1`, in this order"),
        (unnamed, ["0", "1"], set[str](), None),
        (unnamed, ["x", "y"], {"head.last.bias"}, None),
        (named, ["0", "1"], set[str](), "goes by position: 0 is `neg`, 1 is `pos`"),
        (named, ["0", "1"], {"head.last.bias"}, None),
        (config("0", "1"), ["0", "1"], set[str](), None),
    ):  # fmt: skip
        note = arranged(model, missing, labels, base)
        assert (note is None) if said is None else str(note).endswith(said)
        assert torch.equal(model.head.last.weight, before)
    assert arranged(Classifier(3), set[str](), ["a", "b"], named) is None  # no layer has two rows
