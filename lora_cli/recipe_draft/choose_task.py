"""Which task a file of rows is for, and which columns it reads.

The order is that of certainty: conversations, then columns whose names go together, then a label
beside a text, then text alone. What cannot be decided is an error that names the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from lora_cli.data.conversations import conversation_error
from lora_cli.data.unsupported_rows import Found, several_answers, unsupported
from lora_cli.errors import LoraError, did_you_mean
from lora_cli.recipe import TASKS
from lora_cli.recipe_draft.column_kinds import Column
from lora_cli.recipe_draft.labelled_rows import LABEL_NAMES, NONE, labelled, rank
from lora_cli.recipe_draft.language_model_rows import (
    Chosen,
    conversation,
    plain,
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
    unnested,
)

READABLE = ("text", "category", "openai", "sharegpt")


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
    _require_columns(by_name, {"--text": text, "--pair": pair, "--label": label}, place)
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
        found = labelled(columns, by_name, rows, place, text, label, pair)
        if found is None and pair is not None:
            what, hint = "two texts need a label that compares them", "name it: `--label COLUMN`"
            raise LoraError(what, "--pair", f"{hint} ({listed(columns)})")
        chosen = found or plain(columns, by_name, rows, place, text)
    if not chosen.is_chat and text is None and label is None and pair is None:
        require_flat(columns, rows, place, chosen.labels is not None)
    if not chosen.is_chat and (text is None or chosen.labels is not None):
        # texts that are learned alone say nothing of the other columns, if the user says so
        learned = chosen.keys.get("label_column") if text is not None else None
        _reject_rows(rows, place, lambda row: several_answers(row, learned))
    if TASKS[chosen.keys["type"]].usual_training.writes and not can_write:
        raise _no_label(columns, rows, place, chosen)
    if chosen.is_chat or "prompt_column" in chosen.keys:
        _reject_unsupported(chosen, columns, rows, place)
    return _with_left_out(chosen, columns)


def _require_columns(by_name: Collection[str], named: dict[str, str | None], place: str) -> None:
    """Reject an option that names no column of the file; `--label none` names none on purpose."""
    for option, name in named.items():
        if name is not None and name not in by_name and not (option == "--label" and name == NONE):
            hint = did_you_mean(name, by_name, "its columns are")
            raise LoraError(f"{place} has no column `{name}`", option, hint)


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
        meant = "it is" if len(found) == 1 else "they are"
        count = f"{len(found):,} of {len(rows):,} rows cannot be read as {meant} meant"
        raise LoraError(f"{count}; the first has {other}", f"{place}, row {number}", hint)


def _no_label(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]], place: str, chosen: Chosen
) -> LoraError:
    """Return the error of texts that an encoder cannot learn."""
    what = chosen.why.get("", "text without a label").removesuffix(" without a label")
    hint = f"name the label with `--label COLUMN` ({listed(columns)}), or use a language model"
    for column in columns:
        if rank(column) < len(LABEL_NAMES) and column.kind == "other":
            return LoraError(f"`{column.name}` holds objects", place, unnested(column, rows, place))
        if rank(column) < len(LABEL_NAMES) and len(column.counts) == 1:
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
        return labelled(columns, by_name, rows, place, None, None) or written
    except LoraError:
        return written
