"""The functions behind the built-in metrics, each on a few rows that can be counted by hand."""

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


def n_edits(wanted: str | list[str], said: str | list[str]) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(said) + 1))
    for i, one in enumerate(wanted, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(said, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def test_precision_is_of_what_is_found_and_recall_of_what_is_there() -> None:
    pytest.importorskip("seqeval")
    wanted, said = [["B-A", "O", "O", "O"]], [["B-A", "B-A", "O", "B-B"]]
    assert builtin_value("seqeval", "precision", said, wanted) == pytest.approx(1 / 3)
    assert builtin_value("seqeval", "recall", said, wanted) == 1.0


def test_error_rates_count_edits_of_all_rows_together() -> None:
    pytest.importorskip("jiwer")
    wanted = ["the cat sat on the mat", "a dog ran", "one two three four"]
    said = ["the cat on a mat", "a big old dog ran far", "one two three four"]
    words = sum(n_edits(w.split(), s.split()) for w, s in zip(wanted, said, strict=True))
    assert words == 2 + 3  # one left out, one exchanged; three put in
    assert builtin_value("wer", "wer", said, wanted) == pytest.approx(words / (6 + 3 + 4))
    letters = sum(n_edits(w, s) for w, s in zip(wanted, said, strict=True))
    found = builtin_value("cer", "cer", said, wanted)
    assert found == pytest.approx(letters / sum(map(len, wanted)))


@pytest.mark.parametrize(
    ("said", "wanted", "rate"),
    [
        ("a", "x", 1.0),
        ("a", ["x", "a b c d"], 3 / 4),  # a smaller share of edits, though there are more
        ("a b", ["a b c", "a x"], 1 / 3),
        ("a b c", "", 3.0),  # of no words, each one too many counts
        ("", "a b", 1.0),
    ],
)
def test_the_error_rate_of_one_row(said: str, wanted: Any, rate: float) -> None:
    pytest.importorskip("jiwer")
    assert builtin_value("wer", "wer", [said], [wanted]) == pytest.approx(rate)


# ---------------------------------------------------------------------------- whole answers


def test_texts_are_compared_whole_where_there_is_no_pattern() -> None:
    assert references_of("a") == ["a"]
    assert references_of(["a", "b"]) == ["a", "b"]
    assert is_exact_match(" a\n", ["b", "a "])
    assert not is_exact_match("a", "A")
    assert lacks_answer("a", "a") is None


def test_final_answers_are_compared_where_there_is_a_pattern() -> None:
    pattern = MetricContext(answer_pattern=r"= (\d+)")
    for said, wanted, right, lacks in (
        ("so = 4", "x = 4", True, False), ("so = 5", "x = 4", False, False),
        ("x = 4", ["y = 3", "y = 4"], True, False), ("4", "x = 4", False, True),
        ("four", "four", True, None), ("= 4", "four", False, None),
        ("four", ["four", "x = 4"], True, True), ("x = 5", "= 5 or = 6", False, False),
    ):  # fmt: skip
        assert is_exact_match(said, wanted, pattern) is right
        assert lacks_answer(said, wanted, pattern) is lacks
    said, wanted = ["= 1", "= 2", "none", "?"], ["= 1", "= 3", "= 4", "?"]
    assert builtin_value("exact_match", "exact_match", said, wanted, pattern) == 2 / 4
    assert builtin_value("no_answer", "no_answer", said, wanted, pattern) == 1 / 3
    assert math.isnan(builtin_value("no_answer", "no_answer", ["a"], ["a"], pattern))


# ------------------------------------------------------------------------------------ search


def test_scores_of_a_search_are_means_over_rows() -> None:
    # the second row's only right text comes last of ten; the third has twelve right ones
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


def test_scores_of_boxes_found_exactly_or_shifted() -> None:
    pytest.importorskip("faster_coco_eval")
    # one of `a` exactly, one of `a` overlaps by 80 of 120 and one by 92 of 108; `b` is missed
    wanted = [[(0, 0, 10, 10, 0, 0), (50, 50, 60, 60, 1, 0)], [(0, 0, 10, 10, 0, 0)]]
    found = [[(0, 0, 10, 10, 0.9, 0)], [(0, 2, 10, 12, 0.8, 0)]]
    scores = box_scores(found, wanted, ("a", "b", "c"))
    assert list(scores) == [*BOX_METRICS, "ap_a", "ap_b", "ap_c"]
    # with the second one wrong, precision is 1 up to a recall of one half: 51 of 101 points
    half = 51 / 101
    ap_a = (4 * 1.0 + 6 * half) / 10  # right at overlaps of 0.50, 0.55, 0.60 and 0.65
    assert scores["ap_a"] == pytest.approx(ap_a)
    assert scores["ap_b"] == 0.0
    assert math.isnan(scores["ap_c"])
    assert scores["map"] == pytest.approx(ap_a / 2)
    assert scores["map_50"] == pytest.approx(1 / 2)
    assert scores["map_75"] == pytest.approx(half / 2)
    assert scores["mar_100"] == pytest.approx((4 * 1.0 + 6 * 0.5) / 10 / 2)
    assert builtin_value(
        "coco", "ap_a", found, wanted, MetricContext(labels=("a", "b"))
    ) == pytest.approx(ap_a)


def test_only_the_hundred_surest_boxes_of_a_picture_count() -> None:
    pytest.importorskip("faster_coco_eval")
    wrong = [(50.0, 50.0, 60.0, 60.0, 0.9, 0)]
    right = (0.0, 0.0, 10.0, 10.0, 0.1, 0)
    wanted = [[(0, 0, 10, 10, 0, 0)]]
    recalls = [box_scores([wrong * n + [right]], wanted)["mar_100"] for n in (99, 100)]
    assert recalls == [1.0, 0.0]


def test_a_crowd_is_neither_right_nor_wrong() -> None:
    pytest.importorskip("faster_coco_eval")
    crowd = (0, 0, 10, 10, 0, 1)
    assert all(math.isnan(v) for v in box_scores([[]], [[crowd]], ("a",)).values())
    found = [[(0, 0, 5, 10, 0.9, 0), (50, 0, 60, 10, 0.5, 0)]]
    assert box_scores(found, [[crowd, (50, 0, 60, 10, 0, 0)]])["map"] == pytest.approx(1.0)


def test_labels_without_names_are_known_by_the_boxes() -> None:
    pytest.importorskip("faster_coco_eval")
    wanted = [[(0, 0, 10, 10, 3, 0)]]
    assert box_scores([[(0, 0, 10, 10, 0.5, 3)]], wanted) == dict.fromkeys(BOX_METRICS, 1.0)
    assert box_scores([[(0, 0, 10, 10, 0.5, 2)]], wanted) == dict.fromkeys(BOX_METRICS, 0.0)
    both = [[(0, 0, 10, 10, 3, 0), (50, 50, 60, 60, 5, 0)]]
    assert box_scores([[(50, 50, 60, 60, 0.5, 5)]], both) == dict.fromkeys(BOX_METRICS, 0.5)


def test_up_to_twenty_labels_have_a_score_of_their_own() -> None:
    assert len(label_result_names([str(i) for i in range(20)])) == 20
    assert label_result_names([str(i) for i in range(21)]) == []


@pytest.mark.parametrize(("overlap", "thresholds"), [(52, 1), (74, 5), (77, 6), (100, 10)])
def test_boxes_count_from_an_overlap_of_a_half_and_of_three_quarters(
    overlap: int, thresholds: int
) -> None:
    pytest.importorskip("faster_coco_eval")
    scores = box_scores([[(20, 30, 20 + overlap, 40, 0.9, 0)]], [[(20, 30, 120, 40, 0, 0)]])
    wanted = {"map": thresholds / 10, "map_50": 1.0, "map_75": float(overlap >= 75),
              "mar_100": thresholds / 10}  # fmt: skip
    assert scores == pytest.approx(wanted)


# ------------------------------------------------------------------------------------- names


def test_one_row_with_one_of_one_label() -> None:
    one = MetricContext(1, True, ("a",))
    assert builtin_value("f1", "f1", [[1]], [[1]], one) == 1.0
    assert builtin_value("accuracy", "accuracy", [[1]], [[0]], one) == 0.0


def test_which_metric_gives_a_number() -> None:
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


def test_what_each_kind_of_task_may_be_measured_by() -> None:
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


def test_a_script_is_known_by_its_ending_or_by_where_its_path_starts(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("")
    assert check_metric_names([str(tmp_path / "mine.py"), str(tmp_path), "meteor"]) == []
    (problem,) = check_metric_names([str(tmp_path / "yours")])
    assert problem.what == f"there is no metric script `{tmp_path / 'yours'}`"
