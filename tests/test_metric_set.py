"""Tests of `MetricSet`: batches, rows per channel, and metrics that are not built in."""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import LoraError
from lora_cli.metrics import MetricContext, MetricSet

evaluate = pytest.importorskip("evaluate")
BINARY = MetricContext(n_labels=2)


class ExternalMetric:
    """A metric that is not built in, and records its batches."""

    features: Any = {"predictions": None, "references": None}

    def __init__(self) -> None:
        self.batches: list[tuple[list[Any], list[Any]]] = []

    def add_batch(self, predictions: list[Any], references: list[Any]) -> None:
        self.batches.append((predictions, references))

    def compute(self) -> dict[str, float]:
        return {"batches": len(self.batches)}


@pytest.fixture
def external_metric(monkeypatch: pytest.MonkeyPatch) -> ExternalMetric:
    metric = ExternalMetric()
    monkeypatch.setattr(evaluate, "load", lambda name, **_: metric)
    return metric


@pytest.mark.parametrize("several", [False, True])
def test_external_metrics_get_texts_in_the_task_s_form(
    several: bool, external_metric: ExternalMetric
) -> None:
    context = MetricContext(several_references=several)
    metrics = MetricSet(["meteor", "exact_match"], "text", context)
    metrics.add_batch("text", ["a", "b"], ["c", "b"])
    expected = [["c"], ["b"]] if several else ["c", "b"]
    assert external_metric.batches == [(["a", "b"], expected)]
    assert metrics.compute() == {"batches": 1.0, "exact_match": 0.5}


def test_nll_sums_are_not_rounded() -> None:
    metrics = MetricSet(["perplexity"], "nll")
    metrics.add_batch("nll", [1.5, 0.25], [3, 4])
    assert metrics.compute()["perplexity"] == pytest.approx(math.exp(1.75 / 7))


def test_other_channels_and_empty_batches_are_ignored() -> None:
    metrics = MetricSet(["accuracy"], "label", BINARY)
    metrics.add_batch("label", [], [])
    metrics.add_batch("value", [object()], [object()])
    assert metrics.without_rows == ["accuracy"]
    metrics.add_batch("label", [1], [1])
    assert metrics.without_rows == []
    assert metrics.compute() == {"accuracy": 1.0}
    assert metrics.without_rows == ["accuracy"]


def test_metrics_without_rows_may_be_left_out() -> None:
    metrics = MetricSet(["perplexity", "exact_match"], "text", may_lack_rows=True)
    metrics.add_batch("nll", [2.0], [2])
    assert metrics.compute() == pytest.approx({"perplexity": math.e})
    metrics.add_batch("text", ["a"], ["a"])
    assert metrics.compute() == {"exact_match": 1.0}


def test_the_first_of_several_feature_sets_counts(external_metric: ExternalMetric) -> None:
    usable, unusable = ExternalMetric.features, {"sources": None, "predictions": None}
    external_metric.features = [usable, unusable]
    assert MetricSet(["meteor"], "text").channels == {"text"}
    external_metric.features = [unusable, usable]
    with pytest.raises(LoraError, match="expects sources, predictions; a task yields"):
        MetricSet(["meteor"], "text")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("meteor", FileNotFoundError("none"), "unknown metric `meteor`: it is not built in"),
        ("meteor", ImportError("no nltk\nat all"), "`meteor` cannot be loaded: ImportError: no nl"),
        ("meteor", OSError(), "`meteor` cannot be loaded: OSError"),
        ("./m.py", FileNotFoundError("w.txt"), "`./m.py` cannot be loaded: FileNotFoundError: w.t"),
    ],
)
def test_loading_errors_name_the_metric_and_the_reason(
    name: str, error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text("")
    monkeypatch.setattr(evaluate, "load", load)
    with pytest.raises(LoraError) as caught:
        MetricSet([name], "text")
    (problem,) = caught.value.problems
    assert message in problem.what


def test_a_missing_scratch_folder_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    metrics = MetricSet(["accuracy"], "label", BINARY)
    (folder,) = tmp_path.iterdir()
    shutil.rmtree(folder)
    del metrics
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_rows_of_each_channel_are_stored_losslessly() -> None:
    for name, channel, predictions, references, context, expected in (
        ("f1", "tags", [["B-A", "O"]], [["B-A", "B-A"]], MetricContext(), 2 / 3),
        ("mrr_at_10", "ranks", [[2, 3], []], [2, 1], MetricContext(), 1 / 4),
        ("map", "boxes", [[(0.0, 0.0, 9.5, 9.5, 0.5, 0)]], [[(0.0, 0.0, 9.5, 9.5, 0, 0)]],
         MetricContext(labels=("a",)), 1.0),
        ("recall_micro", "label", [[1, 0, 1]], [[1, 1, 0]], MetricContext(3, True), 0.5),
    ):  # fmt: skip
        metric = {"tags": "seqeval", "ranks": "retrieval", "boxes": "coco"}.get(channel, name)
        metrics = MetricSet([metric], channel, context)  # type: ignore[arg-type]
        metrics.add_batch(channel, predictions, references)  # type: ignore[arg-type]
        assert metrics.compute()[name] == pytest.approx(expected)
