"""A teacher's part of the loss: equal to plain torch, kept or computed; and which are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
import torch.nn.functional as F
from closeness import assert_close
from runs import assert_same_run, lines
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lora_cli.errors import IntegrityError, LoraError
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.tasks import build_training_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.generation.output_head import HiddenStates
from lora_cli.tasks.teachers.distillation_loss import (
    TopTokens,
    label_divergence,
    multi_label_divergence,
    token_divergence,
    top_tokens,
)
from lora_cli.training import train
from lora_cli.training.step_log import StepLog

CPU = torch.device("cpu")
TEXTS = [*tiny.CORPUS, "a bore", "a warm plot and a long story"]
LABELS = ["bad", "good"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "lora"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def classifier(folder: Path, sets: tuple[str, ...] = (), **distill: Any) -> Recipe:
    """Return a recipe with a RoBERTa as student and a larger BERT, of other tokens, as teacher."""
    base = tiny.save_encoder(folder / "base")
    if "teacher" not in distill:
        tiny.save_encoder(folder / "teacher", ["good", "bad"], "bert", seed=3, layers=3)
        tiny.wordpiece().save_pretrained(folder / "teacher")
        distill["teacher"] = "./teacher"
    rows = [{"text": t, "label": LABELS[i % 2] if i % 3 else None} for i, t in enumerate(TEXTS)]
    write(folder / "train.jsonl", rows)
    held = [{"text": f"{t} !", "label": LABELS[i % 2]} for i, t in enumerate(TEXTS)]
    write(folder / "validation.jsonl", held)
    path = tiny.recipe(
        base, folder,
        data={"train": "train.jsonl", "validation": "validation.jsonl",
              "check": {"max_overlap": 1.0}},
        train={"max_steps": 4, "micro_batch_size": 3, "log_every_steps": 1,
               "distill": {"temperature": 3.0, "weight": 0.75, **distill}},
        evaluate={"every_steps": 2}, checkpoint={"every_steps": 2},
    )  # fmt: skip
    return load_recipe(path, sets)


def writer(folder: Path, sets: tuple[str, ...] = (), **train_keys: Any) -> Recipe:
    base = tiny.save_llama(folder / "base")
    tiny.save_llama(folder / "teacher", tied=False, seed=5)
    write(folder / "train.jsonl", [{"text": t} for t in TEXTS])
    write(folder / "validation.jsonl", [{"text": f"{t} !"} for t in TEXTS[:3]])
    path = tiny.recipe(
        base, folder,
        data={"train": "train.jsonl", "validation": "validation.jsonl",
              "check": {"max_overlap": 1.0}},
        train={"max_steps": 4, "micro_batch_size": 3, "log_every_steps": 1,
               "distill": {"teacher": "./teacher", "temperature": 1.5, "weight": 0.4},
               **train_keys},
        evaluate={"every_steps": 4},
    )  # fmt: skip
    return load_recipe(path, sets)


def opened(recipe: Recipe) -> tuple[Task, torch.nn.Module, list[Any]]:
    task = build_training_task(recipe)
    task.load_processor()
    split = load_data(task)["train"]
    model, _ = task.load_model(CPU)
    return task, model, [split.examples[i] for i in range(len(split))]


# ---------------------------------------------------------------------------- the divergences


def drawn(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergences_equal_their_definition(temperature: float) -> None:
    student, teacher = drawn(5, 7).requires_grad_(), drawn(7, 5).T
    p, q = (torch.softmax(z / temperature, -1) for z in (teacher, student))
    wanted = temperature**2 * (p * (p / q).log()).sum(-1)
    found = label_divergence(student, teacher, temperature)
    torch.testing.assert_close(found, wanted)
    ours, theirs = (
        torch.autograd.grad(x.sum(), student, retain_graph=True) for x in (found, wanted)
    )
    torch.testing.assert_close(ours, theirs)
    p, q = (torch.sigmoid(z / temperature) for z in (teacher, student))
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    wanted = temperature**2 * each.sum(-1)
    torch.testing.assert_close(multi_label_divergence(student, teacher, temperature), wanted)


@pytest.mark.parametrize("size", [10, 64, 65, 400])
def test_tokens_are_compared_by_the_top_tokens_and_the_rest(size: int) -> None:
    student, teacher, temperature = drawn(6, size).float(), drawn(size, 6).T.float(), 2.0
    teacher_tokens = top_tokens(teacher, temperature)
    assert teacher_tokens.ids.shape == (6, min(size, 64))
    assert teacher_tokens.log_p.shape == (6, size if size <= 64 else 65)
    p, q = (torch.softmax(z.double() / temperature, -1) for z in (teacher, student))
    order = teacher.argsort(-1, descending=True)[:, :64]
    groups = [x.gather(-1, order) for x in (p, q)]
    if size > 64:
        groups = [
            torch.cat([some, x.scatter(-1, order, 0.0).sum(-1, keepdim=True)], -1)
            for some, x in zip(groups, (p, q), strict=True)
        ]
    p_top, q_top = groups
    wanted = 4 * (p_top * (p_top / q_top).log()).sum(-1)
    found = token_divergence(student, teacher_tokens, temperature)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    whole = 4 * (p * (p / q).log()).sum(-1)
    assert (found <= whole * (1 + 1e-5)).all()
    if size <= 64:
        torch.testing.assert_close(found.double(), whole, rtol=1e-4, atol=1e-5)


def test_impossible_outcomes_add_zero_and_no_nan() -> None:
    teacher = torch.tensor([[2.0, -torch.inf, 0.0]])
    student = torch.tensor([[0.0, 1.0, -1.0]], requires_grad=True)
    loss = label_divergence(student, teacher, 1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    # nearly all of the mass on one token: the rest is not lost to rounding
    sharp = torch.zeros(1, 200)
    sharp[0, 3] = 40.0
    teacher_tokens = top_tokens(sharp, 1.0)
    assert token_divergence(torch.zeros(1, 200), teacher_tokens, 1.0).isfinite().all()
    assert_close(teacher_tokens.log_p[0, -1].exp() / 136, teacher_tokens.log_p[0, 1].exp())


# -------------------------------------------------------------------------------- classifiers


def batch_and_loss(task: Any, model: Any, examples: Any) -> tuple[Any, Any]:
    """Return a step's only batch, and its loss: each term is the mean over its own items."""
    batch = task.collate(examples)
    found = task.losses(model, task.forward(model, batch), batch)
    weights = task.train_loss_weights
    return batch, sum(weights[k] * found[k].sum() / batch.items[k].sum() for k in weights)


def test_a_step_of_a_classifier_equals_plain_torch(tmp_path: Path) -> None:
    recipe = classifier(tmp_path)
    task, model, examples = opened(recipe)
    batch, loss = batch_and_loss(task, model, examples)

    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher").eval()
    read = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    mine = AutoTokenizer.from_pretrained(tmp_path / "base")
    rows = lines(tmp_path / "train.jsonl")
    kl, ce = [], []
    for row in rows:
        with torch.no_grad():
            p = teacher(**read(row["text"], return_tensors="pt")).logits[:, [1, 0]]  # good, bad
        q = model(**mine(row["text"], return_tensors="pt")).logits
        p, log_q = torch.softmax(p / 3.0, -1), torch.log_softmax(q / 3.0, -1)
        kl.append(9.0 * (p * (p.log() - log_q)).sum())
        if row["label"] is not None:
            ce.append(F.cross_entropy(q, torch.tensor([LABELS.index(row["label"])])))
    assert len(ce) < len(kl)
    wanted = 0.75 * torch.stack(kl).mean() + 0.25 * torch.stack(ce).mean()
    assert_close(loss, wanted)
    assert_close(task.loss(model, batch), 0.75 * sum(kl) + 0.25 * sum(ce))


def test_several_labels_are_compared_one_by_one(tmp_path: Path) -> None:
    classifier(tmp_path)
    rows = [{"text": t, "label": [["good"], [], None][i % 3]} for i, t in enumerate(TEXTS)]
    write(tmp_path / "train.jsonl", rows)
    sets = ("task.problem=multi_label", "data.validation=null")
    recipe = load_recipe(tmp_path / "recipe.yaml", sets)
    task, model, examples = opened(recipe)
    batch = task.collate(examples)
    found = task.losses(model, task.forward(model, batch), batch)
    logits = task.forward(model, batch)
    has = torch.tensor([row["label"] is not None for row in rows])
    marks = torch.tensor([[0.0, float(row["label"] == ["good"])] for row in rows])
    wanted = F.binary_cross_entropy_with_logits(logits, marks, reduction="none").sum(-1)
    assert_close(found["loss"], wanted * has)
    assert batch.items["loss"].tolist() == [2.0 * float(x) for x in has]
    assert batch.items["teacher"].tolist() == [2.0] * len(rows)
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher").eval()
    read = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        teacher_logits = teacher(**read(rows[0]["text"], return_tensors="pt")).logits[:, [1, 0]]
    assert_close(found["teacher"][:1], multi_label_divergence(logits[:1], teacher_logits, 3.0))


@pytest.mark.slow
def test_cached_answers_give_the_same_run_as_computed_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = classifier(tmp_path)
    report = train(recipe)
    printed = capsys.readouterr().err
    assert (
        "computing once what the frozen `teacher` makes of 10 examples of train: about " in printed
    )
    assert "6 train rows with a label, 4 without: those learn from the teacher alone" in printed
    assert report["teacher"]["name"].endswith("teacher")
    assert (report["teacher"]["temperature"], report["teacher"]["weight"]) == (3.0, 0.75)
    steps = [r for r in lines(tmp_path / "out" / "metrics.jsonl") if "loss" in r]
    for record in steps:
        both = 0.25 * record["loss_labels"] + 0.75 * record["loss_teacher"]
        assert record["loss"] == pytest.approx(both, rel=1e-5)
    # validation is measured by its labels alone
    measured = [r for r in lines(tmp_path / "out" / "metrics.jsonl") if "validation" in r]
    assert set(measured[0]["validation"]) == {"loss", "accuracy", "f1"}
    assert "fingerprint" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    def forbidden(*_: Any) -> None:
        raise AssertionError("the teacher's answers are in the cache")

    online = load_recipe(
        tmp_path / "recipe.yaml", ["data.cache_limit=0B", f"output_dir={tmp_path / 'online'}"]
    )
    found = train(online)["metrics"]["after"]["validation"]
    assert found["loss"] == pytest.approx(
        report["metrics"]["after"]["validation"]["loss"], rel=1e-5
    )
    again = load_recipe(tmp_path / "recipe.yaml", [f"output_dir={tmp_path / 'again'}"])
    from lora_cli.tasks.teachers.distilled_classification import DistilledSequenceClassification

    answers = DistilledSequenceClassification.answers
    calls: list[int] = []

    def counting(self: Any, batch: Any) -> torch.Tensor:
        calls.append(len(batch.rows))
        return answers(self, batch)

    monkeypatch.setattr(DistilledSequenceClassification, "answers", counting)
    train(again)
    assert calls == [1]  # which names the outputs
    assert_same_run(tmp_path / "out", tmp_path / "again")


@pytest.mark.slow
def test_a_run_resumes_exactly_and_not_with_another_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(classifier(tmp_path))
    stopped = load_recipe(
        tmp_path / "recipe.yaml", [f"output_dir={tmp_path / 'two'}", "train.log_every_steps=3"]
    )
    whole = load_recipe(
        tmp_path / "recipe.yaml", [f"output_dir={tmp_path / 'one'}", "train.log_every_steps=3"]
    )
    train(whole)
    add = StepLog.add

    def leaving(self: Any, planned: Any, *rest: Any) -> None:
        if planned.number == 3:
            raise KeyboardInterrupt
        add(self, planned, *rest)

    monkeypatch.setattr(StepLog, "add", leaving)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    weights = tmp_path / "teacher" / "model.safetensors"
    kept = weights.read_bytes()
    tiny.save_encoder(tmp_path / "other", ["good", "bad"], "bert", seed=9, layers=3)
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(LoraError, match=r"was started with `teacher: .*, and now it is"):
        train(stopped, resume=True)
    weights.write_bytes(kept)
    for change in ("train.distill.temperature=1.0", "train.distill.weight=0.5"):
        sets = [f"output_dir={tmp_path / 'two'}", "train.log_every_steps=3", change]
        with pytest.raises(LoraError, match=change.split("=")[0]):
            train(load_recipe(tmp_path / "recipe.yaml", sets), resume=True)
    train(stopped, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_an_adapter_is_a_teacher(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    first = classifier(tmp_path / "first", ("train.distill=null", "data.validation=null"))
    write(
        tmp_path / "first" / "train.jsonl",
        [{"text": t, "label": LABELS[i % 2]} for i, t in enumerate(TEXTS)],
    )
    train(first)
    recipe = classifier(tmp_path, teacher=str(tmp_path / "first" / "out"))
    task, model, examples = opened(recipe)
    batch = task.collate(examples)
    from lora_cli.evaluation.open_adapter import open_adapter
    from lora_cli.recipe import load_adapter_recipe

    folder = tmp_path / "first" / "out"
    other, taught, _ = open_adapter(folder, load_adapter_recipe(folder))
    wanted = other.answer(taught, lines(tmp_path / "train.jsonl"))
    teacher_logits = task.frozen_outputs(model, batch)["teacher_logits"]
    for row, (_, *scores) in zip(teacher_logits.softmax(-1).tolist(), wanted, strict=True):
        assert row == pytest.approx(scores, abs=1e-5)
    assert set(task.train_loss_weights) == {"loss", "teacher"}


@pytest.mark.slow
def test_a_teacher_cuts_texts_as_it_was_trained_to(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    classifier(tmp_path / "first")
    rows = [{"text": f"{t} </s>", "label": LABELS[i % 2]} for i, t in enumerate(TEXTS)]
    write(tmp_path / "first" / "train.jsonl", rows)
    own = ["task.truncate=left", "task.max_length=6", "task.split_special_tokens=true"]
    train(
        load_recipe(
            tmp_path / "first" / "recipe.yaml", ["train.distill=null", "data.validation=null", *own]
        )
    )
    folder = tmp_path / "first" / "out"
    recipe = classifier(tmp_path, teacher=str(folder))
    write(tmp_path / "train.jsonl", rows)
    task, model, examples = opened(recipe)
    from lora_cli.evaluation.open_adapter import open_adapter
    from lora_cli.recipe import load_adapter_recipe

    other, taught, _ = open_adapter(folder, load_adapter_recipe(folder))
    teacher_logits = task.frozen_outputs(model, task.collate(examples))["teacher_logits"].softmax(
        -1
    )
    wanted = torch.tensor([scores for _, *scores in other.answer(taught, rows)])
    assert_close(teacher_logits, wanted)
    pairs = [{**row, "other": "a bore"} for row in rows]
    write(tmp_path / "train.jsonl", pairs)
    write(tmp_path / "validation.jsonl", pairs)
    paired = load_recipe(tmp_path / "recipe.yaml", ["task.text_pair_column=other"])
    rejected(paired, "it was trained on 1 text a row, and the recipe names 2")


def test_rows_to_measure_by_are_drawn_from_those_with_a_label(tmp_path: Path) -> None:
    classifier(tmp_path)
    sets = ["data.validation={from: train, fraction: 0.5}"]
    recipe = load_recipe(tmp_path / "recipe.yaml", sets)
    task = build_training_task(recipe)
    task.load_processor()
    splits = load_data(task)
    rows = {name: [split.rows[i] for i in range(len(split.rows))] for name, split in splits.items()}
    assert len(rows["validation"]) == 3
    assert all(row["label"] is not None for row in rows["validation"])
    assert sum(row["label"] is None for row in rows["train"]) == 4


# ------------------------------------------------------------------------------ language models


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_of_a_language_model_equals_plain_torch(tmp_path: Path, packing: bool) -> None:
    recipe = writer(tmp_path)
    task, model, examples = opened(recipe)
    if packing:
        recipe = writer(tmp_path, ("train.packing=true",))
        task, model, _ = opened(recipe)
        packs = task.packed(load_data(task)["train"])
        examples = [packs[i] for i in range(len(packs))]
        assert len(packs) < len(TEXTS)
    _, loss = batch_and_loss(task, model, examples)
    task.fit_to_model(model.requires_grad_(False))
    assert isinstance(task.forward(model, task.collate(examples)), HiddenStates)
    _, without_all_scores = batch_and_loss(task, model, examples)

    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    read = AutoTokenizer.from_pretrained(tmp_path / "base")
    kl, ce = [], []
    for text in TEXTS:
        inner = read(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[tiny.BOS, *inner, tiny.EOS]])
        with torch.no_grad():
            p = torch.softmax(teacher(ids).logits[0, :-1] / 1.5, -1)
        logits = model(ids).logits[0, :-1]
        q = torch.softmax(logits / 1.5, -1)
        order = p.argsort(-1, descending=True)
        grouped = []
        for x in (p, q):
            x = x.gather(-1, order)
            grouped.append(torch.cat([x[:, :64], x[:, 64:].sum(-1, keepdim=True)], -1))
        kl.append(1.5**2 * (grouped[0] * (grouped[0] / grouped[1]).log()).sum(-1))
        ce.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    wanted = 0.4 * torch.cat(kl).mean() + 0.6 * torch.cat(ce).mean()
    assert_close(loss, wanted, 1e-4)
    assert_close(without_all_scores, wanted, 1e-4)


def test_neither_student_nor_teacher_may_let_packed_texts_see_each_other(tmp_path: Path) -> None:
    class Forgetful(torch.nn.Module):
        """A language model that takes no position ids."""

        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return self.model(input_ids=input_ids, use_cache=use_cache)

    task: Any
    task, model, _ = opened(writer(tmp_path, ("train.packing=true",)))
    split = load_data(task)["train"]
    task.check_packing(model, split)
    with pytest.raises(LoraError, match=r"^(?!the teacher).*packed texts see each other"):
        task.check_packing(Forgetful(model), split)
    task.teacher._model = Forgetful(task.teacher.model())
    with pytest.raises(LoraError, match=r"the teacher: .*packed texts see each other"):
        task.check_packing(model, split)


@pytest.mark.parametrize("packing", ["false", "true"])
@pytest.mark.slow
def test_cached_tokens_give_the_same_run(tmp_path: Path, packing: str) -> None:
    recipe = writer(tmp_path, (f"train.packing={packing}",))
    kept = train(recipe)
    sets = [f"train.packing={packing}", "data.cache_limit=0B", f"output_dir={tmp_path / 'online'}"]
    online = train(load_recipe(tmp_path / "recipe.yaml", sets))
    for ours, theirs in zip(
        *(lines(tmp_path / f / "metrics.jsonl") for f in ("out", "online")), strict=True
    ):
        for key in ours.keys() & {"loss", "loss_teacher", "loss_labels"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    perplexity = [r["metrics"]["after"]["validation"]["perplexity"] for r in (kept, online)]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-4)


# ----------------------------------------------------------------------------------- rejections


def rejected(recipe: Recipe, words: str) -> LoraError:
    with pytest.raises(LoraError, match=words) as found:
        check_recipe(recipe)
    return found.value


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["bad", "great"], "the teacher: it has no label `good`; its labels are `bad`, `great`"),
        (["bad", "good", "so so"], "it has the label `so so`, which the recipe does not have"),
        (["LABEL_0", "LABEL_1"], "its 2 labels have no names"),
    ],
)
def test_a_teacher_of_other_labels_is_rejected(
    labels: list[str], words: str, tmp_path: Path
) -> None:
    tiny.save_encoder(tmp_path / "teacher", labels, seed=3)
    error = rejected(classifier(tmp_path, teacher="./teacher"), words)
    assert "train.distill.teacher (" in str(error)


def test_labels_match_whatever_their_case_and_by_number(tmp_path: Path) -> None:
    tiny.save_encoder(tmp_path / "teacher", ["GOOD", "Bad"], seed=3)
    task, *_ = opened(classifier(tmp_path, teacher="./teacher"))
    assert task.teacher_positions.tolist() == [1, 0]  # type: ignore[attr-defined]


def test_a_teacher_without_a_head_is_rejected(tmp_path: Path) -> None:
    tiny.save_encoder(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config["id2label"], config["label2id"] = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoraError, match=r"the teacher: it has no trained `classifier"):
        train(classifier(tmp_path, teacher="./teacher"))


def test_a_teacher_that_is_not_there_is_rejected(tmp_path: Path) -> None:
    rejected(
        classifier(tmp_path, teacher="./nowhere"),
        "the teacher: there is no folder|there is no folder",
    )


def test_a_teacher_of_other_tokens_is_rejected(tmp_path: Path) -> None:
    recipe = writer(tmp_path)
    tiny.tokenizer("gpt2").save_pretrained(tmp_path / "teacher")
    rejected(recipe, "the teacher: its tokenizer differs from that of .* in .* token")


def test_a_teacher_that_reads_fewer_tokens_is_rejected(tmp_path: Path) -> None:
    recipe = writer(tmp_path)
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config["max_position_embeddings"] = 8
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    rejected(recipe, "the teacher: it reads no more than 8 tokens, and the student 32")
    check_recipe(load_recipe(tmp_path / "recipe.yaml", ["task.max_length=8"]))


def test_a_model_for_several_labels_does_not_teach_one(tmp_path: Path) -> None:
    recipe = classifier(tmp_path)
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    rejected(recipe, "`problem_type: multi_label_classification`, and the recipe `problem: single")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"type": "token_classification"}, "`distill` has no meaning with `task.type: token"),
        ({"type": "sequence_classification", "problem": "regression"}, "has no probabilities"),
    ],
)
def test_tasks_without_distillation_reject_a_teacher(
    task: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    path = tiny.recipe(
        base, tmp_path, task={"labels": None, **task}, train={"distill": {"teacher": "x"}}
    )
    with pytest.raises(LoraError, match=words):
        load_recipe(path)


@pytest.mark.slow
def test_without_labels_the_teacher_s_weight_must_be_one(tmp_path: Path) -> None:
    recipe = classifier(tmp_path)
    write(tmp_path / "train.jsonl", [{"text": t} for t in TEXTS])
    rejected(recipe, "no train row has a label")
    report = train(load_recipe(tmp_path / "recipe.yaml", ["train.distill.weight=1"]))
    assert report["training"]["steps"] == 4
    log = lines(tmp_path / "out" / "metrics.jsonl")
    assert all("loss_labels" not in record for record in log)


def test_a_row_without_a_label_stays_an_error_where_no_teacher_answers_it(tmp_path: Path) -> None:
    recipe = classifier(tmp_path)
    rejected(load_recipe(tmp_path / "recipe.yaml", ["train.distill=null"]), "`label` is blank")
    write(tmp_path / "validation.jsonl", [{"text": "a", "label": None}])
    rejected(recipe, "`label` is blank")


def test_a_number_for_a_missing_label_is_an_error_with_a_hint(
    tmp_path: Path,
) -> None:
    recipe = classifier(tmp_path)
    write(tmp_path / "train.jsonl", [{"text": t, "label": -1} for t in TEXTS])
    rejected(recipe, "-1 often stands for a row without a label: leave its cell empty")


def test_the_error_of_a_damaged_adapter_names_the_teacher(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    first = classifier(tmp_path / "first", ("train.distill.weight=1", "data.validation=null"))
    train(first)
    file = tmp_path / "first" / "out" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(IntegrityError, match="the teacher: "):
        train(classifier(tmp_path, teacher=str(tmp_path / "first" / "out")))


def test_probabilities_of_top_tokens_and_the_rest_sum_to_one() -> None:
    kept = top_tokens(drawn(3, 100).float(), 2.0)
    assert isinstance(kept, TopTokens)
    assert (kept.ids.dtype, kept.log_p.dtype) == (torch.int32, torch.float32)
    assert_close(kept.log_p.exp().sum(-1), torch.ones(3))
