"""The part of the page about objects in images: the scores of each label, the worst images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.errors import counted
from lora_cli.reporting.page_analysis import Line, finite
from lora_cli.reporting.page_elements import DASH, esc, named, own, section, share_bar, table
from lora_cli.reporting.report import part

CASES, LABELS = 20, 200
OVERLAP = 0.5  # intersection over union from which on a box is right
Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Box:
    """A box in an image, with its label and score."""

    corners: Corners
    label: str
    score: float | None = None
    crowd: bool = False


def box_sections(report: dict[str, Any], lines: Sequence[Line], split: str) -> list[str]:
    """Return the sections on the objects in a split's pictures."""
    rows = counted(len(lines), f"{split} row")
    hardest = sorted(lines, key=lambda line: -(finite(line.get("loss")) or 0.0))
    shown = hardest[:CASES]
    note = (
        f"{'The' if len(shown) > 1 else 'Of the'} {counted(len(shown), 'picture')} (of {rows}) "
        "that cost most loss, the worst first. Blue, drawn through: what is in the data. Orange, "
        "dashed: what the model found. Where the model is right, the annotation is not."
    )
    cases = "".join(map(_case, shown))
    return [
        _labels(report, lines, split, rows),
        section(
            "errors", "Worst pictures", note, f'<ol class="cases">{cases}</ol>' if cases else ""
        ),
    ]


def boxes_of(line: Line, key: str) -> list[Box]:
    """Return the boxes of a line, as its reference or its prediction has them."""
    found = []
    value = line.get(key)
    for item in value if isinstance(value, list) else []:
        if not isinstance(item, dict):
            continue
        corners = item.get("box")
        numbers = [finite(n) for n in corners] if isinstance(corners, list) else []
        known = [n for n in numbers if n is not None]
        if len(known) == 4 == len(numbers):
            x0, y0, x1, y1 = known
            label, score = str(item.get("label")), finite(item.get("score"))
            found.append(Box((x0, y0, x1, y1), label, score, bool(item.get("crowd"))))
    return found


def per_label(lines: Iterable[Line]) -> dict[str, tuple[int, int, int]]:
    """Return the numbers of objects, of predictions and of correct predictions of each label.

    A box is right if it overlaps one of its label by half of their union that no box with a higher
    score has taken. One on a crowd does not count.
    """
    wanted: Counter[str] = Counter()
    said: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for line in lines:
        free = boxes_of(line, "reference")
        wanted.update(box.label for box in free if not box.crowd)
        for box in sorted(boxes_of(line, "prediction"), key=lambda box: -(box.score or 0.0)):
            alike = [o for o in free if o.label == box.label]
            best = max(
                alike, key=lambda other: (_overlap(box, other), not other.crowd), default=None
            )
            if best is None or _overlap(box, best) < OVERLAP:
                said[box.label] += 1
            elif not best.crowd:
                said[box.label] += 1
                right[box.label] += 1
                free.remove(best)
    labels = sorted(wanted.keys() | said.keys())
    return {label: (wanted[label], said[label], right[label]) for label in labels}


def _overlap(found: Box, other: Box) -> float:
    """Return the intersection over union of two boxes; of a crowd, over the found one."""
    a, b = found.corners, other.corners
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area_a, area_b = ((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    whole = area_a if other.crowd else area_a + area_b - width * height
    return width * height / whole if whole > 0 else 0.0


def _labels(report: dict[str, Any], lines: Sequence[Line], split: str, rows: str) -> str:
    scores = part(report, "metrics", "after", split)
    note = (
        f"Objects of {rows}. A box is right if it and an object of its label overlap by half of "
        "their union. Precision: of the boxes that the model found (with a score above "
        "<code>task.threshold</code>), the share that are right. Recall: of the objects, the share "
        "that were found. Average precision: over all scores and the overlaps 0.50 to 0.95."
    )
    counts = per_label(lines)
    if not counts:
        return ""
    cells = []
    for label, (wanted, said, right) in list(counts.items())[:LABELS]:
        precision = f"{right / said:.3f}" if said else DASH
        recall = f"{right / wanted:.3f}" if wanted else DASH
        average = share_bar(finite(scores.get(f"ap_{label}")))
        cells.append([named(label), precision, recall, average, f"{wanted:,}", f"{said:,}"])
    header = ["label", "precision", "recall", "average precision", "objects", "found"]
    return section("labels", "By label", note, table(header, cells, "By label"))


def _case(line: Line) -> str:
    """Return an image with its boxes, and a description of them."""
    wanted, said = boxes_of(line, "reference"), boxes_of(line, "prediction")
    loss = finite(line.get("loss"))
    head = f"<span>loss <b>{DASH if loss is None else f'{loss:.3f}'}</b></span>"
    head += f"<span>{counted(len(wanted), 'object')}, {len(said):,} found</span>"
    place = f'<span class="place">{own(line["place"])}</span>' if "place" in line else ""
    both = "".join(
        f"<div><i>{name}</i>{own(', '.join(map(_words, boxes)) or '(nothing)', 'span', 'text')}"
        "</div>"
        for name, boxes in (("in the data", wanted), ("found", said))
    )
    drawn = _drawn(line, wanted, said)
    return f'<li>{drawn}<div class="head">{head}{place}</div><div class="pair">{both}</div></li>'


def _words(box: Box) -> str:
    score = "" if box.score is None else f" {100 * box.score:.0f} %"
    return f"{box.label}{score}{' (crowd)' if box.crowd else ''}"


def _drawn(line: Line, wanted: Sequence[Box], said: Sequence[Box]) -> str:
    """Return the image with the boxes on it, or nothing if the image was not saved."""
    picture, size = line.get("picture"), line.get("size")
    numbers = [finite(n) for n in size] if isinstance(size, list) else []
    width, height = (numbers[0] or 0.0, numbers[1] or 0.0) if len(numbers) == 2 else (0.0, 0.0)
    if not picture or width <= 0 or height <= 0:
        return ""
    shapes = "".join(
        f'<rect class="{look}" x="{x0:.1f}" y="{y0:.1f}" width="{max(x1 - x0, 0):.1f}" '
        f'height="{max(y1 - y0, 0):.1f}"><title>{esc(f"{name}: {_words(box)}")}</title></rect>'
        for look, name, boxes in (("wanted", "in the data", wanted), ("found", "found", said))
        for box in boxes
        for x0, y0, x1, y1 in [box.corners]
    )
    size_of = f'width="{width:.0f}" height="{height:.0f}"'
    return (
        f'<svg class="boxed" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{esc(str(line.get("place", "picture")))}">'
        f'<image {size_of} href="{esc(picture)}" preserveAspectRatio="none"/>{shapes}</svg>'
    )
