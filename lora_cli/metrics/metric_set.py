"""A set of metrics that is fed batch by batch; each metric is run by `evaluate`.

A subclass of `evaluate.Metric` runs the built-in metrics. Any other name is passed to
`evaluate.load`: a script (`./mine.py`), a metric on the Hub (`user/metric`), or one of Hugging
Face's own (`meteor`).

Tasks reduce their outputs to one small prediction per row (a class, a number, a text, a sum) before
adding them here, so memory grows with the number of rows, never with logits. Rows are kept in Arrow
buffers in memory, so concurrent runs share no cache files.

`import evaluate` takes seconds, so it is imported only when a `MetricSet` is created.
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
    EMPTY_CONTEXT,
    SPECS,
    Channel,
    MetricContext,
    MetricSpec,
    Rows,
    references_of,
)
from lora_cli.metrics.metric_names import check_metric_names, is_script, known_metrics


class MetricSet:
    """A set of metrics that is fed batch by batch.

    Args:
        names: Built-in metrics, or anything that `evaluate.load` accepts; duplicates are ignored.
        default_channel: The channel that the task feeds; metrics that are not built in read it.
        context: The task's labels and how it compares texts.
        location: Where the recipe names the metrics, for error messages.
        may_lack_rows: Leave out a metric that was fed no rows instead of raising an error.

    Raises:
        LoraError: With every metric that is unknown, does not suit the task, or needs a missing
            package.
    """

    def __init__(
        self,
        names: Sequence[str],
        default_channel: Channel,
        context: MetricContext = EMPTY_CONTEXT,
        location: str = "evaluate.metrics",
        may_lack_rows: bool = False,
    ) -> None:
        self._location, self.may_lack_rows = location, may_lack_rows
        self._several = context.several_references
        self._n_rows: Counter[Channel] = Counter()
        self._metrics: dict[str, tuple[Channel, Any]] = {}
        # every `evaluate.Metric` creates a folder, even with `keep_in_memory`
        scratch = tempfile.mkdtemp(prefix="lora-metrics-")
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        problems = []
        for name in dict.fromkeys(names):
            if errors := check_metric_names([name], default_channel, context, location):
                problems += errors
                continue
            options = {"cache_dir": scratch, "keep_in_memory": True}
            if spec := SPECS.get(name):
                metric = _builtin_class()(name, spec, context, **options)
                self._metrics[name] = (spec.channel, metric)
                continue
            try:
                self._metrics[name] = (default_channel, _load(name, location, **options))
            except LoraError as error:
                problems += error.problems
        if problems:
            raise LoraError(problems)

    @property
    def channels(self) -> set[Channel]:
        """The channels that must be fed before `compute`."""
        return {channel for channel, _ in self._metrics.values()}

    @property
    def without_rows(self) -> list[str]:
        """The metrics that were fed no row since the last `compute`."""
        return [name for name, (channel, _) in self._metrics.items() if not self._n_rows[channel]]

    def add_batch(
        self, channel: Channel, predictions: Sequence[Any], references: Sequence[Any]
    ) -> None:
        """Add rows to the metrics that read the channel, if any.

        Args:
            channel: The kind of the values.
            predictions: A list, a numpy array, or a tensor on the CPU; may be empty.
            references: As many values of the same kind.
        """
        assert len(predictions) == len(references), (len(predictions), len(references))
        if len(predictions) == 0 or channel not in self.channels:
            return
        p, r = _plain(channel, predictions, references)
        for name, (metric_channel, metric) in self._metrics.items():
            if metric_channel == channel:
                as_lists = channel == "text" and (name in SPECS or self._several)
                with self._blaming(name):
                    metric.add_batch(
                        predictions=p, references=[references_of(x) for x in r] if as_lists else r
                    )
        self._n_rows[channel] += len(p)

    def compute(self) -> dict[str, float]:
        """Compute all metrics, and clear the rows.

        If two metrics return a value of the same name, the second is prefixed with its metric's
        name: `mine_f1`. The same goes for `loss`, which is reserved for the task's loss.

        Returns:
            The values by name.

        Raises:
            LoraError: If there are no rows, or a metric that is not built in fails.
        """
        results: dict[str, float] = {}
        for name, (channel, metric) in self._metrics.items():
            if self.may_lack_rows and not self._n_rows[channel]:
                continue
            if not self._n_rows[channel]:
                message = f"nothing to evaluate: metric `{name}` was given no rows"
                raise LoraError(
                    message, self._location, "is the split empty, or filtered to nothing?"
                )
            with self._blaming(name):
                values = _numbers(metric.compute())
            for key, value in values.items():
                is_taken = key in results or key == "loss"
                results[f"{Path(name).stem}_{key}" if is_taken else key] = value
        self._n_rows.clear()
        return results

    @contextlib.contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        """Redirect stdout to stderr, and name the metric in errors if it is not built in."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            if name in SPECS:
                raise
            message = f"metric `{name}` failed: {_reason(error)}"
            raise LoraError(
                message, self._location, "fix the script, or leave the metric out"
            ) from error


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


def _load(name: str, location: str, **options: Any) -> Any:
    """Load a metric by `evaluate.load`."""
    import evaluate

    path = os.path.expanduser(name) if is_script(name) else name
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a script may print
            metric = evaluate.load(path, **options)
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not is_script(name):
            message = f"unknown metric `{name}`: it is not built in, and `evaluate` finds none"
            hint = did_you_mean(name, known_metrics(), noun="built in:")
            raise LoraError(message, location, hint) from error
        message = f"metric `{name}` cannot be loaded: {_reason(error)}"
        hint = f"try it alone: `python -c 'import evaluate; evaluate.load(\"{name}\")'`"
        raise LoraError(message, location, hint) from error
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    if set(features) != {"predictions", "references"}:
        message = (
            f"metric `{name}` expects {', '.join(features)}; a task yields predictions, references"
        )
        raise LoraError(
            message, location, "wrap it in a script of your own, and name that: ./my_metric.py"
        )
    return metric


def _plain(
    channel: Channel, predictions: Sequence[Any], references: Sequence[Any]
) -> tuple[Rows, Rows]:
    """Convert rows to lists of plain values, which Arrow stores without guessing their type."""
    if channel in ("text", "tags", "ranks", "boxes", "speech", "lengths"):
        return list(predictions), list(references)
    p, r = np.asarray(predictions), np.asarray(references)
    assert channel != "label" or (p.dtype.kind in "biu" and r.dtype.kind in "biu"), (p, r)
    kinds = {"label": (int, int), "value": (float, float), "nll": (float, int)}[channel]
    return p.astype(kinds[0]).tolist(), r.astype(kinds[1]).tolist()


def _numbers(computed: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalar values of a result as floats, without lists per row or per class."""
    results = {k: v.item() if getattr(v, "ndim", None) == 0 else v for k, v in computed.items()}
    values = {key: float(v) for key, v in results.items() if isinstance(v, numbers.Real)}
    if not values:
        raise ValueError(f"it gives no single number, only {', '.join(results) or 'nothing'}")
    return values


def _reason(error: Exception) -> str:
    """Return an exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
