"""The model card: what an adapter is, how to use it, its results, and its origin."""

from __future__ import annotations

import functools
import pprint
import re
from pathlib import Path
from typing import Any

import yaml

from lora_cli import __version__
from lora_cli.errors import printable
from lora_cli.files import write_atomically
from lora_cli.recipe import ADAPTER_TITLES, Recipe
from lora_cli.reporting.report import (
    goal_of,
    is_hub_id,
    part,
    results_table,
    short_name,
    strict,
)

# what a card tells of the recipe; the rest is in `recipe.yaml`
SETTINGS = """task.max_length task.max_source_length task.max_target_length
train.optimizer.type train.optimizer.learning_rate
train.optimizer.weight_decay train.scheduler.type train.scheduler.warmup_ratio
train.scheduler.warmup_steps train.max_grad_norm train.packing train.seed"""
LOW_RANK = "adapter.rank adapter.alpha adapter.dropout adapter.use_rslora adapter.init adapter.bias"

SPECIAL = set("\\`*[]<>|~&$:")  # what Markdown or HTML may take for more than a letter

LOADING = """\
{imports}from peft import PeftModel
from transformers import {auto}, {processor}

base = {base}
{variable} = {processor}.from_pretrained({files})
{setup}model = {auto}.from_pretrained({how})
{resizing}model = PeftModel.from_pretrained(model, ".").eval()  # this folder, or its id on the Hub

"""

# the folder's tokenizer has the new tokens; some bases have more rows than tokens already
RESIZING = """\
n_rows = max(len(tokenizer), model.get_input_embeddings().num_embeddings)
model.resize_token_embeddings(n_rows, mean_resizing=False)  # the adapter has the new rows
"""


def write_model_card(folder: Path, recipe: Recipe, report: dict[str, Any]) -> None:
    """Write `README.md`, the card that the Hub shows: what it is, its use, results and origin."""
    command, results, library = report.get("command"), results_table(report), _library(recipe)
    versions = [f"{key} {v}" for key, v in part(report, "versions").items() if v]
    made_by = f"Made by {code_span(command)}. " if command else ""
    definitions = part(report, "metric_definitions")
    parts = [
        *_opening(recipe, report, library),
        *_usage(folder, recipe, report, library),
        f"## Results\n\n{_table([list(map(plain_text, row)) for row in results])}"
        if len(results) > 1
        else "## Results",
        "\n".join(f"- {code_span(n)}: {_with_code(words)}" for n, words in definitions.items()),
        "![Loss and validation metric over the steps](learning_curve.png)",
        f"## Data\n\n{_table(_data_rows(report))}" if part(report, "data") else "",
        f"## Training\n\n{made_by}All settings: `recipe.yaml`.",
        _table(_training_rows(recipe, report)),
        f"Versions: {', '.join(versions)}." if versions else "",
    ]
    _write_parts(folder, parts)


def write_derived_card(
    folder: Path,
    recipe: Recipe,
    title: str,
    text: str,
    is_exported: bool = False,
    library: str | None = "peft",
) -> None:
    """Write `README.md` for an adapter that was derived from others without training.

    Args:
        folder: Where it goes.
        recipe: Says what the adapter is for, and how it is used.
        title: Of the section that says what it was made of.
        text: That section, in Markdown.
        is_exported: It is for another program, and this tool's commands do not take it as it is.
        library: The library that reads it, by the Hub's name, if it has one.
    """
    report = {"lora_version": __version__}
    opening = _opening(recipe, report, library)
    usage = _usage(folder, recipe, report, library, for_lora=not is_exported)
    _write_parts(folder, [*opening, *usage, f"## {title}\n\n{text}"])


def _write_parts(folder: Path, parts: list[str]) -> None:
    write_atomically(folder / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def _library(recipe: Recipe) -> str | None:
    """Return the library that reads the folder, besides this tool; None if there is none."""
    if recipe.adapter.low_rank:
        return "peft"
    if recipe.adapter.type != "full":
        return None
    return "diffusers" if recipe.task.generates_images else "transformers"


def _opening(recipe: Recipe, report: dict[str, Any], library: str | None) -> list[str]:
    """Return the first parts of a card: front matter, and what it is."""
    name, kind, pipeline = recipe.model.name, recipe.adapter.type, recipe.task.pipeline_tag
    hub, dataset, goal = is_hub_id(name), recipe.data.name, goal_of(recipe.task.type)
    front = {
        "base_model": name if hub else None,  # the Hub rejects paths
        "library_name": library,
        "pipeline_tag": pipeline,
        "datasets": [dataset] if dataset and is_hub_id(dataset) else None,
        "tags": [*([] if kind in ("full", "none") else [kind]), "lora-cli"],
    }
    base = f"[{name}](https://huggingface.co/{name})" if hub else code_span(name)
    version, day = (str(report.get(key) or "") for key in ("lora_version", "created"))
    labels = _labels(recipe, report)
    named = ", ".join(map(code_span, labels[:50])) + ", ..." * (len(labels) > 50)
    return [
        f"---\n{yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False)}---",
        f"# {plain_text(short_name(name))} for {goal}",
        f"{ADAPTER_TITLES[kind]} of {base} for {goal}, made with {f'`lora` {version}'.strip()}"
        + (f" on {day[:10]}." if day else "."),
        f"Labels: {named}." if labels else "",
    ]


def _usage(
    folder: Path,
    recipe: Recipe,
    report: dict[str, Any],
    library: str | None,
    for_lora: bool = True,
) -> list[str]:
    """Return how to use an adapter, with this tool and with the library that reads it."""
    # of the others, only this tool reads the folder, or the reader that it was exported for
    has_code = library in ("peft", "transformers", "diffusers")
    code = _snippet(recipe, _labels(recipe, report), folder) if has_code else ""
    pairs = getattr(recipe.task, "text_pair_column", None)
    asked = "--input pairs.csv --output answers.csv" if pairs else f'"{recipe.task.example_input}"'
    commands = f"```bash\nlora eval --adapter .\nlora predict --adapter . {asked}\n```"
    return [
        "## Use" if for_lora or code else "",
        f"With `lora`, in this folder:\n\n{commands}" if for_lora else "",
        f"With `{library}`:\n\n{_code_block(code)}" if code else "",
    ]


def _table(rows: list[list[str]]) -> str:
    """Return a table in Markdown; the first row is its header, and every cell is Markdown."""
    cells = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def plain_text(value: Any) -> str:
    """Return a value escaped so that Markdown shows it literally, also in a table.

    Labels, names of files and columns come from the data, which may be anybody's.
    """
    return "".join(f"&#{ord(c)};" if c in SPECIAL else c for c in printable(str(value)))


def code_span(value: Any) -> str:
    """Return a value as code within a line, in backticks where they can hold it."""
    text = printable(str(value))
    return f"<code>{plain_text(text)}</code>" if set("`|<>&\\") & set(text) else f"`{text}`"


def _with_code(words: str) -> str:
    """Return text of this project with the values between backticks as code."""
    return re.sub("`([^`]+)`", lambda found: code_span(found[1]), words)


def _code_block(code: str) -> str:
    """Return a block of Python whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}python\n{code}\n{fence}"


def _data_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = [["split", "rows", "skipped", "source", "SHA-256"]]
    for split in part(report, "data"):
        facts = part(report, "data", split)
        if split == "overlap":  # what the splits have in common
            continue
        counts = (f"{facts[key]:,}" if facts.get(key) else "" for key in ("rows", "skipped_rows"))
        source, sha256 = (
            code_span(facts[key]) if facts.get(key) else "" for key in ("source", "sha256")
        )
        rows.append([plain_text(split), *counts, source, sha256])
    return rows


def _training_rows(recipe: Recipe, report: dict[str, Any]) -> list[list[str]]:
    """Return the recipe's settings and the report's measurements, each by its own key."""
    found: dict[str, Any] = {"adapter.type": recipe.adapter.type}
    for key in f"{LOW_RANK if recipe.adapter.low_rank else ''} {SETTINGS}".split():
        found[key] = functools.reduce(_value_of, key.split("."), recipe)
    for section in ("parameters", "best", "training"):
        found |= {f"{section}.{key}": value for key, value in part(report, section).items()}
    rows = [["setting or measurement", "value"]]
    for key, value in strict(found).items():
        if value is not None:
            text = f"{value:,.6g}" if isinstance(value, float) else str(value)
            text = text.lower() if isinstance(value, bool) else text
            number = f"{value:,}" if type(value) is int else plain_text(text)
            rows.append([code_span(key), number])
    return rows


def _value_of(section: Any, key: str) -> Any:
    """Return a key of a section; None if a section of its type has none."""
    return getattr(section, key, None)


def _labels(recipe: Recipe, report: dict[str, Any]) -> list[str]:
    """Return the names of the labels, in the order of the model's outputs."""
    if named := getattr(recipe.task, "labels", None):
        return [str(label) for label in named]
    if not recipe.task.label_columns_by_key:
        return []
    found = sorted(part(report, "data", "train", "labels"), key=lambda v: (str(type(v)), v))
    return [str(label) for label in found]


def _own_code(recipe: Recipe, folder: Path) -> str:
    """Return the code of a task that no class of transformers is for."""
    model = recipe.model
    parts = tuple(sorted(place.parent.name for place in folder.glob("*/adapter_config.json")))
    base = repr(model.name) if parts else repr(".")
    options = f", revision={model.revision!r}" if parts and model.revision != "main" else ""
    return recipe.task.own_code(base, options, parts, recipe.evaluate.drawing)


def _snippet(recipe: Recipe, labels: list[str], folder: Path) -> str:
    """Return Python that runs an adapter or a full model without this tool."""
    model, lora = recipe.model, recipe.adapter.low_rank
    usage = recipe.task.usage(labels, recipe.evaluate.generation)
    if usage is None:
        return _own_code(recipe, folder)
    base, head, imports, options = repr(model.name), usage.head, usage.imports, ""
    if labels and usage.head:
        base += f"\nlabels = {pprint.pformat(labels, width=88, compact=True)}"
    if not lora:  # the folder is a whole model, which knows its labels
        base, head = repr("."), ""
    elif model.name.startswith("package:"):
        package, _, inside = model.name.removeprefix("package:").partition("/")
        base = base.replace(repr(model.name), f"str(files({package!r}) / {inside!r})")
        imports = "from importlib.resources import files\n\n" + imports
    elif model.revision != "main":
        options = f", revision={model.revision!r}"
    if model.trust_remote_code:
        options += ", trust_remote_code=True"
    how = f"base{head}{options}"
    how = how if len(how) < 40 else f"\n    {how}\n"
    variable, processor = usage.processor
    grown = lora and bool(model.add_tokens)
    code = LOADING.format(
        imports=imports, auto=usage.auto_class, base=base, how=how, setup=usage.setup,
        files=repr(".") if lora and (grown or usage.has_own_processor) else f"base{options}",
        resizing=RESIZING if grown else "",
        variable=variable, processor=processor,
    )  # fmt: skip
    return (code if lora else re.sub(r"(?m)^.*PeftModel.*\n", "", code)) + usage.code
