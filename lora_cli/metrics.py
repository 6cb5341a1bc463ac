"""Metrics that work without a network, and any other that `evaluate` can load.

The built-in ones are plain functions of two lists, in the table `_SPECS`; one subclass of
`evaluate.Metric` runs them all. Any other name goes to `evaluate.load`: a script (`./mine.py`), a
name on the Hub (`user/metric`), or one of Hugging Face's own (`meteor`).

A task reduces its outputs to one small prediction per row (a class, a number, a text, a sum of
negative log-likelihoods) before they come here, so memory grows with rows, never with logits. Rows
are kept in `evaluate`'s Arrow buffers in memory: no cache file that two runs could fight over.

`import evaluate` takes seconds, so this module imports it, and the libraries that compute, only
when a `MetricSet` is made. `check_metric_names` and `metric_mode` answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import numbers
import os.path
import shutil
import sys
import tempfile
import uuid
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_cli.errors import LoraError, Problem, did_you_mean

Channel = Literal["label", "value", "text", "nll"]
"""What a metric reads of each evaluated row, as prediction and reference:

- `label`: class indices; with several labels per row, 0/1 lists of length `n_labels`
- `value`: floats (regression)
- `text`: strings
- `nll`: the row's sum of negative log-likelihoods in nats, and its number of trained tokens
"""

# the channels a task can feed, by its default one: a language model writes and scores
_FEEDS: dict[Channel, set[Channel]] = {
    "label": {"label"},
    "value": {"value"},
    "text": {"text", "nll"},
    "nll": {"text", "nll"},
}
_NOUNS = {"label": "labels", "value": "numbers", "text": "texts", "nll": "log-likelihoods"}


@dataclass(frozen=True)
class MetricContext:
    """What a metric must know of the task.

    Args:
        n_labels: Number of classes; None if unknown, or if there are none.
        multi_label: Whether a row may have several labels.
    """

    n_labels: int | None = None
    multi_label: bool = False


@dataclass(frozen=True)
class MetricSpec:
    """A built-in metric.

    Args:
        channel: What it reads.
        compute: Takes all predictions and references, at least one row; returns one number, or
            several by name.
        mode: Whether less or more is better.
        results: Names of its numbers, where it gives several.
        package: What it needs of the extra `text-metrics`.
        multi_label: Whether it is defined for rows with several labels.
    """

    channel: Channel
    compute: Callable[[list[Any], list[Any], MetricContext], float | dict[str, float]]
    mode: Literal["min", "max"] = "max"
    results: tuple[str, ...] = ()
    package: str | None = None
    multi_label: bool = True


# ------------------------------------------------------------------------------------- labels


def _accuracy(predictions: list[Any], references: list[Any], context: MetricContext) -> float:
    """Return the fraction of right rows; with several labels a row is right if all of them are."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(references, predictions))


def _balanced_accuracy(p: list[Any], references: list[Any], context: MetricContext) -> float:
    """Return the mean recall of the classes that the references contain."""
    from sklearn.metrics import recall_score

    # not balanced_accuracy_score: it warns if a class is predicted that no reference has
    present = np.unique(references)
    return float(recall_score(references, p, labels=present, average="macro", zero_division=0))


def _precision_recall_f1(
    predictions: list[Any],
    references: list[Any],
    context: MetricContext,
    score: Literal["precision", "recall", "f1"],
    average: Literal["", "macro", "micro", "weighted"],
) -> float:
    """Return one score, 0 where it would divide by 0.

    Without an `average`: that of label 1 if there are two labels of which a row has one, else
    macro. Classes that neither predictions nor references contain take no part in an average.
    """
    from sklearn.metrics import precision_recall_fscore_support

    p, r = np.asarray(predictions), np.asarray(references)
    # one column is no multi-label matrix to scikit-learn, but two classes; only 1 is a label
    one_column = context.multi_label and p.shape[1] == 1
    binary = not context.multi_label and context.n_labels == 2 and not average
    scores = precision_recall_fscore_support(
        r.ravel() if one_column else r,
        p.ravel() if one_column else p,
        labels=[1] if one_column or binary else None,
        average=average or "macro",
        zero_division=0,
    )
    return float(scores[("precision", "recall", "f1").index(score)])


def _matthews(predictions: list[Any], references: list[Any], context: MetricContext) -> float:
    """Return Matthews' correlation coefficient, 0 where either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    if len(set(predictions)) == 1 or len(set(references)) == 1:
        return 0.0  # scikit-learn's own value, without its warning
    return float(matthews_corrcoef(references, predictions))


# ------------------------------------------------------------------------------------- values


def _correlation(p: np.ndarray, r: np.ndarray) -> float:
    """Return Pearson's r; nan where it is undefined: one row, a constant side, not finite."""
    from scipy import stats

    if len(p) < 2 or not (np.isfinite(p).all() and np.isfinite(r).all()):
        return math.nan
    with warnings.catch_warnings():
        # constant, or so near to it that rounding decides
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        return float(stats.pearsonr(p, r).statistic)


def _pearson(predictions: list[Any], references: list[Any], context: MetricContext) -> float:
    return _correlation(np.asarray(predictions), np.asarray(references))


def _spearman(predictions: list[Any], references: list[Any], context: MetricContext) -> float:
    from scipy import stats

    # ranks carry a nan on, so that `_correlation` sees it
    p, r = (stats.rankdata(x, nan_policy="propagate") for x in (predictions, references))
    return _correlation(p, r)


def _mse(predictions: list[Any], references: list[Any], context: MetricContext) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # a model that diverged has inf or nan
        return float(np.mean(np.square(np.subtract(predictions, references))))


def _rmse(predictions: list[Any], references: list[Any], context: MetricContext) -> float:
    return math.sqrt(_mse(predictions, references, context))


def _mae(predictions: list[Any], references: list[Any], context: MetricContext) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.mean(np.abs(np.subtract(predictions, references))))


def _perplexity(nlls: list[Any], n_tokens: list[Any], context: MetricContext) -> float:
    """Return exp(total nll / total tokens): not the mean of the rows' perplexities."""
    total_tokens = sum(n_tokens)
    if total_tokens == 0:
        raise LoraError("nothing to evaluate: no row has a trained token (metric `perplexity`)")
    try:
        return math.exp(sum(nlls) / total_tokens)
    except OverflowError:
        return math.inf


# -------------------------------------------------------------------------------------- texts


def _exact_match(predictions: list[Any], references: list[Any], context: MetricContext) -> float:
    hits = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
    return sum(hits) / len(hits)


def _bleu(predictions: list[Any], references: list[Any], context: MetricContext) -> float:
    """Return corpus BLEU, 0 to 100, as sacrebleu reports it."""
    import sacrebleu

    # force: no warning about texts that look tokenized
    return float(sacrebleu.corpus_bleu(predictions, [references], force=True).score)


_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def _rouge(p: list[Any], references: list[Any], context: MetricContext) -> dict[str, float]:
    """Return the means over rows of ROUGE's F1, 0 to 1; rougeLsum takes a line for a sentence."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(_ROUGE, use_stemmer=True)
    rows = [scorer.score(target, said) for target, said in zip(references, p, strict=True)]
    return {key: float(np.mean([row[key].fmeasure for row in rows])) for key in _ROUGE}


_SPECS: dict[str, MetricSpec] = {
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
    "pearson": MetricSpec("value", _pearson),
    "spearman": MetricSpec("value", _spearman),
    "mse": MetricSpec("value", _mse, "min"),
    "rmse": MetricSpec("value", _rmse, "min"),
    "mae": MetricSpec("value", _mae, "min"),
    "perplexity": MetricSpec("nll", _perplexity, "min"),
    "exact_match": MetricSpec("text", _exact_match),
    "bleu": MetricSpec("text", _bleu, package="sacrebleu"),
    "rouge": MetricSpec("text", _rouge, results=_ROUGE, package="rouge_score"),
}


# -------------------------------------------------------------------- names, without `evaluate`


def known_metrics() -> list[str]:
    """Return the names of the built-in metrics."""
    return list(_SPECS)


def metric_mode(name: str) -> Literal["min", "max"] | None:
    """Return whether less or more of a metric (or of one of its results) is better, if known."""
    if name == "loss":
        return "min"
    for metric, spec in _SPECS.items():
        if name == metric or name in spec.results:
            return spec.mode
    return None


def check_metric_names(
    names: Sequence[str],
    default_channel: Channel | None = None,
    context: MetricContext = MetricContext(),  # noqa: B008 - frozen
    at: str = "evaluate.metrics",
) -> list[Problem]:
    """Return what is wrong with the names, as far as can be said without loading anything.

    A name that is not built in may still be one that `evaluate` loads: only `MetricSet` can tell.

    Args:
        names: As in the recipe.
        default_channel: What the task feeds; None skips the checks that need it.
        context: What the task says of its labels.
        at: Where the names stand, for the problems.
    """
    problems = []
    for name in dict.fromkeys(names):
        spec = _SPECS.get(name)
        if spec is None:
            if _is_path(name) and not os.path.exists(os.path.expanduser(name)):
                hint = f"the path counts from {Path.cwd()}"
                problems.append(Problem(f"there is no metric script `{name}`", at, hint))
            continue
        if default_channel and spec.channel not in _FEEDS[default_channel]:
            what = (
                f"metric `{name}` compares {_NOUNS[spec.channel]}, but this task yields "
                f"{_NOUNS[default_channel]}"
            )
            usable = [n for n, s in _SPECS.items() if s.channel in _FEEDS[default_channel]]
            problems.append(Problem(what, at, f"choose from {', '.join(usable)}"))
        elif context.multi_label and not spec.multi_label:
            what = f"metric `{name}` is not defined for rows with several labels"
            problems.append(Problem(what, at, "f1_macro, f1_micro and accuracy are"))
        if spec.package and importlib.util.find_spec(spec.package) is None:
            what = f"metric `{name}` needs the package `{spec.package}`, which is not installed"
            problems.append(Problem(what, at, "pip install 'lora-cli[text-metrics]'"))
    return problems


def _is_path(name: str) -> bool:
    """Return whether a name can only be that of a local script or of its folder."""
    return name.endswith(".py") or name.startswith((".", "/", "~"))


# ---------------------------------------------------------------------------- with `evaluate`


class MetricSet:
    """Several metrics fed row by row.

    Args:
        names: Built-in metrics, or whatever `evaluate.load` takes. A name that stands twice
            counts once.
        default_channel: What the task feeds, and what a metric that is not built in reads.
        context: What the task says of its labels.
        at: Where the names stand, for errors.

    Raises:
        LoraError: A metric is unknown, does not suit the task, or needs a missing package; all
            such problems together.
    """

    def __init__(
        self,
        names: Sequence[str],
        default_channel: Channel,
        context: MetricContext = MetricContext(),  # noqa: B008 - frozen
        at: str = "evaluate.metrics",
    ) -> None:
        self._at = at
        self._rows: Counter[Channel] = Counter()
        self._metrics: dict[str, tuple[Channel, Any]] = {}
        problems = check_metric_names(names, default_channel, context, at)
        faulty = {problem.what.split("`")[1] for problem in problems}
        # every Metric makes itself a folder, even one that keeps its rows in memory
        scratch = tempfile.mkdtemp(prefix="lora-metrics-")
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        for name in dict.fromkeys(names):
            if name in faulty:
                continue
            if spec := _SPECS.get(name):
                metric = _builtin_class()(name, spec, context, scratch)
                self._metrics[name] = (spec.channel, metric)
                continue
            try:
                self._metrics[name] = (default_channel, _load(name, scratch, at))
            except LoraError as error:
                problems += error.problems
        if problems:
            raise LoraError(problems)

    @property
    def channels(self) -> set[Channel]:
        """What the metrics read: the channels that must be fed before `compute`."""
        return {channel for channel, _ in self._metrics.values()}

    def add_batch(
        self, channel: Channel, predictions: Sequence[Any], references: Sequence[Any]
    ) -> None:
        """Add rows to the metrics that read the channel; the others take no notice.

        Lists, numpy arrays and tensors on the CPU do. An empty batch is no harm.
        """
        assert len(predictions) == len(references), (len(predictions), len(references))
        if len(predictions) == 0 or channel not in self.channels:
            return
        rows = _plain(channel, predictions, references)
        for name, (wanted, metric) in self._metrics.items():
            if wanted == channel:
                with self._blaming(name):
                    metric.add_batch(predictions=rows[0], references=rows[1])
        self._rows[channel] += len(predictions)

    def compute(self) -> dict[str, float]:
        """Return every metric's numbers by name, and forget the rows.

        A name that two metrics give is prefixed with the second one's: `mine_f1`.

        Raises:
            LoraError: No rows were added, or a metric that is not built in failed.
        """
        results: dict[str, float] = {}
        for name, (channel, metric) in self._metrics.items():
            if not self._rows[channel]:
                what = f"nothing to evaluate: metric `{name}` was given no rows"
                raise LoraError(what, self._at, "is the split empty, or filtered to nothing?")
            with self._blaming(name):
                computed = metric.compute()
            for key, value in _numbers(name, computed, self._at).items():
                results[f"{Path(name).stem}_{key}" if key in results else key] = value
        self._rows.clear()
        return results

    @contextlib.contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        """Keep stdout for data; say which metric failed, if it is not ours."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            if name in _SPECS:
                raise
            raise LoraError(f"metric `{name}` failed: {_reason(error)}", self._at) from error


@functools.cache
def _builtin_class() -> Any:
    """Return the class that runs a `MetricSpec` as an `evaluate.Metric`."""
    import datasets
    import evaluate

    def feature(kind: str, many: bool = False) -> Any:
        value = datasets.Value(kind)
        return datasets.Sequence(value) if many else value

    class BuiltinMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
        def __init__(
            self, name: str, spec: MetricSpec, context: MetricContext, scratch: str
        ) -> None:
            self.spec_name, self.spec, self.context = name, spec, context
            super().__init__(
                config_name=name,
                cache_dir=scratch,
                keep_in_memory=True,
                experiment_id=uuid.uuid4().hex,
            )

        def _info(self) -> Any:
            channel = self.spec.channel
            kinds = {"label": "int64", "value": "float64", "text": "string", "nll": "float64"}
            many = channel == "label" and self.context.multi_label
            features = {
                "predictions": feature(kinds[channel], many),
                "references": feature("int64" if channel == "nll" else kinds[channel], many),
            }
            # no `format="numpy"`: it would round floats to float32
            return evaluate.MetricInfo(
                description=f"{self.spec_name}, as `lora` computes it",
                citation="",
                features=datasets.Features(features),
            )

        def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
            result = self.spec.compute(predictions, references, self.context)
            return result if isinstance(result, dict) else {self.spec_name: result}

    return BuiltinMetric


def _load(name: str, scratch: str, at: str) -> Any:
    """Return the metric that `evaluate` knows by this name."""
    import evaluate

    try:
        # a script is free to print when it is imported
        with contextlib.redirect_stdout(sys.stderr):
            metric = evaluate.load(
                os.path.expanduser(name) if _is_path(name) else name,
                cache_dir=scratch,
                keep_in_memory=True,
                experiment_id=uuid.uuid4().hex,
            )
    except FileNotFoundError as error:  # also without a network
        what = f"unknown metric `{name}`: it is not built in, and `evaluate` finds none"
        hint = did_you_mean(name, known_metrics(), noun="built in:")
        raise LoraError(what, at, hint) from error
    except Exception as error:
        raise LoraError(f"metric `{name}` cannot be loaded: {_reason(error)}", at) from error
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    if set(features) != {"predictions", "references"}:
        what = f"metric `{name}` wants {', '.join(features)}; a task yields predictions, references"
        raise LoraError(what, at, "wrap it in a script of your own, and name that: ./my_metric.py")
    return metric


def _plain(
    channel: Channel, predictions: Sequence[Any], references: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Return rows as lists of what Arrow stores without guessing."""
    if channel == "text":
        return list(predictions), list(references)
    p, r = np.asarray(predictions), np.asarray(references)
    assert channel != "label" or (p.dtype.kind in "biu" and r.dtype.kind in "biu"), (p, r)
    kinds = {"label": (int, int), "value": (float, float), "nll": (float, int)}[channel]
    return p.astype(kinds[0]).tolist(), r.astype(kinds[1]).tolist()


def _numbers(name: str, computed: Mapping[str, Any], at: str) -> dict[str, float]:
    """Return the single numbers of a result as plain floats; lists and texts are left out."""
    items = {k: v.item() if getattr(v, "ndim", None) == 0 else v for k, v in computed.items()}
    kept = {key: float(v) for key, v in items.items() if isinstance(v, numbers.Real)}
    if not kept:
        gives = ", ".join(f"{key} ({type(v).__name__})" for key, v in items.items())
        raise LoraError(f"metric `{name}` gives no single number, only {gives}", at)
    return kept


def _reason(error: Exception) -> str:
    """Return an exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
