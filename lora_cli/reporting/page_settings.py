"""The part of the page about the inputs of a run: its rows, settings and recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_cli.reporting.page_analysis import finite
from lora_cli.reporting.page_answers import MATRIX_LABELS
from lora_cli.reporting.page_elements import DASH, esc, facts, named, own, section, table
from lora_cli.reporting.report import part

COUNTS = {
    "rows": "rows",
    "examples": "examples",
    "skipped_rows": "skipped",
    "dropped_rows": "dropped",
    "rows_without_example": "without example",
    "cut_rows": "cut",
    "divided_rows": "divided",
}
FOUND = {
    "duplicates": "duplicates",
    "near_duplicates": "near duplicates",
    "contradictions": "contradictions",
}
GROUPS = ("adapter", "teacher", "parameters", "training", "best")


def data_section(report: dict[str, Any]) -> str:
    """Return the contents of each split, the findings in its rows, and its overlap with others."""
    splits = {name: part(report, "data", name) for name in part(report, "data")}
    overlap = splits.pop("overlap", {})
    columns: dict[str, list[str]] = {}
    for key, name in COUNTS.items():
        columns[name] = [_count(s.get(key)) for s in splits.values()]
    units = f"{report.get('unit', 'token')}s"
    if any(f"max_{units}" in split for split in splits.values()):
        columns[f"{units} (median, longest)"] = [_lengths(s, units) for s in splits.values()]
    for key, name in FOUND.items():
        columns[name] = [_count(part(s, key).get("rows")) for s in splits.values()]
    if columns["examples"] == columns["rows"]:
        del columns["examples"]
    kept = {
        name: cells
        for name, cells in columns.items()
        if set(cells) - {"0", DASH} or name in ("rows", "duplicates")
    }
    rows = []
    for i, (name, split) in enumerate(splits.items()):
        rows.append([esc(name), *(cells[i] for cells in kept.values()), _source(split)])
        rows += _set_rows(name, split, list(kept))
    inner = table(["split", *kept, "source, SHA-256 of the rows"], rows, "Splits") if rows else ""
    shared = "".join(f"<li>{line}</li>" for line in _shared(splits, overlap))
    inner += f'<ul class="plain">{shared}</ul>' if shared else ""
    return section("data", "Data", "", inner, _labels(splits))


def _set_rows(name: str, split: dict[str, Any], columns: list[str]) -> list[list[str]]:
    """Return a row of the table for each data set that is mixed in a split."""
    rows = []
    for one in part(split, "sets"):
        facts = part(split, "sets", one)
        counts = [_count(facts.get("rows")) if c == "rows" else DASH for c in columns]
        share = finite(part(split, "shares").get(one))
        drawn = f" ({100 * share:.1f} % of an epoch)" if share is not None else ""
        source = f"{own(facts.get('source') or DASH)}{drawn}"
        rows.append([f"{esc(name)}: {own(one)}", *counts, source])
    return rows


def _count(value: Any) -> str:
    return f"{number:,.0f}" if (number := finite(value)) is not None else DASH


def _lengths(split: dict[str, Any], units: str) -> str:
    known = part(split, units)
    longest = known.get("max", split.get(f"max_{units}"))
    return f"{_count(known.get('p50'))}, {_count(longest)}" if longest is not None else DASH


def _source(split: dict[str, Any]) -> str:
    digest = str(split.get("sha256") or "")
    short = f' <code title="{esc(digest)}">{esc(digest[:12])}</code>' if digest else ""
    return f"{own(split.get('source') or DASH)}{short}"


def _shared(splits: dict[str, Any], overlap: dict[str, Any]) -> Iterable[str]:
    """Yield sentences about the rows of a split that are also in another."""
    for name in overlap:
        rows = f"of the {_count(part(splits, name).get('rows'))} {esc(name)} rows"
        for other in part(overlap, name):
            both = [part(overlap, name, other, how).get("rows") for how in ("exact", "near")]
            counts = [n for v in both if (n := finite(v)) is not None]
            if not counts:
                continue
            exact, near = counts[0], sum(counts[1:])
            if exact:
                also = f", and {near:,.0f} nearly do" if near else ""
                yield f"<b>{exact:,.0f} {rows} stand in {esc(other)} too{also}.</b>"
            elif near:
                yield f"{near:,.0f} {rows} nearly stand in {esc(other)}."
            else:
                also = ", nor nearly" if len(counts) > 1 else ""
                yield f"None {rows} stands in {esc(other)}{also}."


def _labels(splits: dict[str, Any]) -> str:
    counted = {name: part(s, "labels") for name, s in splits.items() if part(s, "labels")}
    labels = dict.fromkeys(label for counts in counted.values() for label in counts)
    if not labels:
        return ""
    rows = [[named(x), *(_count(c.get(x) or 0) for c in counted.values())] for x in labels]
    shown = table(["label", *map(esc, counted)], rows, "Rows by label")
    is_open = " open" if len(labels) <= MATRIX_LABELS else ""
    return f"<details{is_open}><summary>Rows by label ({len(labels)})</summary>{shown}</details>"


def settings_section(report: dict[str, Any], folder: Path) -> str:
    """Return the settings and measurements by group, the versions, the command and the recipe."""
    parts = [f"<p>Base model {own(name, 'code')}</p>" if (name := report.get("base_model")) else ""]
    for group in GROUPS:
        shown = facts((_name(key), _value(key, v)) for key, v in part(report, group).items())
        title = "Best on validation" if group == "best" else group.capitalize()
        parts.append(f"<h3>{title}</h3>{shown}" if shown else "")
    versions = {"lora": report.get("lora_version"), **part(report, "versions")}
    shown = facts(versions.items())
    parts.append(f"<h3>Versions</h3>{shown}" if shown else "")
    command = report.get("command")
    parts.append(f"<h3>Command</h3><pre>{own(command)}</pre>" if command else "")
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        text = own(recipe.read_text(encoding="utf-8", errors="replace"))
        parts.append(
            "<h3>Recipe</h3><details><summary>The whole recipe, with every default"
            f"</summary><pre>{text}</pre></details>"
        )
    return section("settings", "Settings", "", *parts)


def _name(key: str) -> str:
    key = f"{key.removesuffix('_per_s')}_a_second" if key.endswith("_per_s") else key
    return key.removesuffix("_bytes").replace("_", " ")


def _value(key: str, value: Any) -> Any:
    """Return a setting in readable form."""
    number = finite(value)
    if number is not None and key.endswith("_bytes"):
        return size(number)
    if number is not None and key == "seconds":
        return clock(number)
    if number is not None and key.endswith("percent"):
        return f"{number:g} %"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return f"{value:,}" if type(value) is int else f"{value:,.6g}" if number is not None else value


def clock(seconds: float) -> str:
    """Return a time in readable form: 0.5 s, 95 s, 12 min 05 s, 3 h 07 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.0f}\xa0s" if seconds >= 1 else f"{seconds:.2g}\xa0s"
    if whole < 6000:
        return f"{whole // 60}\xa0min {whole % 60:02d}\xa0s"
    return f"{whole // 3600}\xa0h {whole % 3600 // 60:02d}\xa0min"


def size(count: float | None) -> str:
    """Return a number of bytes as GiB or MiB; nothing for none."""
    if not count:
        return ""
    return f"{count / 2**30:.1f}\xa0GiB" if count >= 2**30 else f"{count / 2**20:.0f}\xa0MiB"
