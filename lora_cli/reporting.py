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

    Curve = tuple[NDArray[Any], NDArray[Any]]  # steps (N,), values (N,)

MOST_DOTS = 40  # more points than these run together
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
KINDS = {"lora": "LoRA adapter", "full": "full fine-tuning", "none": "head alone",
         "bitfit": "biases alone"}
WHAT = {"lora": "A LoRA adapter of", "full": "A model with every weight fine-tuned, from",
        "none": "A newly trained head on the frozen weights of",
        "bitfit": "The fine-tuned biases (BitFit) of"}
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
            scalars = {n: v for n, v in _strict(metrics).items() if isinstance(v, int | float)}
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
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name))


def _short_name(model: str) -> str:
    """Return a model's name without the folders of a path."""
    return model if _is_hub_id(model) else PurePath(model.removeprefix("package:")).name


# ------------------------------------------------------------------------------ the learning curve


def plot_learning_curve(folder: Path, report: dict[str, Any]) -> Path:
    """Draw `learning_curve.png`, 1600 x 900 pixels, from the folder's `metrics.jsonl`.

    Left the loss of training and validation; right validation's main metric, or, where that is the
    loss or was never measured, the learning rate.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    log = [line for line in read_metrics_log(folder / "metrics.jsonl") if "step" in line]
    training = [line for line in log if "validation" not in line]
    validation = [{**_part(line, "validation"), "step": line["step"]} for line in log
                  if "validation" in line]  # fmt: skip
    best, last = _part(report, "best"), max((line["step"] for line in log), default=0) or 1
    metric = best.get("metric", "loss")
    with matplotlib.rc_context({**STYLE, "axes.titlepad": 24 if "step" in best else 10}):
        # not pyplot, which keeps every figure alive and may look for a screen
        figure = Figure(figsize=(10, 5.625), dpi=160, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        _headline(figure, report)
        left, right = (figure.add_axes((x, 0.115, 0.325, 0.645)) for x in (0.07, 0.55))
        _plot_loss(left, training, validation, report)
        if metric != "loss" and any(metric in line for line in validation):
            _plot_metric(right, validation, metric, best)
        else:
            _plot_learning_rate(right, training)
        for axes in (left, right):
            axes.set(xlim=(-0.02 * last, 1.02 * last), xlabel="step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            if not axes.lines:
                axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
                _note(axes, 0.5, 0.5, "nothing was logged", ha="center")
            elif "step" in best:
                axes.axvline(best["step"], color=SECONDARY, lw=0.8, zorder=1)
                x, side = best["step"] / last, "left" if best["step"] < 0.3 * last else "right"
                text = f"best: step {best['step']:,}"
                _note(axes, (x + 0.02) / 1.04, 1.015, text, ha=side, va="bottom", size=9.5)
        image = BytesIO()
        canvas.print_png(image)
    write_atomically(folder / "learning_curve.png", image.getvalue())
    return folder / "learning_curve.png"


def _note(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Write in a panel, whose lower left corner is (0, 0) and upper right one (1, 1)."""
    axes.text(x, y, text, transform=axes.transAxes, **{"color": MUTED, "size": 10.5, **style})


def _headline(figure: Any, report: dict[str, Any]) -> None:
    adapter, ran = _part(report, "adapter"), _part(report, "training")
    kind, rank = adapter.get("type"), adapter.get("rank")
    rows, steps = _part(report, "data", "train").get("rows"), ran.get("steps")
    seconds = ran.get("seconds")
    task = PIPELINES.get(str(report.get("task")), "training").replace("-", " ").capitalize()
    title = [task, _short_name(str(report.get("base_model") or ""))]
    facts = [
        KINDS.get(str(kind), "") + (f", rank {rank}" if kind == "lora" and rank else ""),
        f"{rows:,} training rows" if rows else "",
        f"{steps:,} steps" if steps else "",
        (f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min") if seconds else "",
        str(ran.get("device") or "").replace("cpu", "CPU"),
    ]
    line = "  ·  ".join
    figure.text(0.0215, 0.935, line(filter(None, title)), size=14.5, weight="bold", color=INK)
    figure.text(0.022, 0.888, line(filter(None, facts)), size=10.5, color=MUTED)


def _curve(lines: list[dict[str, Any]], key: str) -> Curve:
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


def _draw(axes: Any, curve: Curve, color: str, width: float = 2.2, dots: bool = False) -> None:
    x, y = curve
    if len(y[y == y]):
        axes.plot(x, y, color=color, lw=width, marker="o" if dots or len(y) == 1 else "", ms=5.5)


def _plot_loss(
    axes: Any, training: list[Any], validation: list[Any], report: dict[str, Any]
) -> None:
    import numpy as np

    (x, raw), (at, measured) = _curve(training, "loss"), _curve(validation, "loss")
    trend, few = raw, len(raw) < 12
    if not few:
        trend = _smooth(raw)
        axes.plot(x, raw, color=TRAINING, alpha=0.3, lw=0.8)
    _draw(axes, (x, trend), TRAINING, dots=few)
    _draw(axes, (at, measured), VALIDATION, dots=len(at) <= MOST_DOTS)
    seen = np.concatenate([raw, measured])
    if axes.lines:
        # a single spike leaves the frame rather than flatten all the rest
        top = min(np.nanmax(seen), 2 * np.nanmax(np.concatenate([trend, measured])))
        _set_limits(axes, np.nanmin(seen), top, 0.06)
    _name_ends(axes, [("training", trend, TRAINING), ("validation", measured, VALIDATION)])
    # a cross-entropy is in nats, the loss of a regression is not
    nats = report.get("task") == "causal_lm" or bool(_part(report, "data", "train", "labels"))
    axes.set(title="Loss", ylabel=f"loss ({'nats ' if nats else ''}per item)")


def _plot_metric(axes: Any, lines: list[Any], metric: str, best: dict[str, Any]) -> None:
    """Draw the main metric, and lighter the others that share its scale, at most three."""
    import numpy as np

    names = dict.fromkeys(name for line in lines for name in line if name not in ("step", "loss"))
    curves = {name: _curve(lines, name) for name in names}
    x, y = curves.pop(metric)
    known, title = np.flatnonzero(np.isfinite(y)), metric.replace("_", " ")
    axes.set(title=f"Validation {title}", ylabel=title)
    if not len(known):
        return
    ends, shown = [(title, y, VALIDATION)], [y]
    for name, (steps, values) in curves.items():
        seen = np.abs(np.concatenate([values[values == values], y[known]])).max()
        if seen <= 1 and len(ends) <= 3 and np.isfinite(values).any():
            _draw(axes, (steps, values), SECONDARY, 1.2)
            ends.append((name.replace("_", " "), values, SECONDARY))
            shown.append(values)
    _draw(axes, (x, y), VALIDATION, dots=len(x) <= MOST_DOTS)
    _set_limits(axes, np.nanmin(np.concatenate(shown)), np.nanmax(np.concatenate(shown)), 0.14)
    if len(ends) > 1:
        _name_ends(axes, ends)
    up = -1 if best.get("mode") == "min" else 1  # values stand on the side away from the curve
    first, top = known[0], known[np.argmax(up * y[known])]
    late = x[top] > 0.3 * x[-1]
    if first != top:
        text = _number(float(y[first])) + (" before training" if x[first] == 0 else "")
        _value(axes, (x[first], y[first]), text, (6, -8 * up), MUTED)
    axes.plot(x[top], y[top], "o", ms=9, mew=1.5, color=VALIDATION, zorder=4)
    text = _number(float(y[top]))
    _value(axes, (x[top], y[top]), text, (-6 if late else 6, 9 * up), VALIDATION, weight="bold")


def _value(
    axes: Any, at: tuple[float, float], text: str, away: tuple[int, int], color: str, **style: Any
) -> None:
    """Write a value beside its point, at a distance in points, with a halo over lines."""
    from matplotlib.patheffects import withStroke

    axes.annotate(text, at, away, textcoords="offset points", size=10.5, color=color,
                  ha="left" if away[0] > 0 else "right", va="bottom" if away[1] > 0 else "top",
                  path_effects=[withStroke(linewidth=3, foreground="white")], **style)  # fmt: skip


def _plot_learning_rate(axes: Any, training: list[Any]) -> None:
    x, y = _curve(training, "learning_rate")
    top = y[y == y].max(initial=0.0) or 1.0
    power = math.floor(math.log10(top))
    _draw(axes, (x, y / 10**power), TRAINING)
    _set_limits(axes, 0.0, top / 10**power, 0.06)
    axes.set(title="Learning rate", ylabel=f"learning rate (x 1e{power})")


def _set_limits(axes: Any, low: float, high: float, margin: float) -> None:
    room = margin * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _name_ends(axes: Any, curves: list[tuple[str, NDArray[Any], str]]) -> None:
    """Name each curve in the margin, at the height where it ends; names never overlap."""
    low, high = axes.get_ylim()
    ends = [((y[y == y][-1] - low) / (high - low), text, color)
            for text, y, color in curves if len(y[y == y])]  # fmt: skip
    free = -1.0
    for height, text, color in sorted(ends):
        height = max(height, free)
        text = text if len(text) < 15 else text[:12] + "…"
        _note(axes, 1.025, height, text, color=color, va="center", size=10)
        free = height + 0.055


# ---------------------------------------------------------------------------------- the model card

# what a card tells of the recipe; the rest is in `recipe.yaml`
SETTINGS = """task.max_length train.optimizer.type train.optimizer.learning_rate
train.optimizer.weight_decay train.scheduler.type train.scheduler.warmup_ratio
train.scheduler.warmup_steps train.max_grad_norm train.packing train.seed"""
LOW_RANK = "adapter.rank adapter.alpha adapter.dropout adapter.use_rslora adapter.bias"


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
    code, results, data = _snippet(recipe, labels), results_table(report), _data_rows(report)
    versions = (f"{key} {v}" for key, v in _part(report, "versions").items() if v)
    parts = [
        f"---\n{yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False)}---",
        f"# {_short_name(name)}: {KINDS[kind]} for {goal}",
        f"{WHAT[kind]} {base}, for {goal}. Trained with {f'`lora` {version}'.strip()}"
        + (f" on {day[:10]}." if day else "."),
        f"Labels: {named}." if labels else "",
        "## Use\n\nWith `lora`, in this folder:",
        '```bash\nlora eval --adapter .\nlora predict --adapter . "Some text"\n```',
        f"With `{'peft' if kind == 'lora' else 'transformers'}`:" if code else "",
        f"```python\n{code}\n```" if code else "",
        "## Results" if len(results) > 1 else "",
        _table(results),
        "![Loss and validation metric over the steps](learning_curve.png)",
        "## Data" if len(data) > 1 else "",
        _table(data),
        f"## Training\n\n{f'Made by `{command}`. ' if command else ''}All settings: `recipe.yaml`.",
        _table([["setting or measurement", "value"], *_training_rows(recipe, report)]),
        f"Versions: {', '.join(versions)}." if _part(report, "versions") else "",
    ]
    write_atomically(folder / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def _table(rows: list[list[str]]) -> str:
    """Return a Markdown table of the columns that hold something."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    rows = [[row[i].replace("|", "\\|").replace("\n", " ") for i in kept] for row in rows]
    rows[1:1] = [["---"] * len(kept)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if kept else ""


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
    targets = _part(report, "adapter").get("target_modules", recipe.adapter.target_modules)
    if recipe.adapter.low_rank and targets:
        found["adapter.target_modules"] = ", ".join(
            [targets] if isinstance(targets, str) else targets
        )
    for section in ("parameters", "best", "training"):
        found |= {f"{section}.{key}": value for key, value in _part(report, section).items()}
    return [
        [f"`{key}`", f"{value:,.6g}" if isinstance(value, float) else str(value)]
        for key, value in _strict(found).items()
        if value is not None
    ]


def _labels(recipe: Recipe, report: dict[str, Any]) -> list[str]:
    """Return the names of the labels, in the order of the model's outputs."""
    task = recipe.task
    if task.type != "sequence_classification" or task.problem == "regression":
        return []
    found = sorted(_part(report, "data", "train", "labels"), key=lambda v: (str(type(v)), v))
    return [str(label) for label in task.labels or found]


def _snippet(recipe: Recipe, labels: list[str]) -> str:
    """Return Python that runs the result without this tool; none where only this tool can."""
    model, lora, pad = recipe.model, recipe.adapter.low_rank, recipe.task.pad_token
    imports, base, options, setup = ["import torch"], repr(model.name), "", list[str]()
    match recipe.task:
        case SequenceClassificationSpec() as task:
            if task.problem != "regression" and not labels:
                return ""
            auto, run = "AutoModelForSequenceClassification", _classification(task)
            head = ", num_labels=1"
            if labels:
                head = ", num_labels=len(labels), id2label=dict(enumerate(labels))"
                setup = [f"labels = {pprint.pformat(labels, width=88, compact=True)}"]
        case CausalLMSpec() as task:
            auto, head, run = "AutoModelForCausalLM", "", _generation(task, recipe)
    if not lora:  # the folder is a whole model, and knows its labels
        base, head, setup = repr("."), "", []
    elif model.name.startswith("package:"):
        package, _, inside = model.name.removeprefix("package:").partition("/")
        imports = ["from importlib.resources import files\n", *imports]
        base = f"str(files({package!r}) / {inside!r})"
    elif model.revision != "main":
        options = f", revision={model.revision!r}"
    options += ", trust_remote_code=True" * model.trust_remote_code
    adapt = 'model = PeftModel.from_pretrained(model, ".")  # this folder, or its id on the Hub'
    lines = [*imports, *["from peft import PeftModel"] * lora]
    lines += [f"from transformers import {auto}, AutoTokenizer", "", f"base = {base}", *setup]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained(base{options})"]
    lines += [f"tokenizer.pad_token = {pad!r}"] if pad else []
    lines += [f"model = {auto}.from_pretrained(\n    base{head}{options}\n)", *[adapt] * lora]
    return "\n".join([*lines, "model.eval()", "", *run])


def _classification(task: SequenceClassificationSpec) -> list[str]:
    texts = '"Some text"' + (', "Another text"' if task.text_pair_column else "")
    answer = {
        "single_label": "model.config.id2label[scores.argmax().item()]",
        "multi_label": "[model.config.id2label[i] for i, score in enumerate(scores) if score > 0]",
        "regression": "scores.item()",
    }[task.problem]
    return [
        f'inputs = tokenizer({texts}, truncation=True, max_length={task.max_length}, return_tensors="pt")',
        "with torch.no_grad():\n    scores = model(**inputs).logits[0]",
        f"print({answer})",
    ]


def _generation(task: CausalLMSpec, recipe: Recipe) -> list[str]:
    spec, lines = recipe.evaluate.generation, list[str]()
    how = "do_sample=False"
    if spec.temperature:
        how = f"do_sample=True, temperature={spec.temperature:g}, top_p={spec.top_p:g}"
    if task.messages_column or task.format == "alpaca":
        if task.chat_template:
            name = PurePath(task.chat_template).name
            lines = [f"tokenizer.chat_template = open({name!r}).read()  # the recipe's template"]
        chat = '[{"role": "user", "content": "Some text"}]'
        read = f"tokenizer.apply_chat_template(\n    {chat}, add_generation_prompt=True, return_dict=True,\n"
        read += '    return_tensors="pt",\n)'
    else:
        read = f'tokenizer({("Some text" + task.separator)!r}, return_tensors="pt")'
    return [
        *lines,
        f"inputs = {read}",
        f"output = model.generate(**inputs, max_new_tokens={spec.max_new_tokens}, {how})",
        'answer = output[0, inputs["input_ids"].shape[1]:]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
