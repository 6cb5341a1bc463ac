"""Several metrics at once, fed row by row.

Those that are not built in are loaded by `evaluate`: a script (`./mine.py`), a name on the Hub
(`user/metric`), or one of Hugging Face's own (`meteor`).

A task reduces its outputs to one small prediction per row (a class, a number, a text, a sum) before
they come here, so memory grows with rows, never with logits. Rows wait in buffers in memory:
there is no cache file that two runs could fight over.

`import evaluate` takes seconds, so it is imported only where such a metric is named.
"""

from __future__ import annotations

import contextlib
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
import pyarrow as pa

from lora_cli.errors import LoraError, did_you_mean
from lora_cli.metrics.builtin import (
    NOTHING_KNOWN,
    SPECS,
    Channel,
    MetricContext,
    MetricSpec,
    Rows,
    check_metric_names,
    is_script,
    known_metrics,
    references_of,
)


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
        # evaluate's make a folder for themselves, even those that keep their rows in memory
        scratch = tempfile.mkdtemp(prefix="lora-metrics-")
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        problems = []
        for name in dict.fromkeys(names):
            if errors := check_metric_names([name], default_channel, context, at):
                problems += errors
                continue
            if spec := SPECS.get(name):
                self._metrics[name] = (spec.channel, _Builtin(name, spec, context))
                continue
            options = {"cache_dir": scratch, "keep_in_memory": True}
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


class _Builtin:
    """A built-in metric, with the rows that it was fed, in buffers of NumPy and Arrow.

    Args:
        name: Its name.
        spec: What it reads and computes.
        context: What the task says of its labels.
    """

    def __init__(self, name: str, spec: MetricSpec, context: MetricContext) -> None:
        self.name, self.spec, self.context = name, spec, context
        self._types = _types_of(spec.channel)
        self._fed: tuple[list[Any], list[Any]] = ([], [])

    def add_batch(self, predictions: Rows, references: Rows) -> None:
        """Add rows."""
        for side, rows, kind in zip(self._fed, (predictions, references), self._types, strict=True):
            # to Arrow numbers need pandas, which takes long to import
            is_number = isinstance(kind, type)
            side.append(np.asarray(rows, dtype=kind) if is_number else pa.array(rows, type=kind))

    def compute(self) -> dict[str, float]:
        """Return the numbers by name, and forget the rows."""
        p, r = ([row for rows in side for row in rows.tolist()] for side in self._fed)
        self._fed = ([], [])
        result = self.spec.compute(p, r, self.context)
        return result if isinstance(result, dict) else {self.name: result}


def _types_of(channel: Channel) -> tuple[Any, Any]:
    """Return how predictions and references are kept: types of NumPy's, or Arrow's."""
    text, ranks = pa.string(), pa.list_(pa.int64())
    tags, boxes = pa.list_(text), pa.list_(pa.list_(pa.float64()))
    types: dict[Channel, tuple[Any, Any]] = {
        "label": (np.int64, np.int64),
        "value": (np.float64, np.float64),
        "text": (text, pa.list_(text)),
        "nll": (np.float64, np.int64),
        "tags": (tags, tags),
        "ranks": (ranks, np.int64),
        "boxes": (boxes, boxes),
    }
    return types[channel]


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
    if channel in ("text", "tags", "ranks", "boxes"):
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
