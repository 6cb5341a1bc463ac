"""Draft a recipe with comments from a data file and the name of a base model."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_cli.data.cell_values import half_width
from lora_cli.data.chat_formats import conversation_error, read_conversations
from lora_cli.data.column_kinds import SPLIT_NAMES, Column, as_number, describe_column
from lora_cli.data.csv_rows import delimiter_of
from lora_cli.data.detect_format import DataFile
from lora_cli.data.file_formats import kind_by_name
from lora_cli.data.numbered_labels import parquet_label_names
from lora_cli.data.parallel_pairs import read_pair
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import TASKS, FormatSpec, Recipe
from lora_cli.recipe.spec.task_section import MediaKind
from lora_cli.recipe_draft.answer_cuts import rows_without_answer
from lora_cli.recipe_draft.base_model_info import Base, describe_base
from lora_cli.recipe_draft.box_sources import read_boxes
from lora_cli.recipe_draft.chat_lengths import TurnCounter
from lora_cli.recipe_draft.choose_splits import Keys, Rows, choose_splits, is_unusable, usable_rows
from lora_cli.recipe_draft.choose_task import choose_task
from lora_cli.recipe_draft.data_folder import read_source, recipe_of_folder, split_files
from lora_cli.recipe_draft.draft_findings import add_findings
from lora_cli.recipe_draft.draft_training import add_training
from lora_cli.recipe_draft.draft_values import Draft
from lora_cli.recipe_draft.hints import without_overrides
from lora_cli.recipe_draft.media_rows import media_splits, read_media_folder
from lora_cli.recipe_draft.memory_budget import GIB, Card, local_card
from lora_cli.recipe_draft.text_lengths import length_of, unknown_token_warning
from lora_cli.tasks.proposal import Proposal, Table

NEW_NAMES = {"text_pair_column": "text_2"}  # column names that differ from their key
MAX_LABELS = 500  # more labels are not listed in the recipe, but collected from the train rows
CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
TEMPLATE = "chatml.jinja"


def draft_recipe(
    source: Path,
    model: str,
    target: Path,
    text: str | None = None,
    label: str | None = None,
    second: Path | None = None,
    pair: str | None = None,
    memory: float | None = None,
) -> Draft:
    """Draft a recipe for a data file.

    Args:
        source: The data file or folder.
        model: Hub ID, folder or `package:NAME/FOLDER` of the base model.
        target: Path of the recipe; its paths are relative to that folder.
        text: Text column, if the user names it.
        label: Label or completion column, if the user names it.
        second: A second text file with the translation of each line of the first.
        pair: Column of the second text, which the label compares with the first.
        memory: GPU memory in GiB; None for the GPU of this machine.

    Raises:
        LoraError: If the file cannot be read, or the task is ambiguous.
    """
    try:
        return _draft(source, model, target, text, label, second, pair, memory)
    except LoraError as error:
        raise without_overrides(error) from error


def _draft(
    source: Path,
    model: str,
    target: Path,
    text: str | None,
    label: str | None,
    second: Path | None,
    pair: str | None,
    memory: float | None,
) -> Draft:
    """Draft the recipe; hints of errors may suggest `--set`, which `lora init` does not have."""
    boxes = read_boxes(source) if second is None else None
    media: tuple[DataFile, MediaKind] | None = None if boxes is None else (boxes, "image")
    if second is None and media is None:
        media = read_media_folder(source)
    if media is not None:
        file, kind = media
    else:
        file, kind = (read_source(source) if second is None else read_pair(source, second)), None
    base = describe_base(model)
    columns = [describe_column(name, file.rows, _delimiter(file)) for name in file.columns]
    if file.form.get("label_from") == "fasttext":
        columns = [_with_several_labels(column) for column in columns]
    place = file.path.name if kind is None else str(source)
    are_lines = second is not None
    table = Table(columns, file.rows, place, text, label, pair, kind, are_lines)
    chosen = choose_task(table, base)
    file, columns, chosen = _with_names(file, columns, chosen)
    file, columns = _renamed(file, columns, chosen)
    card = local_card() if memory is None else Card(memory * GIB, f"a GPU of {memory:g} GiB")
    draft = Draft({"model": {"name": _relative(model, target, base)}}, {})
    if kind is not None:
        other_rows: Rows = []
        splits = media_splits(file, kind, chosen.keys, target)
    else:
        splits, other_rows = choose_splits(file, columns, chosen, target)
    _name_numbered_labels(file, chosen)
    _add_task(draft, base, chosen, [file.rows, other_rows])
    _add_data(draft, file, columns, chosen, target, splits)
    limits = _limits(chosen)
    add_training(draft, base, len(usable_rows(file.rows, chosen)), card, list(limits))
    warning = unknown_token_warning([file.rows, other_rows], base, chosen) if limits else None
    if warning is not None:
        draft.findings.append(("unknown", warning))
    draft.values["output_dir"] = _output_dir(file.path, target)
    add_findings(draft, file, chosen)
    Recipe.model_validate(draft.values)  # an error here is a bug
    return draft


def _with_several_labels(column: Column) -> Column:
    """Return the label column of a fastText file as a list column if any row has several labels."""
    if column.name != "label" or not any(" " in value for value in column.counts):
        return column
    counts: Counter[str] = Counter()
    for value, times in column.counts.items():
        for label in value.split():
            counts[label] += times
    return replace(column, kind="list", separator=" ", counts=counts)


def _output_dir(source: Path, target: Path) -> str:
    """Return the output folder, named after the recipe, or after the data for `recipe.yaml`."""
    name = target.stem if target.stem != "recipe" else source.absolute().name
    if target.stem == "recipe" and not source.is_dir():
        if name.partition(".")[0].lower() in SPLIT_NAMES:  # `ag_news/train.csv`
            name = source.absolute().parent.name
        name = re.sub(r"\{.*?\}", "", name).lstrip(".").partition(".")[0]
    name = re.sub(r"[^-.\w]+", "_", name).strip("_.")
    return f"out/{name or 'recipe'}"


def _delimiter(file: DataFile) -> str:
    return delimiter_of(file.path, FormatSpec.model_validate(file.form))


def _relative(model: str, target: Path, base: Base) -> str:
    """Return the name of a model for the recipe; folders become relative to the recipe."""
    folder = Path(model).expanduser()
    if Path(model).is_absolute() or model.startswith("~") or not folder.is_dir():
        return model
    path = os.path.relpath(folder.absolute(), target.absolute().parent)
    return path if path.startswith(".") else f"./{path}"


def _with_names(
    file: DataFile, columns: list[Column], chosen: Proposal
) -> tuple[DataFile, list[Column], Proposal]:
    """Name the columns of a file without a header after their role in the task."""
    if file.named or "columns" not in file.form:
        return file, columns, chosen
    roles = [key for key, name in chosen.keys.items() if key.endswith("_column") and name]
    new_names = {chosen.keys[key]: NEW_NAMES.get(key, key.removesuffix("_column")) for key in roles}
    old_names = {name: column for column, name in new_names.items()}

    def renamed(value: Any) -> Any:
        return new_names.get(value, value) if isinstance(value, str) else value

    def row_error(row: dict[str, Any]) -> str:
        assert chosen.row_error is not None
        return chosen.row_error({old_names.get(name, name): value for name, value in row.items()})

    why = {}
    for key, reason in chosen.why.items():
        for column, name in new_names.items():
            reason = reason.replace(f"`{column}`", f"`{name}`")
        why[key] = reason
    rows = [{renamed(name): value for name, value in row.items()} for row in file.rows]
    names = [renamed(name) for name in file.columns]
    form = {**file.form, "columns": names}
    file = DataFile(file.path, form, file.why, rows, file.errors, names, file.named, file.summary)
    limits = chosen.limits or {}
    named = replace(
        chosen,
        keys={key: renamed(value) if key in roles else value for key, value in chosen.keys.items()},
        why=why,
        inputs=[renamed(name) for name in chosen.inputs],
        limits={k: [renamed(name) for name in limited] for k, limited in limits.items()} or None,
        row_error=row_error if chosen.row_error is not None else None,
    )
    return file, [replace(column, name=renamed(column.name)) for column in columns], named


def _renamed(
    file: DataFile, columns: list[Column], chosen: Proposal
) -> tuple[DataFile, list[Column]]:
    """Rename the columns of a file according to the proposed `data.columns`."""
    if not chosen.renamed:
        return file, columns
    renamed = Table(columns, file.rows, "").renamed(chosen.renamed)
    names = [column.name for column in renamed.columns]
    return replace(file, rows=list(renamed.rows), columns=names), list(renamed.columns)


# ----------------------------------------------------------------------------------------- task


def _add_task(draft: Draft, base: Base, chosen: Proposal, splits: Sequence[Rows]) -> None:
    for key, value in chosen.keys.items():
        if (key, value) not in (("format", "openai"), ("problem", "single_label")):
            draft.put("task", key, value, chosen.why.get(key, ""))
    if "" in chosen.why:
        draft.why["task.type"] = chosen.why[""]
    _add_labels(draft, chosen)
    if chosen.is_chat and base.tokenizer is not None:
        _require_tool_template(base, chosen, splits)
    if chosen.is_chat and base.lacks_template:
        draft.put("task", "chat_template", TEMPLATE, "the model has none; this is ChatML")
        draft.extra_files[TEMPLATE] = CHATML
    for key, columns in _limits(chosen).items():
        _add_length(draft, base, replace(chosen, inputs=columns), splits, key)


def _name_numbered_labels(file: DataFile, chosen: Proposal) -> None:
    """Replace numbered labels by the `ClassLabel` names in the metadata of parquet files."""
    files = split_files(file.path, file.form, "train") if file.path.is_dir() else [file.path]
    if not (chosen.labels and files) or any(kind_by_name(file.name) != "parquet" for file in files):
        return
    names_by_column = parquet_label_names(
        recipe_of_folder(file.path, {"type": chosen.keys["type"]}), files
    )
    column = chosen.keys.get("label_column") or chosen.keys.get("objects_column") or "objects"
    names = names_by_column.get(column, [])
    if names and all(label.isdecimal() and int(label) < len(names) for label in chosen.labels):
        chosen.labels = Counter({name: chosen.labels[str(i)] for i, name in enumerate(names)})
        chosen.are_ordered = True


def _add_labels(draft: Draft, chosen: Proposal) -> None:
    """List the labels in the recipe, unless each has its own column or there are too many."""
    labels = chosen.labels
    if labels and "label_columns" not in chosen.keys and len(labels) <= MAX_LABELS:
        names = sorted(labels, key=_label_order(labels))
        if chosen.labels_are_folders:
            names = sorted(labels)  # the usual order of image folders
        if chosen.are_ordered:
            names = list(labels)
        are_integers = all(name == str(int(name)) for name in names if _is_whole(name)) and all(
            map(_is_whole, names)
        )
        rarest = min(labels, key=lambda name: labels[name])
        commonest = max(labels, key=lambda name: labels[name])
        frequencies = f"rows of each: {labels[rarest]:,} (`{rarest}`) to {labels[commonest]:,}"
        frequencies += f" (`{commonest}`)"
        if labels[rarest] == labels[commonest]:
            frequencies = f"{counted(labels[rarest], 'row')} of each"
        draft.put(
            "task",
            "labels",
            [int(name) for name in names] if are_integers else names,
            "; ".join([counted(len(names), "label"), frequencies, *_case_note(names)]),
        )


def _limits(chosen: Proposal) -> dict[str, list[str]]:
    """Return the columns that each key for a maximum length in tokens applies to."""
    if chosen.limits is not None:
        return chosen.limits
    has_length = "max_length" in TASKS[chosen.keys["type"]].model_fields
    return {"max_length": chosen.inputs} if has_length else {}


def _add_length(
    draft: Draft, base: Base, chosen: Proposal, splits: Sequence[Rows], key: str
) -> None:
    """Choose the maximum length, and which end of longer examples is truncated."""
    turns = None
    if chosen.is_chat and base.tokenizer is not None:
        turns = TurnCounter(base.tokenizer, CHATML if base.lacks_template else None)
    length, why = length_of(splits, base, chosen, turns)
    draft.put("task", key, length, why)
    if (without_answer := rows_without_answer(splits, base, chosen, length, turns)) is not None:
        count, total = without_answer
        draft.put(
            "task",
            "truncate",
            "left",
            f"in {count:,} of {counted(total, 'row')} the prompt alone has so many tokens: cut at "
            "their end (`right`) they would be left out; so they lose their beginning",
        )


def _require_tool_template(base: Base, chosen: Proposal, splits: Sequence[Rows]) -> None:
    """Reject conversations with tools that the chat template of the model would omit."""
    template = CHATML if base.lacks_template else str(base.tokenizer.chat_template)
    form, column = chosen.keys["format"], chosen.keys.get("messages_column")
    used_keys = set()
    for row in (row for rows in splits for row in rows):
        if conversation_error(row, form, column):
            continue  # such rows are skipped and counted elsewhere
        for conversation in read_conversations(row, form, column):
            used_keys |= {"tools"} if conversation.tools else set()
            used_keys |= {"tool_calls" for m in conversation.messages if m.get("tool_calls")}
    for key in sorted(used_keys):
        if key not in template:
            raise LoraError(
                f"the rows have `{key}`, which the chat template of `{base.name}` does not write",
                "--model",
                "use a base model that was trained to call tools",
            )


def _case_note(names: Sequence[str]) -> list[str]:
    """Return a note on labels that differ only in case."""
    by_folded_name: dict[str, list[str]] = {}
    for name in names:
        by_folded_name.setdefault(name.casefold(), []).append(name)
    pairs = [
        " and ".join(f"`{name}`" for name in variants)
        for variants in by_folded_name.values()
        if variants[1:]
    ]
    return (
        [f"{', '.join(pairs)} differ in case only: fix the rows if they are one"] if pairs else []
    )


def _is_whole(text: str) -> bool:
    return text.isdecimal() and text.isascii() and len(text) < 10


def _label_order(labels: Any) -> Any:
    def key(name: str) -> Any:
        return float(name), name

    try:
        return key if all(math.isfinite(float(name)) for name in labels) else None
    except ValueError:
        return None


# ----------------------------------------------------------------------------------------- data


def _add_data(
    draft: Draft,
    file: DataFile,
    columns: list[Column],
    chosen: Proposal,
    target: Path,
    splits: Keys,
) -> None:
    path = os.path.relpath(file.path.absolute(), target.absolute().parent)
    draft.put("data", "path", f"./{path}" if path.startswith("~") else path, file.summary)
    for key, (value, reason) in splits.items():
        if key:
            draft.put("data", key, value, reason)
        else:
            draft.why["data.path"] += f"; {reason}"
    if chosen.renamed:
        draft.put("data", "columns", chosen.renamed, "so that the chat template writes all turns")
    label = next((c for c in columns if c.name == chosen.keys.get("label_column")), None)
    if label and chosen.keys.get("problem") == "regression":
        for key, character in label.numbers._asdict().items():
            if character != getattr(FormatSpec(), key):
                example = next(text for text in label.counts if {".", ","} & set(half_width(text)))
                value = as_number(example, label.numbers)
                file.form[key] = character
                file.why[key] = f"in `{label.name}`: {example} is {value:.15g}"
    if file.form:
        draft.put("data", "format", file.form)
        for key, why in file.why.items():
            draft.why[f"data.format.{key}"] = why
    errors = [error.place for error in file.errors]
    n_blank = sum(is_unusable(row, chosen) for row in file.rows)
    if errors or n_blank:
        reasons = []
        if errors:
            what = f"{counted(len(errors), 'row')} cannot be read, the first at {errors[0]}"
            reasons.append(f"{what} ({file.errors[0].error})")
        if n_blank:
            reasons.append(
                f"{counted(n_blank, 'row')} {'lacks' if n_blank == 1 else 'lack'} a text or a label"
            )
        draft.put("data", "on_bad_row", "skip", "; ".join(reasons))
