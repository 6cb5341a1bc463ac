"""What a run leaves to be read: `report.json`, the learning curve, the model card.

All are made from the report, the recipe and `metrics.jsonl` alone, so that they can be made again
at any time. What is not known is left out.
"""

from __future__ import annotations

import functools
import json
import math
import pprint
import re
from io import BytesIO
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from lora_cli.errors import IntegrityError
from lora_cli.files import write_atomically, write_json
from lora_cli.recipe import CausalLMSpec, Recipe, SequenceClassificationSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Log = list[dict[str, Any]]
    Curve = tuple[NDArray[Any], NDArray[Any]]  # steps (N,), values (N,)

INK, MUTED, RULE, SECONDARY = "#1f2933", "#66717e", "#e3e7ec", "#9aa6b4"
TRAINING, VALIDATION = "#2f6db5", "#d4572a"
# fmt: off
STYLE: dict[str, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#c3cad3",
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": RULE, "axes.axisbelow": True,
    "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.titlesize": 12,
    "axes.titleweight": "bold", "axes.labelcolor": MUTED, "axes.labelsize": 10.5,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 3, "ytick.major.size": 0,
    "font.family": "DejaVu Sans", "font.size": 10, "lines.markeredgecolor": "white",
    "text.parse_math": False,  # a `$` in a name is no formula
}
PIPELINES = {"sequence_classification": "text-classification", "causal_lm": "text-generation"}
KINDS = {"lora": "LoRA adapter", "full": "Full fine-tuning", "none": "Newly trained head",
         "bitfit": "Fine-tuned biases"}
# fmt: on


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
    value = value.item() if hasattr(value, "item") else value  # a scalar of numpy or torch
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`; none if there is no such file.

    A torn last line, which a machine that stops leaves behind, is passed over.

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

    The columns are what was measured, of validation and test before and after training.
    """
    columns = {}
    for split in ("validation", "test"):
        for when in ("before", "after"):
            metrics = _part(report, "metrics", when, split)
            scalars = {
                n: v for n, v in _strict(metrics).items() if isinstance(v, int | float | None)
            }
            if scalars:
                columns[f"{split} {when}"] = scalars
    names = dict.fromkeys(name for scalars in columns.values() for name in scalars)
    main = _part(report, "best").get("metric")
    ordered = sorted(names, key=lambda name: (name != main, name == "loss"))
    rows = [[name, *(_number(s.get(name)) for s in columns.values())] for name in ordered]
    return [["metric", *columns], *rows]


def _part(report: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a section of the report, empty if it is missing."""
    for key in keys:
        section = report.get(key)
        report = section if isinstance(section, dict) else {}
    return report


def _number(value: Any) -> str:
    """Return four decimals, or fewer for large numbers; a dash for what is not known."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    small = value == 0 or 1e-3 <= abs(value) < 100
    return f"{value:.4f}" if small else f"{value:,.2f}" if 100 <= abs(value) < 1e6 else f"{value:g}"


def _is_hub_id(name: str) -> bool:
    """Return whether the Hub takes this as a repository's id; it refuses paths."""
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII))


def _short_name(model: str) -> str:
    """Return a model's name: of a path its last folder, of `package:` the package."""
    if model.startswith("package:"):
        return model.removeprefix("package:").partition("/")[0]
    return model if _is_hub_id(model) else PurePath(model).name


# ------------------------------------------------------------------------------ the learning curve


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
    measured = [{**_part(s, "validation"), "step": s["step"]} for s in log if "validation" in s]
    best = _part(report, "best")
    metric, marked = best.get("metric", "loss"), isinstance(best.get("step"), int)
    with matplotlib.rc_context({**STYLE, "axes.titlepad": 24 if marked else 10}):
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


def _headline(figure: Any, report: dict[str, Any]) -> None:
    ran, kind = _part(report, "training"), str(_part(report, "adapter").get("type"))
    rank, rows = _part(report, "adapter").get("rank"), _part(report, "data", "train").get("rows")
    steps, seconds = ran.get("steps"), ran.get("seconds")
    task = PIPELINES.get(str(report.get("task")), "training").replace("-", " ").capitalize()
    title = [task, _short_name(str(report.get("base_model") or ""))[-54:]]
    facts = [
        KINDS.get(kind, "") + (f", rank {rank}" if kind == "lora" and rank else ""),
        f"{rows:,} training rows" if rows else "",
        f"{steps:,} steps" if steps else "",
        (f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min") if seconds else "",
        str(ran.get("device") or "").replace("cpu", "CPU"),
    ]
    join = "  ·  ".join
    figure.text(0.0215, 0.935, join(filter(None, title)), size=14.5, weight="bold", color=INK)
    figure.text(0.022, 0.888, join(filter(None, facts)), size=10.5, color=MUTED)


def _curve(lines: Log, key: str) -> Curve:
    """Return steps (N,), ascending, and values (N,): NaN where the log has null or infinity."""
    import numpy as np

    points = {line["step"]: line[key] for line in lines if key in line}  # a step's last line counts
    steps = sorted(points)
    y = np.array([v if isinstance(v := points[s], int | float) else math.nan for s in steps], float)
    return np.array(steps, float), np.where(np.isfinite(y), y, np.nan)


def _smooth(y: NDArray[Any]) -> NDArray[Any]:
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
    (x, raw), validation = _curve(training, "loss"), _curve(measured, "loss")
    if len(raw) < 12:
        _draw(axes, (x, raw), TRAINING, "training", marker="o")
    else:
        _draw(axes, (x, raw), TRAINING, alpha=0.3, lw=0.8)
        _draw(axes, (x, _smooth(raw)), TRAINING, "training")
    _draw(axes, validation, VALIDATION, "validation")
    axes.margins(y=0.06)
    _name_ends(axes)
    # a cross-entropy is in nats, the loss of a regression is not
    nats = report.get("task") == "causal_lm" or bool(_part(report, "data", "train", "labels"))
    axes.set(title="Loss", ylabel=f"loss ({'nats ' if nats else ''}per item)")


def _plot_metric(axes: Any, measured: Log, metric: str, best: dict[str, Any]) -> None:
    """Draw the main metric, and lighter the others that share its scale, at most three."""
    import numpy as np
    from matplotlib.patheffects import withStroke

    names = dict.fromkeys(k for line in measured for k in line if k not in ("step", "loss"))
    curves = {name: _curve(measured, name) for name in names}
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
            _number(float(y[i])) + after, (x[i], y[i]), away, textcoords="offset points",
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
    x, y = _curve(training, "learning_rate")
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
        name = name if len(name) < 15 else name[:12] + "…"
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


# ---------------------------------------------------------------------------------- the model card

# what a card tells of the recipe; the rest is in `recipe.yaml`
SETTINGS = """task.max_length train.optimizer.type train.optimizer.learning_rate
train.optimizer.weight_decay train.scheduler.type train.scheduler.warmup_ratio
train.scheduler.warmup_steps train.max_grad_norm train.packing train.seed"""
LOW_RANK = "adapter.rank adapter.alpha adapter.dropout adapter.use_rslora adapter.bias"

LOADING = """\
{imports}from peft import PeftModel
from transformers import {auto}, AutoTokenizer

base = {base}
tokenizer = AutoTokenizer.from_pretrained(base{options})
{setup}model = {auto}.from_pretrained({how})
model = PeftModel.from_pretrained(model, ".").eval()  # this folder, or its id on the Hub

"""
CLASSIFYING = """\
inputs = tokenizer({texts}, truncation=True, max_length={length}, return_tensors="pt")
with torch.no_grad():
    scores = model(**inputs).logits[0]
print({answer})"""
ANSWERS = {
    "single_label": "model.config.id2label[scores.argmax().item()]",
    "multi_label": "[model.config.id2label[i] for i, score in enumerate(scores) if score > 0]",
    "regression": "scores.item()",
}
GENERATING = """\
inputs = tokenizer({text}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={length}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
CHAT = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Some text"}], add_generation_prompt=True, return_dict=True,
    return_tensors="pt",
)"""


def write_model_card(folder: Path, recipe: Recipe, report: dict[str, Any]) -> None:
    """Write `README.md`, the card that the Hub shows: what it is, its use, results and origin."""
    name, kind, pipeline = recipe.model.name, recipe.adapter.type, PIPELINES[recipe.task.type]
    hub, dataset, goal = _is_hub_id(name), recipe.data.name, pipeline.replace("-", " ")
    front = {
        "base_model": name if hub else None,  # the Hub refuses paths
        "library_name": {"lora": "peft", "full": "transformers"}.get(kind),
        "pipeline_tag": pipeline,
        "datasets": [dataset] if dataset and _is_hub_id(dataset) else None,
        "tags": [*([kind] if kind in ("lora", "bitfit") else []), "lora-cli"],
    }
    base = f"[{name}](https://huggingface.co/{name})" if hub else f"`{name}`"
    version, day = (str(report.get(key) or "") for key in ("lora_version", "created"))
    labels, command = _labels(recipe, report), report.get("command")
    named = ", ".join(f"`{label}`" for label in labels[:50]) + ", ..." * (len(labels) > 50)
    results, library = results_table(report), front["library_name"]
    code = _snippet(recipe, labels) if library else ""  # else only this tool reads the folder
    pairs = getattr(recipe.task, "text_pair_column", None)
    asked = "--input pairs.csv --output answers.csv" if pairs else '"Some text"'
    versions = [f"{key} {v}" for key, v in _part(report, "versions").items() if v]
    parts = [
        f"---\n{yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False)}---",
        f"# {_short_name(name)} for {goal}",
        f"{KINDS[kind]} of {base} for {goal}, made with {f'`lora` {version}'.strip()}"
        + (f" on {day[:10]}." if day else "."),
        f"Labels: {named}." if labels else "",
        "## Use\n\nWith `lora`, in this folder:",
        f"```bash\nlora eval --adapter .\nlora predict --adapter . {asked}\n```",
        f"With `{library}`:\n\n```python\n{code}\n```" if code else "",
        f"## Results\n\n{_table(results)}" if len(results) > 1 else "## Results",
        "![Loss and validation metric over the steps](learning_curve.png)",
        f"## Data\n\n{_table(_data_rows(report))}" if _part(report, "data") else "",
        f"## Training\n\n{f'Made by `{command}`. ' if command else ''}All settings: `recipe.yaml`.",
        _table(_training_rows(recipe, report)),
        f"Versions: {', '.join(versions)}." if versions else "",
    ]
    write_atomically(folder / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def _table(rows: list[list[str]]) -> str:
    """Return a table in Markdown; the first row is its header."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    cells.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _data_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = [["split", "rows", "skipped", "source", "SHA-256"]]
    for split in _part(report, "data"):
        part = _part(report, "data", split)
        counts = (f"{part[key]:,}" if part.get(key) else "" for key in ("rows", "skipped_rows"))
        source, sha256 = (f"`{part[key]}`" if part.get(key) else "" for key in ("source", "sha256"))
        rows.append([split, *counts, source, sha256])
    return rows


def _training_rows(recipe: Recipe, report: dict[str, Any]) -> list[list[str]]:
    """Return the recipe's settings and the report's measurements, each by its own key."""
    found: dict[str, Any] = {"adapter.type": recipe.adapter.type}
    for key in f"{LOW_RANK if recipe.adapter.low_rank else ''} {SETTINGS}".split():
        found[key] = functools.reduce(getattr, key.split("."), recipe)
    for section in ("parameters", "best", "training"):
        found |= {f"{section}.{key}": value for key, value in _part(report, section).items()}
    rows = [["setting or measurement", "value"]]
    for key, value in _strict(found).items():
        if value is not None:
            text = f"{value:,.6g}" if isinstance(value, float) else str(value)
            text = text.lower() if isinstance(value, bool) else text
            rows.append([f"`{key}`", f"{value:,}" if type(value) is int else text])
    return rows


def _labels(recipe: Recipe, report: dict[str, Any]) -> list[str]:
    """Return the names of the labels, in the order of the model's outputs."""
    task = recipe.task
    if task.type != "sequence_classification" or task.problem == "regression":
        return []
    found = sorted(_part(report, "data", "train", "labels"), key=lambda v: (str(type(v)), v))
    return [str(label) for label in task.labels or found]


def _snippet(recipe: Recipe, labels: list[str]) -> str:
    """Return Python that runs an adapter or a full model without this tool."""
    model, lora = recipe.model, recipe.adapter.low_rank
    fill = {"options": "", "setup": "", "imports": ""}
    base, head = repr(model.name), ""
    match recipe.task:
        case SequenceClassificationSpec() as task:
            if task.problem != "regression" and not labels:
                return ""
            fill["imports"] = "import torch\n"
            auto, texts = "AutoModelForSequenceClassification", '"Some text"'
            texts += ', "Another text"' if task.text_pair_column else ""
            head, answer = ", num_labels=1", ANSWERS[task.problem]
            if labels:
                head = ", num_labels=len(labels), id2label=dict(enumerate(labels))"
                base += f"\nlabels = {pprint.pformat(labels, width=88, compact=True)}"
            run = CLASSIFYING.format(texts=texts, length=task.max_length, answer=answer)
        case CausalLMSpec() as task:
            auto, length = "AutoModelForCausalLM", recipe.evaluate.generation.max_new_tokens
            run = GENERATING.format(text=repr(f"Some text{task.separator}"), length=length)
            if task.messages_column or task.format == "alpaca":
                run = re.sub(r"tokenizer\(.*\)", CHAT, run, count=1)
            if task.chat_template:
                name = PurePath(task.chat_template).name
                fill["setup"] = f"tokenizer.chat_template = open({name!r}).read()\n"
    if task.pad_token:
        fill["setup"] += f"tokenizer.pad_token = {task.pad_token!r}\n"
    if not lora:  # the folder is a whole model, which knows its labels
        base, head = repr("."), ""
    elif model.name.startswith("package:"):
        package, _, inside = model.name.removeprefix("package:").partition("/")
        base = base.replace(repr(model.name), f"str(files({package!r}) / {inside!r})")
        fill["imports"] = "from importlib.resources import files\n\n" + fill["imports"]
    elif model.revision != "main":
        fill["options"] = f", revision={model.revision!r}"
    if model.trust_remote_code:
        fill["options"] += ", trust_remote_code=True"
    how = f"base{head}{fill['options']}"
    how = how if len(how) < 40 else f"\n    {how}\n"
    code = LOADING.format(auto=auto, base=base, how=how, **fill) + run
    return code if lora else re.sub(r"(?m)^.*PeftModel.*\n", "", code)
