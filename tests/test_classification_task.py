"""What tasks with labels share: labels and items of a batch, losses, scores and columns."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.examples import Batch
from lora_cli.tasks.sequence_classification import SequenceClassification
from lora_cli.tasks.texts import tokenize_long_texts

GENERATOR = torch.Generator().manual_seed(4)
MODEL = nn.Identity()  # none of this needs one


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def task_of(base: Path, tmp_path: Path) -> Any:
    def make(labels: Any = None, base: Path = base, **task: Any) -> SequenceClassification:
        names = [f"l{i}" for i in range(labels)] if isinstance(labels, int) else labels
        given = {"type": "sequence_classification", "labels": names, **task}
        made = build_task(load_recipe(tiny.recipe(base, tmp_path, task=given)))
        assert isinstance(made, SequenceClassification)
        made.load_processor()
        made.learn_from({})
        return made

    return make


def rows_of(values: list[Any]) -> Any:
    """Return rows with these labels, as a data set gives them."""
    return [{"text": "a film", "label": value} for value in values]


def batch_of(task: Any, values: list[Any]) -> Batch:
    examples = [
        {"input_ids": [0, 5 + i, 2], "labels": task.label_of(row), "row": 10 + i}
        for i, row in enumerate(rows_of(values))
    ]
    batch: Batch = task.collate(examples)
    return batch


# ------------------------------------------------------------------------- losses and items


def test_a_batch_with_one_label_per_row(task_of: Any) -> None:
    task = task_of(["a", "b", "c"], class_weights={"b": 0.5, "c": 3.0}, label_smoothing=0.1)
    batch = batch_of(task, ["c", "a", "b", "c"])
    labels, weights = torch.tensor([2, 0, 1, 2]), torch.tensor([1.0, 0.5, 3.0])
    assert torch.equal(batch.targets["labels"], labels)
    assert batch.targets["labels"].dtype == torch.int64
    assert torch.equal(batch.items["loss"], weights[labels])
    assert batch.rows == [10, 11, 12, 13]
    assert batch.cost == 12
    logits = torch.randn(4, 3, generator=GENERATOR)
    found = task.losses(MODEL, logits.bfloat16(), batch)["loss"]
    wanted = F.cross_entropy(
        logits.bfloat16().float(), labels, weights, reduction="none", label_smoothing=0.1
    )
    torch.testing.assert_close(found, wanted)


def test_a_batch_with_several_labels_per_row(task_of: Any) -> None:
    task = task_of(["a", "b", "c"], problem="multi_label", class_weights={"b": 0.5})
    batch = batch_of(task, [["c", "a"], [], ["b"]])
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    assert torch.equal(batch.targets["labels"], labels)
    assert torch.equal(batch.items["loss"], torch.tensor([3.0, 3, 3]))
    logits = torch.randn(3, 3, generator=GENERATOR)
    p, weights = logits.double().sigmoid(), torch.tensor([1.0, 0.5, 1.0])
    by_hand = -(labels * p.log() + (1 - labels) * (1 - p).log()) * weights
    assert task.losses(MODEL, logits, batch)["loss"].tolist() == pytest.approx(by_hand.sum(-1))


def test_a_batch_of_numbers(task_of: Any) -> None:
    task = task_of(problem="regression")
    batch = batch_of(task, [0.5, "-2", 3])
    assert torch.equal(batch.targets["labels"], torch.tensor([0.5, -2.0, 3.0]))
    assert torch.equal(batch.items["loss"], torch.ones(3))
    logits = torch.tensor([[1.0], [1.0], [1.0]])
    assert task.losses(MODEL, logits, batch)["loss"].tolist() == [0.25, 9.0, 4.0]
    (first, *_) = task.predictions(MODEL, logits, batch)
    assert (first.row, first.prediction, first.reference, first.scores) == (10, 1.0, 0.5, None)
    assert first.metric_inputs == {"value": (1.0, 0.5)}


def test_weights_are_copied_to_a_device_once(task_of: Any) -> None:
    task = task_of(["a", "b"])
    assert task._weights_on(torch.device("cpu")) is None
    task = task_of(["a", "b"], class_weights={"a": 2.0})
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert task._weights_on(cpu) is task.reader.weights
    moved = task._weights_on(other)
    assert moved.device == other
    assert task._weights_on(other) is moved
    assert task._weights_on(cpu).tolist() == [2.0, 1.0]


# ---------------------------------------------------------------------------- predictions


def test_predictions_of_one_label(task_of: Any) -> None:
    task = task_of(["a", "b", "c"])
    batch = batch_of(task, ["c", "b"])
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 5.0, 4.0]])
    found = task.predictions(MODEL, logits, batch)
    assert [(p.row, p.prediction, p.reference) for p in found] == [(10, "b", "c"), (11, "b", "b")]
    assert [p.metric_inputs for p in found] == [{"label": (1, 2)}, {"label": (1, 1)}]
    for prediction, row in zip(found, logits.double(), strict=True):
        wanted = dict(zip("abc", row.softmax(-1).tolist(), strict=True))
        assert prediction.scores == pytest.approx(wanted)
    answers = task.answers_of(logits)
    assert [answer[0] for answer in answers] == ["b", "b"]
    assert answers[0][1:] == [round(p, 6) for p in logits[0].softmax(-1).tolist()]


def test_predictions_of_several_labels(task_of: Any) -> None:
    task = task_of(["a", "b", "c"], problem="multi_label")
    batch = batch_of(task, [["c"], []])
    logits = torch.tensor([[0.1, -0.1, 3.0], [0.0, -1.0, -2.0]])
    first, second = task.predictions(MODEL, logits, batch)
    assert (first.prediction, first.reference) == (["a", "c"], ["c"])
    assert first.metric_inputs == {"label": ([1, 0, 1], [0, 0, 1])}
    assert all(type(value) is int for value in first.metric_inputs["label"][1])
    assert (second.prediction, second.reference) == ([], [])  # 0.5 is no yes
    assert second.scores == pytest.approx({"a": 0.5, "b": 0.26894142, "c": 0.11920292})


def test_scores_of_up_to_twenty_labels_are_all_kept(task_of: Any) -> None:
    task = task_of(20)
    logits = torch.randn(1, 20, generator=GENERATOR)
    (found,) = task.predictions(MODEL, logits, batch_of(task, ["l3"]))
    assert list(found.scores) == task.labels
    assert sum(found.scores.values()) == pytest.approx(1)


def test_of_more_labels_the_best_ten_and_the_true_ones_are_kept(task_of: Any) -> None:
    task = task_of(21)
    order = torch.randperm(21, generator=GENERATOR).tolist()  # the best first
    logits = torch.empty(1, 21)
    logits[0, order] = torch.linspace(5, -5, 21)
    best = [f"l{i}" for i in order[:10]]
    for own, wanted in ((order[2], best), (order[15], [*best, f"l{order[15]}"])):
        (found,) = task.predictions(MODEL, logits, batch_of(task, [f"l{own}"]))
        assert list(found.scores) == wanted
        assert found.scores[f"l{own}"] == pytest.approx(float(logits.softmax(-1)[0, own]))
    several = task_of(21, problem="multi_label")
    own = [order[0], order[12], order[20]]
    (found,) = several.predictions(MODEL, logits, batch_of(several, [[f"l{i}" for i in own]]))
    assert list(found.scores) == [*best, *(f"l{i}" for i in sorted(own[1:]))]


@pytest.mark.parametrize("n", [100, 101])
def test_predict_has_a_column_for_each_of_a_hundred_labels(n: int, task_of: Any) -> None:
    task = task_of(n)
    logits = torch.linspace(-3, 3, n)[None]
    columns, (answer,) = task.answer_columns(), task.answers_of(logits)
    assert len(columns) == len(answer)
    probabilities = [round(p, 6) for p in logits.softmax(-1)[0].tolist()]
    if n == 100:
        assert list(columns) == ["prediction", *(f"p_l{i}" for i in range(100))]
        assert set(columns.values()) == {"string", "double"}
        assert answer == ["l99", *probabilities]
    else:
        assert columns == {"prediction": "string", "p": "double", "best": "string"}
        best = {f"l{i}": probabilities[i] for i in range(100, 90, -1)}
        assert answer == ["l100", probabilities[100], best]
        assert list(answer[2]) == list(best)


def test_columns_of_the_other_problems(task_of: Any) -> None:
    several = task_of(["a", "b"], problem="multi_label")
    assert several.answer_columns() == {"prediction": "list<string>", "p_a": "double",
                                        "p_b": "double"}  # fmt: skip
    (answer,) = several.answers_of(torch.tensor([[9.0, -9.0]]))
    assert answer == [["a"], pytest.approx(0.999877), pytest.approx(0.000123)]
    number = task_of(problem="regression")
    assert number.answer_columns() == {"prediction": "double"}
    assert number.answers_of(torch.tensor([[1.5], [-2.0]])) == [[1.5], [-2.0]]


# -------------------------------------------------------------------------------- labels


def test_facts_about_the_labels(task_of: Any) -> None:
    one, several = task_of(["a", "b"]), task_of(["a", "b"], problem="multi_label")
    number = task_of(problem="regression")
    assert [t.knows_labels for t in (one, several, number)] == [True] * 3
    assert [t.reads_train for t in (one, several, number)] == [False] * 3
    assert not one.metric_context.multi_label
    assert several.metric_context.multi_label
    assert [t.metric_context.n_labels for t in (one, number)] == [2, None]
    assert [t.trial_label for t in (one, several, number)] == [0, [0, 0], 0.0]
    assert [t.label_feature for t in (one, several, number)] == ["int64", "list<int8>", "float32"]
    assert [f.kind for f in (*one.label_fields(), *several.label_fields())] == ["label", "labels"]
    assert number.label_fields()[0].kind == "number"
    assert [one.default_metrics, number.default_metrics] == [
        ("accuracy", "f1"), ("pearson", "spearman", "mse"),
    ]  # fmt: skip


def test_the_definition_of_the_loss(task_of: Any) -> None:
    plain = "mean cross-entropy per row, in nats"
    assert task_of(["a", "b"]).loss_definition == plain
    smooth = task_of(["a", "b"], class_weights={"a": 2.0}, label_smoothing=0.25)
    assert smooth.loss_definition == (
        f"{plain}, weighted by `class_weights`, with label smoothing 0.25"
    )
    several = task_of(["a", "b"], problem="multi_label")
    assert several.loss_definition == "mean binary cross-entropy per row and label, in nats"


def test_labels_are_counted_and_named_in_their_order(task_of: Any) -> None:
    task = task_of(["b", "a", "none"])
    assert task.label_counts(rows_of(["a", "b", "a", "2"])) == {"b": 1, "a": 2, "none": 1}
    assert task.labels_of({"label": "1"}) == ["a"]
    several = task_of(["b", "a", "c"], problem="multi_label")
    assert several.label_counts(rows_of([["a", "b"], ["a"]])) == {"b": 1, "a": 2, "c": 0}
    assert several.labels_of({"label": ["c", "b"]}) == ["b", "c"]
    assert several.labels_of({"label": []}) == []
    assert task_of(problem="regression").labels_of({"label": 2}) == ["2.0"]


def test_labels_to_skip_are_named(task_of: Any) -> None:
    task = task_of(["a", "b"], skip_labels=["-", " ? "])
    assert task.skip_reason({"label": "?"}, "train") == "the label `?` is one of `skip_labels`"
    assert task.skip_reason({"label": "a"}, "train") == ""
    assert task.skip_reason({"label": None}, "train") == ""
    assert task_of(["a", "b"]).skip_reason({"label": "-"}, "train") == ""


def head(rows: int) -> dict[str, torch.Tensor]:
    return {"classifier.out_proj.weight": torch.zeros(rows, 32), "other": torch.zeros(1, 32)}


def test_the_head_of_another_tool_s_adapter_gives_the_number_of_labels(
    task_of: Any, tmp_path: Path
) -> None:
    named = tiny.save_encoder(tmp_path / "named", labels=["no", "yes", "maybe"])
    for base, rows, wanted in (
        (named, 3, {"labels": ["no", "yes", "maybe"]}),
        (named, 4, {"labels": ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]}),
        (named, 1, {"problem": "regression"}),
        (named, 0, {"labels": ["no", "yes", "maybe"]}),  # those of the base's own head
    ):
        task = task_of(None, base, problem="regression")  # as nothing is to be learnt of rows
        task.complete_from(head(rows) if rows else {})
        assert task.learned.task == wanted, rows


# --------------------------------------------------------------------------------- texts


def test_texts_that_are_too_long_are_cut_dropped_or_rejected(task_of: Any) -> None:
    texts = [{"text": "film " * n, "label": "a"} for n in (1, 2, 9)]
    tokenizer = task_of(["a", "b"]).tokenizer
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in texts]
    limit = lengths[1]  # the second fits exactly
    cut = task_of(["a", "b"], max_length=limit, truncate="right").encode(texts)
    assert [len(found[0]["input_ids"]) for found in cut] == [lengths[0], limit, limit]
    assert [found[0].get("full_length") for found in cut] == [None, None, lengths[2]]
    assert [found[0]["labels"] for found in cut] == [0] * 3
    left = task_of(["a", "b"], max_length=limit, truncate="left").encode(
        [{"text": "slow " + "film " * 9 + "end", "label": "b"}]
    )[0][0]
    whole = tokenizer("slow " + "film " * 9 + "end")["input_ids"]
    assert left["input_ids"] == [whole[0], *whole[-limit + 1 :]]
    dropping = task_of(["a", "b"], max_length=limit, truncate="drop")
    assert [len(found) for found in dropping.encode(texts)] == [1, 1, 0]
    rejecting = task_of(["a", "b"], max_length=limit, truncate="error")
    assert [len(found) for found in rejecting.encode(texts[:2])] == [1, 1]
    with pytest.raises(LoraError, match=f"{lengths[2]} tokens, more than {limit}"):
        rejecting.encode(texts)
    for task, said in ((rejecting, True), (dropping, True), (task_of(["a", "b"]), False)):
        assert bool(task.answer_error(texts[2])) == said
        assert not task.answer_error(texts[1])


@pytest.mark.parametrize("longest", [50, 9999])
def test_the_full_length_of_a_pair_counts_special_tokens(
    longest: int, task_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # longer ones are not tokenized as a whole
    monkeypatch.setattr(tokenize_long_texts, "LONG", longest)
    monkeypatch.setattr(tokenize_long_texts, "OVERLAP", 32)
    task = task_of(["a", "b"], text_pair_column="more", max_length=16)
    for n in (3, 12, 40):
        row = {"text": "film " * n, "more": "a great cast " * 3, "label": "a"}
        ((example,),) = task.encode([row])
        full = len(task.tokenizer(row["text"], row["more"], verbose=False)["input_ids"])
        assert example["full_length"] == full > 16
        wanted = task.tokenizer(row["text"], row["more"], truncation=True, max_length=16)
        assert example["input_ids"] == wanted["input_ids"]


@pytest.mark.parametrize("types", [1, 2])
def test_a_model_with_one_kind_of_segments_gets_none(
    types: int, task_of: Any, tmp_path: Path
) -> None:
    base = tiny.save_encoder(tmp_path / "bert", None, "bert")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "type_vocab_size": types}))
    tokenizer = tiny.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(base)
    task = task_of(["a", "b"], base, text_pair_column="more")
    assert ("token_type_ids" in task.features()) == (types > 1)
    ((example,),) = task.encode([{"text": "a film", "more": "b", "label": "a"}])
    assert ("token_type_ids" in example) == (types > 1)
    assert ("token_type_ids" in task.collate([{**example, "row": 0}]).inputs) == (types > 1)


def test_the_trial_is_a_short_text_and_one_of_the_requested_length(task_of: Any) -> None:
    for pair in (None, "more"):
        task = task_of(["a", "b"], text_pair_column=pair)
        short, long = task.trial_examples(50)
        assert len(short["input_ids"]) < 30
        assert len(long["input_ids"]) == 50
        assert short["labels"] == long["labels"] == 0
        assert short["row"] == long["row"] == 0


def test_padding_is_the_recipe_s_the_tokenizer_s_or_the_end_of_text(
    task_of: Any, tmp_path: Path
) -> None:
    assert task_of(["a", "b"])._pad_id() == tiny.PAD
    assert task_of(["a", "b"], pad_token="</s>")._pad_id() == tiny.EOS
    assert task_of(["a", "b"], pad_token="<unk>")._pad_id() == tiny.UNK  # named on purpose
    gpt2 = task_of(["a", "b"], tiny.save_gpt2(tmp_path / "gpt2"))
    assert gpt2.tokenizer.pad_token is None
    assert gpt2._pad_id() == gpt2.tokenizer.eos_token_id
    with pytest.raises(LoraError, match="no token `nothing at all`"):
        task_of(["a", "b"], pad_token="nothing at all")._pad_id()
    model, _ = task_of(["a", "b"], pad_token="</s>").load_model(torch.device("cpu"))
    config: Any = model.config
    assert config.pad_token_id == config.get_text_config().pad_token_id == tiny.EOS


def test_an_encoder_decoder_answers_at_the_one_end_of_a_text(task_of: Any, tmp_path: Path) -> None:
    task = task_of(["a", "b"], tiny.save_encoder_decoder(tmp_path / "bart"))
    assert len(task.encode(rows_of(["a", "b"]))) == 2
    with pytest.raises(LoraError, match="the text holds `</s>`"):
        task.encode([{"text": "a </s> film", "label": "a"}])
    pair = task_of(["a", "b"], tiny.save_encoder_decoder(tmp_path / "bart2"),
                   text_pair_column="more")  # fmt: skip
    ((example,),) = pair.encode([{"text": "a film", "more": "b", "label": "a"}])
    assert example["input_ids"].count(tiny.EOS) > 1  # as many in every row
    endless = tiny.save_encoder_decoder(tmp_path / "endless")
    tiny.tokenizer("llama").save_pretrained(endless)
    with pytest.raises(LoraError, match="does not end a text with `</s>`"):
        task_of(["a", "b"], endless).encode(rows_of(["a"]))


def test_the_probe_has_no_token_that_the_model_lacks(task_of: Any, tmp_path: Path) -> None:
    folder = tiny.save_gpt2(tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 50256}))
    task = task_of(["a", "b"], folder)
    model, _ = task.load_model(torch.device("cpu"))
    assert torch.isfinite(model(**task.probe()).logits).all()


def test_a_label_that_is_a_list_of_answers_is_not_supported(task_of: Any) -> None:
    ranked = {"text": "q", "label": [{"text": "x", "score": 1}, {"text": "y", "score": 0}]}
    one = task_of(["a", "b"])
    columns = SimpleNamespace(label_columns=["label"], label_column="label")
    found = one.unsupported(ranked)
    one.spec = columns
    assert one.unsupported(ranked) is None
    assert found is None or found[0]
