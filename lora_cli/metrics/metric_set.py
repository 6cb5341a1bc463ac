"""Several metrics at once, fed row by row, each run by `evaluate`.

One subclass of `evaluate.Metric` runs the built-in ones. Any other name goes to `evaluate.load`: a
script (`./mine.py`), a name on the Hub (`user/metric`), or one of Hugging Face's own (`meteor`).

A task reduces its outputs to one small prediction per row (a class, a number, a text, a sum) before
they come here, so memory grows with rows, never with logits. Rows wait in Arrow buffers in memory:
there is no cache file that two runs could fight over.

`import evaluate` takes seconds, so it is imported only when a `MetricSet` is made.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
import os.path
import shutil
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_cli.errors import LoraError, did_you_mean
from lora_cli.metrics.builtin_metrics import (
    NOTHING_KNOWN,
    SPECS,
    Channel,
    MetricContext,
    MetricSpec,
    Rows,
    references_of,
)
from lora_cli.metrics.metric_names import check_metric_names, is_script, known_metrics


class MetricSet:
    """Several metrics fed row by row.

    Args:
        names: Built-in metrics, or whatever `evaluate.load` takes; one that stands twice counts
            once.
        default_channel: What the task feeds, and what a metric that is not built in reads.
        context: What the task says of its labels.
        at: Where the names stand, for errors.
        may_lack_rows: Leave out the numbers of a metric that was fed no rows, instead of an error.

    Raises:
        LoraError: A metric is unknown, does not suit the task, or needs a missing package; all
            such problems together.
    """

    def __init__(
        self,
        names: Sequence[str],
        default_channel: Channel,
        context: MetricContext = NOTHING_KNOWN,
        at: str = "evaluate.metrics",
        may_lack_rows: bool = False,
    ) -> None:
        self._at, self.may_lack_rows = at, may_lack_rows
        self._several = context.several_references
        self._n_rows: Counter[Channel] = Counter()
        self._metrics: dict[str, tuple[Channel, Any]] = {}
        # every Metric makes a folder for itself, even one that keeps its rows in memory
        scratch = tempfile.mkdtemp(prefix="lora-metrics-")
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        problems = []
        for name in dict.fromkeys(names):
            if errors := check_metric_names([name], default_channel, context, at):
                problems += errors
                continue
            options = {"cache_dir": scratch, "keep_in_memory": True}
            if spec := SPECS.get(name):
                metric = _builtin_class()(name, spec, context, **options)
                self._metrics[name] = (spec.channel, metric)
                continue
            try:
                self._metrics[name] = (default_channel, _load(name, at, **options))
            except LoraError as error:
                problems += error.problems
        if problems:
            raise LoraError(problems)

    @property
    def channels(self) -> set[Channel]:
        """What the metrics read, and so what must be fed before `compute`."""
        return {channel for channel, _ in self._metrics.values()}

    @property
    def without_rows(self) -> list[str]:
        """The metrics that were fed no row since the last `compute`."""
        return [name for name, (channel, _) in self._metrics.items() if not self._n_rows[channel]]

    def add_batch(
        self, channel: Channel, predictions: Sequence[Any], references: Sequence[Any]
    ) -> None:
        """Add rows to the metrics that read the channel; there may be none of either.

        Takes lists, numpy arrays, and tensors on the CPU.
        """
        assert len(predictions) == len(references), (len(predictions), len(references))
        if len(predictions) == 0 or channel not in self.channels:
            return
        p, r = _plain(channel, predictions, references)
        for name, (wanted, metric) in self._metrics.items():
            if wanted == channel:
                lists = channel == "text" and (name in SPECS or self._several)
                with self._blaming(name):
                    metric.add_batch(
                        predictions=p, references=[references_of(x) for x in r] if lists else r
                    )
        self._n_rows[channel] += len(p)

    def compute(self) -> dict[str, float]:
        """Return every metric's numbers by name, and forget the rows.

        A name that two metrics give gets the second metric's name before it: `mine_f1`; so does
        `loss`, which is the task's own.

        Raises:
            LoraError: There are no rows, or a metric that is not built in failed.
        """
        results: dict[str, float] = {}
        for name, (channel, metric) in self._metrics.items():
            if self.may_lack_rows and not self._n_rows[channel]:
                continue
            if not self._n_rows[channel]:
                what = f"nothing to evaluate: metric `{name}` was given no rows"
                raise LoraError(what, self._at, "is the split empty, or filtered to nothing?")
            with self._blaming(name):
                found = _numbers(metric.compute())
            for key, value in found.items():
                taken = key in results or key == "loss"
                results[f"{Path(name).stem}_{key}" if taken else key] = value
        self._n_rows.clear()
        return results

    @contextlib.contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        """Keep stdout for data; say which metric failed, if it is not one of ours."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            if name in SPECS:
                raise
            what = f"metric `{name}` failed: {_reason(error)}"
            raise LoraError(what, self._at, "fix the script, or leave the metric out") from error


@functools.cache
def _builtin_class() -> Any:
    """Return the class that runs a `MetricSpec` as an `evaluate.Metric`."""
    import datasets
    import evaluate

    class BuiltinMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
        def __init__(
            self, name: str, spec: MetricSpec, context: MetricContext, **options: Any
        ) -> None:
            self.spec_name, self.spec, self.context = name, spec, context
            super().__init__(**options)

        def _info(self) -> Any:
            kinds = {
                "label": "int64", "value": "float64", "text": "string", "nll": "float64",
                "tags": "string", "ranks": "int64", "boxes": "float64",
                "speech": "float64", "lengths": "float64",
            }  # fmt: skip
            p = datasets.Value(kinds[self.spec.channel])
            if self.spec.channel in ("tags", "ranks", "speech"):
                p = datasets.List(p)
            if self.spec.channel == "boxes":
                p = datasets.List(datasets.List(p))
            r = datasets.Value("int64") if self.spec.channel in ("nll", "ranks") else p
            if self.spec.channel == "text":
                r = datasets.List(p)
            if self.spec.channel == "label" and self.context.multi_label:
                p = r = datasets.Sequence(p)
            # no format="numpy": it would round floats to float32
            features = datasets.Features({"predictions": p, "references": r})
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions: Rows, references: Rows) -> dict[str, float]:
            result = self.spec.compute(predictions, references, self.context)
            return result if isinstance(result, dict) else {self.spec_name: result}

    return BuiltinMetric


def _load(name: str, at: str, **options: Any) -> Any:
    """Return the metric that `evaluate` knows by this name."""
    import evaluate

    path = os.path.expanduser(name) if is_script(name) else name
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a script may print
            metric = evaluate.load(path, **options)
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not is_script(name):
            what = f"unknown metric `{name}`: it is not built in, and `evaluate` finds none"
            hint = did_you_mean(name, known_metrics(), noun="built in:")
            raise LoraError(what, at, hint) from error
        what = f"metric `{name}` cannot be loaded: {_reason(error)}"
        hint = f"try it alone: `python -c 'import evaluate; evaluate.load(\"{name}\")'`"
        raise LoraError(what, at, hint) from error
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    if set(features) != {"predictions", "references"}:
        what = (
            f"metric `{name}` expects {', '.join(features)}; a task yields predictions, references"
        )
        raise LoraError(what, at, "wrap it in a script of your own, and name that: ./my_metric.py")
    return metric


def _plain(
    channel: Channel, predictions: Sequence[Any], references: Sequence[Any]
) -> tuple[Rows, Rows]:
    """Return rows as lists of what Arrow stores without guessing."""
    if channel in ("text", "tags", "ranks", "boxes", "speech", "lengths"):
        return list(predictions), list(references)
    p, r = np.asarray(predictions), np.asarray(references)
    assert channel != "label" or (p.dtype.kind in "biu" and r.dtype.kind in "biu"), (p, r)
    kinds = {"label": (int, int), "value": (float, float), "nll": (float, int)}[channel]
    return p.astype(kinds[0]).tolist(), r.astype(kinds[1]).tolist()


def _numbers(computed: Mapping[str, Any]) -> dict[str, float]:
    """Return the single numbers of a result as plain floats, without lists (a row's, a class's)."""
    items = {k: v.item() if getattr(v, "ndim", None) == 0 else v for k, v in computed.items()}
    kept = {key: float(v) for key, v in items.items() if isinstance(v, numbers.Real)}
    if not kept:
        raise ValueError(f"it gives no single number, only {', '.join(items) or 'nothing'}")
    return kept


def _reason(error: Exception) -> str:
    """Return an exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
