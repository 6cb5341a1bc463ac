from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.reporting.html_page import _against_baselines
from lora_cli.tasks import build_task
from lora_cli.training import baselines, train
from lora_cli.training import run as training_run
from lora_cli.training.baselines import majority, verdict


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("base"))


def recipe_file(base: Path, tmp_path: Path, labels: Any = None, **sections: Any) -> Path:
    """Write a recipe whose train labels are 1, 0, 1, 1, 0 …, so that 1 is the most common."""
    for name, first in (("train", 0), ("dev", 3), ("test", 5)):
        rows = [
            {"text": f"{text} {name}", "label": labels(i + first) if labels else int(i % 3 != 1)}
            for i, text in enumerate(tiny.CORPUS)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    data = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}
    return tiny.recipe(base, tmp_path, data=data, **sections)


def counted(base: Path, tmp_path: Path, labels: Any = None, **sections: Any) -> Any:
    task = build_task(load_recipe(recipe_file(base, tmp_path, labels, **sections)))
    task.load_processor()
    return majority(task, load_data(task))


def test_the_majority_is_the_most_common_label_of_train(base: Path, tmp_path: Path) -> None:
    found = counted(base, tmp_path)
    assert found["validation"] == {"accuracy": 5 / 8, "f1": pytest.approx(10 / 13)}
    assert list(found) == ["validation", "test"]


def test_the_majority_of_numbers_is_their_mean(base: Path, tmp_path: Path) -> None:
    task = {"labels": None, "problem": "regression"}
    evaluate = {"metrics": ["mse", "pearson"]}
    found = counted(base, tmp_path, lambda i: 0.5 * i, task=task, evaluate=evaluate)
    # the mean of train is 1.75; the values of validation are 1.5 larger
    assert found["validation"]["mse"] == pytest.approx(0.25 * 63 / 12 + 1.5**2)
    assert found["validation"]["pearson"] != found["validation"]["pearson"]


def test_the_majority_of_multiple_labels_is_taken_per_label(base: Path, tmp_path: Path) -> None:
    task = {"labels": ["a", "b", "c"], "problem": "multi_label"}
    found = counted(
        base, tmp_path, lambda i: ["a", *(["b"] if i % 4 == 0 else [])], task=task,
        evaluate={"metrics": ["accuracy", "f1_micro"]},
    )  # fmt: skip
    assert found["validation"]["accuracy"] == 6 / 8


def test_all_baselines_are_measured_and_shown(base: Path, tmp_path: Path) -> None:
    names = ["majority", "none", "base"]
    path = recipe_file(base, tmp_path, evaluate={"baselines": names}, train={"max_steps": 3})
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exception is None
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["baselines"]) == names
    assert report["baselines"]["base"] == report["metrics"]["before"]
    head = tmp_path / "out" / "baselines" / "none"
    alone = evaluate_adapter(head, load_recipe(head / "recipe.yaml"))
    for split in ("validation", "test"):
        assert report["baselines"]["none"][split] == pytest.approx(alone[split], rel=1e-5)
        assert report["baselines"]["majority"][split]["accuracy"] == 5 / 8
    lines = result.stdout.splitlines()
    assert max(map(len, lines[:9])) < 80  # the table
    header = [line.partition("  ")[0] for line in lines]
    for column in ("validation majority", "validation none", "validation before", "test after"):
        assert column in header
        assert column in (tmp_path / "out" / "README.md").read_text()
    assert report["verdict"]["words"] in result.stdout
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert report["verdict"]["passed"] is None  # 8 rows are too few
    assert "8 rows are too few to tell whether the adapter" in report["verdict"]["words"]
    assert "Too few rows to tell." in page
    assert "its baselines." not in page
    assert "head alone" in page
    assert json.loads((head / "report.json").read_text())["adapter"] == {"type": "none"}
    # the head is trained as by a separate recipe
    own = load_recipe(path, ["adapter.type=none", "evaluate.baselines=[]", "output_dir=own"])
    own = own.with_values({"output_dir": str(tmp_path / "own")})
    again = train(own)["metrics"]["after"]
    for split in ("validation", "test"):
        assert report["baselines"]["none"][split] == pytest.approx(again[split], rel=1e-5)


@pytest.mark.slow
def test_baselines_do_not_change_the_adapter_and_can_be_added_later(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(base, tmp_path)
    first = train(load_recipe(path))
    assert "baselines" not in first
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    more = load_recipe(path, ["evaluate.baselines=[none, majority]"])
    real = training_run.train

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(baselines, "_head_alone", stop)
        with pytest.raises(KeyboardInterrupt):
            train(more, resume=True)
    report = train(load_recipe(path, ["evaluate.baselines=[none, majority]"]), resume=True)
    assert list(report["baselines"]) == ["none", "majority"]
    assert report["metrics"] == first["metrics"]
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == weights
    assert training_run.train is real
    monkeypatch.setattr(baselines, "_measure", lambda *_: pytest.fail("measured already"))
    again = train(load_recipe(path, ["evaluate.baselines=[none, majority]"]), resume=True)
    assert again == report


NAN = float("nan")


@pytest.mark.parametrize(
    ("mode", "ours", "others", "passed", "words"),
    [
        ("max", 0.9, {"majority": 0.5, "none": 0.8}, True, "beats the head alone (`none`, 0.8000)"),
        ("max", 0.8, {"majority": 0.5, "none": 0.8}, False, "FAILS to beat the head alone"),
        ("max", 0.4, {"majority": 0.5}, False, "FAILS to beat the commonest answer"),
        ("min", 0.4, {"base": 0.5}, True, "beats the base"),
        ("min", 0.6, {"base": 0.5}, False, "FAILS"),
        ("max", 0.1, {"majority": NAN}, True, "beats"),
        ("max", 0.1, {"majority": None}, True, "beats"),
        ("max", NAN, {"majority": NAN}, False, "FAILS"),
    ],
)
def test_the_verdict(mode: str, ours: float, others: Any, passed: bool, words: str) -> None:
    for split in ("validation", "test"):
        report = {
            "metrics": {"after": {split: {"m": ours}}},
            "baselines": {name: {split: {"m": value}} for name, value in others.items()},
            "data": {split: {"rows": 30}},
        }
        found = verdict(report, "m", mode)
        assert found["passed"] is passed
        assert words in found["words"]
        assert found["words"].endswith(f"in m on {split}")


@pytest.mark.parametrize(
    ("metric", "ours", "other", "rows", "passed", "head"),
    [
        ("accuracy", 1.0, 0.5, 4, None, "Too few rows to tell."),
        ("accuracy", 0.0, 1.0, 2, None, "Too few rows to tell."),
        ("accuracy", 0.5, 0.5, 8, None, "Too few rows to tell."),
        ("f1", 0.7, 0.6, 50, None, "Too few rows to tell."),
        ("accuracy", 0.9, 0.1, 20, True, "Beats its baselines."),
        ("accuracy", 0.1, 0.9, 20, False, "Fails its baselines."),
        ("accuracy", 0.9, 0.8, 1000, True, "Beats its baselines."),
        ("accuracy", 0.82, 0.80, 1000, None, "No clear change."),
        ("accuracy", 0.80, 0.82, 1000, None, "No clear change."),
        ("pearson", 0.50, 0.52, 200, None, "No clear change."),
        ("accuracy", 0.80, 0.80, 1000, False, "Fails its baselines."),
        ("pearson", 0.9, 0.1, 3, None, "Too few rows to tell."),
        ("pearson", 0.9, NAN, 8, None, "Too few rows to tell."),
        ("bleu", 40.0, 1.0, 5, None, "Too few rows to tell."),
    ],
)
def test_few_rows_allow_no_verdict(
    metric: str, ours: float, other: float, rows: int, passed: Any, head: str
) -> None:
    report: dict[str, Any] = {
        "metrics": {"after": {"test": {metric: ours}}},
        "baselines": {"majority": {"test": {metric: other}}},
        "data": {"test": {"rows": rows}},
    }
    report["verdict"] = verdict(report, metric, "max")
    assert report["verdict"]["passed"] is passed
    assert head in _against_baselines(report)
    words = report["verdict"]["words"]
    assert (f"{rows} rows are too few" in words) == (head == "Too few rows to tell.")
    assert (f"no clear difference on {rows:,} rows" in words) == (head == "No clear change.")


def test_the_verdict_on_a_mean_loss_uses_the_losses_of_rows(tmp_path: Path) -> None:
    report: dict[str, Any] = {
        "metrics": {"after": {"test": {"loss": 1.0}}},
        "baselines": {"base": {"test": {"loss": 1.05}}},
        "data": {"test": {"rows": 200}},
    }
    assert verdict(report, "loss", "min")["passed"] is True  # their variance is unknown
    (tmp_path / "predictions").mkdir()
    for spread, passed in ((2.0, None), (0.01, True)):
        lines = [
            json.dumps({"row": i, "loss": 1.0 + spread * (-1) ** i, "n_items": 1})
            for i in range(200)
        ]
        (tmp_path / "predictions" / "test.jsonl").write_text("\n".join(lines))
        assert verdict(report, "loss", "min", tmp_path)["passed"] is passed


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["evaluate.baselines=[majorty]"], "majority"),
        (["evaluate.baselines=[base]", "evaluate.baseline=false"], "`evaluate.baseline: true`"),
        (["evaluate.baselines=[none]", "adapter.type=none"], "`adapter.type: none` trains"),
        (["evaluate.baselines=[majority]", "data.streaming=true"], "need all rows"),
        (["evaluate.baselines=[none]", "task={type: causal_lm}"], "`task.type: causal_lm`"),
        (["evaluate.baselines=[none]", "data={path: rows.jsonl}"], "held-out rows, and there are"),
    ],
)
def test_impossible_baselines_are_rejected(
    base: Path, tmp_path: Path, sets: list[str], message: str
) -> None:
    with pytest.raises(LoraError, match=message):
        load_recipe(recipe_file(base, tmp_path), sets)
