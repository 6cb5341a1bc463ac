"""Tests of several data sets in one run: their shares, metrics, files, columns, and errors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from runs import assert_same_run, lines

from lora_cli.data.load_rows import load_rows
from lora_cli.errors import LoraError
from lora_cli.evaluation import evaluate_split
from lora_cli.evaluation.compare import compare
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.evaluation.evaluate_split import best_by, evaluate
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.preprocessing.data_gate import inspect_data
from lora_cli.preprocessing.encode import cache_key, load_data
from lora_cli.preprocessing.mixture import mixture_of
from lora_cli.preprocessing.show_examples import shown_rows
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.examples import Prediction
from lora_cli.training.run import train
from lora_cli.training.step_log import StepLog

Rows = list[dict[str, Any]]


class Stopped(Exception):
    """Interrupts a run."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of(name: str, count: int) -> Rows:
    texts = [f"{name} {i} {tiny.CORPUS[i % 8]}" for i in range(count)]
    return [{"text": text, "label": "good" if i % 2 else "bad"} for i, text in enumerate(texts)]


def write(folder: Path, **files: Rows) -> None:
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def recipe_of(folder: Path, mix: dict[str, Any], **sections: Any) -> Recipe:
    base = tiny.save_encoder(folder / "base", layers=1)
    data = {"mix": mix, "check": {"max_overlap": 0.2, "near_duplicates": False}}
    return load_recipe(tiny.recipe(base, folder, data=data, **sections))


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Any]:
    """Write a set of 12 rows, and one of 6 whose columns have other names; both have dev rows."""
    other = [{"said": row["text"], "is": row["label"]} for row in rows_of("b", 10)]
    write(tmp_path, a=rows_of("a", 12), a_dev=rows_of("dev", 5), b=other[:6], b_dev=other[6:])
    names = {"said": "text", "is": "label"}
    return {
        "a": {"train": "./a.jsonl", "validation": "./a_dev.jsonl"},
        "b": {"train": "./b.jsonl", "validation": "./b_dev.jsonl", "columns": names},
    }


def weighted(mix: dict[str, Any], **weights: float) -> dict[str, Any]:
    return {name: {**one, "weight": weights[name]} for name, one in mix.items()}


def task_of(recipe: Recipe) -> Any:
    task = build_task(recipe)
    task.load_processor()
    return task


# ------------------------------------------------------------------------------------- the rows


def test_rows_of_all_sets_are_in_one_split(tmp_path: Path, two: dict[str, Any]) -> None:
    found = load_rows(recipe_of(tmp_path, two))
    train_rows, dev = found["train"], found["validation"]
    texts = [row["text"] for row in train_rows]
    assert texts == [row["text"] for row in [*rows_of("a", 12), *rows_of("b", 6)]]
    assert [train_rows.set_of(i) for i in range(18)] == ["a"] * 12 + ["b"] * 6
    assert train_rows.place(13) == "b.jsonl:2 (set b)"
    assert dev[5] == {"text": "b 6 the cast is warm and the story is funny", "label": "bad"}
    assert {name: positions.tolist() for name, positions in dev.sets.items()} == {
        "a": [0, 1, 2, 3, 4], "b": [5, 6, 7, 8],
    }  # fmt: skip
    some = train_rows.select(np.array([1, 5, 12, 17]))
    assert [row["text"] for batch in some.batches(3) for row in batch] == [
        texts[i] for i in (1, 5, 12, 17)
    ]
    assert [len(part) for part in some.parts] == [2, 2]
    assert some.parts[1].place(1) == "b.jsonl:6 (set b)"


def test_a_row_that_moves_to_another_set_changes_the_hashes(
    tmp_path: Path, two: dict[str, Any]
) -> None:
    def hashes(mix: dict[str, Any], files: dict[str, Rows]) -> tuple[str, list[str]]:
        write(tmp_path, **files)
        recipe = recipe_of(tmp_path, mix, task={"text_column": "text"})
        task, rows = task_of(recipe), load_rows(recipe)["train"]
        return rows.content_sha256(), cache_key(task, rows, True)

    rows = rows_of("a", 12)
    one = {"a": two["a"], "b": {"train": "./c.jsonl"}}
    first = hashes(one, {"a": rows[:8], "c": rows[8:]})
    assert hashes(one, {"a": rows[:8], "c": rows[8:]}) == first
    moved = hashes(one, {"a": rows[:9], "c": rows[9:]})
    assert moved[0] != first[0]
    assert moved[1] != first[1]
    renamed = {**one, "b": {**one["b"], "columns": {"label": "text", "text": "label"}}}
    assert hashes(renamed, {"a": rows[:8], "c": rows[8:]})[1] != first[1]
    # the weights only affect sampling
    assert hashes(weighted(one, a=1, b=3), {"a": rows[:8], "c": rows[8:]}) == first


def test_labels_that_sets_number_differently_are_matched_by_name(tmp_path: Path) -> None:
    for name, labels in (("a", ["bad", "good"]), ("b", ["good", "so-so", "bad"])):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=labels)}
        )
        texts = [f"{name} {text}" for text in tiny.CORPUS]
        rows = {"text": texts, "label": [i % len(labels) for i in range(8)]}
        table = datasets.Dataset.from_dict(rows, features=features)
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "train.parquet")
    write(tmp_path, c=[{"text": "c", "label": "good"}])
    mix = {"a": {"name": "./a"}, "b": {"name": "./b"}, "c": {"path": "c.jsonl"}}
    recipe = recipe_of(tmp_path, mix, task={"labels": None})
    rows = load_rows(recipe)["train"]
    assert [row["label"] for row in rows] == [
        *["bad", "good"] * 4, *["good", "so-so", "bad"] * 2, "good", "so-so", "good",
    ]  # fmt: skip
    task = task_of(recipe)
    load_data(task)
    assert task.labels == ["bad", "good", "so-so"]
    alike = recipe_of(tmp_path, {"a": {"name": "./a"}, "d": {"name": "./a"}})
    assert load_rows(alike)["train"].label_names == {"label": ["bad", "good"]}


@pytest.mark.parametrize("labels", [None, ["bad", "good"]])
def test_numbers_of_one_set_do_not_mix_with_label_names_of_another(
    tmp_path: Path, labels: list[str] | None
) -> None:
    write(tmp_path, a=[{"text": f"a {i}", "label": name} for i, name in enumerate(("bad", "good"))])
    write(tmp_path, b=[{"text": f"b {i}", "label": i % 2} for i in range(2)])
    recipe = recipe_of(tmp_path, {"a": {"path": "a.jsonl"}, "b": {"path": "b.jsonl"}},
                       task={"labels": labels})  # fmt: skip
    task = task_of(recipe)
    if labels is None:
        with pytest.raises(LoraError, match="the labels of the set `b` are numbers, and those of"):
            load_data(task)
    else:
        rows = load_data(task)["train"].rows
        assert [task.labels_of(row) for row in rows] == [["bad"], ["good"]] * 2


def test_numbers_of_all_sets_have_one_format(tmp_path: Path) -> None:
    comma = {"delimiter": ";", "decimal": ",", "thousands": "."}
    write(tmp_path, b=[{"text": "b", "label": "0,25"}])
    (tmp_path / "a.csv").write_text("text;label\none;1.234\ntwo;0,5\n", encoding="utf-8")
    task = {"labels": None, "problem": "regression"}

    def mix(**form: str) -> dict[str, Any]:
        return {"a": {"path": "a.csv", "format": comma}, "b": {"path": "b.jsonl", "format": form}}

    made = task_of(recipe_of(tmp_path, mix(decimal=",", thousands="."), task=task))
    labels = [example["labels"] for example in load_data(made)["train"].examples]
    assert labels == [1234.0, 0.5, 0.25]
    with pytest.raises(LoraError, match="the sets write numbers in several ways"):
        recipe_of(tmp_path, mix(), task=task)
    assert recipe_of(tmp_path, mix())  # tasks with labels do not parse numbers


@pytest.mark.parametrize("kind", ["jsonl", "folder"])
def test_columns_are_read_by_other_names(tmp_path: Path, kind: str) -> None:
    rows = [{"a": "one", "text": "two", "label": "bad"}, {"a": "x", "text": "y", "label": "good"}]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", train=rows)
    source = {"path": "set/train.jsonl"} if kind == "jsonl" else {"name": "./set"}
    base = tiny.save_encoder(tmp_path / "base", layers=1)
    data = {**source, "columns": {"a": "text", "text": "a"}}
    found = load_rows(load_recipe(tiny.recipe(base, tmp_path, data=data)))["train"]
    assert [row["text"] for row in found] == ["one", "x"]
    assert [row["a"] for row in found] == ["two", "y"]


# ------------------------------------------------------------------------------------ the shares


def test_weights_are_the_shares_of_an_epoch(
    tmp_path: Path, two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"epochs": 2, "micro_batch_size": 3, "log_every_steps": 9}
    recipe = recipe_of(
        tmp_path, weighted(two, a=1, b=2), train={**steps, "max_steps": None},
        evaluate={"every_steps": 5, "baseline": False}, checkpoint={"every_steps": 4},
    )  # fmt: skip
    out = tmp_path / "out"
    report = train(recipe)
    drawn = [row for line in lines(out / "samples.jsonl") for row in line["examples"]]
    for epoch in (drawn[:18], drawn[18:]):
        assert Counter("ab"[row >= 12] for row in epoch) == {"a": 6, "b": 12}
    assert sorted(drawn) == sorted([*range(12), *4 * list(range(12, 18))])
    facts = report["data"]["train"]
    assert facts["sets"]["b"]["rows"] == 6
    assert facts["shares"] == {"a": 6 / 18, "b": 12 / 18}
    assert (out / "report.html").read_text().count("66.7 % of an epoch") == 1
    # an interrupted and resumed run has the same result
    other = recipe.with_values({"output_dir": str(tmp_path / "other")})
    whole = StepLog._write_line

    def stop(this: StepLog, rate: float) -> None:
        whole(this, rate)
        if this.state.step == 9:
            raise Stopped

    monkeypatch.setattr(StepLog, "_write_line", stop)
    with pytest.raises(Stopped):
        train(other)
    monkeypatch.setattr(StepLog, "_write_line", whole)
    train(other, resume=True)
    assert_same_run(out, tmp_path / "other")


def test_packs_contain_one_set_if_sets_have_weights(tmp_path: Path) -> None:
    write(tmp_path, a=rows_of("a", 40), b=rows_of("b", 9))
    mix = {"a": {"path": "a.jsonl"}, "b": {"path": "b.jsonl"}}
    for weights in ({}, {"a": 1, "b": 1}):
        base = tiny.save_llama(tmp_path / "llama")
        path = tiny.recipe(
            base, tmp_path, data={"mix": weighted(mix, **weights) if weights else mix},
            task={"max_length": 64}, train={"packing": True},
        )  # fmt: skip
        task = task_of(load_recipe(path))
        split = load_data(task)["train"]
        packed = task.packed(split)
        assert sorted(m for pack in packed.packs for m in pack) == list(range(49))
        sets = [{split.rows.set_of(i) for i in pack} for pack in packed.packs]
        assert any(len(found) == 2 for found in sets) is (not weights)
        mixture = mixture_of(task.recipe, split, packed)
        if weights:
            assert mixture is not None
            assert abs(mixture.quotas[0] - mixture.quotas[1]) <= 1
            assert sum(mixture.quotas) == len(packed)
        else:
            assert mixture is None


# ----------------------------------------------------------------------------------- the metrics


def test_metrics_of_a_set_are_those_of_its_rows(tmp_path: Path, two: dict[str, Any]) -> None:
    sections: dict[str, Any] = {"evaluate": {"metrics": ["accuracy", "f1"], "micro_batch_size": 2}}
    task = task_of(recipe_of(tmp_path, two, **sections))
    model = task.load_model(torch.device("cpu"))[0]
    split = load_data(task)["validation"]
    file = tmp_path / "predictions.jsonl"
    found = evaluate(model, task, split, Accelerator(cpu=True), file)
    for name in "ab":
        alone = task_of(recipe_of(tmp_path, {name: two[name]}, **sections))
        encoded = load_data(alone)["validation"]
        single = evaluate(model, alone, encoded, Accelerator(cpu=True))
        for metric in ("loss", "accuracy", "f1"):
            assert found[f"{name}/{metric}"] == pytest.approx(single[metric], rel=1e-6)
    assert found["accuracy"] == pytest.approx(
        (5 * found["a/accuracy"] + 4 * found["b/accuracy"]) / 9
    )
    assert [line["set"] for line in lines(file)] == ["a"] * 5 + ["b"] * 4


def test_a_metric_is_only_omitted_for_sets_without_references(
    tmp_path: Path, two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, a set of plain texts next to a set of questions with answers."""
    predict = evaluate_split._predict_window

    def without_labels(*args: Any) -> list[Prediction]:
        predictions = predict(*args)
        for one in predictions:
            if args[2].rows.set_of(one.row) == "b":
                one.metric_inputs.clear()
        return predictions

    monkeypatch.setattr(evaluate_split, "_predict_window", without_labels)
    task = task_of(recipe_of(tmp_path, two, evaluate={"metrics": ["accuracy"]}))
    model = task.load_model(torch.device("cpu"))[0]
    found = evaluate(model, task, load_data(task)["validation"], Accelerator(cpu=True))
    assert found.keys() == {"loss", "accuracy", "a/loss", "a/accuracy", "b/loss"}
    assert found["accuracy"] == found["a/accuracy"]


def test_the_metric_of_a_set_selects_the_best_adapter(tmp_path: Path, two: dict[str, Any]) -> None:
    recipe = recipe_of(
        tmp_path, two, train={"max_steps": 4, "micro_batch_size": 4},
        evaluate={"best": {"metric": "b/accuracy"}, "every_steps": 1},
    )  # fmt: skip
    assert best_by(recipe, task_of(recipe)) == ("b/accuracy", "max")
    report = train(recipe)
    log = [line["validation"]["b/accuracy"] for line in lines(tmp_path / "out/metrics.jsonl")
           if line.get("step") and "validation" in line]  # fmt: skip
    assert report["best"]["value"] == max(log)
    assert report["best"]["step"] == 1 + log.index(max(log))
    page = (tmp_path / "out/report.html").read_text()
    assert "validation rows of the set b" in page
    assert "train: <" in page  # a line of the table for each set
    measured = evaluate_adapter(tmp_path / "out", load_recipe(tmp_path / "out/recipe.yaml"))
    after = report["metrics"]["after"]["validation"]
    assert measured["validation"] == pytest.approx(after)
    out = tmp_path / "out"
    found = compare(out, out, load_recipe(out / "recipe.yaml"))
    assert (found.metric, found.rows, found.difference) == ("b/accuracy", 4, 0.0)
    assert found.new == pytest.approx(after["b/accuracy"])
    of_loss = compare(out, out, load_recipe(out / "recipe.yaml"), "a/loss")
    assert (of_loss.rows, of_loss.new) == (5, pytest.approx(after["a/loss"]))


# ------------------------------------------------------------------------------------ the checks


def test_a_leak_of_one_set_into_anothers_validation_is_found(
    tmp_path: Path, two: dict[str, Any]
) -> None:
    leaked = [{"said": row["text"], "is": row["label"]} for row in rows_of("a", 2)]
    write(tmp_path, b_dev=[*leaked, {"said": "another", "is": "bad"}], a_dev=rows_of("d", 40))
    recipe = recipe_of(tmp_path, two)
    # 2 of 43 rows are allowed, but they are 2 of the 3 of their set
    with pytest.raises(LoraError, match="2 of 3 validation rows of the set `b`") as caught:
        inspect_data(recipe)
    (problem,) = caught.value.problems
    assert str(problem.at).startswith("data.mix.b.validation (")
    assert "b_dev.jsonl:1 (set b)" in problem.what
    assert "a.jsonl:1 (set a)" in problem.what


def test_rows_of_each_set_are_counted_and_shown(
    tmp_path: Path, two: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    task, data = inspect_data(recipe_of(tmp_path, weighted(two, a=3, b=1)))
    table = capsys.readouterr().err
    rows = {" ".join(line.split()) for line in table.splitlines()}
    assert {"rows 18 9", "rows of a 12 (66.7 %) 5 (55.6 %)", "b in an epoch 22.2 %"} <= rows
    assert "75.0 %" not in table  # 18 examples: 14 and 4
    assert "77.8 %" in table
    shown = list(shown_rows(task, data, 1, colour=False))
    places = [text.splitlines()[0] for text in shown]
    assert [place.split("  ")[1] for place in places] == [
        "a.jsonl:1 (set a)", "b.jsonl:1 (set b)", "a_dev.jsonl:1 (set a)", "b_dev.jsonl:1 (set b)",
    ]  # fmt: skip


def test_every_wrong_row_is_named_with_its_set(tmp_path: Path, two: dict[str, Any]) -> None:
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{\n")
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("[]\n")
    with pytest.raises(LoraError) as caught:
        check_recipe(recipe_of(tmp_path, two))
    assert [problem.at for problem in caught.value.problems] == [
        "a.jsonl:13 (set a)", "b.jsonl:7 (set b)",
    ]  # fmt: skip
