"""The part of the page about the model's answers: confused labels, errors and samples."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_cli.errors import counted
from lora_cli.reporting import page_analysis, page_plots
from lora_cli.reporting.page_analysis import Kind, Line, finite
from lora_cli.reporting.page_boxes import box_sections
from lora_cli.reporting.page_elements import (
    DASH,
    esc,
    named,
    own,
    scroller,
    section,
    share_bar,
    table,
)
from lora_cli.reporting.page_entities import entity_sections
from lora_cli.reporting.page_search import search_sections
from lora_cli.reporting.page_transcripts import transcript_sections
from lora_cli.reporting.report import part, shown_number

MATRIX_LABELS, MAP_LABELS = 20, 120  # more are no matrix, and no map, that one can read
MOST_LABELS, PAIRS, CASES = 200, 15, 20
THUMBNAILS = "thumbnails.json"  # in `predictions`: of the worst rows, by split and row
_SOUND = '<audio controls preload="none"'
MEDIA = re.compile(r"data:(image/(jpeg|png|webp)|audio/(wav|mpeg|flac));base64,[A-Za-z0-9+/=]+")


def read_thumbnails(folder: Path, split: str) -> dict[str, str]:
    """Return small images or sounds of a split's rows as `data:` URLs, by row."""
    try:
        found = json.loads((folder / THUMBNAILS).read_text(encoding="utf-8"))
        pictures = part(found, split) if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}
    return {row: str(p) for row, p in pictures.items() if MEDIA.fullmatch(str(p))}


def answer_sections(
    report: dict[str, Any],
    kind: Kind,
    lines: list[Line],
    split: str,
    pictures: dict[str, str] | None = None,
) -> list[str]:
    """Return the sections on what the model says of a split's rows; `pictures` are of its rows."""
    lines = [{**line, "picture": (pictures or {}).get(str(line.get("row")))} for line in lines]
    rows = counted(len(lines), f"{split} row")
    if kind in ("single_label", "multi_label"):
        labels = page_analysis.label_names(report, lines)
        wrong = page_analysis.worst(kind, lines, len(lines))
        shown = f"The {CASES} of {len(wrong):,}" if len(wrong) > CASES else f"The {len(wrong):,}"
        note = (
            f"{shown} wrong rows (of {rows}) that cost most loss, the worst first; beside a label "
            "the probability that the model gave it. Where it is sure and the label says "
            "otherwise, check the label first: it may be the label that is wrong."
        )
        return [
            _confusion(labels, lines, rows) if kind == "single_label" else "",
            _labels(labels, lines, rows),
            _calibration(kind, lines, rows, len(labels)),
            section("errors", "Worst errors", note, _cases(wrong[:CASES])),
        ]
    if kind == "spans":
        return entity_sections(lines, split)
    if kind == "transcript":
        return transcript_sections(lines, split)
    if kind == "boxes":
        return box_sections(report, lines, split)
    if kind == "retrieval":
        return search_sections(lines, split)
    if kind == "regression":
        both = [(finite(x.get("reference")), finite(x.get("prediction"))) for x in lines]
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        plot = page_plots.scatter(pairs)
        plot = f'<div class="grid">{plot}</div>' if plot else ""
        cases = _cases(page_analysis.worst(kind, lines, CASES))
        note = f"The {split} rows whose prediction is farthest from the reference, the worst first."
        return [
            section("predictions", "Predictions", f"Of the {rows}.", plot),
            section("errors", "Worst errors", note, cases),
        ]
    hardest = page_analysis.worst(kind, lines, CASES)
    unit = "token" if kind == "text" else "item"
    note = f"The {split} rows with the highest loss per {unit}, the hardest first. Look for rows "
    note += "that are broken"
    note += ": another language, markup, a text that was cut." if kind == "text" else "."
    return [section("errors", "Hardest rows", note, _cases(hardest, unit))]


def _confusion(labels: list[str], lines: list[Line], rows: str) -> str:
    pairs = page_analysis.confused_pairs(labels, lines)
    note = f"{rows}: each line a label, each column what it was called. Blue is right, orange wrong"
    note += "; the deeper, the larger the share of the label's rows."
    if len(labels) > MATRIX_LABELS:
        cells = [[named(a), named(b), f"{n:,}"] for n, a, b in pairs[:PAIRS]]
        header = ["label", "called instead", "rows"]
        shown = table(header, cells, "Confused pairs", texts=2) if cells else ""
        if len(labels) > MAP_LABELS:
            note = (
                f"Of {rows} and {counted(len(labels), 'label')}, the pairs that are confused most."
            )
            return section("confusion", "Confusion", note, shown)
        matrix = page_analysis.confusion(labels, lines)
        grid = scroller(page_plots.heat_map(labels, matrix), "Confusion matrix")
        return section("confusion", "Confusion", note, grid, "<h3>Confused most</h3>", shown)
    matrix = page_analysis.confusion(labels, lines)
    head = "".join(f'<th scope="col" title="{esc(x)}">{own(x)}</th>' for x in labels)
    body = ""
    for i, (label, row) in enumerate(zip(labels, matrix, strict=True)):
        total = sum(row) or 1
        counts = "".join(_cell(n, n / total, i == j) for j, n in enumerate(row))
        body += f'<tr><th scope="row" title="{esc(label)}">{own(label)}</th>{counts}</tr>'
    corner = '<td class="corner">label ↓<br>called →</td>'
    grid = f"<thead><tr>{corner}{head}</tr></thead><tbody>{body}</tbody>"
    if pairs:
        count, label, called = pairs[0]
        note += f" Confused most: {own(label, 'code')} called {own(called, 'code')} ({count})."
    inner = scroller(f'<table class="matrix">{grid}</table>', "Confusion matrix")
    return section("confusion", "Confusion", note, inner)


def _cell(count: int, share: float, hit: bool) -> str:
    shade = share**page_plots.FAINT
    deep = shade > (0.87 if hit else 0.92)  # so deep that white reads better than black
    looks = [*["hi"] * deep, *["hit"] * hit]
    look = f' class="{" ".join(looks)}"' if looks else ""
    return f'<td{look} style="--v:{shade:.2f}">{count}</td>' if count else "<td></td>"


def _labels(labels: list[str], lines: list[Line], rows: str) -> str:
    scores = page_analysis.per_label(labels, lines)
    note = f"Of {rows}. Precision: of the rows called so, the share that are. Recall: of the rows "
    note += "that are, the share called so. F1: the harmonic mean of both."
    if many := len(scores) > MATRIX_LABELS:
        scores = sorted(scores, key=lambda s: (s.f1 is None, s.f1 or 0.0))[:MOST_LABELS]
        note += " The labels with the lowest F1 come first."
    cells = [
        [
            named(s.label),
            *(f"{v:.3f}" if v is not None else DASH for v in (s.precision, s.recall)),
            share_bar(s.f1),
            f"{s.rows:,}",
            f"{s.called:,}",
        ]
        for s in scores
    ]
    header = ["label", "precision", "recall", "F1", "rows", "called so"]
    inner = table(header, cells[:MATRIX_LABELS], "By label") if cells else ""
    if many:
        rest = table(header, cells[MATRIX_LABELS:], "The other labels")
        inner += f"<details><summary>The other {len(cells) - MATRIX_LABELS} labels</summary>{rest}"
        inner += "</details>"
    return section("labels", "By label", note, inner)


def _calibration(kind: Kind, lines: list[Line], rows: str, n_labels: int) -> str:
    found = page_analysis.calibration(kind, lines, n_labels)
    if found is None:
        return ""
    bins, error = found
    total = sum(b.rows for b in bins)
    said = sum(b.rows * b.confidence for b in bins) / total
    true = sum(b.rows * b.accuracy for b in bins) / total
    of = "its predictions" if kind == "single_label" else "its labels, row by row,"
    lean = "overconfident" if said > true else "underconfident"
    lean = "" if abs(said - true) < 0.02 else f": it is {lean}"
    note = (
        f"Can its probabilities be believed? It gives {of} {100 * said:.1f} % on average, and "
        f"{100 * true:.1f} % of them are right{lean}. Expected calibration error "
        f"<b>{error:.3f}</b>: the mean distance from the dashed line, over ten bins. The pale bars "
        f"show how many of the {total:,} predictions each bin holds."
    )
    plot = f'<div class="grid">{page_plots.reliability(bins, error)}</div>'
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
            head = f"<span>{each} per {unit}, {counted(int(count or 0), unit)}</span>"
            several = wanted if isinstance(wanted, list) else [wanted]  # right answers to a row
            answers = [*(("wanted", text) for text in several), ("said", said)]
            texts = "".join(
                f"<div><i>{name}</i>{own(str(text).strip(), 'span', 'text')}</div>"
                for name, text in answers
                if text is not None
            )
        else:
            head = f"<span>wanted {_answer(wanted, scores)}</span>"
            head += f"<span>said {_answer(said, scores)}</span>"
        text = own(line["text"], "span", "text") if line.get("text") else ""
        texts = f'<div class="pair">{texts}</div>' if texts else ""
        media, picture, sound = str(line.get("picture") or ""), "", ""
        if media.startswith("data:audio/"):
            sound = _player(media)
        elif media:
            picture = f'<img class="thumb" alt="" src="{esc(media)}">'
        items.append(f'<li>{picture}<div class="head">{head}{place}</div>{text}{sound}{texts}</li>')
    return f'<ol class="cases">{"".join(items)}</ol>' if items else ""


def _answer(value: Any, scores: dict[str, Any]) -> str:
    """Return one or several labels or a number, with the model's probability."""
    if isinstance(value, float):
        return f"<b>{shown_number(value)}</b>"
    parts = []
    for label in value if isinstance(value, list) else [value]:
        p = finite(scores.get(str(label)))
        parts.append(f"{own(label, 'b')}{f' {100 * p:.1f} %' if p is not None else ''}")
    return ", ".join(parts) or "<b>none</b>"


def sample_section(report: dict[str, Any]) -> str:
    """Return what a model wrote before training, at each evaluation, and after it."""
    items = []
    samples = report.get("samples")
    for sample in samples if isinstance(samples, list) else []:
        if not isinstance(sample, dict):
            continue
        texts = "".join(
            f"<div><i>{name}</i>{_said(text)}</div>" for name, text in _progress(sample)
        )
        prompt = own(sample.get("prompt", ""), "b", "text")
        place = f'<span class="place">{own(sample.get("place", ""))}</span>'
        head = f'<div class="head"><span>prompt</span>{place}</div>{prompt}'
        items.append(f'<li>{head}<div class="pair">{texts}</div></li>')
    inner = f'<ol class="cases">{"".join(items)}</ol>' if items else ""
    note = "What the model says of the same validation rows before training, at each evaluation "
    note += "and after training (the best adapter)"
    note += "." if _SOUND in inner else "; the most likely token every time."
    return section("samples", "Samples", note, inner)


def _said(text: str) -> str:
    """Return a sample as markup: a text, or a player for a sound."""
    if MEDIA.fullmatch(text):
        return _player(text)
    return own(text.strip() or "(nothing)", "span", "text")


def _player(sound: str) -> str:
    return f'{_SOUND} src="{esc(sound)}"></audio>'


def _progress(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a model said of a row, by when, in order; equal answers in a row are one."""
    steps = sample.get("during")
    parts = [one for one in steps if isinstance(one, dict)] if isinstance(steps, list) else []
    said = [(one.get("step"), one.get("text")) for one in parts]
    groups: list[tuple[list[int], str]] = []
    for step, text in said:
        if not (isinstance(step, int) and isinstance(text, str)):
            continue
        if groups and groups[-1][1] == text:
            groups[-1][0].append(step)
        else:
            groups.append(([step], text))
    named = [
        (f"step {of[0]:,}" + (f" to {of[-1]:,}" if len(of) > 1 else ""), text)
        for of, text in groups
    ]
    names = {"before": "before", "after": "after training", "reference": "in the data"}
    whole = {key: str(sample[key]) for key in names if isinstance(sample.get(key), str)}
    before = [(names["before"], whole["before"])] if "before" in whole else []
    rest = [(names[key], whole[key]) for key in ("after", "reference") if key in whole]
    return [*before, *named, *(pair for pair in rest if pair[1] or pair[0] == names["after"])]
