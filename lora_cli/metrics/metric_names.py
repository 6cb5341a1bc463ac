"""What is known of a metric by its name: its results, which direction is better, what it reads."""

from __future__ import annotations

import importlib.util
import os.path
from collections.abc import Sequence
from pathlib import Path

from lora_cli.errors import Problem, name_neighbours
from lora_cli.metrics.builtin_metrics import (
    NOTHING_KNOWN,
    SPECS,
    Channel,
    MetricContext,
    Mode,
    Rows,
)

# what metrics can read of a task, by what its own metrics read: a language model writes and scores
FEEDS: dict[Channel, tuple[Channel, ...]] = {
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
    """Return the names of the numbers that a metric gives."""
    spec = SPECS.get(metric)
    return (spec.results if spec else ()) or (metric,)


def metric_giving(result: str, channel: Channel) -> str | None:
    """Return the built-in metric that gives a number of this name, for a kind of task.

    Args:
        result: A metric, or one of the numbers of one. `f1` can be of labels or of entities.
        channel: What the task's own metrics read.
    """
    feeds = FEEDS[channel]
    able = sorted(SPECS, key=lambda name: SPECS[name].channel not in feeds)
    return next((name for name in able if result in result_names(name)), None)


def reads(metric: str) -> Channel | None:
    """Return what a built-in metric reads of each row; None for any other metric."""
    spec = SPECS.get(metric)
    return spec.channel if spec else None


def builtin_value(
    metric: str, result: str, predictions: Rows, references: Rows,
    context: MetricContext = NOTHING_KNOWN,
) -> float:  # fmt: skip
    """Return one number of a built-in metric, computed at once from all rows."""
    found = SPECS[metric].compute(predictions, references, context)
    return found[result] if isinstance(found, dict) else found


LOSS = "loss"  # stands in every result beside the metrics


def check_metric_names(
    names: Sequence[str],
    default_channel: Channel | None = None,
    context: MetricContext = NOTHING_KNOWN,
    at: str = "evaluate.metrics",
) -> list[Problem]:
    """Return what is wrong with the names of metrics, as far as it is known without loading them.

    Args:
        names: The names. One that is not built in may be one that `evaluate` loads.
        default_channel: What the task's own metrics read; None to accept metrics of any task.
        context: The classes of the task, and how its texts are compared.
        at: Where the recipe names the metrics.
    """
    problems = []
    for name in dict.fromkeys(names):
        spec = SPECS.get(name)
        if spec is None:
            if name == LOSS:
                hint = f"leave it out; `evaluate.best: {{metric: {LOSS}, mode: min}}` chooses by it"
                problems.append(Problem(f"`{LOSS}` is measured always, and not named", at, hint))
            elif is_script(name) and not os.path.exists(os.path.expanduser(name)):
                what = f"there is no metric script `{name}`"
                problems.append(Problem(what, at, name_neighbours(Path(name).expanduser())))
            continue
        if default_channel and spec.channel not in FEEDS[default_channel]:
            reads, fed = NOUNS[spec.channel], NOUNS[default_channel]
            what = f"metric `{name}` compares {reads}; this task yields {fed}"
            usable = [n for n, s in SPECS.items() if s.channel in FEEDS[default_channel]]
            hint = f"choose from {', '.join(usable)}" if usable else "leave it out"
            problems.append(Problem(what, at, hint))
        elif default_channel and name == "no_answer" and context.answer_pattern is None:
            what = "metric `no_answer` counts texts without a match of `task.answer_pattern`"
            hint = "add the pattern of a final answer, or leave the metric out"
            problems.append(Problem(f"{what}, which is not there", at, hint))
        elif context.multi_label and not spec.multi_label:
            what = f"metric `{name}` is not defined for rows with several labels"
            problems.append(Problem(what, at, "f1_macro and f1_micro are"))
        if spec.package and importlib.util.find_spec(spec.package) is None:
            what = f"metric `{name}` needs the package `{spec.package}`, which is not installed"
            problems.append(Problem(what, at, f"pip install 'lora-cli[{spec.extra}]'"))
    return problems


def is_script(name: str) -> bool:
    """Return whether a name is the path of a local script, or of its folder."""
    return name.endswith(".py") or name.startswith((".", "/", "~"))
