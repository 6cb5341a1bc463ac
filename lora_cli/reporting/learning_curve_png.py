"""The learning curve: loss, and the metric that chooses the best adapter."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.characters import shortened
from lora_cli.errors import counted, printable, warn
from lora_cli.files import write_atomically
from lora_cli.reporting.fonts import fonts_for
from lora_cli.reporting.report import (
    goal_of,
    part,
    read_metrics_log,
    short_name,
    shown_number,
    title_of,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Log = list[dict[str, Any]]
    Curve = tuple[NDArray[Any], NDArray[Any]]  # steps (N,), values (N,)

# fmt: off
INK, MUTED, RULE, SECONDARY = "#1f2933", "#66717e", "#e3e7ec", "#9aa6b4"
TRAINING, VALIDATION = "#2f6db5", "#d4572a"
STYLE: dict[str, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#c3cad3",
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": RULE, "axes.axisbelow": True,
    "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.titlesize": 12,
    "axes.titleweight": "bold", "axes.labelcolor": MUTED, "axes.labelsize": 10.5,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 3, "ytick.major.size": 0,
    "font.size": 10, "lines.markeredgecolor": "white",
    "text.parse_math": False,  # a `$` in a name is no formula
}
# fmt: on


def plot_learning_curve(folder: Path, report: dict[str, Any]) -> Path:
    """Draw `learning_curve.png`, 1600 x 900 pixels, from the folder's `metrics.jsonl`.

    Left the loss of training and validation; right validation's main metric, or, where that is the
    loss or was never measured, the learning rate.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    log = [line for line in read_metrics_log(folder / "metrics.jsonl") if "step" in line]
    training = [line for line in log if "validation" not in line]
    measured = [{**part(s, "validation"), "step": s["step"]} for s in log if "validation" in s]
    best = part(report, "best")
    metric, marked = best.get("metric", "loss"), isinstance(best.get("step"), int)
    fonts, drawn = _drawable_names(report, measured, metric)
    metric = drawn.get(metric, metric)
    measured = [{drawn.get(k, k): v for k, v in line.items()} for line in measured]
    report = {**report, "base_model": drawn.get(_model_name(report), report.get("base_model"))}
    style = {**STYLE, "font.family": fonts, "axes.titlepad": 24 if marked else 10}
    with matplotlib.rc_context(style):
        # not pyplot, which keeps every figure alive and may look for a screen
        figure = Figure(figsize=(10, 5.625), dpi=160, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        _headline(figure, report)
        left, right = (figure.add_axes((x, 0.115, 0.325, 0.645)) for x in (0.07, 0.55))
        _plot_loss(left, training, measured, report)
        if metric != "loss" and any(metric in line for line in measured):
            _plot_metric(right, measured, metric, best)
        else:
            _plot_learning_rate(right, training)
        last = max((line["step"] for line in log), default=0) or 1
        for axes in (left, right):
            _finish(axes, last, best["step"] if marked else None)
        image = BytesIO()
        canvas.print_png(image)
    write_atomically(folder / "learning_curve.png", image.getvalue())
    return folder / "learning_curve.png"


def _model_name(report: dict[str, Any]) -> str:
    return short_name(str(report.get("base_model") or ""))


def _drawable_names(
    report: dict[str, Any], measured: Log, metric: str
) -> tuple[list[str], dict[str, str]]:
    """Return the fonts for the names in the plot, and replacements for names without a font.

    The warning says what is what; elsewhere the names stand as they are.
    """
    metrics = dict.fromkeys([metric, *(k for line in measured for k in line if k != "step")])
    model = _model_name(report)
    fonts = fonts_for([model, *metrics])
    unknown = [name for name in metrics if not fonts.can_draw(name)]
    drawn = {name: f"metric {i}" for i, name in enumerate(unknown, 1)}
    if not fonts.can_draw(model):
        drawn[model] = "base model"
    if drawn:
        meant = ", ".join(f"`{short}` is `{name}`" for name, short in drawn.items())
        letters = "".join(sorted(fonts.lacking))[:20]
        warn(
            f"no installed font can draw `{printable(letters)}` in learning_curve.png: there "
            f"{printable(meant)}; report.html has the names. A package like fonts-noto-cjk brings "
            "such fonts"
        )
    return fonts.families, drawn


def _headline(figure: Any, report: dict[str, Any]) -> None:
    ran, adapter = part(report, "training"), part(report, "adapter")
    rank, rows = adapter.get("rank"), part(report, "data", "train").get("rows")
    steps, seconds = ran.get("steps"), ran.get("seconds")
    task = goal_of(report.get("task") or "training").capitalize()
    title = [task, _model_name(report)[-54:]]
    facts = [
        title_of(adapter) + (f", rank {rank}" if rank else ""),
        f"{rows:,} training rows" if rows else "",
        counted(steps, "step") if steps else "",
        (f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min") if seconds else "",
        str(ran.get("device") or "").replace("cpu", "CPU"),
    ]
    join = "  ·  ".join
    figure.text(0.0215, 0.935, join(filter(None, title)), size=14.5, weight="bold", color=INK)
    figure.text(0.022, 0.888, join(filter(None, facts)), size=10.5, color=MUTED)


def curve_of(lines: Log, key: str) -> Curve:
    """Return steps (N,), ascending, and values (N,): NaN where the log has null or infinity."""
    import numpy as np

    points = {line["step"]: line[key] for line in lines if key in line}  # a step's last line counts
    steps = sorted(points)
    y = np.array([v if isinstance(v := points[s], int | float) else math.nan for s in steps], float)
    return np.array(steps, float), np.where(np.isfinite(y), y, np.nan)


def smooth(y: NDArray[Any]) -> NDArray[Any]:
    """Return a Gaussian running mean over a few per cent of the points; NaN weighs nothing."""
    import numpy as np

    sigma = max(1.0, len(y) / 40)
    reach = np.arange(-int(3 * sigma), int(3 * sigma) + 1)
    kernel, known = np.exp(-0.5 * (reach / sigma) ** 2), np.isfinite(y)
    total = np.convolve(np.where(known, y, 0.0), kernel, "same")
    weight = np.convolve(known.astype(float), kernel, "same")
    return np.where(weight > 1e-3, total / np.maximum(weight, 1e-3), np.nan)


def _draw(axes: Any, curve: Curve, color: str, name: str = "", **style: Any) -> None:
    """Draw a line, with its points where they are few; `name` is for `_name_ends`."""
    x, y = curve
    few = len(y) == 1 or (color == VALIDATION and len(y) <= 40)
    if len(y[y == y]):
        style = {"lw": 2.2, "marker": "o" if few else "", "ms": 5.5, **style}
        axes.plot(x, y, color=color, label=name.replace("_", " ") or "_", **style)


def _plot_loss(axes: Any, training: Log, measured: Log, report: dict[str, Any]) -> None:
    (x, raw), validation = curve_of(training, "loss"), curve_of(measured, "loss")
    if len(raw) < 12:
        _draw(axes, (x, raw), TRAINING, "training", marker="o")
    else:
        _draw(axes, (x, raw), TRAINING, alpha=0.3, lw=0.8)
        _draw(axes, (x, smooth(raw)), TRAINING, "training")
    _draw(axes, validation, VALIDATION, "validation")
    axes.margins(y=0.06)
    _name_ends(axes)
    # a cross-entropy is in nats, the loss of a regression is not
    nats = "in nats" in str(part(report, "metric_definitions").get("loss"))
    axes.set(title="Loss", ylabel=f"loss ({'nats ' if nats else ''}per item)")


def _plot_metric(axes: Any, measured: Log, metric: str, best: dict[str, Any]) -> None:
    """Draw the main metric, and lighter the others that share its scale, at most three."""
    import numpy as np
    from matplotlib.patheffects import withStroke

    names = dict.fromkeys(k for line in measured for k in line if k not in ("step", "loss"))
    curves = {name: curve_of(measured, name) for name in names}
    x, y = curves.pop(metric)
    known = [int(i) for i in np.flatnonzero(np.isfinite(y))]
    top = np.nanmax(np.abs(y[known]), initial=0.0)
    others = [k for k, (_, v) in curves.items() if max(top, *np.abs(v[v == v]), 0) <= 1][:3]
    for name in others:
        _draw(axes, curves[name], SECONDARY, name, lw=1.2)
    _draw(axes, (x, y), VALIDATION, metric if others else "")
    axes.margins(y=0.14)
    _name_ends(axes)
    title = metric.replace("_", " ")
    axes.set(title=f"Validation {title}", ylabel=title)
    up = -1 if best.get("mode") == "min" else 1  # a value stands on the side away from the curve

    def label(i: int, after: str, away: tuple[int, int], **style: Any) -> None:
        axes.annotate(
            shown_number(float(y[i])) + after, (x[i], y[i]), away, textcoords="offset points",
            size=10.5, ha="left" if away[0] > 0 else "right", va="bottom" if away[1] > 0 else "top",
            path_effects=[withStroke(linewidth=3, foreground="white")], **style,
        )  # fmt: skip

    if len(known):
        chosen = [i for i in known if x[i] == best.get("step")] or [known[np.argmax(up * y[known])]]
        first, top = known[0], chosen[0]
        axes.plot(x[top], y[top], "o", ms=9, mew=1.5, color=VALIDATION, zorder=4)
        side = -6 if x[top] > 0.3 * x[-1] else 6
        label(top, "", (side, 9 * up), color=VALIDATION, weight="bold")
        if first != top:
            when = " before training" if x[first] == 0 else ""
            label(first, when, (6, -8 * up), color=MUTED)


def _plot_learning_rate(axes: Any, training: Log) -> None:
    x, y = curve_of(training, "learning_rate")
    power = math.floor(math.log10(y[y == y].max(initial=0.0) or 1.0))
    _draw(axes, (x, y / 10**power), TRAINING)
    axes.set(title="Learning rate", ylabel=f"learning rate (x 1e{power})")


def _name_ends(axes: Any) -> None:
    """Name each line in the margin, at the height where it ends; names never overlap."""
    (low, high), free, ends = axes.get_ylim(), -1.0, []
    for line in axes.lines:
        if not line.get_label().startswith("_"):
            y = line.get_ydata()
            ends.append(((y[y == y][-1] - low) / (high - low), line.get_label(), line.get_color()))
    for height, name, color in sorted(ends):
        height = max(height, free)
        name = shortened(name, 14)
        axes.text(1.025, height, name, color=color, va="center", transform=axes.transAxes)
        free = height + 0.055


def _finish(axes: Any, last: int, best: int | None) -> None:
    """Set the axis of the steps, and mark the best one with a hairline."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlim=(-0.02 * last, 1.02 * last), xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if not axes.lines:
        axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
        axes.annotate("nothing was logged", (0.5, 0.5), xycoords="axes fraction", color=MUTED,
                      ha="center")  # fmt: skip
    elif best is not None:
        axes.axvline(best, color=SECONDARY, lw=0.8, zorder=1)
        side = "left" if best < 0.3 * last else "right"
        axes.annotate(f"best: step {best:,}", (best, 1), (0, 4), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha=side, color=MUTED)  # fmt: skip
