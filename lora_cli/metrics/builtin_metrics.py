"""The built-in metrics: a plain function for each, and the table `SPECS` that lists them.

To add a metric, write its function, add a line to `SPECS`, and say in `metric_definitions.py` what
it measures. A library that a metric needs is imported inside its function, so that the names can be
checked quickly.
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
from lora_cli.metrics.box_scores import BOXES, box_scores
from lora_cli.metrics.entity_scores import entity_scores
from lora_cli.metrics.final_answers import final_answer, is_same_answer
from lora_cli.metrics.retrieval_scores import RETRIEVAL, retrieval_scores
from lora_cli.metrics.speech_scores import length_error, mel_error, stop_accuracy
from lora_cli.metrics.word_tokenizers import bleu_words, canonical, rouge_words

Channel = Literal[
    "label", "value", "text", "nll", "tags", "ranks", "pictures", "boxes", "speech", "lengths"
]  # fmt: skip
"""What a metric reads of each evaluated row, as prediction and reference.

`label`: class indices, or 0/1 lists of length `n_labels` if a row can have several labels;
`value`: floats;
`text`: strings; a reference may be a list of several right answers;
`nll`: a row's sum of negative log-likelihoods in nats, and its number of trained tokens;
`tags`: lists of tags, one for each word;
`ranks`: the ranks of right answers among the first ten that a search finds, and how many right
answers there are;
`boxes`: lists of (x0, y0, x1, y1, score, label) that were found in a picture, and of the boxes
(x0, y0, x1, y1, label, whether it is a crowd) that are in it;
`pictures`: nothing, because no metric reads pictures;
`speech`: the errors of a spectrogram and of its end, and how many could be (see `speech_scores`);
`lengths`: the frames that were generated, and those of the recording.
"""
Rows = list[Any]
Mode = Literal["min", "max"]


@dataclass(frozen=True)
class MetricContext:
    """What a metric needs to know of the task, such as its classes."""

    n_labels: int | None = None
    multi_label: bool = False
    labels: tuple[str, ...] = ()
    several_references: bool = False
    """Whether a row can have several right texts; an answer has to match one of them."""
    normalizer: str = ""
    """How texts are changed before they are compared, in words; empty if they are not."""
    answer_pattern: str | None = None
    """A regular expression for the final answer in a text, which `exact_match` then compares."""
    most_answers: int | None = None
    """The number of rows of a split for which answers are generated at most."""


NOTHING_KNOWN = MetricContext()


@dataclass(frozen=True)
class MetricSpec:
    """A built-in metric.

    Args:
        channel: What it reads of each row.
        compute: Takes the predictions and references of at least one row; returns one number, or
            several by name.
        mode: Whether a lower or a higher value is better.
        results: The names of its numbers, if it gives several.
        package: The package that it needs, if that is not always installed.
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


# ---------------------------------------------------------- the metrics; p predicted, r reference


def _accuracy(p: Rows, r: Rows, context: MetricContext) -> float:
    """Return the fraction of right rows. If a row has several labels, all have to be right."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(r, p))


def _balanced_accuracy(p: Rows, r: Rows, context: MetricContext) -> float:
    """Return the mean recall of the classes that the references contain."""
    from sklearn.metrics import recall_score

    # not balanced_accuracy_score: it warns if a class is predicted that no reference has
    return float(recall_score(r, p, labels=np.unique(r), average="macro"))


def _precision_recall_f1(
    p: Rows, r: Rows, context: MetricContext, score: str, average: str
) -> float:
    """Return one score, 0 where it would divide by 0.

    Without an `average` it is that of label 1 if a row has one of two labels, else macro. Classes
    that neither predictions nor references contain take no part in an average.
    """
    from sklearn.metrics import precision_recall_fscore_support

    binary = context.n_labels == 2 and not context.multi_label and not average
    if context.multi_label and len(r[0]) == 1:
        # to scikit-learn one column is two classes; here 1 is the label, and 0 its absence
        binary, p, r = True, [row[0] for row in p], [row[0] for row in r]
    labels = [1] if binary else None
    scores = precision_recall_fscore_support(
        r, p, labels=labels, average=average or "macro", zero_division=0
    )
    return float(scores[("precision", "recall", "f1").index(score)])


def _matthews(p: Rows, r: Rows, context: MetricContext) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len({*p, *r}) == 1:
        return 0.0  # scikit-learn's own value, without its warning
    return float(matthews_corrcoef(r, p))


def _correlation(p: Rows, r: Rows, context: MetricContext, ranks: bool) -> float:
    """Return Pearson's r (of the ranks: Spearman's), nan for one row, constants, or inf or nan."""
    from scipy import stats

    if len(p) < 2 or not (np.isfinite(p).all() and np.isfinite(r).all()):
        return math.nan
    if ranks:
        p, r = stats.rankdata(p), stats.rankdata(r)
    with warnings.catch_warnings():
        # constant, or so near to it that rounding decides
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        return float(stats.pearsonr(p, r).statistic)


def _mean_error(p: Rows, r: Rows, context: MetricContext, power: int, root: bool = False) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # a model that diverged has inf or nan
        mean = float(np.mean(np.abs(np.asarray(p) - r) ** power))
    return math.sqrt(mean) if root else mean


def _perplexity(nlls: Rows, n_tokens: Rows, context: MetricContext) -> float:
    """Return exp(total nll / total tokens): not the mean of the rows' perplexities."""
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


def references_of(wanted: str | list[str]) -> list[str]:
    """Return the right answers to a row, of which there may be several."""
    return [wanted] if isinstance(wanted, str) else wanted


def is_exact_match(
    said: str, wanted: str | list[str], context: MetricContext = NOTHING_KNOWN
) -> bool:
    """Return whether a text is a right one but for spaces around it and Unicode's form.

    Where the task has a pattern of final answers, these are compared; a reference in which it finds
    none is compared as a whole.
    """
    right, pattern = references_of(wanted), context.answer_pattern
    if pattern is not None:
        answer = final_answer(pattern, said)
        finals = [final_answer(pattern, text) for text in right]
        answers = [one for one in finals if one is not None]
        if answer is not None and any(is_same_answer(answer, one) for one in answers):
            return True
        right = [text for text, found in zip(right, finals, strict=True) if found is None]
    return canonical(said).strip() in {canonical(text).strip() for text in right}


def _exact_match(p: Rows, r: Rows, context: MetricContext) -> float:
    matches = [is_exact_match(said, want, context) for said, want in zip(p, r, strict=True)]
    return float(np.mean(matches))


def lacks_answer(
    said: str, wanted: str | list[str], context: MetricContext = NOTHING_KNOWN
) -> bool | None:
    """Return whether a text has no final answer; None where no reference has one either."""
    pattern = context.answer_pattern
    if pattern is None or all(
        final_answer(pattern, text) is None for text in references_of(wanted)
    ):
        return None
    return final_answer(pattern, said) is None


def _no_answer(p: Rows, r: Rows, context: MetricContext) -> float:
    found = [lacks_answer(said, want, context) for said, want in zip(p, r, strict=True)]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else math.nan


def _bleu(p: Rows, r: Rows, context: MetricContext) -> float:
    """Return corpus BLEU, 0 to 100, as sacrebleu reports it."""
    import sacrebleu

    said = [bleu_words(text) for text in p]
    wanted = [[bleu_words(text) for text in references_of(texts)] for texts in r]
    # effective order: where no answer has four words, shorter runs are all that can be counted
    # force: no warning about texts that look tokenized
    found = sacrebleu.corpus_bleu(
        said, _streams(wanted), tokenize="none", force=True, use_effective_order=True
    )
    return float(found.score)


def _streams(wanted: list[list[str]]) -> Any:
    """Return references as sacrebleu takes them: all first ones, all second ones, or None."""
    return list(itertools.zip_longest(*wanted)) if wanted else []


def _chrf(p: Rows, r: Rows, context: MetricContext) -> float:
    """Return corpus chrF2, 0 to 100, as sacrebleu reports it."""
    import sacrebleu

    said = [canonical(text) for text in p]
    wanted = [[canonical(text) for text in references_of(texts)] for texts in r]
    return float(sacrebleu.corpus_chrf(said, _streams(wanted)).score)


class _RougeWords:
    """A tokenizer as `rouge_score` takes it."""

    def tokenize(self, text: str) -> list[str]:
        return rouge_words(text)


_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def _rouge(p: Rows, r: Rows, context: MetricContext) -> dict[str, float]:
    """Return the means over rows of ROUGE's F1, 0 to 1; rougeLsum takes a line for a sentence.

    Of several references it is the one with the highest F1.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(_ROUGE, tokenizer=_RougeWords())
    rows = [scorer.score_multi(references_of(w), said) for said, w in zip(p, r, strict=True)]
    return {key: float(np.mean([row[key].fmeasure for row in rows])) for key in _ROUGE}


def _error_rate(p: Rows, r: Rows, context: MetricContext, letters: bool) -> float:
    """Return the edits that make the answers right, over the words or letters of the references.

    Of several references it is the one that takes the smallest share of edits.
    """
    import jiwer

    align = jiwer.process_characters if letters else jiwer.process_words
    n_edits = n_units = 0
    for said, wanted in zip(p, r, strict=True):
        rows = [align(canonical(text), canonical(said)) for text in references_of(wanted)]
        counts = [
            (x.substitutions + x.deletions + x.insertions, x.hits + x.substitutions + x.deletions)
            for x in rows
        ]
        edits, units = min(counts, key=lambda one: one[0] / max(one[1], 1))
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
        "text", functools.partial(_error_rate, letters=False), "min", package="jiwer", extra="audio"
    ),
    "cer": MetricSpec(
        "text", functools.partial(_error_rate, letters=True), "min", package="jiwer", extra="audio"
    ),
    "seqeval": MetricSpec(
        "tags", _entity_scores, results=("f1", "precision", "recall"), package="seqeval",
        extra="ner",
    ),
    "retrieval": MetricSpec("ranks", _retrieval, results=RETRIEVAL),
    "coco": MetricSpec(
        "boxes", _box_scores, results=BOXES, package="faster_coco_eval", extra="detection"
    ),
    "mel_l1": MetricSpec("speech", lambda p, r, context: mel_error(p, r), "min"),
    "stop_accuracy": MetricSpec("speech", lambda p, r, context: stop_accuracy(p, r)),
    "length_error": MetricSpec("lengths", lambda p, r, context: length_error(p, r), "min"),
}  # fmt: skip
