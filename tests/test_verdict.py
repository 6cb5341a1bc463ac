"""What the report says of a run, against intervals that others compute."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lora_cli.reporting.report import trained_rows
from lora_cli.reporting.verdict import verdict


def report_of(metric: str, before: float, after: float, rows: int, **facts: Any) -> dict[str, Any]:
    return {
        "metrics": {"before": {"test": {metric: before}}, "after": {"test": {metric: after}}},
        "best": {"metric": metric},
        "data": {"test": {"rows": rows, **facts}},
    }


@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "f1"])
@pytest.mark.parametrize(
    ("before", "after", "rows", "head"),
    [
        (0.0, 1.0, 1, "Too few rows to tell."),
        (0.0, 1.0, 2, "Too few rows to tell."),
        (0.5, 1.0, 4, "Too few rows to tell."),
        (0.5, 0.7, 20, "Too few rows to tell."),
        (0.0, 0.0, 6, "Too few rows to tell."),
        (0.1, 0.9, 20, "It learned."),
        (0.80, 0.82, 1000, "No clear change."),
        (0.80, 0.88, 1000, "It learned."),
        (0.88, 0.80, 1000, "It got worse."),
        (0.5, 0.5, 1000, "It did not learn."),
    ],
)
def test_a_share_is_judged_by_its_rows(
    metric: str, before: float, after: float, rows: int, head: str
) -> None:
    told = verdict(report_of(metric, before, after, rows), "test")
    assert told.head == head
    assert (told.tone == "unknown") == (head == "Too few rows to tell.")
    if head in ("It learned.", "It got worse."):  # no exact test of two samples would doubt it
        table = [[round(share * rows), rows - round(share * rows)] for share in (before, after)]
        assert stats.fisher_exact(table).pvalue < 0.05


def test_rows_that_left_nothing_are_not_counted() -> None:
    told = verdict(report_of("accuracy", 0.2, 0.8, 1000, rows_without_example=995), "test")
    assert told.head == "Too few rows to tell."
    assert "On the 5 test rows" in told.text
    assert trained_rows({"rows": 97, "rows_without_example": 78}) == "19 of 97 rows"
    assert trained_rows({"rows": 97, "rows_without_example": 0}) == "97 rows"


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_a_loss_is_judged_by_the_rows_losses(metric: str) -> None:
    rng = np.random.default_rng(0)
    for rows in (3, 40, 4000):
        losses = rng.normal(2.0, 0.5, rows)
        lines = [{"row": i, "loss": 4 * x, "n_items": 4} for i, x in enumerate(losses)]
        mean = float(losses.mean())
        half = math.sqrt(2) * float(stats.sem(losses)) * stats.t.ppf(0.975, rows - 1)
        for share, clear in ((0.9, False), (1.1, True)):
            values = [mean + share * half, mean]
            if metric == "perplexity":
                values = [math.exp(value) for value in values]
            told = verdict(report_of(metric, *values, rows), "test", (), lines)
            unclear = "Too few rows to tell." if rows < 100 else "No clear change."
            assert told.head == ("It learned." if clear else unclear), (rows, share)


def test_a_correlation_and_a_metric_of_another_kind() -> None:
    assert verdict(report_of("pearson", 0.1, 0.9, 3), "test").head == "Too few rows to tell."
    assert verdict(report_of("pearson", 0.1, 0.9, 10), "test").head == "It learned."
    assert verdict(report_of("pearson", 0.5, 0.6, 50), "test").head == "Too few rows to tell."
    assert verdict(report_of("bleu", 1.0, 40.0, 5), "test").head == "Too few rows to tell."
    assert verdict(report_of("bleu", 1.0, 40.0, 50), "test").head == "It learned."


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [(20.0, 30.0, "(+50 %)"), (0.05, 50.25, "(+50.2)"), (0.0, 12.5, "(from zero)")],
)
def test_a_change_is_a_percentage_where_that_says_something(
    before: float, after: float, change: str
) -> None:
    assert change in verdict(report_of("bleu", before, after, 1000), "test").text


@pytest.mark.parametrize(
    ("metric", "change"),
    [("mel_l1", "26 %"), ("math/loss", "26 %"), ("own_error", "26 %"), ("own_share", "7.8 points")],
)
def test_an_error_changes_in_percent_and_a_share_in_points(metric: str, change: str) -> None:
    report = report_of(metric, 0.2965, 0.2189, 1000)
    report["best"]["mode"] = "max" if metric == "own_share" else "min"
    assert f"(\N{MINUS SIGN}{change})" in verdict(report, "test").text
