"""`report.json`, the training log, and the table of results."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path, PurePath
from typing import Any

from lora_cli.errors import IntegrityError
from lora_cli.files import write_json
from lora_cli.recipe import ADAPTER_TITLES, TASKS


def title_of(adapter: dict[str, Any]) -> str:
    """Return a title for the `adapter` section of a report of any version."""
    return ADAPTER_TITLES.get(str(adapter.get("type")), "")


def goal_of(task: object) -> str:
    """Return the purpose of a task type in words: `text classification`."""
    spec = TASKS.get(str(task))
    return (spec.pipeline_tag if spec else str(task)).replace("-", " ").replace("_", " ")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json`, atomically, as strict JSON: NaN and infinity become null."""
    write_json(folder / "report.json", strict(report))


def strict(value: Any) -> Any:
    """Return a value for strict JSON: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    value = value.item() if hasattr(value, "item") else value  # a scalar of numpy or torch
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`; none if there is no such file.

    A torn last line, which a machine that stops leaves behind, is skipped.

    Raises:
        IntegrityError: If a line before the last is not a JSON object.
    """
    raw = path.read_bytes().rstrip().split(b"\n") if path.exists() else []
    lines = []
    for number, text in enumerate(raw, 1):
        try:
            line = json.loads(text)
        except ValueError:  # also what UnicodeDecodeError is
            line = None
        if isinstance(line, dict):
            lines.append(line)
        elif number < len(raw):
            what = "this is not a line of a training log"
            raise IntegrityError(what, f"{path}:{number}", "remove the line; only the plot uses it")
    return lines


def results_table(report: dict[str, Any]) -> list[list[str]]:
    """Return the metrics as rows of text: a header, the main metric, the others, the loss.

    The columns are what was measured, of validation and test: the baselines, before and after
    training. (The baseline `base` is what was measured before.)
    """
    columns = {}
    baselines = [name for name in part(report, "baselines") if name != "base"]
    for split in ("validation", "test"):
        for when in (*baselines, "before", "after"):
            place = ("baselines",) if when in baselines else ("metrics",)
            metrics = part(report, *place, when, split)
            scalars = {
                n: v for n, v in strict(metrics).items() if isinstance(v, int | float | None)
            }
            if scalars:
                columns[f"{split} {when}"] = scalars
    names = dict.fromkeys(name for scalars in columns.values() for name in scalars)
    main = part(report, "best").get("metric")
    # those of each set, such as `math/loss`, stand together below those of all rows
    ordered = sorted(names, key=lambda name: (name != main, "/" in name, name == "loss"))
    rows = [[name, *(shown_number(s.get(name)) for s in columns.values())] for name in ordered]
    return [["metric", *columns], *rows]


def part(report: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a section of the report, empty if it is missing."""
    for key in keys:
        section = report.get(key)
        report = section if isinstance(section, dict) else {}
    return report


def shown_number(value: Any) -> str:
    """Return a number with four decimals, or fewer if it is large; a dash if it is unknown."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    small = value == 0 or 1e-3 <= abs(value) < 100
    return (
        f"{value:.4f}" if small else f"{value:,.2f}" if 100 <= abs(value) < 1e6 else f"{value:.4g}"
    )


def trained_rows(facts: dict[str, Any]) -> str:
    """Return the number of trained rows, out of all rows if some contain nothing to train."""
    rows, empty = (facts.get(key) or 0 for key in ("rows", "rows_without_example"))
    of = f" of {rows:,}" if empty else ""
    return f"{rows - empty:,}{of} " + ("row" if rows == 1 else "rows")


def is_hub_id(name: str) -> bool:
    """Return whether the Hub takes this as a repository's id; it rejects paths."""
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII))


def short_name(model: str) -> str:
    """Return a model's name: of a path its last folder, of `package:` the package."""
    if model.startswith("package:"):
        return model.removeprefix("package:").partition("/")[0]
    return model if is_hub_id(model) else PurePath(model).name
