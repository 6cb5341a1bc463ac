"""`report.html`: what was trained on which data, how good it is, and where it fails.

One file that loads and runs nothing, made from the report, the log and the predictions of a run's
folder, so that it can be made again: `write_page(folder)`. What is not known is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.errors import counted
from lora_cli.files import write_atomically
from lora_cli.reporting import page_analysis, page_plots
from lora_cli.reporting.learning_curve_png import curve_of, smooth
from lora_cli.reporting.page_analysis import Line, finite
from lora_cli.reporting.page_answers import answer_sections, read_thumbnails, sample_section
from lora_cli.reporting.page_drawn_pictures import drawing_section
from lora_cli.reporting.page_elements import DASH, document, esc, grouped_table, own, section
from lora_cli.reporting.page_settings import clock, data_section, settings_section, size
from lora_cli.reporting.report import (
    goal_of,
    part,
    read_metrics_log,
    results_table,
    short_name,
    shown_number,
    strict,
    title_of,
    trained_rows,
)
from lora_cli.reporting.verdict import MANY_ROWS, Verdict, main_metric, measured_rows, verdict

COLUMNS = {"none": "head alone"}  # what else a column is called
MOST_METRICS = 6
RIGHT_ROWS = ("accuracy", "exact_match")  # shares of rows, of which an interval is known


def write_page(folder: Path, report: dict[str, Any] | None = None) -> Path:
    """Write `report.html` into the folder of a run.

    Args:
        folder: Holds `metrics.jsonl`, `predictions/` and, unless it is given, `report.json`.
        report: The report.
    """
    if report is None:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report = strict(report)
    splits = [s for s in ("test", "validation") if part(report, "metrics", "after", s)]
    split = (splits or ["validation"])[0]
    lines = page_analysis.read_predictions(folder / "predictions" / f"{split}.jsonl")
    log = [line for line in read_metrics_log(folder / "metrics.jsonl") if "step" in line]
    kind = page_analysis.kind_of(report, lines)
    report["problem"] = kind
    numbers = lines if kind == "regression" else []
    sections = [
        _results(report, numbers, split),
        _curves(report, log),
        sample_section(report),
        drawing_section(folder),
        *answer_sections(
            report, kind, lines, split, read_thumbnails(folder / "predictions", split)
        ),
        data_section(report),
        settings_section(report, folder),
    ]
    title = _title(report)
    verdict_box = verdict(report, split, numbers, lines)
    body = _top(report, title, verdict_box, log, split) + _contents(sections) + "".join(sections)
    write_atomically(folder / "report.html", document(title, f"<main>{body}{_end(report)}</main>"))
    return folder / "report.html"


# ------------------------------------------------------------------------------------------- top


def _title(report: dict[str, Any]) -> str:
    task = str(report.get("task") or "")
    goal = goal_of(task)
    if report.get("problem") == "regression":
        goal = goal.replace("classification", "regression")
    name = short_name(str(report.get("base_model") or "")) or "A model"
    return f"{name} for {goal}" if goal else name


def _top(
    report: dict[str, Any], title: str, verdict_box: Verdict, log: list[Line], split: str
) -> str:
    """Return the title, a summary of the run, the verdict, and the most important figures."""
    adapter, ran = part(report, "adapter"), part(report, "training")
    data = part(report, "data", "train")
    how = title_of(adapter)
    if adapter.get("rank"):
        how += f", rank {adapter['rank']}"
    source, rows, labels = data.get("source"), data.get("rows"), part(data, "labels")
    trained = f"trained on {trained_rows(data)}" if rows else "trained"
    trained += f" of {str(source).rpartition('/')[2]}" if source else ""
    trained += f" with {counted(len(labels), 'label')}" if labels else ""
    steps, epochs, seconds = (finite(ran.get(k)) for k in ("steps", "epochs", "seconds"))
    lasting = counted(int(steps), "step") if steps else ""
    lasting += f" ({epochs:,.4g} epoch{'s' * (epochs != 1)})" if steps and epochs else ""
    lasting += f" in {clock(seconds)}" if seconds else ""
    device = str(ran.get("device") or "").replace("cpu", "CPU")
    memory = size(finite(ran.get("peak_memory_bytes")))
    done = [how, trained, lasting, f"on {device}" if device else ""]
    done.append(f"at most {memory} of memory" if memory else "")
    day = str(report.get("created") or "")[:10]
    return (
        f'<header><div class="over">Training report{f" · {esc(day)}" if day else ""}</div>'
        f'<h1>{own(title)}</h1><p class="lead">{own(", ".join(filter(None, done)))}.</p></header>'
        f"{_box(verdict_box.tone, verdict_box.head, verdict_box.text)}{_against_baselines(report)}"
        f"{_caution(report, log)}{_tiles(report, split)}"
    )


def _box(tone: str, head: str, text: str) -> str:
    return f'<p class="verdict {tone}"><strong>{esc(head)}</strong> {_code(text)}</p>'


def _code(text: str) -> str:
    """Return a text as markup, with the parts between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", own(text))


def _against_baselines(report: dict[str, Any]) -> str:
    """Return whether the adapter beats the baselines, as `lora train` says it."""
    words, passed = (part(report, "verdict").get(key) for key in ("words", "passed"))
    if not isinstance(words, str):
        return ""
    text = f"{words[:1].upper()}{words[1:]}."
    if passed is None:
        unknown = "Not measured."
        if split := part(report, "verdict").get("split"):
            rows = measured_rows(report, str(split))
            unknown = "Too few rows to tell." if rows < MANY_ROWS else "No clear change."
        return _box("unknown", unknown, text)
    if passed:
        return _box("good", "Beats its baselines.", text)
    text += " What it costs to train and to serve buys nothing: use the baseline, or change the run"
    return _box("poor", "Fails its baselines.", f"{text}.")


def _caution(report: dict[str, Any], log: list[Line]) -> str:
    """Return a warning if the run overfits, and whether the saved adapter is affected."""
    over = page_analysis.overfitting(_smoothed(log), _points(_measured(log), "loss"))
    if over is None:
        return ""
    text = (
        f"Validation's loss is lowest at step {over.step:,} "
        f"({shown_number(over.lowest)}) and rises to {shown_number(over.last)} by the end, while "
        f"training's goes on falling ({shown_number(over.training_then)} to "
        f"{shown_number(over.training_last)})."
    )
    saved = part(report, "best").get("step")
    if isinstance(saved, int):
        metric = str(part(report, "best").get("metric")).replace("_", " ")
        text += f" The saved adapter is that of step {saved:,}, chosen by {metric}, "
        text += "before the rise." if saved <= over.step else "after the rise began."
    text += " Try fewer `train.epochs`, `adapter.dropout=0.1`, or more rows."
    return _box("caution", "Overfitting.", text)


def _tiles(report: dict[str, Any], split: str) -> str:
    name, _ = main_metric(report, split)
    before, after = (
        finite(part(report, "metrics", w, split).get(name)) for w in ("before", "after")
    )
    rows = measured_rows(report, split, name)
    tiles = []
    if after is not None:
        notes = [f"before: {shown_number(before)}"] if before is not None else []
        if name.rpartition("/")[2] in RIGHT_ROWS and rows and 0 <= after <= 1:
            low, high = page_analysis.interval(after, int(rows))
            notes.append(f"95 % interval {low:.3f} to {high:.3f}")
        tiles.append((shown_number(after), f"{split} {name.replace('_', ' ')}", *notes))
    counts, ran = part(report, "parameters"), part(report, "training")
    if trainable := finite(counts.get("trainable")):
        share = finite(counts.get("trainable_percent"))
        of = f"{share:g} % of {page_plots.short(finite(counts.get('total')) or 0)}" if share else ""
        tiles.append((f"{trainable:,.0f}", "trained parameters", of))
    if seconds := finite(ran.get("seconds")):
        rate = finite(ran.get("examples_per_s"))
        tiles.append((clock(seconds), "of training", f"{rate:,.3g} rows a second" if rate else ""))
    if memory := size(finite(ran.get("peak_memory_bytes"))):
        tiles.append((memory, "peak memory", str(ran.get("precision") or "")))
    if (busy := finite(ran.get("gpu_utilization_percent"))) is not None:
        heat = finite(ran.get("gpu_temperature_c"))
        tiles.append((f"{busy:.0f} %", "GPU in use", f"at most {heat:.0f} °C" if heat else ""))
    inner = "".join(
        f"<div><b>{esc(value)}</b>{''.join(f'<span>{esc(n)}</span>' for n in notes if n)}</div>"
        for value, *notes in tiles
    )
    return f'<div class="tiles">{inner}</div>' if inner else ""


def _contents(sections: Sequence[str]) -> str:
    links = []
    for text in filter(None, sections):
        anchor = text.split('id="', 1)[1].split('"', 1)[0]
        name = text.split("<h2>", 1)[1].split("</h2>", 1)[0]  # escaped already
        links.append(f'<a href="#{anchor}">{name}</a>')
    return f'<nav aria-label="Contents">{"".join(links)}</nav>'


# --------------------------------------------------------------------------------------- results


def _results(report: dict[str, Any], numbers: Sequence[Line], split: str) -> str:
    """Return the table of metrics; `numbers` are the predictions of a regression."""
    header, *rows = results_table(report)
    if not rows:
        return ""
    columns: dict[str, dict[str, list[str]]] = {}  # cells by split and by what was measured
    for i, name in enumerate(header[1:], 1):
        of, _, when = name.partition(" ")
        columns.setdefault(of, {})[when] = [row[i] for row in rows]
    metrics, notes = [row[0] for row in rows], []
    best = part(report, "best").get("step")
    if isinstance(best, int):
        notes.append(f"“After” is the adapter of step {best:,}, the best on validation.")
    for of, cells in columns.items():
        for name, metric, value in _constants(report, of, numbers if of == split else ()):
            if metric in metrics and name not in cells:
                known = [shown_number(value) if m == metric else DASH for m in metrics]
                columns[of][name] = known
    for of, cells in columns.items():  # before and after come first
        columns[of] = {w: cells[w] for w in ("before", "after") if w in cells} | cells
    shown = {when for cells in columns.values() for when in cells}
    common = page_analysis.majority(report, split)
    if "majority" in shown and common:
        notes.append(f"“Majority” always says {own(common[0], 'code')}, train's commonest label.")
    if "constant" in shown:
        notes.append("“Constant” always says the mean of the split's references.")
    if "none" in shown:
        notes.append("“Head alone” is the same recipe without the adapter.")
    groups = [(of, [COLUMNS.get(w, w) for w in cells]) for of, cells in columns.items()]
    body = [
        [esc(m.replace("_", " ")), *(c[i] for cells in columns.values() for c in cells.values())]
        for i, m in enumerate(metrics)
    ]
    inner = grouped_table("metric", groups, body, "Results", strong="after")
    lines = part(report, "metric_definitions").items()
    verdict_box = "".join(
        f"<li><b>{own(n.replace('_', ' '))}</b>: {_code(words)}</li>" for n, words in lines
    )
    inner += f'<ul class="plain">{verdict_box}</ul>' if verdict_box else ""
    return section("results", "Results", " ".join(notes), inner)


def _constants(
    report: dict[str, Any], split: str, numbers: Sequence[Line]
) -> list[tuple[str, str, float]]:
    """Return (name, metric, value) of each constant answer that can be measured."""
    common, error = page_analysis.majority(report, split), page_analysis.constant_error(numbers)
    found = [("majority", "accuracy", common[1])] if common else []
    return found + ([("constant", "mse", error)] if error is not None else [])


def _measured(log: list[Line]) -> list[Line]:
    return [{**part(s, "validation"), "step": s["step"]} for s in log if "validation" in s]


def _points(lines: list[Line], key: str, smoothed: bool = False) -> list[page_plots.Point]:
    x, y = curve_of(lines, key)
    y = smooth(y) if smoothed and len(y) >= 12 else y
    return [(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True) if math.isfinite(b)]


def _smoothed(log: list[Line]) -> list[page_plots.Point]:
    return _points([line for line in log if "validation" not in line], "loss", smoothed=True)


def _bases(report: dict[str, Any], metric: str) -> list[tuple[float, str]]:
    """Return the results of the baselines on validation, to be drawn as lines."""
    common = page_analysis.majority(report, "validation") if metric == "accuracy" else None
    found = {"majority": common[1]} if common else {}
    for name in part(report, "baselines"):
        value = finite(part(report, "baselines", name, "validation").get(metric))
        if value is not None and name != "base":  # which the curve begins with
            found[name] = value
    return [(value, COLUMNS.get(name, name)) for name, value in found.items()]


def _curves(report: dict[str, Any], log: list[Line]) -> str:
    training = [line for line in log if "validation" not in line]
    measured, best = _measured(log), part(report, "best")
    mark = best["step"] if isinstance(best.get("step"), int) else None
    raw, smoothed = _points(training, "loss"), _smoothed(log)
    losses = [page_plots.Series(raw, "blue", raw=True)] if len(raw) >= 12 else []
    losses.append(page_plots.Series(smoothed, "blue", "training", dots=len(raw) < 12))
    losses.append(page_plots.Series(_points(measured, "loss"), "orange", "validation", dots=True))
    over = page_analysis.overfitting(smoothed, _points(measured, "loss"))
    figures = [page_plots.curves("Loss", losses, mark, overfits=over.step if over else None)]
    main = str(best.get("metric") or main_metric(report, "validation")[0])
    names = dict.fromkeys([main, *(k for line in measured for k in line)])
    for name in [k for k in names if k not in ("loss", "step")][:MOST_METRICS]:
        line = page_plots.Series(_points(measured, name), "orange", dots=True)
        shown = f"Validation {name.replace('_', ' ')}"
        figures.append(page_plots.curves(shown, [line], mark, _bases(report, name)))
    rate = page_plots.Series(_points(training, "learning_rate"), "blue")
    figures.append(page_plots.curves("Learning rate", [rate]))
    norm = page_plots.Series(_points(training, "grad_norm"), "blue")
    figures.append(page_plots.curves("Gradient norm", [norm]))
    inner = "".join(figures)
    note = "Training's loss is smoothed; the thin line is as logged." if len(raw) >= 12 else ""
    return section("curves", "Training", note, f'<div class="grid">{inner}</div>' if inner else "")


def _end(report: dict[str, Any]) -> str:
    version, when = report.get("lora_version"), report.get("created")
    made_by = f"Made by lora{f' {esc(version)}' if version else ''}"
    at = f" on {esc(str(when)[:16].replace('T', ' '))}" if when else ""
    return (
        f"<footer>{made_by}{at} from report.json, metrics.jsonl and predictions/ in this folder."
        "</footer>"
    )
