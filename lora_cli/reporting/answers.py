"""The part of the page on the model's answers: which labels it confuses, where it errs, samples."""

from __future__ import annotations

from typing import Any

from lora_cli.reporting import analysis, plots
from lora_cli.reporting.analysis import Kind, Line, finite
from lora_cli.reporting.markup import DASH, esc, own, scroller, section, table
from lora_cli.reporting.report import part, shown_number

MATRIX_LABELS = 20  # more are no matrix that one can read
MOST_LABELS, PAIRS, CASES = 200, 15, 20


def answer_sections(report: dict[str, Any], kind: Kind, lines: list[Line], split: str) -> list[str]:
    """Return the sections on what the model says of a split's rows."""
    rows = f"{len(lines):,} {split} rows"
    if kind in ("single_label", "multi_label"):
        labels = analysis.label_names(report, lines)
        wrong = analysis.worst(kind, lines, len(lines))
        note = f"The {min(CASES, len(wrong))} of {len(wrong):,} wrong rows (of {rows}) that"
        return [
            _confusion(labels, lines, rows) if kind == "single_label" else "",
            _labels(labels, lines, rows),
            _calibration(kind, lines, rows),
            section("errors", "Worst errors", f"{note} cost most loss.", _cases(wrong[:CASES])),
        ]
    if kind == "regression":
        both = [(finite(x.get("reference")), finite(x.get("prediction"))) for x in lines]
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        plot = plots.scatter(pairs)
        plot = f'<div class="grid">{plot}</div>' if plot else ""
        cases = _cases(analysis.worst(kind, lines, CASES))
        note = f"The {split} rows farthest from their reference."
        return [
            section("predictions", "Predictions", f"Of the {rows}.", plot),
            section("errors", "Worst errors", note, cases),
        ]
    hardest = analysis.worst(kind, lines, CASES)
    unit = "token" if kind == "text" else "item"
    note = f"The {split} rows with the highest loss per {unit}; where a row is hard, look at it."
    return [section("errors", "Hardest rows", note, _cases(hardest, unit))]


def _confusion(labels: list[str], lines: list[Line], rows: str) -> str:
    matrix = analysis.confusion(labels, lines)
    pairs = analysis.confused_pairs(labels, matrix)
    if len(labels) > MATRIX_LABELS:
        cells = [[own(a), own(b), f"{n:,}"] for n, a, b in pairs[:PAIRS]]
        note = f"Of {rows} and {len(labels)} labels, the pairs that are confused most."
        header = ["label", "called instead", "rows"]
        inner = table(header, cells, "Confused pairs", texts=2) if cells else ""
        return section("confusion", "Confused labels", note, inner)
    head = "".join(f'<th scope="col" title="{esc(x)}">{own(x)}</th>' for x in labels)
    body = ""
    for i, (label, row) in enumerate(zip(labels, matrix, strict=True)):
        total = sum(row) or 1
        counts = "".join(_cell(n, n / total, i == j) for j, n in enumerate(row))
        body += f'<tr><th scope="row" title="{esc(label)}">{own(label)}</th>{counts}</tr>'
    corner = '<td class="corner">label ↓<br>called →</td>'
    grid = f"<thead><tr>{corner}{head}</tr></thead><tbody>{body}</tbody>"
    note = f"{rows}: each line a label, each column what it was called."
    if pairs:
        count, label, called = pairs[0]
        note += (
            f" Most often confused: {own(label, 'code')} called {own(called, 'code')} ({count})."
        )
    inner = scroller(f'<table class="matrix">{grid}</table>', "Confusion matrix")
    return section("confusion", "Confusion", note, inner)


def _cell(count: int, share: float, hit: bool) -> str:
    shade = share**0.7  # so that a few confused rows show
    looks = [*["hi"] * (shade > 0.6), *["zero"] * (not count), *["hit"] * hit]
    return f'<td class="{" ".join(looks)}" style="--v:{shade:.3f}">{count if count else "·"}</td>'


def _labels(labels: list[str], lines: list[Line], rows: str) -> str:
    scores = analysis.per_label(labels, lines)
    note = "Precision: of the rows called so, the share that are. Recall: of the rows that are, the"
    note += f" share called so. {rows[:1].upper()}{rows[1:]}."
    if len(scores) > MOST_LABELS:
        scores = sorted(scores, key=lambda s: (s.f1 is None, s.f1 or 0.0))[:MOST_LABELS]
        note += f" The {MOST_LABELS} labels with the lowest F1."
    cells = [
        [
            own(s.label),
            *(f"{v:.3f}" if v is not None else DASH for v in (s.precision, s.recall)),
            _bar(s.f1),
            f"{s.rows:,}",
            f"{s.called:,}",
        ]
        for s in scores
    ]
    header = ["label", "precision", "recall", "F1", "rows", "called so"]
    return section("labels", "By label", note, table(header, cells, "By label") if cells else "")


def _bar(share: float | None) -> str:
    if share is None:
        return DASH
    bar = f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'
    return f"{share:.3f}{bar}"


def _calibration(kind: Kind, lines: list[Line], rows: str) -> str:
    found = analysis.calibration(kind, lines)
    if found is None:
        return ""
    bins, error = found
    total = sum(b.rows for b in bins)
    said = sum(b.rows * b.confidence for b in bins) / total
    true = sum(b.rows * b.accuracy for b in bins) / total
    of = "its predictions" if kind == "single_label" else "its labels, row by row,"
    lean = "" if abs(said - true) < 0.01 else "overconfident" if said > true else "underconfident"
    note = (
        f"Expected calibration error <b>{error:.3f}</b>: what the model states is on average "
        f"{100 * error:.1f} points from what comes true. It gives {of} {said:.3f} on average, and "
        f"{true:.3f} of them are right{f': it is {lean}' if lean else ''}. Ten bins; the pale bars "
        f"show how many of the {total:,} predictions each holds."
    )
    plot = f'<div class="grid">{plots.reliability(bins, error)}</div>'
    return section("calibration", "Calibration", note, plot)


def _cases(lines: list[Line], unit: str = "") -> str:
    """Return rows with their text, what was wanted and what was said; `unit` is of the loss."""
    items = []
    for line in lines:
        scores = part(line, "scores")
        wanted, said = line.get("reference"), line.get("prediction")
        loss, count = finite(line.get("loss")), finite(line.get("n_items"))
        place = f'<span class="place">{own(line["place"])}</span>' if "place" in line else ""
        texts = ""
        if unit:
            each = f"<b>{loss / count:.3f}</b>" if loss is not None and count else DASH
            head = f"<span>{each} a {unit}, {count or 0:,.0f} {unit}s</span>"
            answers = [("wanted", wanted), ("said", said)]
            texts = "".join(
                f"<div><h3>{name}</h3>{own(str(text).strip(), 'span', 'text')}</div>"
                for name, text in answers
                if text is not None
            )
        else:
            head = f"<span>is {_answer(wanted, scores)}</span>"
            head += f"<span>called {_answer(said, scores)}</span>"
        text = own(line["text"], "span", "text") if line.get("text") else ""
        texts = f'<div class="pair">{texts}</div>' if texts else ""
        items.append(f'<li><div class="head">{head}{place}</div>{text}{texts}</li>')
    return f'<ol class="cases">{"".join(items)}</ol>' if items else ""


def _answer(value: Any, scores: dict[str, Any]) -> str:
    """Return a label, several, or a number, with the probability that the model gave it."""
    if isinstance(value, float):
        return f"<b>{shown_number(value)}</b>"
    parts = []
    for label in value if isinstance(value, list) else [value]:
        p = finite(scores.get(str(label)))
        parts.append(f"{own(label, 'b')}{f' {p:.3f}' if p is not None else ''}")
    return ", ".join(parts) or "<b>none</b>"


def sample_section(report: dict[str, Any]) -> str:
    """Return what a language model wrote before and after training."""
    items = []
    samples = report.get("samples")
    for sample in samples if isinstance(samples, list) else []:
        if not isinstance(sample, dict):
            continue
        names = (("before", "before training"), ("after", "after"), ("reference", "wanted"))
        texts = "".join(
            f"<div><h3>{name}</h3>{own(sample[key].strip() or '(nothing)', 'span', 'text')}</div>"
            for key, name in names
            if isinstance(sample.get(key), str) and (sample[key] or key != "reference")
        )
        prompt = own(sample.get("prompt", ""), "b", "text")
        place = f'<span class="place">{own(sample.get("place", ""))}</span>'
        head = f'<div class="head"><span>prompt</span>{place}</div>{prompt}'
        items.append(f'<li>{head}<div class="pair">{texts}</div></li>')
    inner = f'<ol class="cases">{"".join(items)}</ol>' if items else ""
    note = "The first validation rows, continued with the likeliest token every time."
    return section("samples", "Samples", note, inner)
