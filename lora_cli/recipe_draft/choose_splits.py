"""Which rows are held out: those that the data set's author held out, or else drawn ones.

A split of the author's is only taken where it measures what it says: with a label in its rows, and
with texts that train does not have too. Why one is not taken is said beside what is done instead.
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
    flag,
    is_blank,
    label_text,
)
from lora_cli.data.detect_format import DataFile
from lora_cli.data.file_formats import read_rows
from lora_cli.data.parallel_texts import BRACES, parts_of
from lora_cli.data.renamed_columns import renamed_row
from lora_cli.data.row_texts import text_of
from lora_cli.data.split_rows import containing, draw
from lora_cli.data.text_lines import byte_error
from lora_cli.errors import LoraError, counted
from lora_cli.recipe import TASKS, FormatSpec
from lora_cli.recipe.spec import CheckSpec, is_file
from lora_cli.recipe_draft.data_folder import held_out_of
from lora_cli.tasks.proposal import Proposal

MOST_OVERLAP = CheckSpec().max_overlap
PHRASES = 0.1  # with a larger share of rows that stand inside others, these are held out together
SPLIT_WORDS = {"validation": "validation|valid|val|dev", "test": "test|testing"}
Keys = dict[str, tuple[Any, str]]  # of `data`: the value, and what says so
Rows = Sequence[dict[str, Any]]


@dataclass
class _Splits:
    """The splits of the author, by name, and why others are none."""

    keys: Keys = field(default_factory=dict)
    train: Rows = ()
    rejected: dict[str, str] = field(default_factory=dict)
    other_rows: list[dict[str, Any]] = field(default_factory=list)


def choose_splits(
    file: DataFile, columns: Sequence[Column], chosen: Proposal, target: Path
) -> tuple[Keys, list[dict[str, Any]]]:
    """Return the keys of the recipe's `data` that say which rows are held out.

    The rows that are held out in files of their own come with them.

    Args:
        file: The data file.
        columns: What its columns hold.
        chosen: The task.
        target: Where the recipe will be written; its paths are relative to that folder.
    """
    mark = next((c for c in columns if c.kind == "split" and c.name not in chosen.used), None)
    if mark:
        chosen_splits = _by_column(file, mark, chosen)
    elif file.path.is_dir():
        chosen_splits = _by_folder(file, chosen)
    else:
        chosen_splits = _by_files(file, chosen, target)
    missing = [name for name in ("validation", "test") if name not in chosen_splits.keys]
    if file.form.get("sample_by") and len(file.rows) >= 20 and len(missing) == 2:
        # what stands side by side belongs together, so the end is held out in one piece
        end = {
            "train": ("train[:90%]", "running text: its end is held out"),
            "validation": ("train[90%:]", ""),
        }
        return end, []
    drawn = _draws(list(chosen_splits.train), columns, chosen, len(missing) == 2)
    for name in missing:
        value, why = drawn.get(name, (None, ""))
        said = "; ".join(filter(None, (chosen_splits.rejected.get(name), why)))
        if said or value:
            chosen_splits.keys[name if value else ""] = value, said
    order = ("", "split_column", "train", "validation", "test")
    return {
        name: chosen_splits.keys[name] for name in order if name in chosen_splits.keys
    }, chosen_splits.other_rows


def is_skipped(row: dict[str, Any], chosen: Proposal) -> bool:
    """Return whether the label of a row says that it has none."""
    marks = chosen.keys.get("skip_labels", ())
    return bool(marks) and label_text(row.get(chosen.keys["label_column"])) in marks


def is_unusable(row: dict[str, Any], chosen: Proposal) -> bool:
    """Return whether the task would reject a row."""
    keys = chosen.keys
    needed = chosen.inputs
    if keys.get("format") == "alpaca":  # one of the two asks
        both = not is_blank(row.get("input")) and is_blank(row.get("instruction"))
        needed = [name for name in needed if name != ("instruction" if both else "input")]
    if any(is_blank(row.get(name)) for name in needed):
        return True
    if any(
        isinstance(value := row.get(name), str) and byte_error(value, "UTF-8") for name in needed
    ):
        return True
    if chosen.row_error is not None:
        return bool(chosen.row_error(row))
    if chosen.is_chat:
        return bool(conversation_error(row, keys["format"], keys.get("messages_column")))
    if names := keys.get("label_columns"):
        flags = [flag(row.get(name)) for name in names]
        return None in flags or (keys["problem"] == "single_label" and sum(map(bool, flags)) != 1)
    name = keys.get("label_column")
    return name is not None and is_blank(row.get(name)) and "label_separator" not in keys


def usable_rows(rows: Rows, chosen: Proposal) -> list[dict[str, Any]]:
    """Return the rows that are trained or measured: with all that the task reads."""
    return [row for row in rows if not is_unusable(row, chosen) and not is_skipped(row, chosen)]


# ------------------------------------------------------------------------- splits of the author


def _by_column(file: DataFile, mark: Column, chosen: Proposal) -> _Splits:
    """Return the splits that a column names."""
    named: dict[str, list[str]] = {}
    for value in mark.counts:
        named.setdefault(SPLIT_NAMES[value.lower()], []).append(value)
    rows: dict[str, list[dict[str, Any]]] = {value: [] for value in mark.counts}
    for row in file.rows:
        if not is_blank(row.get(mark.name)):
            rows[label_text(row[mark.name])].append(row)
    if len(named["train"]) > 1:
        return _Splits(train=file.rows)
    train = named["train"][0]
    chosen_splits = _Splits(train=rows[train])
    for name in ("validation", "test"):
        for value in named.get(name, ())[:1]:
            reason = _error_of(rows[value], rows[train], chosen)
            what = f"the rows that `{mark.name}` calls {value}"
            if reason:
                chosen_splits.rejected[name] = f"{what} are not used: {reason}"
            else:
                chosen_splits.keys[name] = value, f"{what}: {len(rows[value]):,}"
    if (
        not chosen_splits.keys
    ):  # then nothing speaks against training on all rows that are not held out
        return _Splits(train=file.rows, rejected=chosen_splits.rejected)
    counts = ", ".join(f"{value} {len(rows[value]):,}" for value in mark.counts)
    chosen_splits.keys["split_column"] = mark.name, f"rows of each split: {counts}"
    if train != "train":
        chosen_splits.keys["train"] = train, ""
    return chosen_splits


def _by_folder(file: DataFile, chosen: Proposal) -> _Splits:
    """Return the splits that are files or folders of a folder."""
    chosen_splits = _Splits(train=file.rows)
    form = FormatSpec.model_validate(file.form)
    for name, files in held_out_of(file.path, file.form).items():
        read = [renamed_row(r, chosen.renamed) for one in files for r in read_rows(one, form)]
        rows = [row.columns for row in read if row.columns is not None]
        reason = next((row.error for row in read if row.error), "")
        what = f"{counted(len(files), 'file')} in the folder"
        if reason := reason or _error_of(rows, file.rows, chosen):
            chosen_splits.rejected[name] = f"{what} called {name} are not used: {reason}"
            continue
        chosen_splits.other_rows += rows
        chosen_splits.keys[name] = name, f"{what}: {counted(len(rows), 'row')}"
    return chosen_splits


def _by_files(file: DataFile, chosen: Proposal, target: Path) -> _Splits:
    """Return the splits whose files stand beside one that is called train."""
    chosen_splits = _Splits(train=file.rows)
    for name in SPLIT_WORDS:
        other_files = files_beside(file.path, name)
        for other in other_files[:1]:
            reason, rows = _inspect(other, file, chosen)
            if reason:
                chosen_splits.rejected[name] = f"{other.name} next to it is not used: {reason}"
                continue
            path = os.path.relpath(other, target.absolute().parent)
            more = f"; also there: {', '.join(o.name for o in other_files[1:4])}"
            chosen_splits.other_rows += rows
            why = f"next to the file: {counted(len(rows), 'row')}{more if other_files[1:] else ''}"
            chosen_splits.keys[name] = path if is_file(path) else f"./{path}", why
    return chosen_splits


def files_beside(path: Path, split: str) -> list[Path]:
    """Return the files next to one that is called train which are called as another split."""
    match = re.search(r"(?i)(?<![a-z])train(ing)?(?![a-z])", path.name)
    if match is None:
        return []
    before, after = path.name[: match.start()], path.name[match.end() :]
    end = f"(?P<more>([-_][^.]+)?){re.escape(after)}"
    pattern = re.compile(f"{re.escape(before)}({SPLIT_WORDS[split]}){end}", re.IGNORECASE)
    found = sorted(
        (other.name != before + other.name[len(before) :], len(other.name), other)
        for other in _around(path)
        if pattern.fullmatch(other.name)
    )
    return [other for _, _, other in found]


def _around(path: Path) -> list[Path]:
    """Return the files of a folder; where two belong together, they have one name."""
    files = list(path.absolute().parent.iterdir())
    braces = BRACES.search(path.name)
    if braces is None or path.exists():
        return files
    first, after = braces[1].split(",")[0], path.name[braces.end() :]
    end = first + after
    names = [other.name.removesuffix(end) for other in files if other.name.endswith(end)]
    pairs = [path.absolute().with_name(f"{name}{braces[0]}{after}") for name in names]
    return [pair for pair in pairs if all(part.is_file() for part in parts_of(pair).values())]


def _inspect(path: Path, like: DataFile, chosen: Proposal) -> tuple[str, list[dict[str, Any]]]:
    """Return why a file cannot be a split of another, or nothing; and its rows."""
    try:
        read = read_rows(path, FormatSpec.model_validate(like.form))
        rows = [renamed_row(row, chosen.renamed) for row in read]
    except LoraError as error:
        return error.problems[0].what, []
    reason = next((row.error for row in rows if row.error), "")
    found = [row.columns for row in rows if row.columns is not None]
    return reason or _error_of(found, like.rows, chosen), found


def _error_of(rows: Rows, train: Rows, chosen: Proposal) -> str:
    """Return why rows cannot measure what train teaches, or nothing."""
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
    known = {_text(row, chosen.inputs) for row in train}
    shared = sum(_text(row, chosen.inputs) in known for row in rows)
    if shared > MOST_OVERLAP * len(rows):
        return f"{shared:,} of {counted(len(rows), 'text')} also occur in train"
    return ""


def _text(row: dict[str, Any], columns: Sequence[str]) -> str:
    """Return the text by which rows are compared."""
    return normalised(text_of(row, list(columns)))


# ------------------------------------------------------------------------------------ drawn rows


def _draws(
    rows: list[dict[str, Any]], columns: Sequence[Column], chosen: Proposal, both: bool
) -> Keys:
    """Return validation, and test where there are enough rows, as draws from train."""
    rows = usable_rows(rows, chosen)
    compared = TASKS[chosen.keys["type"]].model_construct(**chosen.keys).input_columns_by_key
    asked = [name for name in chosen.inputs if name in compared.values()]  # as the draw has it
    texts = [_text(row, asked) for row in rows]
    unique = len(set(texts))
    if unique < 10:
        what = f"{unique} different texts are" if unique > 1 else "one text is"
        return {"validation": (None, f"{what} too few to hold any out")}
    fraction = 0.2 if unique < 200 else 0.1 if unique < 20_000 else max(0.01, 2000 / unique)
    chosen_splits: dict[str, Any] = {"from": "train", "fraction": round(fraction, 2)}
    why = [f"of {counted(len(rows), 'row')}"]
    group = _group_of(columns, chosen, rows)
    if group is not None:
        chosen_splits["group_by"] = group.name
        why.append(f"`{group.name}` repeats: its rows stay on one side")
    elif (share := _inside_others(texts)) >= PHRASES:
        chosen_splits["disjoint"] = "substring"
        why.append(f"{100 * share:.0f} % of the texts stand inside others: they go together")
    strata = _strata(rows, chosen)
    if strata and group is None:
        # equal texts stay together, so it is different ones that can be divided
        counts = Counter(stratum for stratum, _ in set(zip(strata, texts, strict=True)))
        least = min(counts.values())
        if least >= max(5, 1 / fraction):
            chosen_splits["stratify"] = True
            why.append("each label in proportion")
        else:
            several = f"{least} different texts" if least > 1 else "one text only"
            why.append(f"not stratified: the rarest label has {several}")
    try:
        draw(
            texts,
            fraction,
            (0, 0),
            chosen_splits.get("disjoint", "exact"),
            strata if "stratify" in chosen_splits else None,
            [str(row[group.name]) for row in rows] if group else None,
        )
    except LoraError as error:
        return {"validation": (None, error.problems[0].what)}
    drawn: Keys = {"validation": (chosen_splits, "; ".join(why))}
    if unique >= 200:
        once = "used once, at the end"
        drawn["test"] = dict(chosen_splits), once if both else "; ".join([*why, once])
    return drawn


def _inside_others(texts: Sequence[str]) -> float:
    """Return the share of short texts that stand inside longer ones, word for word."""
    if sum(map(len, texts)) > 300 * len(texts):  # documents
        return 0.0
    first = {text: i for i, text in reversed(list(enumerate(texts)))}
    inside = (
        first[text] not in owners for text, owners in zip(texts, containing(texts), strict=True)
    )
    return sum(inside) / len(texts)


def _strata(rows: Rows, chosen: Proposal) -> list[str]:
    """Return the stratum of each row, where the task has labels."""
    keys = chosen.keys
    if keys.get("problem") != "single_label":
        return []
    names = keys.get("label_columns") or [keys["label_column"]]
    return [str([row.get(name) for name in names]) for row in rows]


def _group_of(columns: Sequence[Column], chosen: Proposal, rows: Rows) -> Column | None:
    """Return the column that says which rows belong together: a customer, a conversation."""
    for column in columns:
        named = GROUP_NAME.fullmatch(column.name) and column.name not in chosen.used
        repeats = len(column.counts) >= 10 and column.rows_per_value >= 1.2
        if named and repeats and not any(is_blank(row.get(column.name)) for row in rows):
            return column
    return None
