"""Which task a file of rows is for, and which columns it reads.

The order is that of certainty: conversations, then columns whose names go together, then a label
beside a text, then text alone. What cannot be decided is an error that names the columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lora_cli.data.conversations import conversation_error
from lora_cli.data.unsupported_rows import Found, several_answers, unsupported
from lora_cli.errors import LoraError, counted, did_you_mean
from lora_cli.recipe_draft.column_kinds import Column, as_number, flag
from lora_cli.recipe_draft.language_model_rows import (
    Chosen,
    conversation,
    plain,
    prompt_and_completion,
    prompts,
    require_context,
    require_conversations,
    spoken,
)
from lora_cli.recipe_draft.nested import require_flat
from lora_cli.recipe_draft.tagged_rows import tagged
from lora_cli.recipe_draft.text_columns import (
    content_of,
    listed,
    pair_of,
    text_of,
    text_reason,
    unnested,
)

NONE = "none"  # `--label none`: there is a label, but it is not wanted
# the stronger hints first; a column's place is that of the first group that its name matches
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
FEWEST_ROWS = 2.5  # of a label; training wants 2 of those that validation and test leave
NO_ANSWER = {"-", "unsup", "unlabeled", "unlabelled"}  # labels that say there is none
MOST_SMALL_NUMBERS = 20  # values of a column of small whole numbers that are labels
PAIR_HINT = "; two texts that the label compares: `--text A --pair B`"
READABLE = ("text", "category", "openai", "sharegpt")
ENOUGH_ROWS_PER_LABEL = 5  # of a label that nothing but its few values makes one


def choose_task(
    columns: Sequence[Column],
    rows: Sequence[dict[str, Any]],
    place: str,
    text: str | None = None,
    label: str | None = None,
    can_write: bool = True,
    pair: str | None = None,
) -> Chosen:
    """Return the task of a file.

    Args:
        columns: What they hold.
        rows: The rows.
        place: Name of the file, for errors.
        text: The column of the text, if the user names it.
        label: The column of the label, if the user names it; `none` if there is none.
        can_write: The model can continue a text.
        pair: The column of the second text, if the user names it.

    Raises:
        LoraError: If it cannot be decided.
    """
    by_name = {column.name: column for column in columns}
    for option, name in (("--text", text), ("--pair", pair), ("--label", label)):
        if name is not None and name not in by_name and not (option == "--label" and name == NONE):
            hint = did_you_mean(name, by_name, "its columns are")
            raise LoraError(f"{place} has no column `{name}`", option, hint)
    chosen = tagged(columns, rows, place, text, label) if pair is None else None
    if chosen is not None:
        return _with_left_out(chosen, columns)
    if text is None and not any(column.kind in READABLE for column in columns):
        nested = next((column for column in columns if column.kind == "other"), None)
        if nested is not None:
            what = f"the columns stand inside `{nested.name}`, and no task looks there"
            raise LoraError(what, place, unnested(nested, rows, place))
    if text is None and label is None and pair is None:
        require_conversations(by_name, place)
        about_files = spoken(columns, place, can_write)
        written = about_files or conversation(columns, rows) or prompts(by_name)
        # a conversation may have a label too, and an encoder can learn nothing else
        chosen = written if can_write else _label_next_to(written, columns, by_name, rows, place)
        if chosen is not None:
            require_context(chosen, by_name, place)
    if chosen is None:
        labelled = _labelled(columns, by_name, rows, place, text, label, pair)
        if labelled is None and pair is not None:
            what, hint = "two texts need a label that compares them", "name it: `--label COLUMN`"
            raise LoraError(what, "--pair", f"{hint} ({listed(columns)})")
        chosen = labelled or plain(columns, by_name, place, text)
    if not chosen.is_chat and text is None and label is None and pair is None:
        require_flat(columns, rows, place, chosen.labels is not None)
    if not chosen.is_chat and (text is None or chosen.labels is not None):
        # texts that are learned alone say nothing of the other columns, if the user says so
        learned = chosen.keys.get("label_column") if text is not None else None
        _reject_rows(rows, place, lambda row: several_answers(row, learned))
    if chosen.keys["type"] == "causal_lm" and not can_write:
        raise _no_label(columns, rows, place, chosen)
    if chosen.is_chat or "prompt_column" in chosen.keys:
        _reject_unsupported(chosen, columns, rows, place)
    return _with_left_out(chosen, columns)


def _with_left_out(chosen: Chosen, columns: Sequence[Column]) -> Chosen:
    """Return the task with what the columns hold that it does not read."""
    for column in columns:
        if column.name not in chosen.used | chosen.also_read:
            chosen.left_out[column.name] = content_of(column)
    return chosen


def _reject_unsupported(
    chosen: Chosen, columns: Sequence[Column], rows: Sequence[dict[str, Any]], place: str
) -> None:
    """Reject rows that only look like conversations, or like prompts with their answers.

    Raises:
        LoraError: If a row holds what no task reads, or none holds a conversation to be trained.
    """
    _reject_rows(rows, place, unsupported)
    if not chosen.is_chat:
        return
    talks = [column.name for column in columns if column.kind in ("openai", "sharegpt")]
    if len(talks) > 1:
        what = f"the columns `{'` and `'.join(talks)}` all hold turns of conversations"
        hint = "put the turns of a row into one column, in their order"
        raise LoraError(what, place, hint)
    form, column = chosen.keys["format"], chosen.keys.get("messages_column")
    errors = [conversation_error(row, form, column) for row in rows]
    if all(errors):
        hint = "each row has a list of turns, of which one at least is the assistant's"
        raise LoraError(f"no row can be trained: {errors[0]}", f"{place}, row 1", hint)


def _reject_rows(
    rows: Sequence[dict[str, Any]], place: str, test: Callable[[dict[str, Any]], Found | None]
) -> None:
    """Reject rows of which some hold what no task reads.

    Raises:
        LoraError: With how many there are, and what the first one has.
    """
    found = [(i, more) for i, row in enumerate(rows, 1) if (more := test(row)) is not None]
    if found:
        number, (other, hint) = found[0]
        count = f"{len(found):,} of {counted(len(rows), 'row')} cannot be read as they are meant"
        raise LoraError(f"{count}; the first has {other}", f"{place}, row {number}", hint)


def _no_label(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]], place: str, chosen: Chosen
) -> LoraError:
    """Return the error of texts that an encoder cannot learn."""
    what = chosen.why.get("", "text without a label").removesuffix(" without a label")
    hint = f"name the label with `--label COLUMN` ({listed(columns)}), or use a language model"
    for column in columns:
        if _rank(column) < len(LABEL_NAMES) and column.kind == "other":
            return LoraError(f"`{column.name}` holds objects", place, unnested(column, rows, place))
        if _rank(column) < len(LABEL_NAMES) and len(column.counts) == 1:
            value = next(iter(column.counts))
            return LoraError(f"`{column.name}` has one value only, `{value}`", place, hint)
    return LoraError(
        f"there is {what}, but no label, and the model is an encoder, which cannot continue a text",
        place,
        hint,
    )


def _label_next_to(
    written: Chosen | None,
    columns: Sequence[Column],
    by_name: dict[str, Column],
    rows: Sequence[dict[str, Any]],
    place: str,
) -> Chosen | None:
    """Return the classification of rows that a language model would answer, if there is one."""
    if written is None:
        return None
    try:
        return _labelled(columns, by_name, rows, place, None, None) or written
    except LoraError:
        return written


# ------------------------------------------------------------------------------ classification


def _labelled(
    columns: Sequence[Column],
    by_name: dict[str, Column],
    rows: Sequence[dict[str, Any]],
    place: str,
    text: str | None,
    label: str | None,
    second: str | None = None,
) -> Chosen | None:
    """Return the task of a text with a label, or None if nothing is a label."""
    if label == NONE and NONE not in by_name:
        return None
    others = [column for column in columns if column.name not in (text, second)]
    chosen = by_name[label] if label is not None else _label_of(others, rows, place, text)
    if chosen is None:
        return None
    if isinstance(chosen, Column) and text is not None and chosen.kind == "text":
        return prompt_and_completion(by_name[text], chosen)
    taken = {chosen.name} if isinstance(chosen, Column) else {c.name for c in chosen}
    texts = [column for column in columns if column.name not in taken]
    first = by_name[text] if text is not None else None
    pair: tuple[Column, Column] | None
    if second is not None:
        rest = [column for column in texts if column.name != second]
        pair = (first or text_of(rest, place, chosen), by_name[second])
    else:
        pair = None if first is not None else pair_of(texts)
    first = first or (pair[0] if pair else text_of(texts, place, chosen, PAIR_HINT))
    keys = {"type": "sequence_classification", "text_column": first.name}
    why = {"text_column": "chosen by you" if text is not None else text_reason(first, texts)}
    inputs = [first.name]
    if pair:
        keys["text_pair_column"] = pair[1].name
        why["text_column"] = f"with `{pair[1].name}`: two texts that the label compares"
        inputs.append(pair[1].name)
    more, reasons, labels = _label_keys(chosen, rows, place, label is not None)
    return Chosen(keys | more, why | reasons, inputs, labels)


def _rank(column: Column) -> int:
    """Return how clearly a name says that the column is the label; 0 is clearest."""
    found = (i for i, names in enumerate(LABEL_NAMES) if names.fullmatch(column.name.strip()))
    return next(found, len(LABEL_NAMES))


def _label_of(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]], place: str, text: str | None
) -> Column | list[Column] | None:
    """Return the column of the label, or the columns of 0 and 1, or None."""
    able = [column for column in columns if _may_be_label(column)]
    ranked = sorted(able, key=_rank)
    named = [c for c in ranked if _rank(c) < len(LABEL_NAMES) and _rank(c) == _rank(ranked[0])]
    named = _without_renamings(named, rows)
    flags = [c for c in able if c.kind == "binary"]
    if _is_one_hot(flags, rows) and not any(c.kind != "binary" and _rank(c) < 2 for c in named):
        return flags
    if len(named) == 1:
        return named[0]
    words = [column for column in able if column.kind != "number"]
    able = _without_renamings(named or words or able, rows)
    if not able and (measured := _measured(columns)) is not None:
        return measured
    if len(able) <= 1:
        return able[0] if able else None
    raise LoraError(
        "which column is the label? It could be "
        + " or ".join(f"`{column.name}`" for column in able[:6]),
        place,
        f"name it with `--label COLUMN`, or use `--label none` ({listed(columns)})",
    )


def _measured(columns: Sequence[Column]) -> Column | None:
    """Return the only column of fractions, if two columns without names are a pair of texts."""
    fractions = [column for column in columns if column.kind == "number" and column.has_fractions]
    unnamed = pair_of(columns) is not None and columns[0].name == "column_1"
    return fractions[0] if unnamed and len(fractions) == 1 else None


def _may_be_label(column: Column) -> bool:
    hinted = _rank(column) < len(LABEL_NAMES)
    if column.kind not in ("binary", "category", "number", "list") or len(column.counts) < 2:
        return False
    if column.is_id_by_name and _rank(column) > 0:
        return False
    if column.kind == "number" and (column.has_fractions or len(column.counts) > 20):
        return hinted
    if hinted:
        return column.rows_per_value > 1 or column.kind == "category"
    if column.kind == "number" and not _are_small(column):
        return False
    return column.rows_per_value >= ENOUGH_ROWS_PER_LABEL


def _are_small(column: Column) -> bool:
    """Return whether the numbers of a column are few small whole ones, as labels and grades are."""
    return len(column.counts) <= MOST_SMALL_NUMBERS and all(
        re.fullmatch(r"-?\d{1,2}", value) for value in column.counts
    )


def _count_up(column: Column) -> bool:
    """Return whether the values are the whole numbers from 0 or 1, each several times."""
    if column.has_fractions or column.rows_per_value < 3:
        return False
    values = sorted(as_number(value) for value in column.counts)
    return values[0] in (0, 1) and values[-1] - values[0] == len(values) - 1


def _without_renamings(columns: list[Column], rows: Sequence[dict[str, Any]]) -> list[Column]:
    """Return the columns without those that say the same as another, as numbers: words stay."""
    if len(columns) < 2:
        return columns
    words = sorted(columns, key=lambda column: column.kind in ("number", "binary"))
    kept: list[Column] = []
    for column in words:
        for other in kept:
            pairs = {(str(row.get(column.name)), str(row.get(other.name))) for row in rows}
            if len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}):
                break
        else:
            kept.append(column)
    return kept


def _is_one_hot(flags: list[Column], rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether columns of 0 and 1 are labels: three or more, or two that exclude."""
    if len(flags) != 2:
        return len(flags) > 2
    return all(sum(flag(row.get(c.name)) or 0 for c in flags) == 1 for row in rows)


def _label_keys(
    label: Column | list[Column], rows: Sequence[dict[str, Any]], place: str, given: bool
) -> tuple[dict[str, Any], dict[str, str], Counter[str]]:
    """Return the keys of the label, what says so, and how often each stands."""
    if isinstance(label, list):
        names = [column.name for column in label]
        sums = Counter(sum(flag(row.get(name)) or 0 for name in names) for row in rows)
        single = set(sums) == {1}
        counts = Counter(
            {c.name: sum(n for text, n in c.counts.items() if flag(text)) for c in label}
        )
        reason = "exactly one 1 in every row" if single else "any number of 1 in a row"
        problem = "single_label" if single else "multi_label"
        return (
            {"label_columns": names, "problem": problem},
            {"label_columns": "columns of 0 and 1", "problem": reason},
            counts,
        )
    if label.kind in ("other", "blank", "openai", "sharegpt"):
        what = f"`{label.name}` holds {content_of(label)}, no label"
        raise LoraError(what, place, "name another with `--label COLUMN`")
    if label.strays:
        raise _stray_cells(label, place)
    values = counted(len(label.counts), "value")
    if given:
        reason = f"chosen by you; {values}"
    elif _rank(label) < len(LABEL_NAMES):
        reason = f"by its name and its {values}"
    else:
        reason = f"the only column with few values ({len(label.counts):,})"
    keys: dict[str, Any] = {"label_column": label.name}
    why = {"label_column": reason}
    are_names = _rank(label) < len(LABEL_NAMES) - 1 and label.kind == "number" and _count_up(label)
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
    if marks := _marks_without_answer(label.counts):
        keys["skip_labels"] = marks
        rows_of = sum(label.counts[mark] for mark in marks)
        why["skip_labels"] = f"{counted(rows_of, 'row')} without an answer, left out"
        kept = {name: times for name, times in label.counts.items() if name not in marks}
        label = replace(label, counts=Counter(kept))
    if len(label.counts) < 2:
        hint = "nothing can be learned from it; name another with `--label COLUMN`"
        raise LoraError(f"`{label.name}` has one value only", place, hint)
    if label.kind == "text" or (len(label.counts) > 20 and label.rows_per_value < FEWEST_ROWS):
        raise LoraError(
            f"`{label.name}` has {counted(len(label.counts), 'value')} in "
            f"{counted(label.count, 'row')}: no label",
            place,
            "for a prompt and its completion, name both: `--text PROMPT --label COMPLETION`",
        )
    return keys, why, label.counts


def _stray_cells(label: Column, place: str) -> LoraError:
    """Return the error of a column of numbers with cells that are none."""
    cells = counted(len(label.strays), "cell")
    shown = ", ".join(f"`{text[:40]}` in row {number:,}" for number, text in label.strays[:3])
    more = ", …" if len(label.strays) > 3 else ""
    return LoraError(
        f"`{label.name}` holds numbers, except in {cells}: {shown}{more}",
        f"{place}, row {label.strays[0][0]}",
        "write a number there (or leave the cell empty: then its row is skipped)",
    )


def _marks_without_answer(counts: Counter[str]) -> list[str]:
    """Return the labels that say that a row has none: `-` in SNLI, -1 beside 0, 1 and 2."""
    found = [name for name in counts if name.lower() in NO_ANSWER]
    others = {name for name in counts if name != "-1"}
    if "-1" in counts and others == {str(i) for i in range(len(others))} and len(others) > 2:
        found.append("-1")
    return found if len(counts) - len(found) > 1 else []
