"""Precision, recall and F1 are scikit-learn's, and need not import it."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from lora_cli.metrics.builtin import SPECS, MetricContext
from lora_cli.metrics.class_scores import class_scores

SCORES = ("precision", "recall", "f1")


@pytest.mark.parametrize("average", ["binary", "macro", "micro", "weighted"])
@pytest.mark.parametrize("seed", range(6))
def test_they_are_those_of_scikit_learn(seed: int, average: str) -> None:
    random = np.random.default_rng(seed)
    n_classes = 2 if average == "binary" else 6
    r = random.integers(0, n_classes, 40)
    if seed % 2:
        r[r == 0] = n_classes - 1  # a class that is predicted and never right
    p = np.where(random.random(40) < 0.4, r, random.integers(0, n_classes, 40))
    p[p == seed % 5 + 1] = 0  # one that is right and never predicted
    labels = [1] if average == "binary" else None
    how = "macro" if average == "binary" else average
    wanted = precision_recall_fscore_support(r, p, labels=labels, average=how, zero_division=0)
    for score, value in zip(SCORES, wanted, strict=False):
        assert class_scores(p.tolist(), r.tolist(), score, average) == pytest.approx(
            value, rel=1e-12
        )


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_they_are_those_of_scikit_learn_where_rows_have_several_labels(
    share: float, average: str
) -> None:
    random = np.random.default_rng(0)
    r, p = ((random.random((30, 4)) < share).astype(int) for _ in range(2))
    r[:, 2] = 0
    wanted = precision_recall_fscore_support(r, p, average=average, zero_division=0)
    for score, value in zip(SCORES, wanted, strict=False):
        assert class_scores(p.tolist(), r.tolist(), score, average) == pytest.approx(
            value, rel=1e-12
        )
    accuracy = SPECS["accuracy"].compute(p.tolist(), r.tolist(), MetricContext(multi_label=True))
    assert accuracy == accuracy_score(r, p)


def test_one_row_and_one_class() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for average in ("macro", "micro", "weighted"):
            assert class_scores([3], [3], "f1", average) == 1.0
            assert class_scores([3], [4], "f1", average) == 0.0
        assert class_scores([0], [0], "f1", "binary") == 0.0


def test_the_usual_metrics_import_neither_scikit_learn_nor_evaluate() -> None:
    code = """if True:
        import sys
        from lora_cli.metrics.metric_set import MetricSet
        found = MetricSet(["accuracy", "f1"], "label")
        found.add_batch("label", [0, 1, 2], [0, 1, 1])
        print(found.compute()["accuracy"])
        print(sorted({"sklearn", "evaluate", "datasets", "pandas", "torch"} & sys.modules.keys()))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [str(2 / 3), "[]"]
