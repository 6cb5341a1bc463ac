from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from closeness import assert_close
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor
from transformers import FunnelConfig

from lora_cli.data.load_rows import Rows
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_split import evaluate
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import Example

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without head, whose tokenizer makes token types."""
    folder = tmp_path_factory.mktemp("bert")
    tiny.encoder(None).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s>:1 $B:1 </s>:1",
        special_tokens=[("<s>", tiny.BOS), ("</s>", tiny.EOS)],
    )
    tokenizer.save_pretrained(folder)
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def task_of(
    base: Path, tmp_path: Path, rows: Any, validation: Any = None, skip: bool = False, **task: Any
) -> Task:
    """Return the task of a recipe whose train rows are these, its tokenizer loaded."""
    if rows and not isinstance(rows[0], dict):
        rows = [{"text": tiny.CORPUS[i % 8], "label": label} for i, label in enumerate(rows)]
    data = {"path": lines(tmp_path / "train.jsonl", rows)}
    if validation is not None:
        made = [{"text": tiny.CORPUS[i % 8], "label": label} for i, label in enumerate(validation)]
        data["validation"] = lines(tmp_path / "dev.jsonl", made)
    if skip:
        data["on_bad_row"] = "skip"
    given = {"type": "sequence_classification", **task}
    path = tiny.recipe(base, tmp_path, data=data, task={"labels": None, **given})
    made_task = build_task(load_recipe(path))
    made_task.load_processor()
    return made_task


def examples_of(task: Task, split: str = "train") -> list[Example]:
    return list(load_data(task)[split].examples)


def labels_of(task: Task) -> list[Any]:
    return [example["labels"] for example in examples_of(task)]


# ------------------------------------------------------------------------------------- texts


def test_a_text_and_a_pair_are_encoded_as_the_tokenizer_does(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": f"one {i}", "more": "two two", "label": i % 2} for i in range(4)]
    for pair in (None, "more"):
        task = task_of(bert, tmp_path, rows, text_pair_column=pair)
        (first, *_) = examples_of(task)
        wanted = task.tokenizer("one 0", "two two" if pair else None)
        assert first["input_ids"] == wanted["input_ids"]
        assert first["token_type_ids"] == wanted["token_type_ids"]
        assert (1 in first["token_type_ids"]) == (pair is not None)


def test_token_types_reach_the_model_and_are_padded(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "one " * (i + 1), "more": "two", "label": i % 2} for i in range(2)]
    task = task_of(bert, tmp_path, rows, text_pair_column="more")
    batch = task.collate(examples_of(task))
    tokens = task.tokenizer(
        [row["text"] for row in rows], [row["more"] for row in rows], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    for key, wanted in tokens.items():
        assert torch.equal(batch.inputs[key], wanted), key
    assert batch.cost == int(tokens["attention_mask"].sum())


def test_token_types_are_not_given_to_a_model_without_them(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "llama")
    tokenizer = tiny.tokenizer("llama")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(base)
    rows = [{"text": "one", "more": "two", "label": i % 2} for i in range(2)]
    task = task_of(base, tmp_path, rows, text_pair_column="more")
    batch = task.collate(examples_of(task))
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    model, _ = task.load_model(CPU)
    assert torch.isfinite(task.loss(model, batch))


def test_a_long_text_is_cut_and_still_ends(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "great fun " * 40, "label": i} for i in range(2)]
    task = task_of(bert, tmp_path, rows, max_length=10)
    for example in examples_of(task):
        assert len(example["input_ids"]) == 10
        assert example["input_ids"][-1] == tiny.EOS
    assert task_of(bert, tmp_path, rows).max_length == tiny.POSITIONS  # not the recipe's 512


def test_a_model_that_knows_no_end_of_text_reads_texts_as_its_tokenizer_does(
    bert: Path, tmp_path: Path
) -> None:
    task = task_of(bert, tmp_path, ["a", "b"])
    task.config = FunnelConfig(vocab_size=tiny.vocabulary())  # which has no `eos_token_id`
    assert examples_of(task)[0]["input_ids"] == task.tokenizer(tiny.CORPUS[0])["input_ids"]


def test_a_blank_text_is_an_error_with_its_location(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": " ", "label": 1}, {"text": ["b"], "label": 1}]
    with pytest.raises(LoraError) as caught:
        load_data(task_of(bert, tmp_path, rows))
    problems = [(p.what, p.at) for p in caught.value.problems]
    assert problems[0] == ("column `text` is blank", "train.jsonl:2")
    assert problems[1] == ("column `text` holds a list, not text", "train.jsonl:3")


# ------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    ("values", "names", "positions"),
    [
        ([2, 10, 1], ["1", "2", "10"], [1, 2, 0]),  # numbers by value, not as text
        (["pos", "neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        ([True, False], ["false", "true"], [1, 0]),
        ([1, 1.0, " 1", "0"], ["0", "1"], [1, 1, 1, 0]),
        (["1.5", "-1", "007"], ["-1", "1.5", "007"], [1, 0, 2]),
        ([" neg", "neg ", "pos"], ["neg", "pos"], [0, 0, 1]),
        (["4059円", "1円", "812円"], ["1円", "812円", "4059円"], [2, 0, 1]),
        (["1 200", "３００", "12"], ["12", "３００", "1 200"], [2, 1, 0]),
    ],
)
def test_labels_are_found_sorted_and_written_down(
    bert: Path, tmp_path: Path, values: list[Any], names: list[str], positions: list[int]
) -> None:
    task = task_of(bert, tmp_path, values)
    assert labels_of(task) == positions
    assert task.completed_recipe.task.labels == names  # type: ignore[union-attr]
    config = task.model_config()
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: i for i, name in enumerate(names)}
    assert config.num_labels == len(names)


def test_kept_rows_follow_the_labels_when_train_has_a_new_one(bert: Path, tmp_path: Path) -> None:
    for train in (["b", "c"], ["b", "c", "a"]):
        task = task_of(bert, tmp_path, train, ["b", "c", "c"])
        kept = load_data(task)["validation"].examples
        assert [task.labels[example["labels"]] for example in kept] == ["b", "c", "c"]


def test_names_in_the_recipe_name_positions_in_the_data(bert: Path, tmp_path: Path) -> None:
    task = task_of(bert, tmp_path, [1, 0, "1", "good"], labels=["bad", "good"])
    assert labels_of(task) == [1, 0, 1, 1]
    # numbers that are names are not positions
    task = task_of(bert, tmp_path, [1, 2, 5], labels=[5, 2, 1])
    assert labels_of(task) == [2, 1, 0]
    assert task.completed_recipe.task.labels == ["5", "2", "1"]  # type: ignore[union-attr]


def hub_rows(values: list[int], names: list[str]) -> Rows:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    columns = {"text": tiny.CORPUS[: len(values)], "label": values}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    return Rows(dataset, "hub", "0", np.arange(len(values)), {"label": names})


@pytest.mark.parametrize(
    ("named", "classes", "positions"),
    [
        (None, ["b", "a"], [0, 1, 1]),  # the data set's order, not sorted
        (["a", "b"], ["b", "a"], [1, 0, 0]),  # the recipe's order wins, by name
        (["worse", "better"], ["b", "a"], [0, 1, 1]),  # other names: by position
        (None, ["1", "2"], [0, 1, 1]),  # value 1 is the class called 2
    ],
)
def test_class_labels_are_positions_in_their_own_names(
    bert: Path, tmp_path: Path, named: Any, classes: list[str], positions: list[int]
) -> None:
    task = task_of(bert, tmp_path, [0, 1], labels=named)
    rows = hub_rows([0, 1, 1], classes)
    task.learn_from({"train": rows})
    assert task.learned.task["labels"] == (named or classes)
    assert [made[0]["labels"] for made in task.encode(list(rows))] == positions


def test_unlabelled_hub_rows_are_named(bert: Path, tmp_path: Path) -> None:
    task = task_of(bert, tmp_path, [0, 1])
    train = hub_rows([0, 1], ["a", "b"])
    hidden = replace(train, dataset=train.dataset.map(lambda row: {"label": -1}))
    with pytest.raises(LoraError, match=r"`-1` is not a label \(2 rows of test\)"):
        task.learn_from({"train": train, "test": hidden})


def test_unknown_labels_are_counted_and_placed_before_a_model_is_loaded(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(bert, tmp_path, ["neg", "pos"], ["pos", "poss", "meh", "meh", "poss"])
    monkeypatch.setattr(task, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(LoraError) as caught:
        load_data(task)
    meh, poss = caught.value.problems
    assert (meh.what, meh.at) == ("`meh` is not a label (2 rows of validation)", "dev.jsonl:3")
    assert (poss.what, poss.at) == ("`poss` is not a label (2 rows of validation)", "dev.jsonl:2")
    assert "did you mean `pos`" in (poss.hint or "")


@pytest.mark.parametrize(
    ("value", "how"),
    [
        ("返品Ａ", "but for the width or the form of letters"),
        ("カ\u3099ス", "but for the normal form of Unicode (\\u30ab\\u3099\\u30b9 and"),
        ("返品 A", "but for spaces"),
        ("返品\u200bA", "but for characters that cannot be seen"),
    ],
)
def test_a_label_typed_another_way_is_named(
    bert: Path, tmp_path: Path, value: str, how: str
) -> None:
    with pytest.raises(LoraError) as caught:
        load_data(task_of(bert, tmp_path, ["返品A", "ガス"], [value]))
    (problem,) = caught.value.problems
    assert how in (problem.hint or "")


def test_many_unknown_labels_are_not_all_listed(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraError) as caught:
        load_data(task_of(bert, tmp_path, ["neg", "pos"], [f"x{i}" for i in range(30)]))
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1].what == "20 more values of validation are not labels"


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (["a", "a"], {}, "there is one label only, `a`"),
        (["a", "b"], {"labels": ["a", " a"]}, "the label `a` appears 2 times"),
        (["a", None], {}, "column `label` is blank"),
        (["a", float("nan")], {}, "column `label` is blank"),
        (["a", ["b"]], {}, "column `label` holds a list, not one label"),
        ([f"value {i}" for i in range(30)], {}, "column `label` has 30 values in 30 rows"),
        ([[], []], {"problem": "multi_label"}, "no row of the train split has a label"),
        ([["a"], [None]], {"problem": "multi_label"}, "a list with a blank"),
        (["a,b"], {"problem": "multi_label"}, "`--set task.label_separator=,` divides a text"),
    ],
)
def test_labels_that_teach_nothing_are_refused(
    bert: Path, tmp_path: Path, values: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoraError) as caught:
        load_data(task_of(bert, tmp_path, values, **options))
    assert message in str(caught.value)


def test_many_named_labels_need_not_all_occur(bert: Path, tmp_path: Path) -> None:
    names = [f"intent {i}" for i in range(30)]
    assert labels_of(task_of(bert, tmp_path, [0, 29, 5], labels=names)) == [0, 29, 5]


def test_no_usable_row_is_said_so(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"no row of the train split can be used: .* is blank"):
        load_data(task_of(bert, tmp_path, [None, None], skip=True))


@pytest.mark.parametrize("separator", [None, ";"])
def test_a_row_may_have_several_labels(bert: Path, tmp_path: Path, separator: str | None) -> None:
    values: list[Any] = [["b", "a"], ["c"], ["a"]]
    if separator:
        values = ["b; a", "c;", "a"]
    task = task_of(bert, tmp_path, values, problem="multi_label", label_separator=separator)
    assert labels_of(task) == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert task.model_config().problem_type == "multi_label_classification"


MARKS = [{"a": "1", "b": 0, "c": "0"}, {"a": False, "b": True, "c": 0.0}, {"a": 0, "b": 0, "c": 1}]


def marked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"text": tiny.CORPUS[i % 8], **row} for i, row in enumerate(rows)]


def test_each_label_may_have_a_column_of_0_and_1(bert: Path, tmp_path: Path) -> None:
    rows = marked(MARKS)
    task = task_of(bert, tmp_path, rows, label_columns=["a", "b", "c"])
    assert labels_of(task) == [0, 1, 2]
    assert task.labels == ["a", "b", "c"]
    rows[0]["c"] = 1
    names = {"label_columns": ["a", "b", "c"], "labels": ["red", "green", "blue"]}
    task = task_of(bert, tmp_path, rows, problem="multi_label", **names)
    assert labels_of(task) == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert task.labels == ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"b": 1}, "`a`, `b` are all 1; with `problem: single_label` it is one"),
        ({"a": 0}, "no label's column is 1; with `problem: single_label` it is one"),
        ({"c": "2"}, "column `c` holds `2`, not 0 or 1"),
        ({"c": None}, "column `c` is blank, not 0 or 1"),
    ],
)
def test_other_marks_are_faults(
    change: dict[str, Any], what: str, bert: Path, tmp_path: Path
) -> None:
    rows = marked(MARKS)
    rows[0] |= change
    task = task_of(bert, tmp_path, rows, label_columns=["a", "b", "c"])
    with pytest.raises(LoraError) as caught:
        load_data(task)
    (problem,) = caught.value.problems
    assert (problem.what, problem.at) == (what, "train.jsonl:1")


def test_a_missing_column_of_marks_is_named(bert: Path, tmp_path: Path) -> None:
    task = task_of(bert, tmp_path, marked(MARKS), label_columns=["a", "d"])
    with pytest.raises(LoraError, match="has no column `d`"):
        load_data(task)


@pytest.mark.parametrize(
    "value", ["many", "", None, float("nan"), float("inf"), "-inf", "1e39", 10**400, [1.0]]
)
def test_a_bad_number_is_a_error(bert: Path, tmp_path: Path, value: Any) -> None:
    with pytest.raises(LoraError, match="not a number") as caught:
        load_data(task_of(bert, tmp_path, [1.0, value], problem="regression"))
    assert caught.value.problems[0].at == "train.jsonl:2"


def test_numbers_are_targets(bert: Path, tmp_path: Path) -> None:
    task = task_of(bert, tmp_path, ["1.5", -2, 3e3], problem="regression")
    assert labels_of(task) == [1.5, -2.0, 3000.0]
    assert task.model_config().num_labels == 1
    assert task.answer_columns() == {"prediction": "double"}


# -------------------------------------------------------------------------- losses, predictions

PROBLEMS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "single_label": ([0, 1, 2, 1, 0, 0], {}),
    "multi_label": ([["a"], ["b", "c"], [], ["c"], ["a"], ["a", "c"]], {}),
    "regression": ([0.5, 1.5, -1, 0, 2, 3], {}),
}


@pytest.mark.proves(
    "loss",
    task="sequence_classification",
    rows=lambda problem: {"single_label": "classification", "multi_label": "several labels"}.get(
        problem, problem
    ),
    model="bert",
    against="transformers",
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_is_that_of_transformers_and_predictions_sum_to_it(
    bert: Path, tmp_path: Path, problem: str
) -> None:
    values, _ = PROBLEMS[problem]
    task = task_of(bert, tmp_path, values, problem=problem)
    batch = task.collate(examples_of(task))
    model, new = task.load_model(CPU)
    assert new == ["classifier"]
    tiny.enliven(model, 3)
    with torch.no_grad():
        loss = task.loss(model, batch)
        theirs = model(**batch.inputs, labels=batch.targets["labels"]).loss
        predictions = task.predict(model, batch)
    assert batch.n_items == {"single_label": 6, "multi_label": 18, "regression": 6}[problem]
    torch.testing.assert_close(loss / batch.n_items, theirs)
    assert sum(p.losses["loss"][0] for p in predictions) == pytest.approx(loss.item(), rel=1e-5)
    assert sum(p.losses["loss"][1] for p in predictions) == pytest.approx(batch.n_items)
    assert [p.row for p in predictions] == list(range(6))
    for p in predictions:
        if problem == "single_label":
            assert sum((p.scores or {}).values()) == pytest.approx(1.0, abs=1e-6)
            assert p.prediction == max(p.scores or {}, key=(p.scores or {}).__getitem__)
        if problem == "multi_label":
            assert p.prediction == [k for k, v in (p.scores or {}).items() if v > 0.5]
    if problem == "multi_label":
        assert [p.reference for p in predictions] == values
    elif problem == "regression":
        assert [p.metric_inputs["value"] for p in predictions] == [
            (p.prediction, p.reference) for p in predictions
        ]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", ["balanced", {"0": 2.0, "2": 0.25}])
def test_weights_and_smoothing_are_torchs(
    bert: Path, tmp_path: Path, weights: Any, smoothing: float
) -> None:
    values = [0, 1, 2, 1, 0, 0]
    task = task_of(
        bert, tmp_path, values, class_weights=weights, label_smoothing=smoothing
    )  # fmt: skip
    batch = task.collate(examples_of(task))
    model, _ = task.load_model(CPU)
    counts = torch.tensor([3.0, 2.0, 1.0])
    vector = 6 / (3 * counts) if weights == "balanced" else torch.tensor([2.0, 1.0, 0.25])
    with torch.no_grad():
        logits = tiny.enliven(model, 3)(**batch.inputs).logits
        loss = task.loss(model, batch)
        predictions = task.predict(model, batch)
    wanted = F.cross_entropy(logits, torch.tensor(values), vector, label_smoothing=smoothing)
    torch.testing.assert_close(loss / batch.n_items, wanted)
    assert batch.n_items == pytest.approx(float(vector[values].sum()))
    assert sum(p.losses["loss"][0] for p in predictions) == pytest.approx(loss.item(), rel=1e-5)
    assert [p.losses["loss"][1] for p in predictions] == pytest.approx(vector[values].tolist())


def test_balanced_weights_are_written_down_so_that_eval_needs_no_train_rows(
    bert: Path, tmp_path: Path
) -> None:
    task = task_of(bert, tmp_path, ["a", "a", "a", "b"], ["b", "a"], class_weights="balanced")
    validation = load_data(task)["validation"]
    again = build_task(task.completed_recipe)
    again.load_processor()
    n_items = [
        t.collate(list(s.examples)).n_items
        for t, s in ((task, validation), (again, load_data(again, ["validation"])["validation"]))
    ]
    assert n_items == [pytest.approx(2 + 2 / 3)] * 2
    assert task.learned.task["class_weights"] == {"a": pytest.approx(2 / 3), "b": 2.0}


def test_balanced_weights_are_those_of_train_whatever_is_measured(
    bert: Path, tmp_path: Path
) -> None:
    weights = {"class_weights": "balanced", "labels": ["a", "b"]}
    task = task_of(bert, tmp_path, ["a", "a", "a", "b"], ["b", "a"], **weights)
    (validation,) = load_data(task, ["validation"]).values()
    assert task.collate(list(validation.examples)).n_items == pytest.approx(2 + 2 / 3)


def test_rows_that_weigh_nothing_have_no_loss(bert: Path, tmp_path: Path) -> None:
    task = task_of(bert, tmp_path, ["a", "b"], ["a", "a"], class_weights={"a": 0.0})
    data = load_data(task)
    model, _ = task.load_model(CPU)
    losses = [evaluate(model, task, split, Accelerator())["loss"] for split in data.values()]
    assert math.isfinite(losses[0])
    assert math.isnan(losses[1])


def test_a_label_of_very_many_digits_is_no_position(bert: Path, tmp_path: Path) -> None:
    task = task_of(bert, tmp_path, ["a", "9" * 5000], labels=["a", "b"])
    with pytest.raises(LoraError, match="positions are 0 to 1: a, b") as caught:
        load_data(task)
    assert caught.value.problems[0].at == "train.jsonl:2"


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_a_long_text_is_cut_to_the_positions_of_the_model(tmp_path: Path, kind: str) -> None:
    base = tiny.save_encoder(tmp_path / "base", kind=kind)
    unlimited = tiny.tokenizer()
    unlimited.model_max_length = 10**6
    unlimited.save_pretrained(base)
    rows = [{"text": "slow " * 300, "label": label} for label in "ab"]
    task = task_of(base, tmp_path, rows, max_length=1000)
    assert task.max_length == tiny.POSITIONS + (0 if kind == "roberta" else 2)
    model, _ = task.load_model(CPU)
    assert torch.isfinite(task.loss(model, task.collate(examples_of(task))))


def test_a_base_that_computes_in_chunks_takes_texts_of_any_length(tmp_path: Path) -> None:
    whole = tiny.save_encoder(tmp_path / "whole", ["a", "b"], "bert")
    chunks = tiny.save_encoder(tmp_path / "chunks", ["a", "b"], "bert")
    config = json.loads((chunks / "config.json").read_text()) | {"chunk_size_feed_forward": 3}
    (chunks / "config.json").write_text(json.dumps(config))
    outputs = []
    for base in (whole, chunks):
        task = task_of(base, tmp_path, [{"text": "slow " * 4, "label": label} for label in "ab"])
        examples = examples_of(task)
        assert len(examples[0]["input_ids"]) % 3
        model, _ = task.load_model(CPU)
        outputs.append(logits_of(task, model, examples))
    assert_close(outputs[1], outputs[0])


def test_balanced_weights_of_several_labels_count_rows(bert: Path, tmp_path: Path) -> None:
    values = [["a", "b"], ["a"], ["a"]]
    task = task_of(bert, tmp_path, values, problem="multi_label", class_weights="balanced")
    load_data(task)
    assert task.learned.task["class_weights"] == {"a": 0.5, "b": 1.5}


@pytest.mark.parametrize("weights", [{"c": 1.0}, {"a": -1.0}, {"a": 0.0, "b": 0.0}])
def test_bad_weights_are_refused(bert: Path, tmp_path: Path, weights: dict[str, float]) -> None:
    with pytest.raises(LoraError, match="class_weights"):
        load_data(task_of(bert, tmp_path, ["a", "b"], class_weights=weights))


BASES = {
    "roberta": lambda folder: tiny.save_encoder(folder),
    "gpt2": tiny.save_gpt2,
    "llama": tiny.save_llama,
}


def logits_of(task: Task, model: torch.nn.Module, examples: list[Example]) -> Tensor:
    with torch.no_grad():
        return model(**task.collate(examples).inputs).logits


@pytest.mark.proves(
    "alone", "predict", task="sequence_classification", rows="classification", model="{kind}"
)
@pytest.mark.parametrize("kind", BASES)
def test_predictions_do_not_depend_on_padding_or_other_rows(kind: str, tmp_path: Path) -> None:
    base = BASES[kind](tmp_path / kind)
    texts = ["a", "great fun and a great cast", "slow , dull", "the plot " * 9]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    task = task_of(base, tmp_path, rows)
    examples = examples_of(task)
    model, _ = task.load_model(CPU)
    tiny.enliven(model, 1)
    together = logits_of(task, model, examples)
    alone = torch.cat([logits_of(task, model, [example]) for example in examples])
    assert_close(together, alone)
    assert (alone - alone.flip(0)).abs().max() > 1e-2  # they differ, so the test can fail
    answers = task.answer(model, [{"text": text} for text in texts])
    labels = [row[0] for row in answers]
    assert labels == [task.labels[i] for i in alone.argmax(-1).tolist()]  # type: ignore[attr-defined]
    for (_, *probabilities), wanted in zip(answers, alone.softmax(-1).tolist(), strict=True):
        assert probabilities == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_pools_the_last_token_of_the_text(kind: str, tmp_path: Path) -> None:
    base = BASES[kind](tmp_path / kind)
    task = task_of(base, tmp_path, [0, 1, 0, 1])
    examples = examples_of(task)
    model, _ = task.load_model(CPU)
    tiny.enliven(model, 1)
    batch = task.collate(examples)
    assert 0 in batch.inputs["attention_mask"]
    with torch.no_grad():
        hidden = model.base_model(**batch.inputs).last_hidden_state
        last = torch.tensor([len(example["input_ids"]) - 1 for example in examples])
        wanted = model.score(hidden[torch.arange(len(last)), last])
    torch.testing.assert_close(logits_of(task, model, examples), wanted)


def test_the_pad_token_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    task = task_of(tiny.save_gpt2(tmp_path / "gpt2"), tmp_path, [0, 1], pad_token="<nothing>")
    with pytest.raises(LoraError, match="no token `<nothing>`"):
        task.collate(examples_of(task))


def test_one_text_cannot_stand_for_a_pair(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "one", "more": "two", "label": i % 2} for i in range(2)]
    task = task_of(bert, tmp_path, rows, text_pair_column="more")
    with pytest.raises(LoraError, match="reads `text` with `more`"):
        task.parse_input("one")
    assert task_of(bert, tmp_path, [0, 1]).parse_input("one") == {"text": "one"}


# -------------------------------------------------------------------------------- checkpoints


def test_a_head_for_other_labels_is_drawn_anew_and_repeatably(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base", labels=["x", "y", "z"])
    task = task_of(base, tmp_path, [0, 1])
    load_data(task)
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        model, new = task.load_model(CPU)
        assert new == ["classifier"]
        models.append(model.state_dict())
    stored = load_file(base / "model.safetensors")
    assert models[0]["classifier.out_proj.weight"].shape == (2, 32)
    assert 0.005 < models[0]["classifier.out_proj.weight"].std() < 0.05  # not zeros, not noise
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name
        if not name.startswith("classifier.out_proj"):
            assert torch.equal(tensor, stored[name]), name


def test_a_head_for_these_labels_is_kept(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base", labels=["0", "1"])
    task = task_of(base, tmp_path, [0, 1])
    load_data(task)
    model, _ = task.load_model(CPU)
    stored = load_file(base / "model.safetensors")
    assert all(torch.equal(t, stored[name]) for name, t in model.state_dict().items())


def broken(base: Path, change: Any) -> Path:
    file = base / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return base


def test_any_other_mismatch_is_refused(tmp_path: Path) -> None:
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    base = tiny.save_encoder(tmp_path / "base")
    broken(base, lambda tensors: tensors.update({name: torch.zeros(16, 32)}))
    task = task_of(base, tmp_path, [0, 1])
    load_data(task)
    with pytest.raises(LoraError, match=f"`{name}` of the checkpoint has another shape"):
        task.load_model(CPU)


def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")

    def cut(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layer.1." in name]:
            del tensors[name]

    task = task_of(broken(base, cut), tmp_path, [0, 1])
    load_data(task)
    with pytest.raises(LoraError, match=r"holds no weights for `roberta.encoder.layer.1.*, nor"):
        task.load_model(CPU)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"other.{name}"] = tensors.pop(name)

    task = task_of(broken(base, rename), tmp_path, [0, 1])
    load_data(task)
    with pytest.raises(LoraError, match=r"holds no weights for `roberta.*, nor for"):
        task.load_model(CPU)


def test_a_damaged_checkpoint_is_an_error_of_the_user(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    task = task_of(base, tmp_path, [0, 1])
    load_data(task)
    with pytest.raises(LoraError, match="not a whole safetensors file"):
        task.load_model(CPU)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("  ", "column `text` is blank", "write another text"),
        ("a </s> film", "the text holds `</s>`", "write `</s>` otherwise"),
        ("slow " * 99, "more than 32", "shorten it, or cut its beginning"),
    ],
)
def test_a_text_that_has_no_answer_is_said_with_what_helps(
    tmp_path: Path, text: str, what: str, hint: str
) -> None:
    base = tiny.save_encoder_decoder(tmp_path / "base")
    task = task_of(base, tmp_path, [0, 1], truncate="error", max_length=32)
    problem = task.answer_problem({"text": text})
    assert problem is not None
    assert problem.what == task.answer_error({"text": text})
    assert what in problem.what
    assert problem.hint is not None
    assert problem.hint.startswith(hint)
