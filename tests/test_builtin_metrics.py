"""Tests of the built-in metrics on small inputs with results computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lora_cli.metrics import (
    MetricContext,
    builtin_value,
    channel_of,
    check_metric_names,
    known_metrics,
    metric_of_result,
    result_names,
)
from lora_cli.metrics.box_scores import BOX_METRICS, box_scores, label_result_names
from lora_cli.metrics.builtin_metrics import is_exact_match, lacks_answer, references_of
from lora_cli.metrics.retrieval_scores import RETRIEVAL_METRICS, retrieval_scores

# ------------------------------------------------------------------------------ error rates


def edit_distance(reference: str | list[str], hypothesis: str | list[str]) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(hypothesis) + 1))
    for i, a in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def test_entity_precision_and_recall() -> None:
    pytest.importorskip("seqeval")
    references, predictions = [["B-A", "O", "O", "O"]], [["B-A", "B-A", "O", "B-B"]]
    assert builtin_value("seqeval", "precision", predictions, references) == pytest.approx(1 / 3)
    assert builtin_value("seqeval", "recall", predictions, references) == 1.0


def test_error_rates_sum_edits_over_all_rows() -> None:
    pytest.importorskip("jiwer")
    references = ["the cat sat on the mat", "a dog ran", "one two three four"]
    predictions = ["the cat on a mat", "a big old dog ran far", "one two three four"]
    n_word_edits = sum(
        edit_distance(reference.split(), prediction.split())
        for reference, prediction in zip(references, predictions, strict=True)
    )
    assert n_word_edits == 2 + 3  # a deletion and a substitution; three insertions
    assert builtin_value("wer", "wer", predictions, references) == pytest.approx(
        n_word_edits / (6 + 3 + 4)
    )
    n_character_edits = sum(
        edit_distance(reference, prediction)
        for reference, prediction in zip(references, predictions, strict=True)
    )
    error_rate = builtin_value("cer", "cer", predictions, references)
    assert error_rate == pytest.approx(n_character_edits / sum(map(len, references)))


@pytest.mark.parametrize(
    ("prediction", "references", "rate"),
    [
        ("a", "x", 1.0),
        ("a", ["x", "a b c d"], 3 / 4),  # the lower error rate counts, not fewer edits
        ("a b", ["a b c", "a x"], 1 / 3),
        ("a b c", "", 3.0),  # an empty reference: the rate is the number of insertions
        ("", "a b", 1.0),
    ],
)
def test_error_rate_of_a_single_row(prediction: str, references: Any, rate: float) -> None:
    pytest.importorskip("jiwer")
    assert builtin_value("wer", "wer", [prediction], [references]) == pytest.approx(rate)


# ---------------------------------------------------------------------------- answers


def test_whole_texts_are_compared_without_a_pattern() -> None:
    assert references_of("a") == ["a"]
    assert references_of(["a", "b"]) == ["a", "b"]
    assert is_exact_match(" a\n", ["b", "a "])
    assert not is_exact_match("a", "A")
    assert lacks_answer("a", "a") is None


def test_final_answers_are_compared_with_a_pattern() -> None:
    context = MetricContext(answer_pattern=r"= (\d+)")
    for prediction, reference, is_right, has_no_answer in (
        ("so = 4", "x = 4", True, False), ("so = 5", "x = 4", False, False),
        ("x = 4", ["y = 3", "y = 4"], True, False), ("4", "x = 4", False, True),
        ("four", "four", True, None), ("= 4", "four", False, None),
        ("four", ["four", "x = 4"], True, True), ("x = 5", "= 5 or = 6", False, False),
    ):  # fmt: skip
        assert is_exact_match(prediction, reference, context) is is_right
        assert lacks_answer(prediction, reference, context) is has_no_answer
    prediction, reference = ["= 1", "= 2", "none", "?"], ["= 1", "= 3", "= 4", "?"]
    assert builtin_value("exact_match", "exact_match", prediction, reference, context) == 2 / 4
    assert builtin_value("no_answer", "no_answer", prediction, reference, context) == 1 / 3
    assert math.isnan(builtin_value("no_answer", "no_answer", ["a"], ["a"], context))


# --------------------------------------------------------------------------------- retrieval


def test_retrieval_scores_are_means_over_rows() -> None:
    # the second row's only relevant text is ranked 10th; the third row has twelve relevant texts
    ranks, counts = [[1, 3], [10], [2, 11], []], [2, 1, 12, 1]
    best = [1 + 1 / math.log2(3), 1.0, sum(1 / math.log2(i + 2) for i in range(10))]
    gains = [(1 + 1 / 2) / best[0], 1 / math.log2(11) / best[1], 1 / math.log2(3) / best[2], 0]
    expected = {
        "ndcg_at_10": sum(gains) / 4,
        "mrr_at_10": (1 + 1 / 10 + 1 / 2 + 0) / 4,
        "accuracy_at_1": 1 / 4,
        "recall_at_1": (1 / 2) / 4,
        "recall_at_10": (2 / 2 + 1 / 1 + 1 / 12 + 0) / 4,
    }
    assert list(expected) == list(RETRIEVAL_METRICS)
    assert retrieval_scores(ranks, counts) == pytest.approx(expected)
    for name, value in expected.items():
        assert builtin_value("retrieval", name, ranks, counts) == pytest.approx(value)
    late = retrieval_scores([[11]], [1])
    assert late == dict.fromkeys(RETRIEVAL_METRICS, 0.0)


# ------------------------------------------------------------------------------------- boxes


def test_box_scores_of_exact_and_shifted_boxes() -> None:
    pytest.importorskip("faster_coco_eval")
    # one `a` is exact, and one is shifted by 2 of 10 pixels (IoU 80 / 120); `b` is missed
    references = [[(0, 0, 10, 10, 0, 0), (50, 50, 60, 60, 1, 0)], [(0, 0, 10, 10, 0, 0)]]
    predictions = [[(0, 0, 10, 10, 0.9, 0)], [(0, 2, 10, 12, 0.8, 0)]]
    scores = box_scores(predictions, references, ("a", "b", "c"))
    assert list(scores) == [*BOX_METRICS, "ap_a", "ap_b", "ap_c"]
    # if the second box is wrong, precision is 1 up to a recall of 0.5: at 51 of 101 points
    half = 51 / 101
    # the shifted box is right at the thresholds 0.50, 0.55, 0.60 and 0.65
    ap_a = (4 * 1.0 + 6 * half) / 10
    assert scores["ap_a"] == pytest.approx(ap_a)
    assert scores["ap_b"] == 0.0
    assert math.isnan(scores["ap_c"])
    assert scores["map"] == pytest.approx(ap_a / 2)
    assert scores["map_50"] == pytest.approx(1 / 2)
    assert scores["map_75"] == pytest.approx(half / 2)
    assert scores["mar_100"] == pytest.approx((4 * 1.0 + 6 * 0.5) / 10 / 2)
    assert builtin_value(
        "coco", "ap_a", predictions, references, MetricContext(labels=("a", "b"))
    ) == pytest.approx(ap_a)


def test_only_the_100_boxes_with_the_highest_scores_count() -> None:
    pytest.importorskip("faster_coco_eval")
    wrong = [(50.0, 50.0, 60.0, 60.0, 0.9, 0)]
    right = (0.0, 0.0, 10.0, 10.0, 0.1, 0)
    references = [[(0, 0, 10, 10, 0, 0)]]
    recalls = [box_scores([wrong * n + [right]], references)["mar_100"] for n in (99, 100)]
    assert recalls == [1.0, 0.0]


def test_crowds_are_ignored() -> None:
    pytest.importorskip("faster_coco_eval")
    crowd = (0, 0, 10, 10, 0, 1)
    assert all(math.isnan(v) for v in box_scores([[]], [[crowd]], ("a",)).values())
    predictions = [[(0, 0, 5, 10, 0.9, 0), (50, 0, 60, 10, 0.5, 0)]]
    assert box_scores(predictions, [[crowd, (50, 0, 60, 10, 0, 0)]])["map"] == pytest.approx(1.0)


def test_labels_without_names_are_taken_from_the_boxes() -> None:
    pytest.importorskip("faster_coco_eval")
    references = [[(0, 0, 10, 10, 3, 0)]]
    assert box_scores([[(0, 0, 10, 10, 0.5, 3)]], references) == dict.fromkeys(BOX_METRICS, 1.0)
    assert box_scores([[(0, 0, 10, 10, 0.5, 2)]], references) == dict.fromkeys(BOX_METRICS, 0.0)
    two_labels = [[(0, 0, 10, 10, 3, 0), (50, 50, 60, 60, 5, 0)]]
    assert box_scores([[(50, 50, 60, 60, 0.5, 5)]], two_labels) == dict.fromkeys(BOX_METRICS, 0.5)


def test_up_to_20_labels_have_their_own_score() -> None:
    assert len(label_result_names([str(i) for i in range(20)])) == 20
    assert label_result_names([str(i) for i in range(21)]) == []


@pytest.mark.parametrize(("overlap", "thresholds"), [(52, 1), (74, 5), (77, 6), (100, 10)])
def test_overlap_thresholds_are_inclusive(overlap: int, thresholds: int) -> None:
    pytest.importorskip("faster_coco_eval")
    scores = box_scores([[(20, 30, 20 + overlap, 40, 0.9, 0)]], [[(20, 30, 120, 40, 0, 0)]])
    expected = {"map": thresholds / 10, "map_50": 1.0, "map_75": float(overlap >= 75),
              "mar_100": thresholds / 10}  # fmt: skip
    assert scores == pytest.approx(expected)


# ------------------------------------------------------------------------------------- names


def test_multi_label_scores_with_a_single_label() -> None:
    context = MetricContext(1, True, ("a",))
    assert builtin_value("f1", "f1", [[1]], [[1]], context) == 1.0
    assert builtin_value("accuracy", "accuracy", [[1]], [[0]], context) == 0.0


def test_metric_of_a_result_name() -> None:
    assert metric_of_result("f1", "label") == "f1"
    assert metric_of_result("f1", "tags") == "seqeval"
    assert metric_of_result("rougeL", "text") == "rouge"
    assert metric_of_result("map_50", "boxes") == "coco"
    assert metric_of_result("word_errors", "text") is None
    assert result_names("seqeval") == ("f1", "precision", "recall")
    assert result_names("bleu") == ("bleu",)
    assert result_names("./mine.py") == ("./mine.py",)
    assert (channel_of("wer"), channel_of("seqeval"), channel_of("./mine.py")) == (
        "text",
        "tags",
        None,
    )


def test_metrics_for_each_channel() -> None:
    pattern = MetricContext(answer_pattern="x")
    usable = {
        channel: [n for n in known_metrics() if not check_metric_names([n], channel, pattern)]
        for channel in ("value", "text", "tags", "ranks", "boxes", "pictures")
    }
    texts = ["perplexity", "exact_match", "no_answer", "bleu", "chrf", "rouge", "wer", "cer"]
    assert usable == {
        "value": ["pearson", "spearman", "mse", "rmse", "mae"], "text": texts,
        "tags": ["seqeval"], "ranks": ["retrieval"], "boxes": ["coco"], "pictures": [],
    }  # fmt: skip
    (problem,) = check_metric_names(["no_answer"], "text")
    assert "without a match of `task.answer_pattern`" in problem.what
    assert check_metric_names(["no_answer"]) == []


def test_scripts_are_recognised_by_suffix_or_path(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("")
    assert check_metric_names([str(tmp_path / "mine.py"), str(tmp_path), "meteor"]) == []
    (problem,) = check_metric_names([str(tmp_path / "yours")])
    assert problem.what == f"there is no metric script `{tmp_path / 'yours'}`"
