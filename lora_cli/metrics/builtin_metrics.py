"""The built-in metrics: a plain function for each, and the table `SPECS` that lists them.

To add a metric, write its function, add a line to `SPECS`, and describe it in
`metric_definitions.py`. Libraries are imported inside the functions that need them, so that metric
names can be checked quickly.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lora_cli.errors import LoraError
from lora_cli.metrics.box_scores import BOX_METRICS, box_scores
from lora_cli.metrics.entity_scores import entity_scores
from lora_cli.metrics.final_answers import final_answer, is_same_answer
from lora_cli.metrics.retrieval_scores import RETRIEVAL_METRICS, retrieval_scores
from lora_cli.metrics.speech_scores import length_error, mel_error, stop_accuracy
from lora_cli.metrics.word_tokenizers import bleu_words, canonical, rouge_words

Channel = Literal[
    "label", "value", "text", "nll", "tags", "ranks", "pictures", "boxes", "speech", "lengths"
]  # fmt: skip
"""The kind of prediction and reference that a metric compares for each evaluated row.

`label`: class indices, or 0/1 lists of length `n_labels` if a row can have several labels;
`value`: floats;
`text`: strings; a reference may be a list of several correct answers;
`nll`: a row's sum of negative log-likelihoods in nats, and its number of trained tokens;
`tags`: lists of tags, one per word;
`ranks`: the ranks of the relevant texts among the first ten search results, and the number of
relevant texts;
`boxes`: lists of predicted boxes (x0, y0, x1, y1, score, label) and of true boxes
(x0, y0, x1, y1, label, is_crowd), one list per image;
`pictures`: nothing, because no metric compares images;
`speech`: the spectrogram error and the correct stop decisions of a row, and the totals that they
are divided by (see `speech_scores`);
`lengths`: the number of frames that were generated, and that of the recording.
"""
Rows = list[Any]
Mode = Literal["min", "max"]


@dataclass(frozen=True)
class MetricContext:
    """What a metric needs to know about the task, such as its classes."""

    n_labels: int | None = None
    multi_label: bool = False
    labels: tuple[str, ...] = ()
    several_references: bool = False
    """Whether a row can have several correct texts; an answer has to match one of them."""
    normalizer: str = ""
    """A description of how texts are normalised before they are compared; empty if they are not."""
    answer_pattern: str | None = None
    """A regular expression for the final answer in a text, which `exact_match` then compares."""
    max_answers: int | None = None
    """The maximum number of rows of a split for which answers are generated."""


EMPTY_CONTEXT = MetricContext()


@dataclass(frozen=True)
class MetricSpec:
    """A built-in metric.

    Args:
        channel: The kind of predictions and references that it compares.
        compute: Takes the predictions and references of at least one row; returns one value, or
            several by name.
        mode: Whether a lower or a higher value is better.
        results: The names of its values, if it returns several.
        package: The package that it needs, if that is an optional dependency.
        extra: The extra of this project that installs the package.
        multi_label: Whether it is defined for rows with several labels.
    """

    channel: Channel
    compute: Callable[[Rows, Rows, MetricContext], float | dict[str, float]]
    mode: Mode = "max"
    results: tuple[str, ...] = ()
    package: str | None = None
    extra: str = "text-metrics"
    multi_label: bool = True


# ------------------------------------------- the metrics; p: predictions, r: references


def _accuracy(p: Rows, r: Rows, context: MetricContext) -> float:
    """Return the fraction of correct rows. If a row has several labels, all must be correct."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(r, p))


def _balanced_accuracy(p: Rows, r: Rows, context: MetricContext) -> float:
    """Return the mean recall of the classes that the references contain."""
    from sklearn.metrics import recall_score

    # not balanced_accuracy_score, which warns if a predicted class is in no reference
    return float(recall_score(r, p, labels=np.unique(r), average="macro"))


def _precision_recall_f1(
    p: Rows, r: Rows, context: MetricContext, score: str, average: str
) -> float:
    """Return one of the three scores; 0 where it would divide by 0.

    Without an `average`, return the score of label 1 if each row has one of two labels, and the
    macro average otherwise. Classes that are in neither predictions nor references are left out.
    """
    from sklearn.metrics import precision_recall_fscore_support

    binary = context.n_labels == 2 and not context.multi_label and not average
    if context.multi_label and len(r[0]) == 1:
        # scikit-learn would read one column as two classes; here 1 is the label, 0 its absence
        binary, p, r = True, [row[0] for row in p], [row[0] for row in r]
    labels = [1] if binary else None
    scores = precision_recall_fscore_support(
        r, p, labels=labels, average=average or "macro", zero_division=0
    )
    return float(scores[("precision", "recall", "f1").index(score)])


def _matthews(p: Rows, r: Rows, context: MetricContext) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len({*p, *r}) == 1:
        return 0.0  # as scikit-learn returns, but without its warning
    return float(matthews_corrcoef(r, p))


def _correlation(p: Rows, r: Rows, context: MetricContext, ranks: bool) -> float:
    """Return Pearson's r, or Spearman's rho if `ranks`.

    NaN for fewer than two rows, constant values, or values that are not finite.
    """
    from scipy import stats

    if len(p) < 2 or not (np.isfinite(p).all() and np.isfinite(r).all()):
        return math.nan
    if ranks:
        p, r = stats.rankdata(p), stats.rankdata(r)
    with warnings.catch_warnings():
        # raised for values that are constant up to rounding
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        return float(stats.pearsonr(p, r).statistic)


def _mean_error(p: Rows, r: Rows, context: MetricContext, power: int, root: bool = False) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # a diverged model yields inf or nan
        mean = float(np.mean(np.abs(np.asarray(p) - r) ** power))
    return math.sqrt(mean) if root else mean


def _perplexity(nlls: Rows, n_tokens: Rows, context: MetricContext) -> float:
    """Return exp(total nll / total tokens), which is not the mean of the rows' perplexities."""
    if sum(n_tokens) == 0:
        raise LoraError("nothing to evaluate: no row has a trained token (metric `perplexity`)")
    try:
        return math.exp(sum(nlls) / sum(n_tokens))
    except OverflowError:
        return math.inf


def _entity_scores(p: Rows, r: Rows, context: MetricContext) -> dict[str, float]:
    return entity_scores(p, r)


def _retrieval(p: Rows, r: Rows, context: MetricContext) -> dict[str, float]:
    return retrieval_scores(p, r)


def _box_scores(p: Rows, r: Rows, context: MetricContext) -> dict[str, float]:
    return box_scores(p, r, context.labels)


def references_of(references: str | list[str]) -> list[str]:
    """Return the correct answers of a row as a list."""
    return [references] if isinstance(references, str) else references


def is_exact_match(
    prediction: str, references: str | list[str], context: MetricContext = EMPTY_CONTEXT
) -> bool:
    """Return whether a text equals a reference, up to surrounding spaces and Unicode normalisation.

    If the task has an answer pattern, final answers are compared instead; a reference without a
    match is compared as a whole.
    """
    correct, pattern = references_of(references), context.answer_pattern
    if pattern is not None:
        answer = final_answer(pattern, prediction)
        finals = [final_answer(pattern, text) for text in correct]
        known = [final for final in finals if final is not None]
        if answer is not None and any(is_same_answer(answer, final) for final in known):
            return True
        correct = [text for text, final in zip(correct, finals, strict=True) if final is None]
    return canonical(prediction).strip() in {canonical(text).strip() for text in correct}


def _exact_match(p: Rows, r: Rows, context: MetricContext) -> float:
    matches = [is_exact_match(text, refs, context) for text, refs in zip(p, r, strict=True)]
    return float(np.mean(matches))


def lacks_answer(
    prediction: str, references: str | list[str], context: MetricContext = EMPTY_CONTEXT
) -> bool | None:
    """Return whether a text lacks a final answer; None if no reference has one either."""
    pattern = context.answer_pattern
    if pattern is None or all(
        final_answer(pattern, text) is None for text in references_of(references)
    ):
        return None
    return final_answer(pattern, prediction) is None


def _no_answer(p: Rows, r: Rows, context: MetricContext) -> float:
    lacking = [lacks_answer(text, refs, context) for text, refs in zip(p, r, strict=True)]
    known = [value for value in lacking if value is not None]
    return float(np.mean(known)) if known else math.nan


def _bleu(p: Rows, r: Rows, context: MetricContext) -> float:
    """Return corpus BLEU, 0 to 100, as sacrebleu reports it."""
    import sacrebleu

    predictions = [bleu_words(text) for text in p]
    references = [[bleu_words(text) for text in references_of(texts)] for texts in r]
    # use_effective_order: texts of fewer than four words have no 4-grams to count
    # force: do not warn about texts that look tokenized
    score = sacrebleu.corpus_bleu(
        predictions, _streams(references), tokenize="none", force=True, use_effective_order=True
    )
    return float(score.score)


def _streams(references: list[list[str]]) -> Any:
    """Transpose references for sacrebleu: all first references, all second ones, and so on."""
    return list(itertools.zip_longest(*references)) if references else []


def _chrf(p: Rows, r: Rows, context: MetricContext) -> float:
    """Return corpus chrF2, 0 to 100, as sacrebleu reports it."""
    import sacrebleu

    predictions = [canonical(text) for text in p]
    references = [[canonical(text) for text in references_of(texts)] for texts in r]
    return float(sacrebleu.corpus_chrf(predictions, _streams(references)).score)


class _RougeWords:
    """A tokenizer with the interface of `rouge_score`."""

    def tokenize(self, text: str) -> list[str]:
        return rouge_words(text)


_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def _rouge(p: Rows, r: Rows, context: MetricContext) -> dict[str, float]:
    """Return the mean F1 of each ROUGE variant over rows, 0 to 1.

    rougeLsum treats each line as a sentence. With several references, the best F1 counts.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(_ROUGE, tokenizer=_RougeWords())
    rows = [scorer.score_multi(references_of(refs), text) for text, refs in zip(p, r, strict=True)]
    return {key: float(np.mean([row[key].fmeasure for row in rows])) for key in _ROUGE}


def _error_rate(p: Rows, r: Rows, context: MetricContext, chars: bool) -> float:
    """Return the word or character error rate over all rows.

    With several references, the one with the lowest error rate counts.
    """
    import jiwer

    align = jiwer.process_characters if chars else jiwer.process_words
    n_edits = n_units = 0
    for prediction, references in zip(p, r, strict=True):
        rows = [align(canonical(text), canonical(prediction)) for text in references_of(references)]
        counts = [
            (x.substitutions + x.deletions + x.insertions, x.hits + x.substitutions + x.deletions)
            for x in rows
        ]
        edits, units = min(counts, key=lambda count: count[0] / max(count[1], 1))
        n_edits, n_units = n_edits + edits, n_units + units
    return n_edits / max(n_units, 1)


SPECS: dict[str, MetricSpec] = {
    "accuracy": MetricSpec("label", _accuracy),
    "balanced_accuracy": MetricSpec("label", _balanced_accuracy, multi_label=False),
    **{
        f"{score}_{average}".rstrip("_"): MetricSpec(
            "label", functools.partial(_precision_recall_f1, score=score, average=average)
        )
        for score in ("f1", "precision", "recall")
        for average in ("", "macro", "micro", "weighted")
    },
    "matthews_correlation": MetricSpec("label", _matthews, multi_label=False),
    "pearson": MetricSpec("value", functools.partial(_correlation, ranks=False)),
    "spearman": MetricSpec("value", functools.partial(_correlation, ranks=True)),
    "mse": MetricSpec("value", functools.partial(_mean_error, power=2), "min"),
    "rmse": MetricSpec("value", functools.partial(_mean_error, power=2, root=True), "min"),
    "mae": MetricSpec("value", functools.partial(_mean_error, power=1), "min"),
    "perplexity": MetricSpec("nll", _perplexity, "min"),
    "exact_match": MetricSpec("text", _exact_match),
    "no_answer": MetricSpec("text", _no_answer, "min"),
    "bleu": MetricSpec("text", _bleu, package="sacrebleu"),
    "chrf": MetricSpec("text", _chrf, package="sacrebleu"),
    "rouge": MetricSpec("text", _rouge, results=_ROUGE, package="rouge_score"),
    "wer": MetricSpec(
        "text", functools.partial(_error_rate, chars=False), "min", package="jiwer", extra="audio"
    ),
    "cer": MetricSpec(
        "text", functools.partial(_error_rate, chars=True), "min", package="jiwer", extra="audio"
    ),
    "seqeval": MetricSpec(
        "tags", _entity_scores, results=("f1", "precision", "recall"), package="seqeval",
        extra="ner",
    ),
    "retrieval": MetricSpec("ranks", _retrieval, results=RETRIEVAL_METRICS),
    "coco": MetricSpec(
        "boxes", _box_scores, results=BOX_METRICS, package="faster_coco_eval", extra="detection"
    ),
    "mel_l1": MetricSpec("speech", lambda p, r, context: mel_error(p, r), "min"),
    "stop_accuracy": MetricSpec("speech", lambda p, r, context: stop_accuracy(p, r)),
    "length_error": MetricSpec("lengths", lambda p, r, context: length_error(p, r), "min"),
}  # fmt: skip
