"""Choose the held-out rows: splits of the data set's author if usable, otherwise drawn rows.

A split of the author is used only if it gives meaningful results: its rows must have labels, and
its texts must not occur in train. Otherwise, the comment in the recipe says why it is not used.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.characters import normalised
from lora_cli.data.chat_formats import conversation_error
from lora_cli.data.column_kinds import (
    GROUP_NAME,
    SPLIT_NAMES,
    Column,
    binary_value,
    is_blank,
    label_text,
)
from lora_cli.data.detect_format import DataFile
from lora_cli.data.file_formats import read_rows
from lora_cli.data.parallel_texts import BRACES, parts_of
from lora_cli.data.renamed_columns import renamed_row
from lora_cli.data.row_texts import text_of
from lora_cli.data.split_rows import containing_texts, draw
from lora_cli.data.text_lines import byte_error
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import TASKS, FormatSpec
from lora_cli.recipe.spec import CheckSpec, is_file
from lora_cli.recipe_draft.data_folder import held_out_of
from lora_cli.tasks.proposal import Proposal

MAX_OVERLAP = CheckSpec().max_overlap
MIN_CONTAINED_SHARE = (
    0.1  # a larger share of texts inside other texts requires `disjoint: substring`
)
SPLIT_WORDS = {"validation": "validation|valid|val|dev", "test": "test|testing"}
Keys = dict[str, tuple[Any, str]]  # keys of `data`, with their value and reason
Rows = Sequence[dict[str, Any]]


@dataclass
class _Splits:
    """The usable splits of the author, and the reasons why others are not used."""

    keys: Keys = field(default_factory=dict)
    train: Rows = ()
    rejected: dict[str, str] = field(default_factory=dict)
    other_rows: list[dict[str, Any]] = field(default_factory=list)


def choose_splits(
    file: DataFile, columns: Sequence[Column], chosen: Proposal, target: Path
) -> tuple[Keys, list[dict[str, Any]]]:
    """Choose the keys of `data` that define the held-out rows.

    Args:
        file: The data file.
        columns: Its columns.
        chosen: The task.
        target: Path of the recipe; its paths are relative to that folder.

    Returns:
        The keys, and the rows of held-out splits in other files.
    """
    split_column = next(
        (c for c in columns if c.kind == "split" and c.name not in chosen.used), None
    )
    if split_column:
        chosen_splits = _by_column(file, split_column, chosen)
    elif file.path.is_dir():
        chosen_splits = _by_folder(file, chosen)
    else:
        chosen_splits = _by_files(file, chosen, target)
    missing = [name for name in ("validation", "test") if name not in chosen_splits.keys]
    if file.form.get("sample_by") and len(file.rows) >= 20 and len(missing) == 2:
        # neighbouring passages are related, so hold out the end in one piece
        end = {
            "train": ("train[:90%]", "running text: its end is held out"),
            "validation": ("train[90%:]", ""),
        }
        return end, []
    drawn = _draw_splits(list(chosen_splits.train), columns, chosen, len(missing) == 2)
    for name in missing:
        value, why = drawn.get(name, (None, ""))
        reason = "; ".join(filter(None, (chosen_splits.rejected.get(name), why)))
        if reason or value:
            chosen_splits.keys[name if value else ""] = value, reason
    order = ("", "split_column", "train", "validation", "test")
    return {
        name: chosen_splits.keys[name] for name in order if name in chosen_splits.keys
    }, chosen_splits.other_rows


def is_skipped(row: dict[str, Any], chosen: Proposal) -> bool:
    """Return whether the label of a row is one that marks it as unlabelled."""
    marks = chosen.keys.get("skip_labels", ())
    return bool(marks) and label_text(row.get(chosen.keys["label_column"])) in marks


def is_unusable(row: dict[str, Any], chosen: Proposal) -> bool:
    """Return whether the task would reject a row."""
    keys = chosen.keys
    required = chosen.inputs
    if keys.get("format") == "alpaca":  # one of the two must be filled
        has_input_only = not is_blank(row.get("input")) and is_blank(row.get("instruction"))
        required = [
            name for name in required if name != ("instruction" if has_input_only else "input")
        ]
    if any(is_blank(row.get(name)) for name in required):
        return True
    if any(
        isinstance(value := row.get(name), str) and byte_error(value, "UTF-8") for name in required
    ):
        return True
    if chosen.row_error is not None:
        return bool(chosen.row_error(row))
    if chosen.is_chat:
        return bool(conversation_error(row, keys["format"], keys.get("messages_column")))
    if names := keys.get("label_columns"):
        flags = [binary_value(row.get(name)) for name in names]
        return None in flags or (keys["problem"] == "single_label" and sum(map(bool, flags)) != 1)
    name = keys.get("label_column")
    return name is not None and is_blank(row.get(name)) and "label_separator" not in keys


def usable_rows(rows: Rows, chosen: Proposal) -> list[dict[str, Any]]:
    """Return the rows that the task can use for training or evaluation."""
    return [row for row in rows if not is_unusable(row, chosen) and not is_skipped(row, chosen)]


# ------------------------------------------------------------------------- splits of the author


def _by_column(file: DataFile, split_column: Column, chosen: Proposal) -> _Splits:
    """Return the splits that a column defines."""
    values_of_split: dict[str, list[str]] = {}
    for value in split_column.counts:
        values_of_split.setdefault(SPLIT_NAMES[value.lower()], []).append(value)
    rows: dict[str, list[dict[str, Any]]] = {value: [] for value in split_column.counts}
    for row in file.rows:
        if not is_blank(row.get(split_column.name)):
            rows[label_text(row[split_column.name])].append(row)
    if len(values_of_split["train"]) > 1:
        return _Splits(train=file.rows)
    train = values_of_split["train"][0]
    chosen_splits = _Splits(train=rows[train])
    for name in ("validation", "test"):
        for value in values_of_split.get(name, ())[:1]:
            reason = _why_unusable(rows[value], rows[train], chosen)
            what = f"the rows that `{split_column.name}` calls {value}"
            if reason:
                chosen_splits.rejected[name] = f"{what} are not used: {reason}"
            else:
                chosen_splits.keys[name] = value, f"{what}: {len(rows[value]):,}"
    if not chosen_splits.keys:  # no split is usable, so all rows can be used for training
        return _Splits(train=file.rows, rejected=chosen_splits.rejected)
    counts = ", ".join(f"{value} {len(rows[value]):,}" for value in split_column.counts)
    chosen_splits.keys["split_column"] = split_column.name, f"rows of each split: {counts}"
    if train != "train":
        chosen_splits.keys["train"] = train, ""
    return chosen_splits


def _by_folder(file: DataFile, chosen: Proposal) -> _Splits:
    """Return the splits that are files or subfolders of a folder."""
    chosen_splits = _Splits(train=file.rows)
    form = FormatSpec.model_validate(file.form)
    for name, files in held_out_of(file.path, file.form).items():
        raw_rows = [renamed_row(r, chosen.renamed) for path in files for r in read_rows(path, form)]
        rows = [row.columns for row in raw_rows if row.columns is not None]
        reason = next((row.error for row in raw_rows if row.error), "")
        what = f"{counted(len(files), 'file')} in the folder"
        if reason := reason or _why_unusable(rows, file.rows, chosen):
            chosen_splits.rejected[name] = f"{what} called {name} are not used: {reason}"
            continue
        chosen_splits.other_rows += rows
        chosen_splits.keys[name] = name, f"{what}: {counted(len(rows), 'row')}"
    return chosen_splits


def _by_files(file: DataFile, chosen: Proposal, target: Path) -> _Splits:
    """Return the splits in files next to a train file."""
    chosen_splits = _Splits(train=file.rows)
    for name in SPLIT_WORDS:
        other_files = files_beside(file.path, name)
        for other in other_files[:1]:
            reason, rows = _read_split(other, file, chosen)
            if reason:
                chosen_splits.rejected[name] = f"{other.name} next to it is not used: {reason}"
                continue
            path = os.path.relpath(other, target.absolute().parent)
            also = f"; also there: {', '.join(o.name for o in other_files[1:4])}"
            chosen_splits.other_rows += rows
            why = f"next to the file: {counted(len(rows), 'row')}{also if other_files[1:] else ''}"
            chosen_splits.keys[name] = path if is_file(path) else f"./{path}", why
    return chosen_splits


def files_beside(path: Path, split: str) -> list[Path]:
    """Return the files next to a train file whose names are those of another split."""
    match = re.search(r"(?i)(?<![a-z])train(ing)?(?![a-z])", path.name)
    if match is None:
        return []
    prefix, suffix = path.name[: match.start()], path.name[match.end() :]
    ending = f"(?P<more>([-_][^.]+)?){re.escape(suffix)}"
    pattern = re.compile(f"{re.escape(prefix)}({SPLIT_WORDS[split]}){ending}", re.IGNORECASE)
    matches = sorted(
        (other.name != prefix + other.name[len(prefix) :], len(other.name), other)
        for other in _siblings(path)
        if pattern.fullmatch(other.name)
    )
    return [other for _, _, other in matches]


def _siblings(path: Path) -> list[Path]:
    """Return the files in the same folder, or the file pairs if the path is a pair."""
    files = list(path.absolute().parent.iterdir())
    braces = BRACES.search(path.name)
    if braces is None or path.exists():
        return files
    first, suffix = braces[1].split(",")[0], path.name[braces.end() :]
    ending = first + suffix
    names = [other.name.removesuffix(ending) for other in files if other.name.endswith(ending)]
    pairs = [path.absolute().with_name(f"{name}{braces[0]}{suffix}") for name in names]
    return [pair for pair in pairs if all(part.is_file() for part in parts_of(pair).values())]


def _read_split(path: Path, train: DataFile, chosen: Proposal) -> tuple[str, list[dict[str, Any]]]:
    """Return the reason why a file is not a usable split (empty if it is), and its rows."""
    try:
        raw_rows = read_rows(path, FormatSpec.model_validate(train.form))
        rows = [renamed_row(row, chosen.renamed) for row in raw_rows]
    except LoraError as error:
        return error.problems[0].what, []
    reason = next((row.error for row in rows if row.error), "")
    columns = [row.columns for row in rows if row.columns is not None]
    return reason or _why_unusable(columns, train.rows, chosen), columns


def _why_unusable(rows: Rows, train: Rows, chosen: Proposal) -> str:
    """Return the reason why rows cannot evaluate a model of the train rows; empty if they can."""
    rows = [row for row in rows if not is_skipped(row, chosen)]
    if not rows:
        return "it has no rows"
    lacking = [name for name in chosen.used if all(name not in row for row in rows[:100])]
    if lacking and not chosen.is_chat:
        return f"it has no column `{sorted(lacking)[0]}`"
    unusable = sum(is_unusable(row, chosen) for row in rows)
    if unusable:
        return f"{unusable:,} of {counted(len(rows), 'row')} lack a text or a label"
    if chosen.labels and "label_column" in chosen.keys and "label_separator" not in chosen.keys:
        column = chosen.keys["label_column"]
        for row in rows:
            values = row[column] if isinstance(row[column], list) else [row[column]]
            unknown = [v for v in map(label_text, values) if v not in chosen.labels]
            if unknown:
                return f"train has no label `{unknown[0]}`"
    train_texts = {_text(row, chosen.inputs) for row in train}
    shared = sum(_text(row, chosen.inputs) in train_texts for row in rows)
    if shared > MAX_OVERLAP * len(rows):
        return f"{shared:,} of {counted(len(rows), 'text')} also occur in train"
    return ""


def _text(row: dict[str, Any], columns: Sequence[str]) -> str:
    """Return the normalised text by which rows are compared."""
    return normalised(text_of(row, list(columns)))


# ------------------------------------------------------------------------------------ drawn rows


def _draw_splits(
    rows: list[dict[str, Any]], columns: Sequence[Column], chosen: Proposal, needs_both: bool
) -> Keys:
    """Draw validation from train, and test too if there are enough rows."""
    rows = usable_rows(rows, chosen)
    compared = TASKS[chosen.keys["type"]].model_construct(**chosen.keys).input_columns_by_key
    # only the columns by which the draw compares rows
    inputs = [name for name in chosen.inputs if name in compared.values()]
    texts = [_text(row, inputs) for row in rows]
    unique = len(set(texts))
    if unique < 10:
        what = f"{unique} different texts are" if unique > 1 else "one text is"
        return {"validation": (None, f"{what} too few to hold any out")}
    fraction = 0.2 if unique < 200 else 0.1 if unique < 20_000 else max(0.01, 2000 / unique)
    spec: dict[str, Any] = {"from": "train", "fraction": round(fraction, 2)}
    why = [f"of {counted(len(rows), 'row')}"]
    group = _group_of(columns, chosen, rows)
    if group is not None:
        spec["group_by"] = group.name
        why.append(f"`{group.name}` repeats: its rows stay on one side")
    elif (share := _contained_share(texts)) >= MIN_CONTAINED_SHARE:
        spec["disjoint"] = "substring"
        why.append(f"{100 * share:.0f} % of the texts stand inside others: they go together")
    strata = _strata(rows, chosen)
    if strata and group is None:
        # equal texts stay together, so only distinct ones can be split
        counts = Counter(stratum for stratum, _ in set(zip(strata, texts, strict=True)))
        min_count = min(counts.values())
        if min_count >= max(5, 1 / fraction):
            spec["stratify"] = True
            why.append("each label in proportion")
        else:
            rarest = f"{min_count} different texts" if min_count > 1 else "one text only"
            why.append(f"not stratified: the rarest label has {rarest}")
    try:
        draw(
            texts,
            fraction,
            (0, 0),
            spec.get("disjoint", "exact"),
            strata if "stratify" in spec else None,
            [str(row[group.name]) for row in rows] if group else None,
        )
    except LoraError as error:
        return {"validation": (None, error.problems[0].what)}
    drawn: Keys = {"validation": (spec, "; ".join(why))}
    if unique >= 200:
        once = "used once, at the end"
        drawn["test"] = dict(spec), once if needs_both else "; ".join([*why, once])
    return drawn


def _contained_share(texts: Sequence[str]) -> float:
    """Return the share of texts that occur word for word inside longer ones."""
    if sum(map(len, texts)) > 300 * len(texts):  # documents
        return 0.0
    first_row = {text: i for i, text in reversed(list(enumerate(texts)))}
    is_contained = (
        first_row[text] not in owners
        for text, owners in zip(texts, containing_texts(texts), strict=True)
    )
    return sum(is_contained) / len(texts)


def _strata(rows: Rows, chosen: Proposal) -> list[str]:
    """Return the stratum of each row; empty unless the task has single labels."""
    keys = chosen.keys
    if keys.get("problem") != "single_label":
        return []
    names = keys.get("label_columns") or [keys["label_column"]]
    return [str([row.get(name) for name in names]) for row in rows]


def _group_of(columns: Sequence[Column], chosen: Proposal, rows: Rows) -> Column | None:
    """Return the column that groups related rows, such as a customer or conversation ID."""
    for column in columns:
        is_group_name = GROUP_NAME.fullmatch(column.name) and column.name not in chosen.used
        repeats = len(column.counts) >= 10 and column.rows_per_value >= 1.2
        if is_group_name and repeats and not any(is_blank(row.get(column.name)) for row in rows):
            return column
    return None
