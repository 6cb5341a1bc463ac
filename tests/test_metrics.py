"""Tests of the metrics: values against formulas and libraries, names, scripts of users."""

from __future__ import annotations

import gc
import itertools
import math
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from unittest import TestCase

import numpy as np
import pytest
from languages import TEXTS, UNSPACED

from lora_cli.errors import LoraError
from lora_cli.metrics import (
    MetricContext,
    MetricSet,
    check_metric_names,
    definition,
    known_metrics,
    metric_mode,
    result_names,
)
from lora_cli.metrics.word_tokenizers import bleu_words

BINARY = MetricContext(n_labels=2)
THREE = MetricContext(n_labels=3)
UNKNOWN = MetricContext()
TAGS = MetricContext(n_labels=3, multi_label=True)
TEXT_METRICS = ["exact_match", "bleu", "rouge"]

# true positives 2, false positives 1, false negatives 2, true negatives 1
BINARY_P = [1, 1, 1, 0, 0, 0]
BINARY_R = [1, 1, 0, 1, 1, 0]

# confusion, a row per true class: [2, 1, 0], [0, 1, 1], [0, 1, 4]
THREE_R = [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
THREE_P = [0, 0, 1, 1, 2, 2, 2, 2, 2, 1]


def compute_metrics(names, channel, predictions, references, context=UNKNOWN):
    metrics = MetricSet(names, channel, context)
    assert metrics.channels == {channel}
    metrics.add_batch(channel, predictions, references)
    results = metrics.compute()
    assert all(type(value) is float for value in results.values())
    return results


def compute_metric(name, channel, predictions, references, context=UNKNOWN):
    results = compute_metrics([name], channel, predictions, references, context)
    assert list(results) == [name]
    return results[name]


# ------------------------------------------------------------------------------------- labels


def test_binary_scores_are_those_of_label_1():
    names = ["accuracy", "precision", "recall", "f1", "balanced_accuracy", "matthews_correlation"]
    assert compute_metrics(names, "label", BINARY_P, BINARY_R, BINARY) == pytest.approx(
        {
            "accuracy": 3 / 6,
            "precision": 2 / 3,
            "recall": 2 / 4,
            "f1": 2 * 2 / (2 * 2 + 1 + 2),
            "balanced_accuracy": (2 / 4 + 1 / 2) / 2,
            "matthews_correlation": (2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3),
        }
    )


def test_binary_averages_are_explicit():
    f1_of_0 = 2 * 1 / (2 * 1 + 2 + 1)
    f1_of_1 = 4 / 7
    names = ["f1_macro", "f1_micro", "f1_weighted"]
    assert compute_metrics(names, "label", BINARY_P, BINARY_R, BINARY) == pytest.approx(
        {
            "f1_macro": (f1_of_0 + f1_of_1) / 2,
            "f1_micro": 3 / 6,
            "f1_weighted": (2 * f1_of_0 + 4 * f1_of_1) / 6,
        }
    )


@pytest.mark.parametrize(("i", "score"), [*enumerate(["precision", "recall", "f1"])])
def test_three_classes_are_averaged(i, score):
    by_class = {0: (1, 2 / 3, 4 / 5), 1: (1 / 3, 1 / 2, 2 / 5), 2: (4 / 5, 4 / 5, 4 / 5)}
    support = Counter(THREE_R)
    macro = sum(by_class[c][i] for c in by_class) / 3
    names = [score, f"{score}_macro", f"{score}_micro", f"{score}_weighted"]
    assert compute_metrics(names, "label", THREE_P, THREE_R, THREE) == pytest.approx(
        {
            score: macro,
            f"{score}_macro": macro,
            f"{score}_micro": 7 / 10,
            f"{score}_weighted": sum(support[c] * by_class[c][i] for c in by_class) / 10,
        }
    )


def test_matthews_of_three_classes():
    # Gorodkin's R_K as the correlation of one-hot matrices
    p, r = np.eye(3)[THREE_P], np.eye(3)[THREE_R]
    p, r = p - p.mean(0), r - r.mean(0)
    expected = (p * r).sum() / math.sqrt((p * p).sum() * (r * r).sum())
    assert compute_metric(
        "matthews_correlation", "label", THREE_P, THREE_R, THREE
    ) == pytest.approx(expected)


def test_balanced_accuracy_where_a_class_is_only_predicted():
    # recall of class 0: 1/2, of class 1: 1; class 2 has no references
    result = compute_metric("balanced_accuracy", "label", [0, 2, 1], [0, 0, 1], THREE)
    assert result == pytest.approx(0.75)


def test_several_labels_per_row():
    predictions = [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]
    references = [[1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]]
    f1 = [1, 0, 2 / 3]  # by label: tp 2 fp 0 fn 0; tp 0 fp 1 fn 1; tp 1 fp 0 fn 1
    names = ["accuracy", "f1", "f1_micro", "f1_weighted", "precision", "recall"]
    assert compute_metrics(
        names, "label", np.array(predictions), references, TAGS
    ) == pytest.approx(
        {
            "accuracy": 1 / 4,
            "f1": sum(f1) / 3,
            "f1_micro": 2 * 3 / (2 * 3 + 1 + 2),
            "f1_weighted": (2 * f1[0] + 1 * f1[1] + 2 * f1[2]) / 5,
            "precision": (1 + 0 + 1) / 3,
            "recall": (1 + 0 + 1 / 2) / 3,
        }
    )


def test_two_labels_per_row_are_not_binary():
    context = MetricContext(n_labels=2, multi_label=True)
    predictions, references = [[1, 0], [1, 0]], [[1, 1], [0, 1]]
    assert compute_metric("recall", "label", predictions, references, context) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["f1", "f1_macro", "f1_weighted"])
def test_one_multi_label_column_is_one_label(name):
    context = MetricContext(n_labels=1, multi_label=True)
    predictions, references = [[1], [1], [0], [0]], [[1], [0], [0], [0]]
    assert compute_metric(name, "label", predictions, references, context) == pytest.approx(2 / 3)


# --------------------------------------------------------------------------- values and sums


def test_regression():
    p, r = [1.0, 2.5, 3.0, 9.0], [1.0, 2.0, 5.0, 6.0]
    centred_p, centred_r = np.array(p) - np.mean(p), np.array(r) - np.mean(r)
    pearson = centred_p @ centred_r / np.linalg.norm(centred_p) / np.linalg.norm(centred_r)
    squares = 0 + 0.25 + 4 + 9
    names = ["pearson", "mse", "rmse", "mae"]
    assert compute_metrics(names, "value", p, r) == pytest.approx(
        {
            "pearson": pearson,
            "mse": squares / 4,
            "rmse": math.sqrt(squares / 4),
            "mae": (0 + 0.5 + 2 + 3) / 4,
        }
    )


def test_spearman_takes_mean_ranks_of_ties():
    # ranks of predictions 1 2.5 2.5 4, of references 1 3 2 4
    p, r = np.array([1, 2.5, 2.5, 4]) - 2.5, np.array([1, 3, 2, 4]) - 2.5
    expected = p @ r / math.sqrt((p @ p) * (r @ r))
    assert compute_metric("spearman", "value", [0, 5, 5, 1e6], [1, 3, 2, 4]) == pytest.approx(
        expected
    )


def test_values_keep_double_precision():
    # in float32 both are 2**24, and the error 0
    assert compute_metric("mae", "value", [16777217.0], [16777216.0]) == 1.0


def test_perplexity_is_over_all_tokens():
    result = compute_metric("perplexity", "nll", [2.0, 3.0, 0.0], [1, 4, 0])
    assert result == pytest.approx(math.exp(5 / 5))


def test_perplexity_overflows_to_infinity():
    assert compute_metric("perplexity", "nll", [1e6], [1]) == math.inf


def test_perplexity_without_trained_tokens():
    metrics = MetricSet(["perplexity"], "nll")
    metrics.add_batch("nll", [0.0], [0])
    with pytest.raises(LoraError, match=r"^error: nothing to evaluate: no row has a trained token"):
        metrics.compute()


# -------------------------------------------------------------------------------------- texts


def test_exact_match_strips_spaces():
    result = compute_metric("exact_match", "text", [" yes\n", "no", "Yes"], ["yes", "no ", "yes"])
    assert result == pytest.approx(2 / 3)


def corpus_bleu(predictions, references):
    """Return BLEU (Papineni et al. 2002) of texts split at spaces, 0 to 100."""
    log_precision = 0.0
    for n in range(1, 5):
        hits = total = 0
        for prediction, reference in zip(predictions, references, strict=True):
            grams = [
                Counter(tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1))
                for text in (prediction, reference)
            ]
            hits += sum((grams[0] & grams[1]).values())
            total += sum(grams[0].values())
        log_precision += math.log(hits / total) / 4
    lengths = [sum(len(text.split()) for text in texts) for texts in (predictions, references)]
    return 100 * math.exp(log_precision + min(0.0, 1 - lengths[1] / lengths[0]))


def test_bleu_is_a_corpus_score():
    predictions = ["the cat sat on the mat today", "there is a dog in my garden"]
    references = ["the cat sat on the red mat today", "there is a dog in our big garden"]
    expected = corpus_bleu(predictions, references)
    assert 0 < expected < 100
    assert compute_metric("bleu", "text", predictions, references) == pytest.approx(expected)


def test_bleu_does_not_warn_about_tokenized_texts():
    with TestCase().assertNoLogs(level="WARNING"):
        compute_metric("bleu", "text", ["a b c d ."] * 101, ["a b c d ."] * 101)


def test_rouge():
    # stems: the cat sit; first row: 1-grams 2 of 3 and 2 of 4, 2-grams 1 of 2 and 1 of 3; the
    # longest common subsequence is `the cat`. Second row: one line each is right, out of order:
    # as one text 2 of 4 words in order, line by line all 4
    results = compute_metrics(
        ["rouge"],
        "text",
        ["the cats run", "red sun\nblue moon"],
        ["the cat slept here", "blue moon\nred sun"],
    )
    first_1, first_2 = 2 * 2 / (3 + 4), 2 * 1 / (2 + 3)
    assert results == pytest.approx(
        {
            "rouge1": (first_1 + 1) / 2,
            "rouge2": (first_2 + 2 / 3) / 2,
            "rougeL": (first_1 + 0.5) / 2,
            "rougeLsum": (first_1 + 1) / 2,
        }
    )


# -------------------------------------------------------------------- texts of other languages


@pytest.mark.parametrize("language", TEXTS)
def test_identical_texts_are_perfect_in_every_language(language):
    text, _ = TEXTS[language]
    results = compute_metrics(TEXT_METRICS, "text", [text, text], [text, text])
    assert results == {
        "exact_match": 1.0,
        "bleu": pytest.approx(100),
        **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), pytest.approx(1.0)),
    }


@pytest.mark.parametrize("language", TEXTS)
def test_nearly_identical_texts_are_nearly_perfect(language):
    text, other = TEXTS[language]
    results = compute_metrics(TEXT_METRICS, "text", [other], [text])
    assert results["exact_match"] == 0.0
    assert 40 < results["bleu"] < 95
    assert 0.7 < results["rouge1"] < 1
    assert 0.6 < results["rouge2"] < results["rougeL"] + 1e-9


@pytest.mark.parametrize("language", UNSPACED)
def test_bleu_without_spaces_equals_sacrebleu_by_characters(language):
    import sacrebleu

    pairs = [TEXTS[language], TEXTS[language][::-1]]
    predictions, references = [p for _, p in pairs], [r for r, _ in pairs]
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize="char").score
    assert compute_metric("bleu", "text", predictions, references) == pytest.approx(expected)


def test_bleu_of_chinese_equals_sacrebleu_zh():
    import sacrebleu

    predictions = ["我有2台iPhone15，想退货。", TEXTS["Chinese"][1]]
    references = ["我买了2台iPhone 15，想要退货。", TEXTS["Chinese"][0]]
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score
    assert compute_metric("bleu", "text", predictions, references) == pytest.approx(expected)


@pytest.mark.parametrize("language", ["Korean", "Arabic", "Hindi", "German", "Russian"])
def test_bleu_with_spaces_equals_sacrebleu_by_default(language):
    import sacrebleu

    text, other = TEXTS[language]
    predictions, references = (
        [other, f'&quot;{text}&quot;, 3.5 "ok"!'],
        [text, f'"{other}" 3.5, "ok"?'],
    )
    expected = sacrebleu.corpus_bleu(predictions, [references]).score
    assert compute_metric("bleu", "text", predictions, references) == pytest.approx(expected)


def test_bleu_of_short_answers_uses_the_effective_order():
    import sacrebleu

    assert compute_metric("bleu", "text", ["返品", "yes"], ["返品", "yes"]) == pytest.approx(100)
    predictions, references = ["the red car", "no"], ["the blue car", "no"]
    expected = sacrebleu.corpus_bleu(predictions, [references], use_effective_order=True).score
    assert 0 < compute_metric("bleu", "text", predictions, references) == pytest.approx(expected)


def lcs(a, b):
    """Return the length of the longest common subsequence."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        longest = max(table[i, j + 1], table[i + 1, j])
        table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else longest
    return table[-1, -1]


@pytest.mark.parametrize("language", TEXTS)
def test_rouge_equals_an_independent_count(language):
    text, other = TEXTS[language]
    punctuation = "、。，？?"
    if language in UNSPACED:
        words = [[c for c in t if c not in punctuation] for t in (text, other)]
    elif language == "mixed":
        words = [
            re.findall("[a-z]+|[0-9]+|[ぁ-ヿ一-龥]", t.lower().replace("iphone", "iphon"))
            for t in (text, other)
        ]
    else:
        words = [text.split(), other.split()]
    reference, prediction = words
    common = (Counter(reference) & Counter(prediction)).total()
    results = compute_metrics(["rouge"], "text", [other], [text])
    assert results["rouge1"] == pytest.approx(2 * common / (len(reference) + len(prediction)))
    assert results["rougeL"] == pytest.approx(
        2 * lcs(reference, prediction) / (len(reference) + len(prediction))
    )


def test_rouge_of_english_equals_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    prediction = "The cats' houses were running-down (badly), e.g. in 2021_b!"
    reference = "A cat's house is running down badly, e.g. in 2021 b"
    expected = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(
        reference, prediction
    )
    results = compute_metrics(["rouge"], "text", [prediction], [reference])
    for key, score in expected.items():
        assert results[key] == pytest.approx(score.fmeasure)


def test_rouge_keeps_letters_beyond_ascii():
    results = compute_metrics(["rouge"], "text", ["sch n f r"], ["schön für"])
    assert set(results.values()) == {0.0}


@pytest.mark.parametrize("text", ["\U0001f44d", "!?", ":-)", "。", "\u2192 \u2713"])
def test_rouge_of_texts_without_words_compares_visible_characters(text):
    assert compute_metrics(["rouge"], "text", [text], [text])["rouge1"] == 1.0
    assert compute_metrics(["rouge"], "text", [text], ["x"])["rouge1"] == 0.0


@pytest.mark.parametrize("metric", ["exact_match", "bleu", "rouge"])
@pytest.mark.parametrize(
    "text", ["ガソリン代を返金", "é à la carte ça", "반품하고 싶은데 어떻게 하나요"]
)
def test_texts_are_compared_in_unicode_s_normal_form(metric, text):
    composed = compute_metrics([metric], "text", [text], [text])
    decomposed = compute_metrics([metric], "text", [unicodedata.normalize("NFD", text)], [text])
    assert decomposed == composed


@pytest.mark.slow
def test_a_corpus_may_mix_languages():
    import sacrebleu

    predictions, references = [b for _, b in TEXTS.values()], [a for a, _ in TEXTS.values()]
    tokenized = [bleu_words(t) for t in predictions], [bleu_words(t) for t in references]
    expected = sacrebleu.corpus_bleu(
        tokenized[0], [tokenized[1]], tokenize="none", force=True
    ).score
    together = compute_metrics(TEXT_METRICS, "text", predictions, references)
    assert together["bleu"] == pytest.approx(expected)
    per_row = [
        compute_metrics(["rouge"], "text", [p], [r])
        for p, r in zip(predictions, references, strict=True)
    ]
    assert together["rougeL"] == pytest.approx(np.mean([x["rougeL"] for x in per_row]))


# ----------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize(
    ("metric", "context", "text"),
    [
        ("f1", MetricContext(2, labels=("bad", "良い")), "of the label `良い`, the second of two"),
        ("precision", MetricContext(2), "of the label at position 1"),
        ("f1", MetricContext(3), "macro average, the mean over those of the 3 labels that occur"),
        ("f1", TAGS, "macro average, the mean over the 3 labels, each"),
        ("f1_micro", BINARY, "micro average"),
        ("recall_weighted", THREE, "weighted average"),
        ("f1", MetricContext(1, True, ("spam",)), "of the label `spam`"),
        ("accuracy", THREE, "share of rows whose label is right"),
        ("accuracy", TAGS, "of which every label is right (exact match)"),
        ("pearson", UNKNOWN, "not defined for fewer than two rows"),
        ("matthews_correlation", BINARY, "0 where answers or references are all the same"),
        ("perplexity", UNKNOWN, "per token"),
        ("bleu", UNKNOWN, "0 to 100; words by sacrebleu's tokenizer 13a, and one word for each"),
        ("./mine.py", UNKNOWN, "computed by the script `./mine.py`"),
        ("meteor", UNKNOWN, "computed by `evaluate`'s metric `meteor`"),
    ],
)
def test_metric_definitions(metric, context, text):
    (line,) = definition(metric, context).values()
    assert text in line


def test_every_result_of_every_metric_is_defined():
    for name in known_metrics():
        for context in (UNKNOWN, BINARY, THREE, TAGS):
            assert list(definition(name, context)) == list(result_names(name))
    assert "lower-case words" in definition("rouge", UNKNOWN)["rouge1"]


def test_the_definition_of_f1_names_the_right_label():
    from sklearn.metrics import f1_score

    context = MetricContext(2, labels=("no", "yes"))
    names_p, names_r = ([context.labels[i] for i in rows] for rows in (BINARY_P, BINARY_R))
    expected = f1_score(names_r, names_p, pos_label="yes")
    assert compute_metric("f1", "label", BINARY_P, BINARY_R, context) == pytest.approx(expected)
    assert "`yes`" in definition("f1", context)["f1"]


# ------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    ("channel", "names", "predictions", "references"),
    [
        ("label", ["f1", "matthews_correlation"], THREE_P, THREE_R),
        ("value", ["pearson", "spearman", "rmse"], [1.5, 2, 3, 0, 7], [1.0, 2, 2, 4, 9]),
        ("nll", ["perplexity"], [1.0, 2.0, 3.5, 0.5, 9.0], [1, 2, 3, 4, 5]),
        ("text", ["rouge", "bleu", "exact_match"], ["a b c d", "b", "c"], ["a b c d e", "b", "d"]),
    ],
)
def test_results_do_not_depend_on_the_batch_size(channel, names, predictions, references):
    together = compute_metrics(names, channel, predictions, references, THREE)
    metrics = MetricSet(names, channel, THREE)
    for start, stop in [(0, 1), (1, 1), (1, 3), (3, len(predictions))]:
        metrics.add_batch(channel, predictions[start:stop], references[start:stop])
    assert metrics.compute() == together


def test_compute_clears_the_rows():
    metrics = MetricSet(["accuracy"], "label", BINARY)
    metrics.add_batch("label", [1, 1], [0, 0])
    assert metrics.compute() == {"accuracy": 0.0}
    with pytest.raises(LoraError, match="nothing to evaluate"):
        metrics.compute()
    metrics.add_batch("label", [1], [1])
    assert metrics.compute() == {"accuracy": 1.0}


def test_channels_are_fed_separately():
    metrics = MetricSet(["perplexity", "exact_match", "perplexity"], "nll")
    assert metrics.channels == {"nll", "text"}
    metrics.add_batch("nll", [0.0], [3])
    metrics.add_batch("text", ["a"], ["a"])
    metrics.add_batch("label", [1], [0])  # no metric reads this channel
    assert metrics.compute() == {"perplexity": 1.0, "exact_match": 1.0}


def test_a_channel_without_rows_is_an_error():
    metrics = MetricSet(["perplexity", "exact_match"], "text")
    metrics.add_batch("nll", [0.0], [3])
    metrics.add_batch("text", [], [])
    with pytest.raises(LoraError, match="nothing to evaluate: metric `exact_match`"):
        metrics.compute()


def test_an_empty_set_of_metrics():
    metrics = MetricSet([], "label")
    metrics.add_batch("label", [1], [1])
    assert metrics.channels == set()
    assert metrics.compute() == {}


def test_tensors_and_arrays_are_accepted():
    import torch

    assert (
        compute_metric("accuracy", "label", torch.tensor([1, 0]), np.array([1, 1]), BINARY) == 0.5
    )
    assert compute_metric("mse", "value", torch.tensor([1.0, 3.0]), np.float32([1, 1])) == 2.0


def test_labels_must_be_integers():
    with pytest.raises(AssertionError):
        compute_metrics(["accuracy"], "label", [0.4, 0.6], [0, 1], BINARY)


def test_lengths_must_agree():
    with pytest.raises(AssertionError):
        compute_metrics(["accuracy"], "label", [0, 1], [0], BINARY)


# --------------------------------------------------------------------------- degenerate cases

LABEL_METRICS = [n for n in known_metrics() if not check_metric_names([n], "label")]
VALUE_METRICS = [n for n in known_metrics() if not check_metric_names([n], "value")]


@pytest.mark.slow_after(4)
@pytest.mark.parametrize("context", [BINARY, THREE, MetricContext()])
@pytest.mark.parametrize(
    ("predictions", "references", "right"),
    [([0, 0], [0, 0], 1.0), ([1], [1], 1.0), ([1, 1], [0, 0], 0.0), ([0, 0], [1, 1], 0.0)],
)
def test_one_class_only(context, predictions, references, right):
    results = compute_metrics(LABEL_METRICS, "label", predictions, references, context)
    assert results.pop("matthews_correlation") == 0.0
    if context == BINARY and references == predictions == [0, 0]:
        # label 1 does not occur, so its scores divide by zero
        assert {results.pop(name) for name in ("f1", "precision", "recall")} == {0.0}
    assert set(results.values()) == {right}


def test_many_classes_seen_once():
    rows = list(range(50))
    results = compute_metrics(LABEL_METRICS, "label", rows, rows, MetricContext(n_labels=50))
    assert list(results.values()) == pytest.approx([1.0] * len(LABEL_METRICS))


def test_rows_without_any_label():
    results = compute_metrics(["f1", "accuracy"], "label", [[0, 0, 0]] * 2, [[0, 0, 0]] * 2, TAGS)
    assert results == {"f1": 0.0, "accuracy": 1.0}


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]),
        ([0.1] * 3, [0.1] * 3),
        ([1.0], [1.0]),
        ([math.nan, 1.0, 2.0], [1.0, 2.0, 3.0]),
        ([math.inf, 1.0, 2.0], [1.0, 2.0, 3.0]),
    ],
)
def test_undefined_correlations_are_nan(predictions, references):
    results = compute_metrics(["pearson", "spearman"], "value", predictions, references)
    assert all(math.isnan(value) for value in results.values())


def test_correlation_of_two_rows():
    assert compute_metrics(
        ["pearson", "spearman"], "value", [1.0, 2.0], [5.0, 3.0]
    ) == pytest.approx({"pearson": -1.0, "spearman": -1.0})


def test_correlation_of_nearly_constant_values_does_not_warn():
    compute_metric("pearson", "value", [1e16, 1e16, 1e16 + 2], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("bad", "expected"), [(math.nan, math.nan), (math.inf, math.inf), (1e300, math.inf)]
)
def test_errors_of_a_model_that_diverged(bad, expected):
    results = compute_metrics(["mse", "rmse"], "value", [bad, 1.0], [1.0, 1.0])
    assert list(results.values()) == pytest.approx([expected, expected], nan_ok=True)


def test_perplexity_of_a_model_that_diverged():
    assert math.isnan(compute_metric("perplexity", "nll", [math.nan, 1.0], [1, 1]))


def test_empty_texts():
    results = compute_metrics(TEXT_METRICS, "text", ["", ""], ["", "a b c d"])
    assert results.pop("exact_match") == 0.5
    assert set(results.values()) == {0.0}


# -------------------------------------------------------------------------------------- names


def test_modes():
    lower = ["loss", "mse", "rmse", "mae", "perplexity", "no_answer", "wer", "cer"]
    lower += ["mel_l1", "length_error"]
    expected = dict.fromkeys(lower, "min")
    assert {name: metric_mode(name) for name in expected} == expected
    for name in set(known_metrics()) - set(expected) | {"rouge1", "rouge2", "rougeL", "rougeLsum"}:
        assert metric_mode(name) == "max", name
    assert metric_mode("word_errors") is None


def test_the_documented_metrics_are_known():
    documented = (
        "accuracy, f1, precision, recall, matthews_correlation, pearson, spearman, mse, "
        "perplexity, exact_match, bleu, chrf, rouge"
    )
    assert set(documented.split(", ")) <= set(known_metrics())


def test_unsuitable_metrics_are_reported_together():
    with pytest.raises(LoraError) as caught:
        MetricSet(
            ["bleu", "accuracy", "mse", "perplexity", "mse"],
            "label",
            location="evaluate.metrics (r:3)",
        )
    assert [problem.what for problem in caught.value.problems] == [
        "metric `bleu` compares texts; this task yields labels",
        "metric `mse` compares numbers; this task yields labels",
        "metric `perplexity` compares log-likelihoods; this task yields labels",
    ]
    assert {problem.at for problem in caught.value.problems} == {"evaluate.metrics (r:3)"}
    hint = caught.value.problems[0].hint
    assert hint is not None
    assert "f1_macro" in hint
    assert "rouge" not in hint


@pytest.mark.parametrize("channel", ["text", "nll"])
def test_language_models_yield_texts_and_likelihoods(channel):
    assert check_metric_names([*TEXT_METRICS, "perplexity"], channel) == []
    assert len(check_metric_names(["accuracy", "mse"], channel)) == 2


def test_metrics_that_need_one_label_per_row():
    problems = check_metric_names(LABEL_METRICS, "label", TAGS)
    assert [problem.what.split("`")[1] for problem in problems] == [
        "balanced_accuracy",
        "matthews_correlation",
    ]


def test_names_are_checked_without_a_task():
    assert check_metric_names(["accuracy", "bleu", "meteor", "user/metric"]) == []


@pytest.mark.parametrize("name", ["./absent.py", "absent.py", "/absent", "~/absent.py"])
def test_a_missing_script(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (problem,) = check_metric_names([name], "label")
    assert problem.what == f"there is no metric script `{name}`"
    absolute = name.startswith(("/", "~"))
    assert problem.hint == (
        "is the path right?" if absolute else f"the path starts from {tmp_path}"
    )


@pytest.mark.parametrize(("name", "package"), [("bleu", "sacrebleu"), ("rouge", "rouge_score")])
def test_a_missing_extra(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LoraError) as caught:
        MetricSet(["exact_match", name], "text")
    assert str(caught.value) == (
        f"error: metric `{name}` needs the package `{package}`, which is not installed\n"
        "  at evaluate.metrics\n"
        "hint: pip install 'lora-cli[text-metrics]'"
    )


def test_names_are_checked_without_heavy_imports():
    code = (
        "import sys, lora_cli.metrics as m\n"
        "assert m.check_metric_names(['bleu', 'f1', 'meteor'], 'text')\n"
        "assert m.metric_mode('f1') == 'max'\n"
        "heavy = 'evaluate datasets sklearn scipy sacrebleu rouge_score torch'.split()\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout == "[]\n"


# ------------------------------------------------------------------- metrics that are not built in

SCRIPT = """
import datasets
import evaluate

print("imported")

class Mine(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="",
            features=datasets.Features({FEATURES}),
        )

    def _compute(self, predictions, references):
        print("computed")
        hits = [p == r for p, r in zip(predictions, references)]
        return {RESULT}
"""
LABELS = '{"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}'


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Block the network, and let `evaluate` cache scripts in the test's folder."""
    import socket

    import evaluate

    def reject(*args: object, **kwargs: object) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)  # read at import
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(evaluate.config, "DOWNLOADED_EVALUATE_PATH", tmp_path / "downloads")
    monkeypatch.setattr(socket.socket, "connect", reject)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


@pytest.fixture
def script(offline, tmp_path):
    def write(result, features=LABELS, name="mine.py"):
        code = SCRIPT.replace("{FEATURES}", features).replace("{RESULT}", result)
        (tmp_path / name).write_text(code)
        return f"./{name}"

    return write


def test_a_custom_script(script, capsys):
    name = script('{"hits": sum(hits), "share": sum(hits) / len(hits), "rows": hits}')
    metrics = MetricSet(["accuracy", name], "label", THREE)
    for _ in range(2):
        metrics.add_batch("label", [0, 1], [0, 1])
        metrics.add_batch("label", [2], [0])
        results = metrics.compute()
        assert results == pytest.approx({"accuracy": 2 / 3, "hits": 2.0, "share": 2 / 3})
        assert all(type(value) is float for value in results.values())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.split() == ["imported", "computed", "computed"]


def test_a_script_does_not_replace_the_loss(script):
    path = script('{"loss": 7.0}')
    assert compute_metrics([path], "label", [1], [1]) == {"mine_loss": 7.0}


def test_a_script_in_the_home_folder(script, tmp_path, monkeypatch):
    script('{"a": 1.0}', name="at_home.py")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compute_metrics(["~/at_home.py"], "label", [1], [1]) == {"a": 1.0}


def test_results_of_the_same_name_are_prefixed(script):
    name = script('{"accuracy": 0.25}')
    results = compute_metrics(["accuracy", name], "label", [1], [1], BINARY)
    assert results == {"accuracy": 1.0, "mine_accuracy": 0.25}


def test_results_are_converted_to_floats(script):
    name = script(
        '{"a": __import__("numpy").float32(0.5), "b": __import__("numpy").array(2), "c": True}'
    )
    assert compute_metrics([name], "label", [1], [1]) == {"a": 0.5, "b": 2.0, "c": 1.0}


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ('{"by_class": [0.5, 1.0]}', "ValueError: it gives no single number, only by_class"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_script_that_fails(script, result, reason):
    metrics = MetricSet([script(result)], "label")
    metrics.add_batch("label", [1], [1])
    with pytest.raises(LoraError) as caught:
        metrics.compute()
    assert caught.value.problems[0].what == f"metric `./mine.py` failed: {reason}"


def test_a_script_with_incompatible_rows(script):
    metrics = MetricSet([script('{"a": 1.0}')], "text")
    with pytest.raises(
        LoraError, match=r"metric `\./mine\.py` failed: ValueError: invalid literal"
    ):
        metrics.add_batch("text", ["not a number"], ["nor this"])


def test_a_script_with_other_inputs(script):
    features = '{"predictions": datasets.Value("string"), "sources": datasets.Value("string")}'
    with pytest.raises(LoraError, match="expects predictions, sources; a task yields"):
        MetricSet([script('{"a": 1.0}', features)], "text")


def test_a_script_with_a_syntax_error(script):
    with pytest.raises(LoraError, match=r"`\./mine\.py` cannot be loaded: SyntaxError"):
        MetricSet([script('{"a": ')], "label")


def test_unknown_names_are_reported_with_all_other_problems(offline):
    with pytest.raises(LoraError) as caught:
        MetricSet(["acuracy", "bleu", "user/metric"], "label")
    acuracy, bleu, hub = caught.value.problems
    assert "compares texts" in bleu.what
    assert acuracy.what == (
        "unknown metric `acuracy`: it is not built in, and `evaluate` finds none"
    )
    assert acuracy.at == "evaluate.metrics"
    assert acuracy.hint is not None
    assert acuracy.hint.startswith("did you mean `accuracy`? (built in: accuracy, ")
    assert "unknown metric `user/metric`" in hub.what


def test_no_file_is_left_behind(script, tmp_path, monkeypatch):
    import evaluate

    scratch, cache = tmp_path / "scratch", tmp_path / "cache"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", cache)
    metrics = MetricSet(["accuracy", script('{"a": 1.0}')], "label", BINARY)
    metrics.add_batch("label", [1], [1])
    assert [path for path in scratch.rglob("*") if path.is_file()] == []
    metrics.compute()
    del metrics
    gc.collect()
    assert list(scratch.iterdir()) == []
    assert not cache.exists()


def test_the_best_of_several_references_counts():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    predictions = ["a cat sat on the mat", "the dog runs very fast"]
    references = [["the cat sat on a mat", "a cat sat on the mat"], ["the dog runs quickly today"]]
    streams = [["the cat sat on a mat", "the dog runs quickly today"],
               ["a cat sat on the mat", None]]  # fmt: skip
    context = MetricContext(several_references=True)
    metrics = MetricSet(["bleu", "chrf", "rouge", "exact_match"], "text", context)
    metrics.add_batch("text", predictions[:1], references[:1])
    metrics.add_batch("text", predictions[1:], references[1:])
    results = metrics.compute()
    expected = sacrebleu.corpus_bleu(predictions, streams, use_effective_order=True).score
    assert results["bleu"] == pytest.approx(expected)
    assert results["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, streams).score)
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    scores = [
        max(scorer.score(reference, text)["rouge1"].fmeasure for reference in row_references)
        for text, row_references in zip(predictions, references, strict=True)
    ]
    assert results["rouge1"] == pytest.approx(sum(scores) / 2)
    assert results["exact_match"] == 0.5
    assert "nrefs:var" in definition("chrf", context)["chrf"]
    assert "nrefs:1|" in definition("bleu", MetricContext())["bleu"]
