"""Lookups by metric name: its results, whether lower or higher is better, what it compares."""

from __future__ import annotations

import importlib.util
import os.path
from collections.abc import Sequence
from pathlib import Path

from lora_cli.errors import Problem, name_neighbours
from lora_cli.metrics.builtin_metrics import (
    EMPTY_CONTEXT,
    SPECS,
    Channel,
    MetricContext,
    Mode,
    Rows,
)

# the channels that a task yields, by the channel of its default metrics: a language model both
# generates texts and scores given ones
COMPATIBLE: dict[Channel, tuple[Channel, ...]] = {
    "label": ("label",),
    "value": ("value",),
    "text": ("text", "nll"),
    "nll": ("nll", "text"),
    "tags": ("tags",),
    "ranks": ("ranks",),
    "pictures": (),
    "boxes": ("boxes",),
    "speech": ("speech", "lengths"),
    "lengths": ("lengths", "speech"),
}
NOUNS = {
    "label": "labels", "value": "numbers", "text": "texts", "nll": "log-likelihoods",
    "tags": "tags of words", "ranks": "ranks of a search", "boxes": "boxes",
    "speech": "spectrograms", "lengths": "lengths of speech",
    "pictures": "pictures, of which it measures the loss alone",
}  # fmt: skip


def known_metrics() -> list[str]:
    """Return the names of the built-in metrics."""
    return list(SPECS)


def metric_mode(name: str) -> Mode | None:
    """Return whether a lower or higher value of a metric is better; None if it is not built in."""
    modes = {key: spec.mode for n, spec in SPECS.items() for key in (n, *spec.results)}
    return "min" if name == "loss" else modes.get(name)


def result_names(metric: str) -> tuple[str, ...]:
    """Return the names of the values that a metric computes."""
    spec = SPECS.get(metric)
    return (spec.results if spec else ()) or (metric,)


def metric_of_result(result: str, channel: Channel) -> str | None:
    """Return the built-in metric that computes a value of this name, for a kind of task.

    Args:
        result: The name of a metric or of one of its values. `f1` may be that of labels or that of
            entities, depending on the task.
        channel: The channel of the task's default metrics.
    """
    channels = COMPATIBLE[channel]
    candidates = sorted(SPECS, key=lambda name: SPECS[name].channel not in channels)
    return next((name for name in candidates if result in result_names(name)), None)


def channel_of(metric: str) -> Channel | None:
    """Return the channel of a built-in metric; None for any other metric."""
    spec = SPECS.get(metric)
    return spec.channel if spec else None


def builtin_value(
    metric: str, result: str, predictions: Rows, references: Rows,
    context: MetricContext = EMPTY_CONTEXT,
) -> float:  # fmt: skip
    """Compute one value of a built-in metric from all rows at once."""
    value = SPECS[metric].compute(predictions, references, context)
    return value[result] if isinstance(value, dict) else value


LOSS = "loss"  # part of every result, besides the metrics


def check_metric_names(
    names: Sequence[str],
    default_channel: Channel | None = None,
    context: MetricContext = EMPTY_CONTEXT,
    location: str = "evaluate.metrics",
) -> list[Problem]:
    """Check the names of metrics without loading the metrics.

    Args:
        names: The names; one that is not built in may be a metric that `evaluate` can load.
        default_channel: The channel of the task's default metrics; None to accept metrics of any
            task.
        context: The classes of the task, and how its texts are compared.
        location: Where the recipe names the metrics, for the messages.

    Returns:
        The problems found.
    """
    problems = []
    for name in dict.fromkeys(names):
        spec = SPECS.get(name)
        if spec is None:
            if name == LOSS:
                hint = f"leave it out; `evaluate.best: {{metric: {LOSS}, mode: min}}` chooses by it"
                what = f"`{LOSS}` is measured always, and not named"
                problems.append(Problem(what, location, hint))
            elif is_script(name) and not os.path.exists(os.path.expanduser(name)):
                what = f"there is no metric script `{name}`"
                problems.append(Problem(what, location, name_neighbours(Path(name).expanduser())))
            continue
        if default_channel and spec.channel not in COMPATIBLE[default_channel]:
            compared, yielded = NOUNS[spec.channel], NOUNS[default_channel]
            what = f"metric `{name}` compares {compared}; this task yields {yielded}"
            usable = [n for n, s in SPECS.items() if s.channel in COMPATIBLE[default_channel]]
            hint = f"choose from {', '.join(usable)}" if usable else "leave it out"
            problems.append(Problem(what, location, hint))
        elif default_channel and name == "no_answer" and context.answer_pattern is None:
            what = "metric `no_answer` counts texts without a match of `task.answer_pattern`"
            hint = "add the pattern of a final answer, or leave the metric out"
            problems.append(Problem(f"{what}, which is not there", location, hint))
        elif context.multi_label and not spec.multi_label:
            what = f"metric `{name}` is not defined for rows with several labels"
            problems.append(Problem(what, location, "f1_macro and f1_micro are"))
        if spec.package and importlib.util.find_spec(spec.package) is None:
            what = f"metric `{name}` needs the package `{spec.package}`, which is not installed"
            problems.append(Problem(what, location, f"pip install 'lora-cli[{spec.extra}]'"))
    return problems


def is_script(name: str) -> bool:
    """Return whether a name is the path of a local script or of a folder with one."""
    return name.endswith(".py") or name.startswith((".", "/", "~"))
