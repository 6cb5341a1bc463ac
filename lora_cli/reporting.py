"""What a run leaves to be read: `report.json`, the learning curve, the card of the adapter.

All three are made from the report and `metrics.jsonl` alone, so they can be made again at any time;
a value that is not known is left out. Numbers are shown, never judged: no run is called good here.
"""

from __future__ import annotations

import json
import math
import pprint
import re
import shlex
import textwrap
from io import BytesIO
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from lora_cli.errors import IntegrityError
from lora_cli.files import write_atomically, write_json
from lora_cli.recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

INK, MUTED, RULE = "#1f2933", "#6b7785", "#dfe4ea"
TRAINING, VALIDATION, SECONDARY = "#2f6db5", "#d9622b", "#a3aebb"
MAX_SECONDARY = 3  # more lines than that and none is read
TASKS = {"sequence_classification": "text classification", "causal_lm": "text generation"}
ADAPTERS = {"lora": "LoRA adapter", "full": "full fine-tuning", "none": "head alone",
            "bitfit": "biases alone"}  # fmt: skip


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json`, atomically, as strict JSON: NaN and infinity become null."""
    write_json(folder / "report.json", _strict(report))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`; none if there is no such file.

    A torn last line, which a machine that stops leaves behind, is passed over.

    Raises:
        IntegrityError: If a line before the last is not a JSON object.
    """
    if not path.exists():
        return []
    raw = path.read_bytes().rstrip().split(b"\n")
    lines = []
    for number, text in enumerate(raw, 1):
        try:
            line = json.loads(text)
        except ValueError:  # UnicodeDecodeError is one
            line = None
        if isinstance(line, dict):
            lines.append(line)
        elif number < len(raw):
            raise IntegrityError("this is not a line of a training log", f"{path}:{number}",
                                 "remove the line; only the learning curve is drawn from it")  # fmt: skip
    return lines


def results_table(report: dict[str, Any]) -> list[list[str]]:
    """Return the metrics as rows of text: a header, the main metric, the others, the loss.

    The columns are those measured, among validation and test before and after training.
    """
    columns = {
        f"{split} {when}": measured
        for split in ("validation", "test")
        for when in ("before", "after")
        if (measured := _scalars(_part(report, "metrics", when, split)))
    }
    names = dict.fromkeys(name for measured in columns.values() for name in measured)
    main = _part(report, "best").get("metric")
    ordered = sorted(names, key=lambda name: (name != main, name == "loss"))
    return [["metric", *columns]] + [
        [name, *(_number(measured.get(name)) for measured in columns.values())] for name in ordered
    ]


def _scalars(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what fits a cell: numbers, and null, which is how JSON keeps a NaN."""
    kept = (int, float, type(None))
    return {str(k): v for k, v in metrics.items() if hasattr(v, "item") or isinstance(v, kept)}


def _part(report: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a section of the report, empty if it is missing."""
    for key in keys:
        section = report.get(key)
        report = section if isinstance(section, dict) else {}
    return report


def _number(value: Any) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size == 0 or 1e-3 <= size < 100:
        return f"{value:.4f}"
    return f"{value:,.2f}" if 100 <= size < 1e6 else f"{value:.3g}"


def _duration(seconds: Any) -> str:
    if seconds is None or not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 2:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _short_name(model: str) -> str:
    """Return a model's name without the folders that a path or a package begins with."""
    name = model if _is_hub_id(model) else model.rstrip("/").removeprefix("package:")
    if name.startswith(("/", ".", "~")):
        name = PurePath(name).name
    return textwrap.shorten(name, 60, placeholder="…") if " " in name else name[-60:]


def _is_hub_id(name: str) -> bool:
    """Return whether the Hub takes this as the id of a repository; it refuses paths."""
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name)) and ".." not in name


# ------------------------------------------------------------------------------ the learning curve


def plot_learning_curve(folder: Path, report: dict[str, Any]) -> Path:
    """Draw `learning_curve.png` from the folder's `metrics.jsonl`: 1600 x 900 pixels.

    Left the loss of training and validation; right validation's main metric, or, if that is the
    loss or was not measured, the learning rate.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics_log(folder / "metrics.jsonl")
    # the object interface: pyplot would keep the figure alive and may look for a screen
    figure = Figure(figsize=(10, 5.625), dpi=160, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    _headline(figure, report)
    validation = [{"step": line["step"], **line["validation"]} for line in lines
                  if isinstance(line.get("validation"), dict) and "step" in line]  # fmt: skip
    training = [line for line in lines if "validation" not in line and "step" in line]
    metric = _part(report, "best").get("metric")
    left = figure.add_axes((0.065, 0.115, 0.355, 0.66))
    right = figure.add_axes((0.565, 0.115, 0.355, 0.66))
    _plot_loss(left, training, validation, report)
    if metric not in (None, "loss") and len(_curve(validation, metric)[0]):
        _plot_metric(right, validation, metric, report)
    else:
        _plot_learning_rate(right, training)
    last = max((line["step"] for line in training + validation), default=0)
    for axes in (left, right):
        _furnish(axes, last or 1)
        _mark_best(axes, _part(report, "best").get("step"))
    canvas.draw()
    image = BytesIO()
    canvas.print_png(image, metadata={"Software": None})
    path = folder / "learning_curve.png"
    write_atomically(path, image.getvalue())
    return path


def _headline(figure: Any, report: dict[str, Any]) -> None:
    task, model = TASKS.get(str(report.get("task")), ""), str(report.get("base_model") or "")
    adapter, training = _part(report, "adapter"), _part(report, "training")
    kind = ADAPTERS.get(str(adapter.get("type")), "")
    rank = f" of rank {adapter['rank']}" if kind == ADAPTERS["lora"] and "rank" in adapter else ""
    rows, steps = _part(report, "data", "train").get("rows"), training.get("steps")
    facts = [
        kind + rank,
        f"{rows:,} training rows" if rows else "",
        f"{steps:,} steps" if steps else "",
        _duration(training.get("seconds")),
        str(training.get("device") or "").replace("cpu", "CPU"),
    ]
    title = "  ·  ".join(filter(None, (task.capitalize(), _short_name(model)))) or "Training"
    style = {"parse_math": False, "va": "baseline"}  # a `$` in a name is no formula
    figure.text(0.022, 0.935, title, size=14, weight="bold", color=INK, **style)
    figure.text(0.022, 0.89, "  ·  ".join(filter(None, facts)), size=10, color=MUTED, **style)


def _curve(lines: list[dict[str, Any]], key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return steps (N,), ascending, and values (N,), NaN where the log has null or infinity."""
    import numpy as np

    points = {line["step"]: line[key] for line in lines if key in line}  # the last of a step counts
    steps = sorted(points)
    values = [v if isinstance(v := points[step], int | float) else math.nan for step in steps]
    y = np.array(values, dtype=float)
    return np.array(steps, dtype=float), np.where(np.isfinite(y), y, np.nan)


def _smooth(y: NDArray[Any]) -> NDArray[Any]:
    """Return a Gaussian running mean over a few per cent of the points; NaN weighs nothing."""
    import numpy as np

    if len(y) < 12:
        return y
    sigma = max(1.0, len(y) / 50)
    reach = np.arange(-int(3 * sigma), int(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    known = np.isfinite(y)
    weight = np.convolve(known.astype(float), kernel, "same")
    total = np.convolve(np.where(known, y, 0.0), kernel, "same")
    return np.where(known, total / np.maximum(weight, 1e-12), np.nan)


def _plot_loss(axes: Any, training: list[dict[str, Any]], validation: list[dict[str, Any]],
               report: dict[str, Any]) -> None:  # fmt: skip
    import numpy as np

    (x, raw), (at, measured) = _curve(training, "loss"), _curve(validation, "loss")
    smooth = _smooth(raw)
    if smooth is not raw:
        axes.plot(x, raw, color=TRAINING, alpha=0.28, lw=0.8)
    axes.plot(x, smooth, color=TRAINING, lw=2.2, **_dots(smooth, 12))
    axes.plot(at, measured, color=VALIDATION, lw=1.8, **_dots(measured, 40))
    trend = np.concatenate([smooth, measured])
    everything = np.concatenate([raw, measured])
    if np.isfinite(everything).any():
        # a single spike may leave the frame rather than flatten everything else
        top = min(np.nanmax(everything), 2 * np.nanmax(trend))
        _set_limits(axes, np.nanmin(everything), top, 0.06)
    _end_labels(axes, [("training", smooth, TRAINING), ("validation", measured, VALIDATION)])
    # nats are what a cross-entropy is in; the loss of a regression is not
    nats = report.get("task") == "causal_lm" or bool(_part(report, "data", "train", "labels"))
    axes.set_ylabel("loss (nats per item)" if nats else "loss (per item)")
    axes.set_title("Loss")


def _plot_metric(axes: Any, lines: list[dict[str, Any]], metric: str,
                 report: dict[str, Any]) -> None:  # fmt: skip
    import numpy as np

    names = dict.fromkeys(name for line in lines for name in line if name not in ("step", "loss"))
    curves = {name: _curve(lines, name) for name in (metric, *names)}
    curves = {name: xy for name, xy in curves.items() if np.isfinite(xy[1]).any()}
    x, y = curves.pop(metric, _curve(lines, metric))
    # only what shares the main metric's scale can share its axis
    scale = 1.0 if np.isfinite(y).any() and np.nanmax(np.abs(y)) <= 1 else 0.0
    others = [n for n, (_, v) in curves.items() if np.nanmax(np.abs(v)) <= scale][:MAX_SECONDARY]
    for name in others:
        axes.plot(*curves[name], color=SECONDARY, lw=1.2)
    axes.plot(x, y, color=VALIDATION, lw=2.2, **_dots(y, 40))
    shown = np.concatenate([y, *(curves[name][1] for name in others)])
    if np.isfinite(shown).any():
        _set_limits(axes, np.nanmin(shown), np.nanmax(shown), 0.13)
        _value_labels(axes, x, y, _part(report, "best"))
    labels = [(name.replace("_", " "), curves[name][1], MUTED) for name in others]
    if labels:
        _end_labels(axes, [(metric.replace("_", " "), y, VALIDATION), *labels])
    axes.set_ylabel(metric.replace("_", " "), parse_math=False)
    axes.set_title(f"Validation {metric.replace('_', ' ')}", parse_math=False)


def _value_labels(axes: Any, x: NDArray[Any], y: NDArray[Any], best: dict[str, Any]) -> None:
    """Write the value of the first point and of the best, on the side away from the curve."""
    import numpy as np

    known = np.flatnonzero(np.isfinite(y))
    sign = -1 if best.get("mode") == "min" else 1
    first, top = known[0], known[np.argmax(sign * y[known])]
    chosen = np.flatnonzero((x == best.get("step", math.nan)) & np.isfinite(y))
    top = chosen[0] if len(chosen) else top

    def label(i: int, text: str, dx: int, dy: int, **style: Any) -> None:
        axes.annotate(text, (x[i], y[i]), (dx, dy), textcoords="offset points", size=10.5,
                      va="bottom" if dy > 0 else "top", clip_on=False, **style)  # fmt: skip

    if first != top:
        when = " before training" if x[first] == 0 else ""
        label(first, _number(float(y[first])) + when, 5, -7 * sign, ha="left", color=MUTED)
    axes.plot(x[top], y[top], "o", ms=9, color=VALIDATION, mec="white", mew=1.5, zorder=4)
    late = x[top] > 0.6 * x[-1]
    label(top, _number(float(y[top])), 4 if late else -4, 8 * sign, color=VALIDATION,
          ha="right" if late else "left", weight="bold")  # fmt: skip


def _plot_learning_rate(axes: Any, training: list[dict[str, Any]]) -> None:
    import numpy as np

    x, y = _curve(training, "learning_rate")
    axes.plot(x, y, color=TRAINING, lw=2.2, **_dots(y, 1))
    if np.isfinite(y).any():
        _set_limits(axes, 0.0, float(np.nanmax(y)), 0.08)
    axes.set_ylabel("learning rate")
    axes.set_title("Learning rate")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _dots(y: NDArray[Any], most: int) -> dict[str, Any]:
    """Return the style of points, which are drawn only where they are few enough to be told."""
    return {"marker": "o" if len(y) <= most else "", "ms": 5, "mec": "white", "mew": 0.8}


def _set_limits(axes: Any, low: float, high: float, margin: float) -> None:
    room = margin * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _end_labels(axes: Any, curves: list[tuple[str, NDArray[Any], str]]) -> None:
    """Name each curve in the margin, at the height where it ends; names never overlap."""
    low, high = axes.get_ylim()
    gap, ends = 0.058, []
    for text, y, color in curves:
        known = y[y == y]
        if len(known):
            ends.append((min(1.0, (known[-1] - low) / (high - low)), text, color))
    floor = -1.0
    for height, text, color in sorted(ends):
        floor = max(height, floor + gap)
        axes.text(1.02, floor, text, color=color, size=10.5, va="center", parse_math=False,
                  transform=axes.transAxes)  # fmt: skip


def _furnish(axes: Any, last_step: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("step")
    axes.title.set(size=12, weight="bold", color=INK)
    if not any(len(line.get_xdata()) for line in axes.lines):
        axes.text(0.5, 0.5, "nothing was logged", color=MUTED, ha="center", size=11,
                  transform=axes.transAxes)  # fmt: skip
        axes.set(xticks=[], yticks=[])


def _mark_best(axes: Any, step: Any) -> None:
    if not isinstance(step, int | float):
        return
    axes.axvline(step, color=MUTED, lw=0.9, zorder=1)
