"""Collect the findings that `lora init` prints: each inferred value with its reason."""

from __future__ import annotations

from lora_cli.data.detect_format import DataFile
from lora_cli.data.parallel_pairs import translations_of
from lora_cli.errors import counted
from lora_cli.recipe_draft.draft_values import Draft
from lora_cli.tasks.proposal import Proposal

PRINTED_NAMES = {
    "image_column": "picture", "text_column": "text", "text_pair_column": "text pair",
    "prompt_column": "prompt", "completion_column": "completion",
    "messages_column": "messages", "label_column": "label",
    "label_columns": "labels", "label_separator": "separator", "labels": "labels",
    "skip_labels": "no label", "chat_template": "template", "max_length": "length",
    "truncate": "cut", "tokens_column": "words", "tags_column": "tags", "scheme": "scheme",
    "spans_column": "spans",
}  # fmt: skip
NOT_PRINTED = ("type", "problem", "format", "separator")  # or printed with another key


def add_findings(draft: Draft, file: DataFile, chosen: Proposal) -> None:
    """Collect each inferred value with its reason, in the order of interest to the user."""
    add = draft.findings.append
    task, data, why = draft.values["task"], draft.values["data"], draft.why
    add(
        (
            "file",
            f"{file.summary}: {counted(len(file.rows), 'row')}, "
            f"{counted(len(file.columns), 'column')}",
        )
    )
    for key, value in file.form.items():
        shown = repr(value) if key == "delimiter" else value
        shown = ", ".join(value) if isinstance(value, list) else shown
        add((key, f"{str(shown).lower() if isinstance(value, bool) else shown}: {file.why[key]}"))
    if chosen.renamed:
        renames = ", ".join(f"`{old}` as {new}" for old, new in chosen.renamed.items())
        add(("columns", f"{renames}: {why['data.columns']}"))
    problem = task.get("problem", "single_label") if chosen.labels is not None else None
    reason = chosen.why.get("problem") or chosen.why.get("", "")
    kind = f"{task['type']}, {problem}" if problem else task["type"]
    add(("task", f"{kind}" + (f": {reason}" if reason else "")))
    _add_task_keys(draft)
    for split in ("split_column", "train", "validation", "test"):
        if split in data:
            value = data[split]
            shown = value if isinstance(value, str) else f"{value['fraction']:g} of train"
            shown = f"`{shown}`" if split == "split_column" else shown
            reason = why.get(f"data.{split}", "")
            add((split.replace("_", " "), f"{shown}" + (f", {reason}" if reason else "")))
    if more := why["data.path"].removeprefix(file.summary).removeprefix("; "):
        add(("held out", more if "validation" in data else f"nothing: {more}"))
    add(("memory", draft.memory))
    if "on_bad_row" in data:
        add(("skipped", why["data.on_bad_row"]))
    if translations := translations_of(file):
        names = ", ".join(other.name for other in translations[:4])
        what = f"next to it, with as many lines: {names}; to learn to translate, name both files"
        add(("also", what))
    if chosen.left_out:
        parts = [f"`{name}` ({reason})" for name, reason in chosen.left_out.items()]
        more = f", and {len(parts) - 12} more" if len(parts) > 12 else ""
        add(("left out", ", ".join(parts[:12]) + more))


def _add_task_keys(draft: Draft) -> None:
    """Add the value and reason of each key of the task."""
    task, why, add = draft.values["task"], draft.why, draft.findings.append
    names = PRINTED_NAMES | {
        key: key.removesuffix("_column").replace("_", " ")
        for key in task
        if key not in PRINTED_NAMES and key not in NOT_PRINTED
    }
    for key, name in names.items():
        if key not in task:
            continue
        value = task[key]
        reason = why.get(f"task.{key}", "")
        if key == "labels" and isinstance(value, list):
            shown = ", ".join(map(str, value[:6])) + (", …" if len(value) > 6 else "")
        elif key == "label_separator":
            shown = repr(value)
        elif isinstance(value, list):
            shown = ", ".join(f"`{item}`" for item in value)
        else:
            shown = str(value) if isinstance(value, int | float) else f"`{value}`"
        add((name, f"{shown}, {reason}" if reason else shown))
