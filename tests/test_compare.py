from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

from lora_cli.adapters.attach import attach
from lora_cli.adapters.peft_format.adapter_folder import save_adapter
from lora_cli.cli.app import app
from lora_cli.errors import LoraError, RegressionError
from lora_cli.evaluation import compare as comparison
from lora_cli.evaluation.compare import Comparison, bootstrap, compare, row_sums
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.recipe import Recipe, dump_recipe, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.examples import Prediction

TEXTS = [" ".join(["great fun", "slow", "a plot"][: 1 + i % 3] * (1 + i % 5)) for i in range(23)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("base"))


def recipe_of(base: Path, tmp_path: Path, **sections: Any) -> Recipe:
    for name in ("train", "dev"):
        rows = [{"text": text, "label": i % 3 % 2, "more": "x"} for i, text in enumerate(TEXTS)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    sections = {"data": {"path": "train.jsonl", "validation": "dev.jsonl"}, **sections}
    return load_recipe(tiny.recipe(base, tmp_path, **sections))


def adapter(recipe: Recipe, folder: Path, seed: int) -> Path:
    """Write a folder as training would, with random weights."""
    torch.manual_seed(seed)
    task = build_task(recipe)
    task.load_processor()
    model, new = task.load_model(torch.device("cpu"))
    attach(model, recipe, new)
    tiny.wake(model)
    folder.mkdir()
    if recipe.adapter.type == "full":
        model.save_pretrained(folder)  # type: ignore[operator]
        task.tokenizer.save_pretrained(folder)
    else:
        save_adapter(folder, model, recipe, new)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "100", "TERM": "dumb"})


# ----------------------------------------------------------------------------------- bootstrap


LOSS = {"loss": (0.0, 1.0)}


def rows_of(rights: list[bool]) -> list[Prediction]:
    return [
        Prediction(i, None, None, None, {"label": (int(right), 1)}, LOSS)
        for i, right in enumerate(rights)
    ]


def test_the_interval_is_that_of_paired_differences() -> None:
    generator = np.random.default_rng(3)
    old = (generator.random(400) < 0.8).tolist()
    new = [not right if i % 20 == 0 else right for i, right in enumerate(old)]
    task = build_task(tiny.recipe_of())
    theirs, ours, differences = bootstrap("accuracy", task, rows_of(old), rows_of(new))
    assert (theirs, ours) == (pytest.approx(np.mean(old)), pytest.approx(np.mean(new)))
    assert len(differences) == 10_000
    per_row = np.subtract(new, old, dtype=float)
    assert differences.mean() == pytest.approx(per_row.mean(), abs=2e-3)
    # of paired rows: with independent resamples it would be four times as wide
    assert differences.std() == pytest.approx(per_row.std() / 20, rel=0.05)
    again = bootstrap("accuracy", task, rows_of(old), rows_of(new))[2]
    assert np.array_equal(differences, again)


def test_batches_of_resamples_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, old, new = build_task(tiny.recipe_of()), rows_of([True, False] * 30), rows_of([True] * 60)
    whole = bootstrap("accuracy", task, old, new)[2]
    monkeypatch.setattr(comparison, "MAX_COUNTS", 100)
    assert np.array_equal(bootstrap("accuracy", task, old, new)[2], whole)


def test_examples_of_one_row_are_resampled_together() -> None:
    examples = [
        Prediction(row, None, None, None, {"nll": (2.0 * n, n)}, {"loss": (2.0 * n, n)})
        for row, n in ((4, 3), (4, 5), (7, 1))
    ]
    for metric in ("loss", "perplexity"):
        sums = row_sums(metric, examples)
        assert sums is not None
        assert sums.tolist() == [[16.0, 8.0], [2.0, 1.0]]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("metric", ["f1", "matthews_correlation", "balanced_accuracy"])
def test_metrics_that_are_not_sums_are_recomputed(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert comparison.FEWER_RESAMPLES == 1000
    monkeypatch.setattr(comparison, "FEWER_RESAMPLES", 50)
    recipe = tiny.recipe_of().with_values({"task.labels": ["bad", "good"]})
    task = build_task(recipe)
    reference = np.random.default_rng(0).integers(0, 2, 60).tolist()

    def predicted(wrong: int) -> list[Prediction]:
        return [
            Prediction(i, None, None, None,
                       {"label": (1 - want if i % wrong == 0 else want, want)}, LOSS)
            for i, want in enumerate(reference)
        ]  # fmt: skip

    theirs, ours, differences = bootstrap(metric, task, predicted(5), predicted(3))
    assert theirs > ours
    assert len(differences) == 50
    chance = float(differences.std()) / 50**0.5  # standard error of the mean
    assert differences.mean() == pytest.approx(ours - theirs, abs=5 * chance)
    assert 0.03 < differences.std() < 0.25


def test_errors_are_means_over_rows() -> None:
    recipe = tiny.recipe_of().with_values({"task.problem": "regression"})
    values = [(0.5, 1.0), (2.0, -1.0)]
    rows = [Prediction(i, None, None, None, {"value": pair}, LOSS) for i, pair in enumerate(values)]
    task = build_task(recipe)
    for metric, wanted in (("mse", 4.625), ("mae", 1.75), ("rmse", 4.625**0.5)):
        assert bootstrap(metric, task, rows, rows)[0] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("mode", "old", "new", "interval", "worse", "words"),
    [
        ("max", 0.9, 0.89, (-0.02, -0.001), True, "worse by 0.0100, more than the 0.005"),
        ("max", 0.9, 0.89, (-0.02, -0.001), True, "outside the 95 % interval"),
        ("max", 0.9, 0.896, (-0.02, 0.01), False, "within the 0.005 that is allowed"),
        ("max", 0.9, 0.896, (-0.02, 0.01), False, "on 10 rows that may be chance"),
        ("max", 0.9, 0.95, (0.01, 0.09), False, "better by 0.0500; zero is outside"),
        ("min", 0.9, 0.95, (0.01, 0.09), True, "worse by 0.0500"),
        ("min", 0.9, 0.9, (0.0, 0.0), False, "equal to the old one"),
        ("min", 2.0, 2.0 + 6e-8, (1e-8, 1e-7), False, "equal to the old one, but for rounding"),
        ("max", 0.9, 0.900001, (1e-7, 1e-5), False, "better by 0.0000; zero is outside"),
        ("min", 0.9, float("nan"), (0.0, 0.0), True, "worse"),
    ],
)
def test_the_verdict(
    mode: str, old: float, new: float, interval: Any, worse: bool, words: str
) -> None:
    found = Comparison("test", "m", mode, 10, old, new, new - old, interval, 9, 0.005)
    assert found.worse is worse
    assert words in found.verdict


# ----------------------------------------------------------------------------------- whole folders


@pytest.mark.parametrize(
    ("kinds", "metric"),
    [(("lora", "lora"), None), (("lora", "full"), "loss"), (("full", "lora"), "f1")],
)
@pytest.mark.slow
def test_both_adapters_are_measured_as_by_eval(
    base: Path, tmp_path: Path, kinds: tuple[str, str], metric: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(comparison, "FEWER_RESAMPLES", 100)
    folders, wanted = [], []
    for seed, kind in enumerate(kinds):
        task = {"labels": ["0", "1"], "class_weights": {"0": 3.0}}
        recipe = recipe_of(base, tmp_path, task=task, adapter={"type": kind})
        folders.append(adapter(recipe, tmp_path / f"a{seed}", seed))
        of = load_recipe(folders[-1] / "recipe.yaml")
        wanted.append(evaluate_adapter(folders[-1], of)["validation"])
    recipe = load_recipe(folders[0] / "recipe.yaml")
    found = compare(folders[0], folders[1], recipe, metric)
    name = metric or "accuracy"
    assert (found.metric, found.split, found.rows) == (name, "validation", 23)
    assert found.new == pytest.approx(wanted[0][name], rel=1e-5)
    assert found.old == pytest.approx(wanted[1][name], rel=1e-5)
    assert wanted[0]["loss"] != pytest.approx(wanted[1]["loss"])
    low, high = found.interval
    assert low <= found.difference <= high


@pytest.mark.slow
def test_the_command_prints_old_new_and_verdict(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path)
    a, b = (str(adapter(recipe, tmp_path / f"a{i}", i)) for i in (0, 1))
    options = ("--metric", "loss", "--max-drop", "0", "--json")
    results = [run("--adapter", x, "--against", y, *options) for x, y in ((a, b), (b, a))]
    facts = [json.loads(result.stdout) for result in results]
    assert facts[0]["difference"] == pytest.approx(-facts[1]["difference"])
    assert sorted(fact["worse"] for fact in facts) == [False, True]
    for fact, result in zip(facts, results, strict=True):
        error = result.exception
        assert isinstance(error, RegressionError) if fact["worse"] else error is None
        assert fact["metric"] == "loss"
    assert RegressionError.exit_code == 6
    result = run("--adapter", a, "--against", b, "--max-drop", "100")
    assert result.exception is None
    old, new, header, row, definition, interval, verdict = result.stdout.splitlines()
    assert definition == "accuracy: share of rows whose label is right"
    assert (old, new) == (f"old  {b}", f"new  {a}")
    assert header.split()[-6:] == ["old", "new", "difference", "95", "%", "interval"]
    assert row.split()[0] == "accuracy"
    assert "10,000 resamples" in interval
    assert verdict.startswith("verdict: the new adapter is ")
    same = run("--adapter", a, "--against", a, "--max-drop", "0")
    assert same.exception is None
    assert "equal to the old one" in same.stdout


@pytest.mark.slow_after(3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "nowhere"], "there is no folder nowhere"),
        (["--metric", "f1"], "`--metric` needs `--against`"),
        (["--input", "dev.jsonl", "--split", "train"], "exclude each other"),
        (["--against", "a", "--split", "test"], "no split `test`"),
        (["--against", "a", "--metric", "acuracy"], "did you mean `accuracy`"),
        (["--against", "a", "--metric", "bleu"], "this task yields labels"),
        (["--against", "labels"], "`task.labels` is"),
        (["--against", "base"], "was trained on `/elsewhere`"),
    ],
)
def test_incomparable_adapters_are_rejected(
    base: Path, tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(base, tmp_path)
    adapter(recipe, tmp_path / "a", 0)
    for name, change in (
        ("labels", ("- bad\n  - good", "- good\n  - bad")),
        ("base", (str(base), "/elsewhere")),
    ):
        (tmp_path / name).mkdir()
        text = dump_recipe(recipe)
        assert change[0] in text
        (tmp_path / name / "recipe.yaml").write_text(text.replace(*change))
    result = run("--adapter", "a", *arguments)
    assert isinstance(result.exception, LoraError)
    assert message in str(result.exception)


# ----------------------------------------------------------------------------------- --input


@pytest.mark.slow
def test_another_file_is_measured_without_the_other_splits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(base, tmp_path)
    folder = adapter(recipe, tmp_path / "a", 0)
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(tiny.CORPUS)]
    other = tmp_path / "other.csv"
    other.write_text(
        "label,text\n" + "".join(f'{r["label"]},"{r["text"]}"\n' for r in rows), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    wanted = run("--adapter", "a", "--set", "data.test=other.csv", "--split", "test", "--json")
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).unlink()
    found = run("--adapter", "a", "--input", "other.csv", "--json")
    assert json.loads(found.stdout) == json.loads(wanted.stdout)
    assert list(json.loads(found.stdout)) == ["test", "metric_definitions"]
    compared = run("--adapter", "a", "--against", "a", "--input", "other.csv", "--json")
    assert json.loads(compared.stdout)["rows"] == 8
    missing = run("--adapter", str(folder), "--input", "nowhere.csv")
    assert "there is no file nowhere.csv" in str(missing.exception)


def test_a_file_replaces_a_data_set_of_the_hub(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path, data={"name": "user/set", "validation": "validation"})
    folder = adapter(recipe, tmp_path / "a", 0)
    found = run("--adapter", str(folder), "--input", str(tmp_path / "dev.jsonl"), "--json")
    assert found.exception is None
    recipe = recipe.with_values({"task.labels": None})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    found = run("--adapter", str(folder), "--input", str(tmp_path / "dev.jsonl"))
    assert "the labels are not known" in str(found.exception)
