"""The plots of the page as inline SVG: learning curves, calibration, predictions and references.

Colours come from the page's style by class, so that they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.characters import cells, shortened
from lora_cli.errors import counted
from lora_cli.reporting.page_analysis import Bin
from lora_cli.reporting.page_elements import esc
from lora_cli.reporting.report import shown_number

Point = tuple[float, float]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 290, 56, 14, 24, 44
MOST_POINTS = 500  # of a line; more are averaged
MAP_WIDTH, CELL, NAME = 1012, (10.5, 18), 24  # of a heat map: pixels; columns of a label
FAINT = 0.7  # power of a share that is its shade, so that a few confused rows show


@dataclass(frozen=True)
class Series:
    """A line of a plot: its points by ascending x, its style and its name."""

    points: Sequence[Point]
    color: str
    name: str = ""
    raw: bool = False
    """A thin line behind the others, which does not decide the range."""
    dots: bool = False


@dataclass(frozen=True)
class Frame:
    """The mapping from values to positions in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM

    def at(self, point: Point) -> Point:
        """Return the position of a point, clipped slightly outside the frame."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = (point[0] - x0) / (x1 - x0 or 1)
        up = min(max((point[1] - y0) / (y1 - y0 or 1), -0.5), 1.5)
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about so many round numbers between two values."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= count), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def curves(
    title: str,
    series: Sequence[Series],
    mark: int | None = None,
    bases: Sequence[tuple[float, str]] = (),
    overfits: int | None = None,
) -> str:
    """Return a figure of lines over the steps, or nothing if there are no points.

    Args:
        title: What the plot shows.
        series: The lines, the first at the back.
        mark: The step of the best adapter.
        bases: Horizontal lines and their names.
        overfits: The step from which on the run overfits.
    """
    series = [Series(thin(s.points), s.color, s.name, s.raw, s.dots) for s in series if s.points]
    if not series:
        return ""
    bounding = [p for s in series if not s.raw for p in s.points] or list(series[0].points)
    values = [y for _, y in bounding] + [value for value, _ in bases]
    last = max(x for s in series for x, _ in s.points) or 1
    frame = Frame((0, max(last, mark or 0)), _padded(min(values), max(values)))
    steps = [x for x in ticks(*frame.x) if x == int(x)]  # there is no half step
    parts = _shade(frame, overfits) if overfits is not None else []
    parts += _axes(frame, steps, ticks(*frame.y), "step")
    parts += _mark(frame, mark) if mark is not None else []
    for value, _ in bases:
        _, y = frame.at((0, value))
        parts.append(f'<path class="base" d="M{frame.left} {y:.1f}H{frame.right}"/>')
    parts += [_line(frame, s) for s in series]
    keys = "".join(_key(f"bg-{s.color}", s.name) for s in series if s.name)
    keys += "".join(_key("dash", f"{name} {shown_number(value)}") for value, name in bases)
    said = f"{title} over {last:,.0f} steps. {' '.join(_titled(s) for s in series if not s.raw)}"
    said += f" The best adapter is that of step {mark:,}." if mark is not None else ""
    said += f" It overfits from step {overfits:,} on." if overfits is not None else ""
    return _figure(title, keys, said, parts)


def _shade(frame: Frame, start: int) -> list[str]:
    """Return the shaded region where the run overfits, with its label."""
    x, _ = frame.at((start, 0))
    width, height = frame.right - x, frame.bottom - frame.top
    parts = [
        f'<rect class="shade" x="{x:.1f}" y="{frame.top}" width="{width:.1f}" height="{height}"/>'
    ]
    if width > 70:  # at its beginning, where both lines are low
        parts.append(_text(x + 6, frame.top + 15, "overfits", "start", "warned"))
    return parts


def _mark(frame: Frame, step: int) -> list[str]:
    x, _ = frame.at((step, 0))
    side = "end" if step > 0.6 * frame.x[1] else "start"
    line = f'<path class="mark" d="M{x:.1f} {frame.top}V{frame.bottom}"/>'
    return [line, _text(x, frame.top - 8, f"best: step {step:,}", side)]


def _titled(series: Series) -> str:
    """Return a description of a line, for screen readers."""
    (first, start), (last, end) = series.points[0], series.points[-1]
    name = series.name[:1].upper() + series.name[1:] or "It"
    if len(series.points) == 1:
        return f"{name} is {shown_number(end)} at step {last:,.0f}."
    return (
        f"{name} goes from {shown_number(start)} at step {first:,.0f} to "
        f"{shown_number(end)} at step {last:,.0f}."
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    floor = 0.0 if low >= 0 else -math.inf  # losses and shares are not drawn below nothing
    return max(low - margin, floor), high + margin


def thin(points: Sequence[Point]) -> list[Point]:
    """Return at most `MOST_POINTS` points: the means of neighbours."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _line(frame: Frame, series: Series) -> str:
    places = [frame.at(point) for point in series.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    look = f"line {series.color}{' raw' if series.raw else ''}"
    parts = [f'<path class="{look}" d="{path}"/>'] if len(places) > 1 else []
    if len(places) == 1 or (series.dots and len(places) <= 60):
        parts += [
            f'<circle class="dot {series.color}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            f"<title>step {step:,.0f}: {shown_number(value)}</title></circle>"
            for (x, y), (step, value) in zip(places, series.points, strict=True)
        ]
    return "".join(parts)


def _axes(
    frame: Frame, xs: Sequence[float], ys: Sequence[float], across: str, up: str = ""
) -> list[str]:
    """Return the grid lines, tick labels and axis names."""
    parts = []
    most = max(map(abs, ys))
    for value in ys:
        _, y = frame.at((0, value))
        parts.append(f'<path class="rule" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        parts.append(_text(frame.left - 7, y + 4, short(value, most), "end"))
    for value in xs:
        x, _ = frame.at((value, 0))
        parts.append(_text(x, frame.bottom + 18, short(value), "middle"))
    parts.append(_text((frame.left + frame.right) / 2, HEIGHT - 6, across, "middle"))
    if up:
        parts.append(_text(8, frame.top - 9, f"↑ {up}", "start"))
    return parts


def short(value: float, most: float = 1.0) -> str:
    """Return a number as an axis has it that goes to `most`: 12k, 0.25, 2e-4."""
    if abs(value) >= 1e4:
        unit, name = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k")
        return f"{value / unit:.4g}{name}"
    if value and most < 1e-2:
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _text(x: float, y: float, text: str, anchor: str, look: str = "") -> str:
    look = f' class="{look}"' if look else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{esc(text)}</text>'


def _key(look: str, name: str) -> str:
    return f'<span class="key"><i class="{look}"></i>{esc(name)}</span>'


def _figure(title: str, keys: str, said: str, parts: Iterable[str]) -> str:
    return (
        f"<figure><figcaption><b>{esc(title)}</b><span>{keys}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(said)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def reliability(bins: Sequence[Bin], error: float) -> str:
    """Return the reliability diagram: predicted probabilities against the share that is right."""
    frame = Frame((0, 1), (0, 1))
    fifths = [0, 0.2, 0.4, 0.6, 0.8, 1]
    parts = _axes(frame, fifths, fifths, "stated probability", "share that was right")
    total = sum(b.rows for b in bins)
    width = (frame.right - frame.left) / 10 - 3
    for b in bins:  # how many predictions each bin holds
        x, _ = frame.at((min(int(b.confidence * 10), 9) / 10, 0))
        height = 0.5 * (frame.bottom - frame.top) * b.rows / total
        parts.append(
            f'<rect class="soft" x="{x + 1.5:.1f}" y="{frame.bottom - height:.1f}" '
            f'width="{width:.1f}" height="{height:.1f}"/>'
        )
    (x0, y0), (x1, y1) = frame.at((0, 0)), frame.at((1, 1))
    parts.append(f'<path class="base" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
    points = [frame.at((b.confidence, b.accuracy)) for b in bins]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    parts.append(f'<path class="line orange" d="{path}"/>')
    for (x, y), b in zip(points, bins, strict=True):
        title = f"{counted(b.rows, 'prediction')}: said {b.confidence:.3f}, true {b.accuracy:.3f}"
        radius = 2.5 + 5 * math.sqrt(b.rows / total)  # a bin of few rows tells little
        parts.append(
            f'<circle class="dot orange" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
            f"<title>{title}</title></circle>"
        )
    keys = _key("bg-orange", "measured") + _key("dash", "perfect")
    said = f"Reliability diagram, expected calibration error {error:.4f}"
    return _figure("Reliability", keys, said, parts)


def scatter(pairs: Sequence[Point]) -> str:
    """Return a figure of references and predictions, at most 2,000 of them evenly chosen."""
    if not pairs:
        return ""
    pairs = pairs[:: -(-len(pairs) // 2000)]
    values: list[Any] = [v for pair in pairs for v in pair]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 1.0
    frame = Frame((low - margin, high + margin), (low - margin, high + margin))
    parts = _axes(frame, ticks(*frame.x), ticks(*frame.y), "reference", "predicted")
    (x0, y0), (x1, y1) = frame.at((low, low)), frame.at((high, high))
    parts.append(f'<path class="base" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
    for point in pairs:
        x, y = frame.at(point)
        parts.append(f'<circle class="dot blue" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    said = f"Predictions against references of {counted(len(pairs), 'row')}"
    return _figure("Predicted and wanted", _key("dash", "equal"), said, parts)


def heat_map(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """Return the confusion matrix of many labels without numbers; a pointer shows each."""
    names = [shortened(label, NAME) for label in labels]
    room = 6.2 * max(map(cells, names)) + 12
    cell = min(max((MAP_WIDTH - room - 8) / len(labels), CELL[0]), CELL[1])
    side = cell * len(labels)
    ground = f'<rect class="paper" x="{room:.0f}" y="{room:.0f}" '
    parts = [f'{ground}width="{side:.0f}" height="{side:.0f}"/>']
    for i, (label, name, row) in enumerate(zip(labels, names, matrix, strict=True)):
        middle, total = room + cell * (i + 0.5), sum(row) or 1
        parts.append(_text(room - 5, middle + 3.5, name, "end"))
        parts.append(
            f'<text text-anchor="start" transform="translate({middle + 3.5:.1f} {room - 5:.0f}) '
            f'rotate(-90)">{esc(name)}</text>'
        )
        parts += [
            f'<rect class="{"hit" if i == j else "miss"}" style="--v:{(n / total) ** FAINT:.2f}" '
            f'x="{room + cell * j:.1f}" y="{room + cell * i:.1f}" width="{cell:.1f}" '
            f'height="{cell:.1f}">'
            f"<title>{esc(label)} called {esc(labels[j])}: {n:,} of {total:,}</title></rect>"
            for j, n in enumerate(row)
            if n
        ]
    size = f"{room + side + 8:.0f}"
    right = sum(row[i] for i, row in enumerate(matrix))
    said = f"Confusion matrix of {len(labels)} labels: {right:,} of {sum(map(sum, matrix)):,} rows "
    return (
        f'<svg class="heat" role="img" aria-label="{esc(said)}on the diagonal" width="{size}" '
        f'height="{size}" viewBox="0 0 {size} {size}">{"".join(parts)}</svg>'
    )
