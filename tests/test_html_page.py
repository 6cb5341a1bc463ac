from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import html5lib
import numpy as np
import pytest
import tiny

from lora_cli.metrics import MetricContext, definition
from lora_cli.recipe import load_recipe
from lora_cli.reporting import page_analysis, page_plots, write_page
from lora_cli.reporting.page_elements import STYLE, esc
from lora_cli.reporting.verdict import verdict

HOSTILE = (
    "<script>alert('1')</script> & \"q\" 😀 \u202eשלמא http://evil.example/x.js \x00\x13\ud800"
)
NAN = float("nan")
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
Json = dict[str, Any]


class Page(HTMLParser):
    """Reads a page: its tags must be balanced; texts and attributes are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def write_lines(path: Path, lines: list[Json]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def page_of(
    folder: Path, report: Json, predictions: list[Json] = (), split: str = "test", log: Any = ()
) -> Page:
    """Write a run's folder and its page, and check what holds of every page."""
    write_lines(folder / "metrics.jsonl", list(log))
    write_lines(folder / "predictions" / f"{split}.jsonl", list(predictions))
    text = write_page(folder, report).read_text(encoding="utf-8")
    page = Page(text)
    outside = re.sub(r">[^<]*<", "><", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))
    outside = re.sub(r' (title|aria-label)="[^"]*"', "", outside)  # these are read, not fetched
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert not re.search(r"https?://|url\(|@import", outside + style)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("href", "src")]
    assert {link[1:] for link in links} <= set(page.ids)
    assert all(link.startswith("#") for link in links)
    assert len(set(page.ids)) == len(page.ids)
    assert "nan" not in re.findall(r"\b\w+\b", text.lower().split("</style>")[1])
    return page


def line_of(row: int, reference: Any, prediction: Any, scores: Json | None = None) -> Json:
    line = {"row": row, "place": f"t.csv:{row}", "text": f"text {row}", "reference": reference}
    line |= {"prediction": prediction, "loss": float(row), "n_items": 1}
    return line | ({"scores": scores} if scores is not None else {})


# a: 3 rows, 2 found; b: 1 row, found; a is called b once
LINES = [
    line_of(0, "a", "a", {"a": 0.95, "b": 0.05}),
    line_of(1, "a", "a", {"a": 0.65, "b": 0.35}),
    line_of(2, "a", "b", {"a": 0.35, "b": 0.65}),
    line_of(3, "b", "b", {"a": 0.0, "b": 1.0}),
]
REPORT: Json = {
    "lora_version": "0.1.0",
    "created": "2026-01-02T03:04:05+00:00",
    "command": "lora train recipe.yaml",
    "task": "sequence_classification",
    "base_model": "org/base",
    "adapter": {"type": "lora", "rank": 8, "target_modules": ["query", "value"]},
    "parameters": {"total": 1000, "trainable": 7, "trainable_percent": 0.7},
    "data": {
        "train": {
            "rows": 30,
            "source": "x/train.csv",
            "sha256": "ab",
            "labels": {"a": 10, "b": 20},
        },
        "test": {"rows": 4, "source": "x/t.csv", "sha256": "cd", "labels": {"a": 3, "b": 1}},
    },
    "metrics": {
        "before": {"test": {"loss": 1.0, "accuracy": 0.25}},
        "after": {"test": {"loss": 0.5, "accuracy": 0.75}},
    },
    "best": {"metric": "accuracy", "mode": "max", "value": 0.8, "step": 20},
    "training": {"steps": 40, "seconds": 95.1, "device": "cpu", "peak_memory_bytes": 3 * 2**30},
    "versions": {"python": "3.11.7"},
}


def report_of(**changes: Any) -> Json:
    return {**json.loads(json.dumps(REPORT)), **changes}


def log_of(validation: list[float], training: list[float], key: str = "accuracy") -> list[Json]:
    lines: list[Json] = []
    for i, loss in enumerate(validation):
        lines.append({"step": 10 * i, "validation": {"loss": loss, key: 1 - loss / 4}})
    for i, loss in enumerate(training, 1):
        lines.append({"step": i, "loss": loss, "learning_rate": 1e-4 / i, "grad_norm": 1.0})
    return lines


# ------------------------------------------------------------------------------------- numbers


def test_confusion_and_scores_of_labels_are_those_counted_by_hand() -> None:
    matrix = page_analysis.confusion(["a", "b", "c"], LINES)
    assert matrix == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert page_analysis.confused_pairs(["a", "b", "c"], LINES) == [(1, "a", "b")]
    a, b, c = page_analysis.per_label(["a", "b", "c"], LINES)
    assert (a.rows, a.called, a.precision, a.recall, a.f1) == (3, 2, 1.0, 2 / 3, 0.8)
    assert (b.rows, b.called, b.precision, b.recall, b.f1) == (1, 2, 0.5, 1.0, 2 / 3)
    assert (c.rows, c.called, c.precision, c.recall, c.f1) == (0, 0, None, None, None)


def test_pairs_of_labels_are_counted_as_in_the_matrix() -> None:
    labels = ["a", "b", "c", "d"]
    random = np.random.default_rng(0)
    lines = [line_of(0, labels[i], labels[j]) for i, j in random.integers(0, 4, (200, 2))]
    matrix = page_analysis.confusion(labels, lines)
    by_matrix = {(labels[i], labels[j], matrix[i][j]) for i in range(4) for j in range(4) if i != j}
    found = page_analysis.confused_pairs(labels, lines)
    assert {(a, b, n) for n, a, b in found} == by_matrix
    assert [n for n, _, _ in found] == sorted((n for *_, n in by_matrix), reverse=True)
    many = [f"label {i}" for i in range(50_000)]
    assert page_analysis.confused_pairs(many, [line_of(0, many[3], many[-1])]) == [
        (1, many[3], many[-1])
    ]


def test_calibration_of_several_labels_needs_the_probability_of_each() -> None:
    line = {**line_of(0, ["a"], ["a"]), "scores": {"a": 0.9, "b": 0.2}}
    assert page_analysis.calibration("multi_label", [line], 2) is not None
    assert page_analysis.calibration("multi_label", [line], 30) is None
    assert page_analysis.calibration(
        "single_label", [{**line_of(0, "a", "a"), "scores": {"a": 0.9}}], 30
    )


def test_scores_of_several_labels_a_row() -> None:
    lines = [line_of(0, ["a", "b"], ["a"]), line_of(1, [], ["b"]), line_of(2, ["b"], ["b"])]
    a, b = page_analysis.per_label(["a", "b"], lines)
    assert (a.precision, a.recall, a.f1) == (1.0, 1.0, 1.0)
    assert (b.precision, b.recall, b.f1) == (0.5, 0.5, 0.5)


def test_calibration_error_is_that_computed_by_hand() -> None:
    found = page_analysis.calibration("single_label", LINES)
    assert found is not None
    bins, error = found
    # said 0.65 twice, right once; 0.95 and 1.0 share the last bin, both right
    assert [(b.rows, b.accuracy) for b in bins] == [(2, 0.5), (2, 1.0)]
    assert [b.confidence for b in bins] == pytest.approx([0.65, 0.975])
    assert error == pytest.approx((2 * 0.15 + 2 * 0.025) / 4)
    scores = {"a": 0.8, "b": 0.1, "c": NAN}
    found = page_analysis.calibration("multi_label", [line_of(0, ["a"], ["a"], scores)])
    assert found is not None
    assert found[1] == pytest.approx((0.2 + 0.1) / 2)  # of a: said 0.8, true 1; of b: 0.1, 0
    assert page_analysis.calibration("single_label", [line_of(0, "a", "a")]) is None


def test_majority_is_trains_commonest_label_on_the_splits_rows() -> None:
    assert page_analysis.majority(REPORT, "test") == ("b", 0.25)
    assert page_analysis.majority(REPORT, "validation") is None
    several = report_of(data={"test": {"rows": 4, "labels": {"a": 4, "b": 4}}})
    assert page_analysis.majority(several, "test") is None
    assert page_analysis.majority({}, "test") is None


def test_an_interval_is_wilsons() -> None:
    assert page_analysis.interval(0.75, 4) == pytest.approx((0.30064, 0.95441), abs=1e-4)
    assert page_analysis.interval(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)


def test_the_worst_rows_come_first() -> None:
    assert [x["row"] for x in page_analysis.worst("single_label", LINES)] == [2]
    numbers = [line_of(0, 1.0, 1.5), line_of(1, 1.0, -3.0), line_of(2, NAN, 1.0)]
    assert [x["row"] for x in page_analysis.worst("regression", numbers)] == [1, 0]
    windows = [  # of row 0 two: (2 + 8) / (2 + 2) per token
        {"row": 0, "loss": 2.0, "n_items": 2}, {"row": 0, "loss": 8.0, "n_items": 2},
        {"row": 1, "loss": 3.0, "n_items": 1}, {"row": 2, "loss": NAN, "n_items": 1},
        {"row": 3, "loss": 1.0, "n_items": 0},
    ]  # fmt: skip
    found = page_analysis.worst("text", windows)
    assert [(x["row"], x["loss"] / x["n_items"]) for x in found] == [(1, 3.0), (0, 2.5)]
    assert page_analysis.constant_error([line_of(0, 1.0, 0), line_of(1, 3.0, 0)]) == 1.0


@pytest.mark.parametrize(
    ("validation", "training", "step"),
    [
        ([2.0, 1.0, 0.8, 1.2], [2.0, 1.0, 0.5, 0.1], 20),
        ([2.0, 1.0, 0.8, 0.81], [2.0, 1.0, 0.5, 0.1], None),  # within 2 %
        ([2.0, 1.0, 0.8, 1.2], [2.0, 1.0, 0.5, 0.6], None),  # training's rises too
        ([2.0, 1.0], [2.0, 1.0], None),
        ([], [2.0, 1.0], None),
    ],
)
def test_overfitting_is_named_where_it_shows(
    validation: list[float], training: list[float], step: int | None
) -> None:
    curves = [list(zip((0, 10, 20, 30), y, strict=False)) for y in (training, validation)]
    found = page_analysis.overfitting(*curves)
    assert (found and found.step) == step


@pytest.mark.parametrize(
    ("before", "after", "rows", "tone", "said"),
    [
        (0.25, 0.75, 400, "good", "rises from 0.2500 before training to 0.7500 (+50.0 points), 50.0"
         " points above always saying “b” (0.2500)"),
        (0.25, 0.28, 400, "poor", "no clear gain over always saying “b”"),
        (0.25, 0.3, 4, "unknown", "4 rows are too few to tell this from chance"),
        (0.8, 0.75, 400, "poor", "falls from 0.8000 before"),
        (0.05, 0.1, 400, "poor", "15.0 points below always saying"),
        (None, 0.75, 400, "good", "accuracy is 0.7500 (not measured before training)"),
        (0.5, None, 400, "unknown", "not known"),
    ],
)  # fmt: skip
def test_the_verdict_compares_with_before_and_with_the_commonest_label(
    before: float | None, after: float | None, rows: int, tone: str, said: str
) -> None:
    labels = {"a": rows * 3 // 4, "b": rows // 4}
    data = {"train": REPORT["data"]["train"], "test": {"rows": rows, "labels": labels}}
    metrics = {"before": {"test": {"accuracy": before}}, "after": {"test": {"accuracy": after}}}
    found = verdict(report_of(data=data, metrics=metrics), "test")
    assert found.tone == tone
    assert said in found.text


def test_less_perplexity_is_better() -> None:
    metrics = {"before": {"test": {"perplexity": 20.0}}, "after": {"test": {"perplexity": 5.0}}}
    best = {"metric": "perplexity", "mode": "min"}
    data = {"test": {"rows": 400}}
    found = verdict({"metrics": metrics, "best": best, "data": data}, "test")
    assert (found.tone, "falls from 20.0000" in found.text) == ("good", True)
    assert "(\N{MINUS SIGN}75 %)" in found.text


def test_ticks_are_round_and_within() -> None:
    assert page_plots.ticks(0, 153) == [0, 50, 100, 150]
    assert page_plots.ticks(1.07, 2.1) == [1.25, 1.5, 1.75, 2.0]
    assert page_plots.ticks(3, 3) == [3]
    assert [page_plots.short(x) for x in (0, 0.25, 12000, 2.5e6)] == ["0", "0.25", "12k", "2.5M"]
    assert page_plots.short(2e-4, 5e-4) == "2e-4"
    assert len(page_plots.thin([(i, i) for i in range(1201)])) <= page_plots.MOST_POINTS


# ---------------------------------------------------------------------------------------- pages


def test_a_page_of_labels(tmp_path: Path) -> None:
    log = log_of([2.0, 1.0, 0.8, 1.2], [2 - i / 20 for i in range(30)])
    page = page_of(tmp_path, REPORT, LINES, log=log)
    for said in (
        "base for text classification", "LoRA adapter, rank 8, trained on 30 rows of train.csv",
        "40 steps in 95 s, on CPU, at most 3.0 GiB of memory", "Overfitting. Validation's loss is",
        "lowest at step 20", "chosen by accuracy, before the rise", "95 % interval",
        "majority", "0.2500", "Expected calibration error 0.088", "overconfident",
        "lora train recipe.yaml", "query, value", "text 2", "35.0 %", "overfits",
    ):  # fmt: skip
        assert said in page.text
    assert "text 3" not in page.text  # it is right
    assert page.tags.count("svg") == 5
    assert page.tags.count("section") == 8


def test_texts_cannot_leave_their_place(tmp_path: Path) -> None:
    labels = {HOSTILE: 3, '"><script>': 1}
    lines = [line_of(0, HOSTILE, '"><script>', {HOSTILE: 0.2, '"><script>': 0.8})]
    lines[0] |= {"text": HOSTILE, "place": HOSTILE}
    facts = {"rows": 4, "source": HOSTILE, "sha256": HOSTILE, "labels": labels}
    report = report_of(
        base_model=HOSTILE, command=HOSTILE, data={"train": facts, HOSTILE: facts},
        adapter={"type": HOSTILE, HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE},
        samples=[{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE, "place": HOSTILE}],
    )  # fmt: skip
    page = page_of(tmp_path, report, lines)
    assert "<script>alert('1')</script> & \"q\" 😀 \u202eשלמא" in page.text
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\x00" not in text
    assert esc("a\x00\ud800b<>\"'") == "a\ufffd\ufffdb&lt;&gt;&quot;&#x27;"


@pytest.mark.parametrize(("count", "mapped"), [(30, True), (130, False)])
def test_many_labels_are_a_map_or_a_list_of_pairs(tmp_path: Path, count: int, mapped: bool) -> None:
    names = [f"label {i:02}" for i in range(count)]
    lines = [line_of(i, name, names[0]) for i, name in enumerate(names * 2)]
    page = page_of(tmp_path, report_of(data={}, answers="single_label"), lines)
    assert "Confused most" in page.text or not mapped
    assert "label 01 called label 00: 2 of 2" in page.text or not mapped
    assert page.attributes.count(("class", "miss")) == (count - 1 if mapped else 0)
    assert ("class", "matrix") not in page.attributes
    assert f"The other {count - 20} labels" in page.text
    assert page.text.count("text ") == 20 + page.text.count("for text ")  # the worst rows


def test_a_single_label(tmp_path: Path) -> None:
    data = {"train": {"rows": 2, "labels": {"a": 2}}, "test": {"rows": 1, "labels": {"a": 1}}}
    page = page_of(tmp_path, report_of(data=data), [line_of(0, "a", "a", {"a": 1.0})])
    assert "Worst errors" not in page.text
    assert "Confusion" in page.text


def test_several_labels_a_row(tmp_path: Path) -> None:
    lines = [
        line_of(0, ["a"], ["a", "b"], {"a": 0.9, "b": 0.6}),
        line_of(1, ["b"], [], {"a": 0.1, "b": 0.2}),
    ]
    several = MetricContext(2, multi_label=True, labels=("a", "<b>"))
    report = report_of(metric_definitions=definition("accuracy", several) | {"x": "of `<b>`"})
    page = page_of(tmp_path, report, lines)
    assert "Confusion" not in page.text
    assert "said none" in page.text
    assert "every label is right" in page.text
    assert "of <b>" in page.text  # as text
    alone = {"after": {"test": {"f1": 0.9}}}
    told = verdict(report_of(metrics=alone, best={"metric": "f1"}), "test")
    assert (told.tone, told.head) == ("unknown", "Measured.")
    assert "Reliability" in page.text


def test_regression(tmp_path: Path) -> None:
    metrics = {"after": {"test": {"loss": 0.5, "mse": 0.5}}}
    best = {"metric": "mse", "mode": "min", "step": 3}
    lines = [line_of(0, 1.0, 1.25), line_of(1, 3.0, NAN), line_of(2, 5.0, -2.0)]
    page = page_of(tmp_path, report_of(metrics=metrics, best=best, data={}), lines)
    assert "Predicted and wanted" in page.text
    assert "after constant" in page.text
    assert "2.6667" in page.text  # variance of 1, 3, 5
    assert page.text.index("text 2") < page.text.index("text 0")
    worse = {"before": {"test": {"mse": 9.0}}, "after": {"test": {"mse": 2.7}}}
    data = {"test": {"rows": 400}}
    told = verdict(report_of(metrics=worse, best=best, data=data), "test", lines)
    assert told.head == "It learned next to nothing."  # though less than before
    assert "no smaller than that of always saying the mean (2.6667)" in told.text


def test_a_language_model(tmp_path: Path) -> None:
    metrics = {"before": {"test": {"perplexity": 20}}, "after": {"test": {"perplexity": 5.5}}}
    during = [{"step": 10 * i, "text": text} for i, text in enumerate(("one", "one", "two"), 1)]
    samples = [{"prompt": "Once", "before": "xyzzy", "after": "upon", "reference": "a time",
                "during": [*during, {"step": None}, 7]}, 3,
               {"prompt": "x", "during": 3}]  # fmt: skip
    lines = [{"row": 0, "text": "easy", "loss": 1.0, "n_items": 4},
             {"row": 1, "text": "hard", "loss": 9.0, "n_items": 3,
              "reference": "what was"}]  # fmt: skip
    report = report_of(task="causal_lm", metrics=metrics, samples=samples, data={})
    report["best"] = {"metric": "perplexity", "mode": "min"}
    page = page_of(tmp_path, report, lines, log=log_of([3, 2], [3, 2], "perplexity"))
    assert "perplexity falls from 20.0000 before training to 5.5000" in page.text
    assert "3.000 per token" in page.text
    assert page.text.index("hard") < page.text.index("easy")
    assert all(said in page.text for said in ("xyzzy", "upon", "a time", "what was"))
    assert "step 10 to 20" in page.text
    assert "step 30" in page.text


@pytest.mark.parametrize("key", sorted(REPORT))
def test_each_key_may_be_missing(tmp_path: Path, key: str) -> None:
    page_of(tmp_path, {k: v for k, v in REPORT.items() if k != key}, LINES)


@pytest.mark.parametrize("wrong", [None, [], "x", {"train": None, "test": 3, "after": []}])
def test_each_key_may_be_another_thing(tmp_path: Path, wrong: Any) -> None:
    for key in ("adapter", "data", "metrics", "best", "training", "samples", "parameters"):
        page_of(tmp_path, report_of(**{key: wrong}), [{}, {"row": 1}, *LINES])


def test_nothing_at_all_and_nothing_held_out(tmp_path: Path) -> None:
    assert "is not known" in page_of(tmp_path, {}).text
    page = page_of(tmp_path, report_of(metrics={}, best=None), log=log_of([], [2.0, 1.0, 0.5]))
    assert "No rows were held out" in page.text
    assert page.tags.count("svg") == 3


def test_nan_and_infinity_are_left_out(tmp_path: Path) -> None:
    metrics = {"before": {"test": {"accuracy": NAN}}, "after": {"test": {"accuracy": math.inf}}}
    log = log_of([NAN, 1.0, math.inf], [NAN, 2.0, -math.inf, 1.0])
    lines = [line_of(0, "a", "b", {"a": NAN, "b": math.inf}), *LINES]
    lines[0]["loss"] = NAN
    page = page_of(tmp_path, report_of(metrics=metrics), lines, log=log)
    assert "inf" not in page.text.lower().split()


# ---------------------------------------------------------------------------------- whole runs


def runs(folder: Path, tmp_path: Path, **sections: Any) -> tuple[Json, Page]:
    from lora_cli.training import train

    rows = [{"text": f"{text} <b>", "label": i % 2} for i, text in enumerate(tiny.CORPUS)]
    write_lines(tmp_path / "rows.jsonl", rows)
    data = {"path": "rows.jsonl", "validation": "rows.jsonl", "check": {"max_overlap": 1.0}}
    report = train(load_recipe(tiny.recipe(folder, tmp_path, data=data, **sections)))
    out = tmp_path / "out"
    first = (out / "report.html").read_text(encoding="utf-8")
    (out / "report.html").unlink()
    write_page(out)  # from the files alone
    assert (out / "report.html").read_text(encoding="utf-8") == first
    return report, Page(first)


def test_a_run_of_labels_leaves_its_page_with_the_texts(tmp_path: Path) -> None:
    labels = {"labels": ["0", "1"]}
    folder = tiny.save_encoder(tmp_path / "base")
    _, page = runs(folder, tmp_path, task={"type": "sequence_classification", **labels})
    lines = page_analysis.read_predictions(tmp_path / "out/predictions/validation.jsonl")
    assert [line["text"] for line in lines] == [f"{text} <b>" for text in tiny.CORPUS]
    wrong = [line["text"] for line in lines if line["reference"] != line["prediction"]]
    assert wrong
    assert all(text in page.text for text in wrong)


def test_a_run_of_a_language_model_leaves_samples(tmp_path: Path) -> None:
    report, page = runs(tiny.save_llama(tmp_path / "base"), tmp_path)
    assert len(report["samples"]) == 5
    for sample, text in zip(report["samples"], tiny.CORPUS, strict=False):
        assert set(sample) == {"place", "prompt", "reference", "before", "during", "after"}
        assert f"{text} <b>".startswith(sample["prompt"])
        assert sample["prompt"] + sample["reference"] == f"{text} <b>"
    assert "Samples" in page.text


# ------------------------------------------------------------------------------------- the page


def test_colours_can_be_read_in_light_and_in_dark() -> None:
    def luminance(colour: str) -> float:
        wide = "".join(2 * c for c in colour) if len(colour) == 3 else colour
        parts = [int(wide[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = (
        dict(re.findall(r"--([\w-]+):#(\w+)", block))
        for block in re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL)[:2]
    )
    for colours in (light, light | dark):
        for ground in ("paper", "card", "soft"):
            for text in ("ink", "muted", "blue", "orange", "good", "poor"):
                a, b = sorted(luminance(colours[k]) for k in (text, ground))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground, colours)  # WCAG's AA


def test_a_page_is_valid_html_whose_headings_and_plots_can_be_heard(tmp_path: Path) -> None:
    log = log_of([2.0, 1.0, 0.8, 1.2], [2 - i / 20 for i in range(30)])
    verdict = {"passed": False, "words": "the adapter FAILS to beat the base (`base`, 1)"}
    (tmp_path / "recipe.yaml").write_text("model: {name: <b>}\n")
    page = page_of(tmp_path, report_of(verdict=verdict), LINES, log=log)
    parser = html5lib.HTMLParser(strict=True)  # which raises
    parser.parse((tmp_path / "report.html").read_text(encoding="utf-8"))
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    told = [value for name, value in page.attributes if name == "aria-label" and "over" in value]
    assert "Validation goes from 2.0000 at step 0 to 1.2000 at step 30." in told[0]
    assert "It overfits from step 20 on." in told[0]
    assert "Fails its baselines. The adapter FAILS to beat the base ( base , 1)" in page.text
    assert "model: {name: <b>}" in page.text  # the recipe
