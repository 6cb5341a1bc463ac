"""Proposes sequence classification for `lora init`: finds the text, the label and its kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_cli.data.column_kinds import CONVERSATIONS, Column, as_number, binary_value, is_blank
from lora_cli.data.label_lists import read_nested
from lora_cli.data.text_columns import content_of, list_columns, pair_of, text_of, text_reason
from lora_cli.errors import LoraError, counted, printable
from lora_cli.tasks.classification.labels import has_scores, is_multi_hot
from lora_cli.tasks.proposal import NO_LABEL, BaseFacts, Certainty, Proposal, Table, proposed
from lora_cli.tasks.texts.text_checks import check_texts

# the strongest hints first; the rank of a column is that of the first pattern that it matches
LABEL_NAMES = [
    re.compile(rf"(?i){before}({names})s?")
    for before, names in (
        ("", r"label|gold_label|class|target|y|(label|class|target)[ _]?(id|idx|index|no|number)"),
        (r"(.*[_\W])?", "label|class|target"),
        (r"(.*[_\W])?",
         r"category|categorie|kategorie|intent|sentiment|emotion|topic|queue|polarity|stance|tag|"
         r"genre|toxicity|spam|is_\w+|ラベル|カテゴリ|标签|метка|etiqueta|classe|klasse"),
        (r"(.*[_\W])?",
         r"rating|score|stars?|grade|similarity|priority|type|language|lang|answer|overall|"
         r"sterne?|note|punkte?|points?|étoiles?|estrellas?|stelle|voto|評価|評点|点数|星|评分|평점|оценка"),
    )
]  # fmt: skip
WITH_UNIT = re.compile(r"[-+(]?\d[\d.,]*\s*[°]?[^\W\d]{0,9}[%)²³]?")  # `3.4 kg`, `12 %`, `(1.5)`
MAX_SHOWN = 60  # characters of a cell in a message
MIN_ROWS_PER_VALUE = 2.5  # so that about 2 are left after validation and test rows are split off
# labels of rows without an answer; MySQL and Hive write `\N` for a missing value
NO_ANSWER_LABELS = {"-", "unsup", "unlabeled", "unlabelled", "\\n"}
MAX_SMALL_NUMBERS = 20  # the most distinct values of a column of small whole numbers as labels
PAIR_HINT = "; two texts that the label compares: `--text A --pair B`"
MIN_ROWS_PER_LABEL = 5  # of a column that can only be a label because it has few values


def propose_labelled(table: Table, base: BaseFacts) -> Proposal | None:
    """Return a proposal to classify the texts or pairs of a table; see `Task.propose`."""

    def choose() -> Proposal | None:
        columns, text, label, pair = table.columns, table.text, table.label, table.pair
        found = label_proposal(columns, table.by_name, table.rows, table.place, text, label, pair)
        if found is None and pair is not None:
            what, hint = "two texts need a label that compares them", "name it: `--label COLUMN`"
            raise LoraError(what, "--pair", f"{hint} ({list_columns(columns)})")
        if found is not None:
            found.check = lambda: _check(found, table)
        return found

    return proposed(choose, Certainty.LIKELY, of_error=Certainty.UNCLEAR)


def _check(chosen: Proposal, table: Table) -> None:
    """Check that the texts and labels can be trained on.

    Raises:
        LoraError: If they cannot, for example because the labels are objects.
    """
    check_texts(table, chosen)
    label = table.by_name.get(chosen.keys.get("label_column", ""))
    if label is None:
        return
    if label.kind == "list":
        _require_names(label, table.rows, table.place)
    cells = [row[label.name] for row in table.rows if not is_blank(row.get(label.name))]
    if all(isinstance(cell, str) and _is_object(cell) for cell in cells):
        what = (
            f"`{label.name}` holds objects as text, no labels: `{printable(cells[0], MAX_SHOWN)}`"
        )
        hint = "write what is to be learned of them as a column; several labels as a list of names"
        raise LoraError(what, table.place, hint)


def _is_object(cell: str) -> bool:
    """Return whether a cell contains an object, or a list of objects, as JSON or Python text."""
    text = cell.strip()
    value = read_nested(text) if text[:1] in ("{", "[") else None
    items = value if isinstance(value, list) and value else [value]
    return all(isinstance(item, dict) for item in items)


def label_proposal(
    columns: Sequence[Column],
    by_name: dict[str, Column],
    rows: Sequence[dict[str, Any]],
    place: str,
    text: str | None,
    label: str | None,
    second: str | None = None,
) -> Proposal | None:
    """Return the proposal for texts with a label, or None if no column can be the label.

    Args:
        columns: The columns of the rows.
        by_name: The same, by name.
        rows: The rows.
        place: The name of the file, for errors.
        text: The column of the text, if the user names it.
        label: The column of the label, if the user names it.
        second: The column of the second text of a pair, if the user names it.

    Raises:
        LoraError: If several columns may be the text or the label, or the label has no use.
    """
    if label == NO_LABEL and label not in by_name:
        return None
    others = [column for column in columns if column.name not in (text, second)]
    chosen = by_name[label] if label is not None else _find_label(others, rows, place, text)
    if chosen is None:
        return None
    if isinstance(chosen, Column) and text is not None and chosen.kind == "text":
        return None  # rather a prompt and its completion
    taken = {chosen.name} if isinstance(chosen, Column) else {c.name for c in chosen}
    texts = [column for column in columns if column.name not in taken]
    first = by_name[text] if text is not None else None
    pair: tuple[Column, Column] | None
    if second is not None:
        rest = [column for column in texts if column.name != second]
        pair = (first or text_of(rest, place, chosen, rows=rows), by_name[second])
    else:
        pair = None if first is not None else pair_of(texts)
    first = first or (pair[0] if pair else text_of(texts, place, chosen, PAIR_HINT, rows))
    keys = {"type": "sequence_classification", "text_column": first.name}
    why = {"text_column": "chosen by you" if text is not None else text_reason(first, texts)}
    inputs = [first.name]
    if pair:
        keys["text_pair_column"] = pair[1].name
        why["text_column"] = f"with `{pair[1].name}`: two texts that the label compares"
        inputs.append(pair[1].name)
    more, reasons, labels = _keys_for_label(chosen, rows, place, label is not None)
    return Proposal(keys | more, why | reasons, inputs, labels)


def rank(column: Column) -> int:
    """Return how clearly a column is the label by its name, from 0 (clearest) upwards."""
    found = (i for i, names in enumerate(LABEL_NAMES) if names.fullmatch(column.name.strip()))
    return next(found, len(LABEL_NAMES))


def _find_label(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]], place: str, text: str | None
) -> Column | list[Column] | None:
    """Return the column of the label, or several columns of 0 and 1; None if there is none.

    Raises:
        LoraError: If several columns may be the label.
    """
    candidates = [column for column in columns if _can_be_label(column)]
    ranked = sorted(candidates, key=rank)
    named = [c for c in ranked if rank(c) < len(LABEL_NAMES) and rank(c) == rank(ranked[0])]
    named = _without_duplicates(named, rows)
    flags = [c for c in candidates if c.kind == "binary"]
    if _is_one_hot(flags, rows) and not any(c.kind != "binary" and rank(c) < 2 for c in named):
        return flags
    if len(named) == 1:
        return named[0]
    not_numbers = [column for column in candidates if column.kind != "number"]
    candidates = _without_duplicates(named or not_numbers or candidates, rows)
    if not candidates and (score_column := _score_column(columns)) is not None:
        return score_column
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    raise LoraError(
        "which column is the label? It could be "
        + " or ".join(f"`{column.name}`" for column in candidates[:6]),
        place,
        f"name it with `--label COLUMN`, or use `--label none` ({list_columns(columns)})",
    )


def _score_column(columns: Sequence[Column]) -> Column | None:
    """Return the only column of fractions, if the columns have no names and two are texts.

    This is the format of sentence similarity: two texts and a score.
    """
    fractions = [column for column in columns if column.kind == "number" and column.has_fractions]
    unnamed = pair_of(columns) is not None and columns[0].name == "column_1"
    return fractions[0] if unnamed and len(fractions) == 1 else None


def _can_be_label(column: Column) -> bool:
    is_named = rank(column) < len(LABEL_NAMES)
    if column.kind not in ("binary", "category", "number", "list") or len(column.counts) < 2:
        return False
    if column.is_id_by_name and rank(column) > 0:
        return False
    if column.kind == "number" and (column.has_fractions or len(column.counts) > 20):
        return is_named
    if is_named:
        return column.rows_per_value > 1 or column.kind == "category"
    if column.kind == "number" and not _has_few_small_numbers(column):
        return False
    return column.rows_per_value >= MIN_ROWS_PER_LABEL


def _has_few_small_numbers(column: Column) -> bool:
    """Return whether a column has few distinct values, all of which are small whole numbers."""
    return len(column.counts) <= MAX_SMALL_NUMBERS and all(
        re.fullmatch(r"-?\d{1,2}", value) for value in column.counts
    )


def _counts_up(column: Column) -> bool:
    """Return whether the values are all whole numbers from 0 or 1 on, each several times."""
    if column.has_fractions or column.rows_per_value < 3:
        return False
    values = sorted(as_number(value) for value in column.counts)
    return values[0] in (0, 1) and values[-1] - values[0] == len(values) - 1


def _without_duplicates(columns: list[Column], rows: Sequence[dict[str, Any]]) -> list[Column]:
    """Return the columns without those that encode the same values; names win over numbers."""
    if len(columns) < 2:
        return columns
    names_first = sorted(columns, key=lambda column: column.kind in ("number", "binary"))
    kept: list[Column] = []
    for column in names_first:
        for other in kept:
            pairs = {(str(row.get(column.name)), str(row.get(other.name))) for row in rows}
            if len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}):
                break
        else:
            kept.append(column)
    return kept


def _is_one_hot(flags: list[Column], rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether columns of 0 and 1 are labels: three or more, or two with one 1 per row."""
    if len(flags) != 2:
        return len(flags) > 2
    return all(sum(binary_value(row.get(c.name)) or 0 for c in flags) == 1 for row in rows)


def _keys_for_label(
    label: Column | list[Column], rows: Sequence[dict[str, Any]], place: str, is_named_by_user: bool
) -> tuple[dict[str, Any], dict[str, str], Counter[str]]:
    """Return the recipe keys of the label, a reason for each, and the count of each label."""
    if isinstance(label, list):
        return _keys_for_flags(label, rows)
    if label.kind in ("other", "blank", *CONVERSATIONS):
        what = f"`{label.name}` holds {content_of(label)}, no label"
        raise LoraError(what, place, "name another with `--label COLUMN`")
    if label.strays:
        raise _stray_cells_error(label, place)
    values = counted(len(label.counts), "value")
    if is_named_by_user:
        reason = f"chosen by you; {values}"
    elif rank(label) < len(LABEL_NAMES):
        reason = f"by its name and its {values}"
    else:
        reason = f"the only column with few values ({len(label.counts):,})"
    keys: dict[str, Any] = {"label_column": label.name}
    why = {"label_column": reason}
    are_names = rank(label) < len(LABEL_NAMES) - 1 and label.kind == "number" and _counts_up(label)
    if are_names:
        why["label_column"] += "; numbers that count up, so that they are names of labels"
    elif label.kind == "number" and (label.has_fractions or len(label.counts) > 20):
        keys["problem"] = "regression"
        numbers = [as_number(value, label.numbers) for value in label.counts]
        why["problem"] = f"numbers from {min(numbers):g} to {max(numbers):g}"
        if label.numbers.decimal == ",":
            why["problem"] += ", with decimal commas"
        return keys, why, Counter()
    if label.kind == "list":
        keys["problem"] = "multi_label"
        why["problem"] = "lists of labels"
        if label.separator is not None:
            keys["label_separator"] = label.separator
            why["problem"] = "several labels in a row"
        return keys, why, label.counts
    keys["problem"] = "single_label"
    if no_answer := _no_answer_labels(label.counts):
        keys["skip_labels"] = no_answer
        n_rows = sum(label.counts[mark] for mark in no_answer)
        why["skip_labels"] = f"{counted(n_rows, 'row')} without an answer, left out"
        kept = {name: n for name, n in label.counts.items() if name not in no_answer}
        label = replace(label, counts=Counter(kept))
    if len(label.counts) < 2:
        hint = "nothing can be learned from it; name another with `--label COLUMN`"
        raise LoraError(f"`{label.name}` has one value only", place, hint)
    if label.kind == "text" or (
        len(label.counts) > 20 and label.rows_per_value < MIN_ROWS_PER_VALUE
    ):
        hint = "for a prompt and its completion, name both: `--text PROMPT --label COMPLETION`"
        with_unit = sum(WITH_UNIT.fullmatch(value) is not None for value in label.counts)
        if with_unit > len(label.counts) / 2:
            example = next(value for value in label.counts if WITH_UNIT.fullmatch(value))
            hint = f"to predict numbers, write them alone, without what stands in `{example}`"
        what = f"`{label.name}` has {counted(len(label.counts), 'value')} in "
        raise LoraError(what + f"{counted(label.count, 'row')}: no label", place, hint)
    return keys, why, label.counts


def _require_names(label: Column, rows: Sequence[dict[str, Any]], place: str) -> None:
    """Check that lists contain the labels of their row, not a number for every label.

    Raises:
        LoraError: If they contain numbers.
    """
    cells = [row.get(label.name) for row in rows]
    what = "a 0 or 1" if any(is_multi_hot(cell, label.separator) for cell in cells) else ""
    if what or any(map(has_scores, cells)):
        raise LoraError(
            f"`{label.name}` has {what or 'a score'} for each label, not the labels",
            place,
            "write the names of those that fit, or a column of 0 and 1 for each label",
        )


def _keys_for_flags(
    label: Sequence[Column], rows: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, str], Counter[str]]:
    """Return the same as `_keys_for_label`, for columns of 0 and 1."""
    names = [column.name for column in label]
    sums = Counter(sum(binary_value(row.get(name)) or 0 for name in names) for row in rows)
    single = set(sums) == {1}
    counts = Counter(
        {c.name: sum(n for text, n in c.counts.items() if binary_value(text)) for c in label}
    )
    reason = "exactly one 1 in every row" if single else "any number of 1 in a row"
    problem = "single_label" if single else "multi_label"
    return (
        {"label_columns": names, "problem": problem},
        {"label_columns": "columns of 0 and 1", "problem": reason},
        counts,
    )


def _stray_cells_error(label: Column, place: str) -> LoraError:
    """Return the error for a column of numbers in which some cells are not numbers."""
    cells = counted(len(label.strays), "cell")
    shown = ", ".join(f"`{text[:40]}` in row {number:,}" for number, text in label.strays[:3])
    more = ", …" if len(label.strays) > 3 else ""
    return LoraError(
        f"`{label.name}` holds numbers, except in {cells}: {shown}{more}",
        f"{place}, row {label.strays[0][0]}",
        "write a number there (or leave the cell empty: then its row is skipped)",
    )


def _no_answer_labels(counts: Counter[str]) -> list[str]:
    """Return the labels that mean that a row has none: `-` in SNLI, or -1 next to 0, 1 and 2."""
    found = [name for name in counts if name.lower() in NO_ANSWER_LABELS]
    others = {name for name in counts if name != "-1"}
    if "-1" in counts and others == {str(i) for i in range(len(others))} and len(others) > 2:
        found.append("-1")
    return found if len(counts) - len(found) > 1 else []
