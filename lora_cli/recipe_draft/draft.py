"""From a data file and a model's name to a recipe with comments."""

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
from lora_cli.data.column_kinds import SPLIT_NAMES, Column, as_number, describe
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
from lora_cli.recipe_draft.memory_budget import GIB, Card, card_here
from lora_cli.recipe_draft.text_lengths import length_of, unknown_share
from lora_cli.tasks.proposal import Proposal, Table

NEW_NAMES = {"text_pair_column": "text_2"}  # of columns; else as their key
MANY_LABELS = 500  # more are not written out, but found in the train rows
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
    """Return a recipe for a data file.

    Args:
        source: The data file.
        model: Hub id, folder or `package:NAME/FOLDER` of the base model.
        target: Where the recipe will be written; its paths are relative to that folder.
        text: The column of the text, if the user names it.
        label: The column of the label, or the completion, if the user names it.
        pair: The column of the second text, which the label compares with the first.
        memory: Of the GPU that trains it, in GiB. None: that of the GPU of this machine.
        second: Another text file whose lines belong to those of the first: the translation.

    Raises:
        LoraError: If the file cannot be read, or it cannot be decided what to learn from it.
    """
    try:
        return _drafted(source, model, target, text, label, second, pair, memory)
    except LoraError as error:
        raise without_overrides(error) from error


def _drafted(
    source: Path,
    model: str,
    target: Path,
    text: str | None,
    label: str | None,
    second: Path | None,
    pair: str | None,
    memory: float | None,
) -> Draft:
    """Return the recipe; errors may speak of keys that only a recipe has."""
    boxes = read_boxes(source) if second is None else None
    media: tuple[DataFile, MediaKind] | None = None if boxes is None else (boxes, "image")
    if second is None and media is None:
        media = read_media_folder(source)
    if media is not None:
        file, kind = media
    else:
        file, kind = (read_source(source) if second is None else read_pair(source, second)), None
    base = describe_base(model)
    columns = [describe(name, file.rows, _delimiter(file)) for name in file.columns]
    if file.form.get("label_from") == "fasttext":
        columns = [_divided_by_spaces(column) for column in columns]
    place = file.path.name if kind is None else str(source)
    are_lines = second is not None
    table = Table(columns, file.rows, place, text, label, pair, kind, are_lines)
    chosen = choose_task(table, base)
    file, columns, chosen = _with_names(file, columns, chosen)
    file, columns = _renamed(file, columns, chosen)
    card = card_here() if memory is None else Card(memory * GIB, f"a GPU of {memory:g} GiB")
    draft = Draft({"model": {"name": _relative(model, target, base)}}, {})
    if kind is not None:
        other_rows: Rows = []
        splits = media_splits(file, kind, chosen.keys, target)
    else:
        splits, other_rows = choose_splits(file, columns, chosen, target)
    _name_numbers(file, chosen)
    _task(draft, base, chosen, [file.rows, other_rows])
    _data(draft, file, columns, chosen, target, splits)
    limits = _limits(chosen)
    add_training(draft, base, len(usable_rows(file.rows, chosen)), card, list(limits))
    warning = unknown_share([file.rows, other_rows], base, chosen) if limits else None
    if warning is not None:
        draft.findings.append(("unknown", warning))
    draft.values["output_dir"] = _output_dir(file.path, target)
    add_findings(draft, file, chosen)
    Recipe.model_validate(draft.values)  # what is wrong here is ours
    return draft


def _divided_by_spaces(column: Column) -> Column:
    """Return fastText's column of labels as what it is, if some row has several."""
    if column.name != "label" or not any(" " in value for value in column.counts):
        return column
    counts: Counter[str] = Counter()
    for value, times in column.counts.items():
        for label in value.split():
            counts[label] += times
    return replace(column, kind="list", separator=" ", counts=counts)


def _output_dir(source: Path, target: Path) -> str:
    """Return a folder for the results: called as the recipe, or as the data if that is `recipe`."""
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
    """Return a model's name as the recipe has to write it: a folder as seen from the recipe."""
    folder = Path(model).expanduser()
    if Path(model).is_absolute() or model.startswith("~") or not folder.is_dir():
        return model
    path = os.path.relpath(folder.absolute(), target.absolute().parent)
    return path if path.startswith(".") else f"./{path}"


def _with_names(
    file: DataFile, columns: list[Column], chosen: Proposal
) -> tuple[DataFile, list[Column], Proposal]:
    """Name the columns of a file without a header after what they are used for."""
    if file.named or "columns" not in file.form:
        return file, columns, chosen
    roles = [key for key, name in chosen.keys.items() if key.endswith("_column") and name]
    new = {chosen.keys[key]: NEW_NAMES.get(key, key.removesuffix("_column")) for key in roles}
    old = {name: column for column, name in new.items()}

    def renamed(value: Any) -> Any:
        return new.get(value, value) if isinstance(value, str) else value

    def row_error(row: dict[str, Any]) -> str:
        assert chosen.row_error is not None
        return chosen.row_error({old.get(name, name): value for name, value in row.items()})

    why = {}
    for key, reason in chosen.why.items():
        for column, name in new.items():
            reason = reason.replace(f"`{column}`", f"`{name}`")
        why[key] = reason
    rows = [{renamed(name): value for name, value in row.items()} for row in file.rows]
    names = [renamed(name) for name in file.columns]
    form = {**file.form, "columns": names}
    file = DataFile(file.path, form, file.why, rows, file.errors, names, file.named, file.about)
    limits = chosen.limits or {}
    named = replace(
        chosen,
        keys={key: renamed(value) if key in roles else value for key, value in chosen.keys.items()},
        why=why,
        inputs=[renamed(name) for name in chosen.inputs],
        limits={k: [renamed(name) for name in some] for k, some in limits.items()} or None,
        row_error=row_error if chosen.row_error is not None else None,
    )
    return file, [replace(column, name=renamed(column.name)) for column in columns], named


def _renamed(
    file: DataFile, columns: list[Column], chosen: Proposal
) -> tuple[DataFile, list[Column]]:
    """Return a file as `data.columns` lets the task read it."""
    if not chosen.renamed:
        return file, columns
    new = Table(columns, file.rows, "").renamed(chosen.renamed)
    names = [column.name for column in new.columns]
    return replace(file, rows=list(new.rows), columns=names), list(new.columns)


# ----------------------------------------------------------------------------------------- task


def _task(draft: Draft, base: Base, chosen: Proposal, splits: Sequence[Rows]) -> None:
    for key, value in chosen.keys.items():
        if (key, value) not in (("format", "openai"), ("problem", "single_label")):
            draft.put("task", key, value, chosen.why.get(key, ""))
    if "" in chosen.why:
        draft.why["task.type"] = chosen.why[""]
    _labels(draft, chosen)
    if chosen.is_chat and base.tokenizer is not None:
        _require_tool_template(base, chosen, splits)
    if chosen.is_chat and base.lacks_template:
        draft.put("task", "chat_template", TEMPLATE, "the model has none; this is ChatML")
        draft.extra_files[TEMPLATE] = CHATML
    for key, columns in _limits(chosen).items():
        _length(draft, base, replace(chosen, inputs=columns), splits, key)


def _name_numbers(file: DataFile, chosen: Proposal) -> None:
    """Name labels that are numbers as parquet files name them: `ClassLabel` in their metadata."""
    inside = split_files(file.path, file.form, "train") if file.path.is_dir() else [file.path]
    if not (chosen.labels and inside) or any(kind_by_name(one.name) != "parquet" for one in inside):
        return
    named = parquet_label_names(recipe_of_folder(file.path, {"type": chosen.keys["type"]}), inside)
    column = chosen.keys.get("label_column") or chosen.keys.get("objects_column") or "objects"
    names = named.get(column, [])
    if names and all(label.isdecimal() and int(label) < len(names) for label in chosen.labels):
        chosen.labels = Counter({name: chosen.labels[str(i)] for i, name in enumerate(names)})
        chosen.are_ordered = True


def _labels(draft: Draft, chosen: Proposal) -> None:
    """Write out the labels, unless each has a column of its own or they are very many."""
    labels = chosen.labels
    if labels and "label_columns" not in chosen.keys and len(labels) <= MANY_LABELS:
        names = sorted(labels, key=_label_order(labels))
        if chosen.labels_are_folders:
            names = sorted(labels)  # as all tools order them
        if chosen.are_ordered:
            names = list(labels)
        whole = all(name == str(int(name)) for name in names if _is_whole(name)) and all(
            map(_is_whole, names)
        )
        rarest = min(labels, key=lambda name: labels[name])
        commonest = max(labels, key=lambda name: labels[name])
        spread = f"rows of each: {labels[rarest]:,} (`{rarest}`) to {labels[commonest]:,}"
        spread += f" (`{commonest}`)"
        if labels[rarest] == labels[commonest]:
            spread = f"{counted(labels[rarest], 'row')} of each"
        draft.put(
            "task",
            "labels",
            [int(name) for name in names] if whole else names,
            "; ".join([counted(len(names), "label"), spread, *_same_but_for_case(names)]),
        )


def _limits(chosen: Proposal) -> dict[str, list[str]]:
    """Return, for each key that limits a length in tokens, the columns that it limits."""
    if chosen.limits is not None:
        return chosen.limits
    has_length = "max_length" in TASKS[chosen.keys["type"]].model_fields
    return {"max_length": chosen.inputs} if has_length else {}


def _length(draft: Draft, base: Base, chosen: Proposal, splits: Sequence[Rows], key: str) -> None:
    """Choose the longest input, and what is cut of longer ones."""
    turns = None
    if chosen.is_chat and base.tokenizer is not None:
        turns = TurnCounter(base.tokenizer, CHATML if base.lacks_template else None)
    length, why = length_of(splits, base, chosen, turns)
    draft.put("task", key, length, why)
    if (without := rows_without_answer(splits, base, chosen, length, turns)) is not None:
        count, of = without
        draft.put(
            "task",
            "truncate",
            "left",
            f"in {count:,} of {counted(of, 'row')} the prompt alone has so many tokens: cut at "
            "their end (`right`) they would be left out; so they lose their beginning",
        )


def _require_tool_template(base: Base, chosen: Proposal, splits: Sequence[Rows]) -> None:
    """Reject conversations with tools or calls that the model's chat template would leave out."""
    template = CHATML if base.lacks_template else str(base.tokenizer.chat_template)
    form, column = chosen.keys["format"], chosen.keys.get("messages_column")
    found = set()
    for row in (row for rows in splits for row in rows):
        if conversation_error(row, form, column):
            continue  # it is skipped, and said so
        for conversation in read_conversations(row, form, column):
            found |= {"tools"} if conversation.tools else set()
            found |= {"tool_calls" for m in conversation.messages if m.get("tool_calls")}
    for key in sorted(found):
        if key not in template:
            raise LoraError(
                f"the rows have `{key}`, which the chat template of `{base.name}` does not write",
                "--model",
                "use a base model that was trained to call tools",
            )


def _same_but_for_case(names: Sequence[str]) -> list[str]:
    """Return which labels may be meant to be one."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.casefold(), []).append(name)
    pairs = [" and ".join(f"`{name}`" for name in some) for some in alike.values() if some[1:]]
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


def _data(
    draft: Draft,
    file: DataFile,
    columns: list[Column],
    chosen: Proposal,
    target: Path,
    splits: Keys,
) -> None:
    path = os.path.relpath(file.path.absolute(), target.absolute().parent)
    draft.put("data", "path", f"./{path}" if path.startswith("~") else path, file.about)
    for key, (value, reason) in splits.items():
        if key:
            draft.put("data", key, value, reason)
        else:
            draft.why["data.path"] += f"; {reason}"
    if chosen.renamed:
        draft.put("data", "columns", chosen.renamed, "so that the chat template writes all turns")
    label = next((c for c in columns if c.name == chosen.keys.get("label_column")), None)
    if label and chosen.keys.get("problem") == "regression":
        for key, mark in label.numbers._asdict().items():
            if mark != getattr(FormatSpec(), key):
                example = next(text for text in label.counts if {".", ","} & set(half_width(text)))
                value = as_number(example, label.numbers)
                file.form[key] = mark
                file.why[key] = f"in `{label.name}`: {example} is {value:.15g}"
    if file.form:
        draft.put("data", "format", file.form)
        for key, why in file.why.items():
            draft.why[f"data.format.{key}"] = why
    errors = [error.place for error in file.errors]
    blank = sum(is_unusable(row, chosen) for row in file.rows)
    if errors or blank:
        said = []
        if errors:
            what = f"{counted(len(errors), 'row')} cannot be read, the first at {errors[0]}"
            said.append(f"{what} ({file.errors[0].error})")
        if blank:
            said.append(
                f"{counted(blank, 'row')} {'lacks' if blank == 1 else 'lack'} a text or a label"
            )
        draft.put("data", "on_bad_row", "skip", "; ".join(said))
