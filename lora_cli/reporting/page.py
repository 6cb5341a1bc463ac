"""`report.html`: what was trained on what, whether it is any good, and where it fails.

One file that loads and runs nothing, made from the report, the log and the predictions of a run's
folder, so that it can be made again: `write_page(folder)`. What is not known is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.files import write_atomically
from lora_cli.reporting import analysis, plots
from lora_cli.reporting.analysis import Line, finite
from lora_cli.reporting.answers import MATRIX_LABELS, answer_sections, sample_section
from lora_cli.reporting.curve import curve_of, smooth
from lora_cli.reporting.markup import DASH, document, esc, facts, own, section, table
from lora_cli.reporting.report import (
    KINDS,
    PIPELINES,
    part,
    read_metrics_log,
    results_table,
    short_name,
    shown_number,
    strict,
)


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
    lines = analysis.read_predictions(folder / "predictions" / f"{split}.jsonl")
    log = [line for line in read_metrics_log(folder / "metrics.jsonl") if "step" in line]
    kind = analysis.kind_of(report, lines)
    report["problem"] = kind
    sections = [
        _results(report, lines if kind == "regression" else [], split),
        _curves(report, log, split),
        sample_section(report),
        *answer_sections(report, kind, lines, split),
        _data(report),
        _settings(report),
    ]
    title = _title(report)
    body = _top(report, title, log, split) + _contents(sections) + "".join(sections)
    write_atomically(folder / "report.html", document(title, f"<main>{body}{_end(report)}</main>"))
    return folder / "report.html"


# ------------------------------------------------------------------------------------------- top


def _title(report: dict[str, Any]) -> str:
    task = str(report.get("task") or "")
    goal = PIPELINES.get(task, task.replace("_", "-")).replace("-", " ")
    name = short_name(str(report.get("base_model") or "")) or "A model"
    return f"{name} for {goal}" if goal else name


def _top(report: dict[str, Any], title: str, log: list[Line], split: str) -> str:
    """Return the title, what was done, the verdict, and the figures that one asks for first."""
    adapter, ran = part(report, "adapter"), part(report, "training")
    data = part(report, "data", "train")
    how = KINDS.get(str(adapter.get("type")), "")
    if adapter.get("type") == "lora" and adapter.get("rank"):
        how += f", rank {adapter['rank']}"
    source, rows, labels = data.get("source"), data.get("rows"), part(data, "labels")
    trained = f"trained on {rows:,} rows" if rows else "trained"
    trained += f" of {str(source).rpartition('/')[2]}" if source else ""
    trained += f" with {len(labels)} labels" if labels else ""
    steps, epochs, seconds = (finite(ran.get(k)) for k in ("steps", "epochs", "seconds"))
    lasting = f"{steps:,.0f} steps" if steps else ""
    lasting += f" ({epochs:,.4g} epochs)" if steps and epochs else ""
    lasting += f" in {_clock(seconds)}" if seconds else ""
    device = str(ran.get("device") or "").replace("cpu", "CPU")
    memory = _bytes(finite(ran.get("peak_memory_bytes")))
    done = [how, trained, lasting, f"on {device}" if device else ""]
    done.append(f"at most {memory} of memory" if memory else "")
    told = analysis.verdict(report, split)
    day = str(report.get("created") or "")[:10]
    return (
        f'<header><div class="over">Training report{f" · {esc(day)}" if day else ""}</div>'
        f'<h1>{own(title)}</h1><p class="lead">{own(", ".join(filter(None, done)))}.</p></header>'
        f'<p class="verdict {told.tone}">{own(told.text)}</p>{_caution(report, log)}'
        f"{_tiles(report, split)}"
    )


def _caution(report: dict[str, Any], log: list[Line]) -> str:
    """Return a warning if the run overfits, and whether the saved adapter is spared."""
    over = analysis.overfitting(_smoothed(log), _points(_measured(log), "loss"))
    if over is None:
        return ""
    text = (
        f"Overfitting: validation's loss is lowest at step {over.step:,} "
        f"({shown_number(over.lowest)}) and rises to {shown_number(over.last)} by the end, while "
        f"training's goes on falling ({shown_number(over.training_then)} to "
        f"{shown_number(over.training_last)})."
    )
    saved = part(report, "best").get("step")
    if isinstance(saved, int):
        metric = str(part(report, "best").get("metric")).replace("_", " ")
        when = "before the rise" if saved <= over.step else "after the rise began"
        text += f" The saved adapter is that of step {saved:,}, chosen by {metric}, {when}."
    return f'<p class="verdict caution">{own(text)}</p>'


def _tiles(report: dict[str, Any], split: str) -> str:
    name, _ = analysis.main_metric(report, split)
    before, after = (
        finite(part(report, "metrics", w, split).get(name)) for w in ("before", "after")
    )
    rows = finite(part(report, "data", split).get("rows"))
    tiles = []
    if after is not None:
        notes = [f"before: {shown_number(before)}"] if before is not None else []
        if name == "accuracy" and rows and 0 <= after <= 1:
            low, high = analysis.interval(after, int(rows))
            notes.append(f"95 % interval {low:.3f} to {high:.3f}")
        tiles.append((shown_number(after), f"{split} {name.replace('_', ' ')}", *notes))
    counts, ran = part(report, "parameters"), part(report, "training")
    if trainable := finite(counts.get("trainable")):
        share = finite(counts.get("trainable_percent"))
        of = f"{share:g} % of {plots.short(finite(counts.get('total')) or 0)}" if share else ""
        tiles.append((f"{trainable:,.0f}", "trained parameters", of))
    if seconds := finite(ran.get("seconds")):
        rate = finite(ran.get("examples_per_s"))
        tiles.append(
            (_clock(seconds), "in training steps", f"{rate:,.4g} rows a s" if rate else "")
        )
    if memory := _bytes(finite(ran.get("peak_memory_bytes"))):
        tiles.append((memory, "peak memory", str(ran.get("precision") or "")))
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
    note, error = "", analysis.constant_error(numbers)
    base: dict[str, dict[str, str]] = {}  # by the name of the column
    for name in ("validation", "test"):
        if (common := analysis.majority(report, name)) and f"{name} after" in header:
            base[name] = {"accuracy": shown_number(common[1])}
            note = f"“Majority” is always saying {own(common[0], 'code')}, train's commonest label."
    if error is not None and f"{split} after" in header:
        base[split] = {"mse": shown_number(error)}
        note = "“Constant” is always saying the mean of the split's references."
    found = {row[0] for row in rows}
    base = {k: v for k, v in base.items() if found & v.keys()}
    note, word = (note, "constant" if error is not None else "majority") if base else ("", "")
    cells = [[esc(row[0].replace("_", " ")), *map(esc, row[1:])] for row in rows]
    for name in ("test", "validation"):  # from the right, so that the places stay
        if name in base:
            at = header.index(f"{name} after") + 1
            header.insert(at, f"{name} {word}")
            for row, cell in zip(rows, cells, strict=True):
                cell.insert(at, base[name].get(row[0], DASH))
    best = part(report, "best").get("step")
    if isinstance(best, int):
        note = f"“After” is the adapter of step {best:,}, the best on validation. {note}"
    return section("results", "Results", note, table([*map(esc, header)], cells, "Results"))


def _measured(log: list[Line]) -> list[Line]:
    return [{**part(s, "validation"), "step": s["step"]} for s in log if "validation" in s]


def _points(lines: list[Line], key: str, smoothed: bool = False) -> list[plots.Point]:
    x, y = curve_of(lines, key)
    y = smooth(y) if smoothed and len(y) >= 12 else y
    return [(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True) if math.isfinite(b)]


def _smoothed(log: list[Line]) -> list[plots.Point]:
    return _points([line for line in log if "validation" not in line], "loss", smoothed=True)


def _curves(report: dict[str, Any], log: list[Line], split: str) -> str:
    training = [line for line in log if "validation" not in line]
    measured, best = _measured(log), part(report, "best")
    mark = best["step"] if isinstance(best.get("step"), int) else None
    raw, smoothed = _points(training, "loss"), _smoothed(log)
    losses = [plots.Series(raw, "blue", raw=True)] if len(raw) >= 12 else []
    losses.append(plots.Series(smoothed, "blue", "training", dots=len(raw) < 12))
    losses.append(plots.Series(_points(measured, "loss"), "orange", "validation", dots=True))
    figures = [plots.curves("Loss", losses, mark)]
    metric = str(best.get("metric") or analysis.main_metric(report, "validation")[0])
    if metric != "loss":
        common = analysis.majority(report, "validation") if metric == "accuracy" else None
        shown = metric.replace("_", " ")
        line = plots.Series(_points(measured, metric), "orange", dots=True)
        base = (common[1], "majority label") if common else None
        figures.append(plots.curves(f"Validation {shown}", [line], mark, base))
    rate = plots.Series(_points(training, "learning_rate"), "blue")
    figures.append(plots.curves("Learning rate", [rate]))
    norm = plots.Series(_points(training, "grad_norm"), "blue")
    figures.append(plots.curves("Gradient norm", [norm]))
    inner = "".join(figures)
    note = "Training's loss is smoothed; the thin line is as logged." if len(raw) >= 12 else ""
    return section("curves", "Training", note, f'<div class="grid">{inner}</div>' if inner else "")


# ------------------------------------------------------------------------------- data, settings


def _data(report: dict[str, Any]) -> str:
    splits = {name: part(report, "data", name) for name in part(report, "data")}
    names = {
        "rows": "rows",
        "examples": "examples",
        "skipped_rows": "skipped",
        "dropped_rows": "dropped",
        "rows_without_example": "without example",
        "max_tokens": "longest (tokens)",
    }
    known = {k: v for k, v in names.items() if any(finite(s.get(k)) for s in splits.values())}
    cells = []
    for name, split in splits.items():
        counts = [f"{v:,.0f}" if (v := finite(split.get(k))) is not None else DASH for k in known]
        digest = f'<span class="mono">{esc(split.get("sha256") or DASH)}</span>'
        cells.append([esc(name), *counts, own(split.get("source") or DASH), digest])
    header = ["split", *known.values(), "source", "SHA-256 of the rows"]
    inner = table(header, cells, "Splits") if cells else ""
    labels = dict.fromkeys(label for s in splits.values() for label in part(s, "labels"))
    if labels:
        counted = {name: part(s, "labels") for name, s in splits.items() if part(s, "labels")}
        rows = [
            [own(label), *(f"{finite(c.get(label)) or 0:,.0f}" for c in counted.values())]
            for label in labels
        ]
        shown = table(["label", *map(esc, counted)], rows, "Labels")
        open_ = " open" if len(labels) <= MATRIX_LABELS else ""
        inner += (
            f"<details{open_}><summary>Rows by label ({len(labels)})</summary>{shown}</details>"
        )
    return section("data", "Data", "", inner)


def _settings(report: dict[str, Any]) -> str:
    found: list[tuple[str, Any]] = []
    for name in ("adapter", "parameters", "training", "best"):
        for key, value in part(report, name).items():
            shown = f"{value:,}" if type(value) is int else value
            shown = f"{value:.6g}" if isinstance(value, float) else shown
            shown = ", ".join(map(str, value)) if isinstance(value, list) else shown
            shown = str(value).lower() if isinstance(value, bool) else shown
            found.append((f"{name}.{key}", shown))
    command = report.get("command")
    command = f"<h3>Command</h3><pre>{own(command)}</pre>" if command else ""
    settings = facts([("base_model", report.get("base_model")), *found])
    versions = {"lora": report.get("lora_version"), **part(report, "versions")}
    versions_shown = facts(versions.items())
    versions_shown = f"<h3>Versions</h3>{versions_shown}" if versions_shown else ""
    note = "Every setting stands in <code>recipe.yaml</code> beside this page."
    inner = f"{settings}<br>{versions_shown}<br>{command}" if settings else command
    return section("settings", "Settings", note, inner)


def _end(report: dict[str, Any]) -> str:
    version, when = report.get("lora_version"), report.get("created")
    made = f"Made by lora{f' {esc(version)}' if version else ''}"
    at = f" on {esc(str(when)[:16].replace('T', ' '))}" if when else ""
    return (
        f"<footer>{made}{at} from report.json, metrics.jsonl and predictions/ in this folder."
        "</footer>"
    )


def _clock(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.2g} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _bytes(count: float | None) -> str:
    if not count:
        return ""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
