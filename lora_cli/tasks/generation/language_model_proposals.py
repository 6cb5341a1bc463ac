"""Proposes language model recipes for `lora init`: chats, prompts with answers, or plain text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from lora_cli.data.column_kinds import CONVERSATIONS, Column, is_blank
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.data.text_columns import (
    TEXT_NAMES,
    list_columns,
    text_of,
    text_reason,
    unnesting_hint,
)
from lora_cli.data.unsupported_rows import unsupported
from lora_cli.errors import LoraError, counted, printable
from lora_cli.tasks.classification.labelled_text_proposals import LABEL_NAMES, rank
from lora_cli.tasks.generation.conversation_columns import require_whole_conversations
from lora_cli.tasks.generation.text_pair_names import source_and_target
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table, proposed
from lora_cli.tasks.texts.text_checks import check_texts, reject_rows

PROMPT_NAMES = [
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "chosen"), ("question", "answer"),
    ("question", "response"), ("query", "response"), ("query", "answer"), ("input", "output"),
    ("instruction", "response"), ("instruction", "completion"), ("source", "target"),
    ("article", "summary"), ("document", "summary"), ("text", "summary"),
    ("article", "highlights"), ("dialogue", "summary"), ("frage", "antwort"),
    ("problem", "solution"), ("src", "tgt"), ("prompt", "canonical_solution"),  # of HumanEval
    ("text", "code"), ("question", "query"), ("question", "sql"), ("nl", "code"),
    ("nl", "cmd"), ("intent", "snippet"), ("instruction", "code"), ("docstring", "code"),
]  # fmt: skip
TURN_FORMATS = {
    "openai": "turns with role and content", "sharegpt": "turns with from and value",
    "pairs": "questions with their answers",
}  # fmt: skip
MOST_ROWS = 0.9  # the share of the rows in which prompt and completion bring their own separator
MUCH_SHORTER = 0.2  # times the length of the main text: shorter texts, such as titles, are ignored
MIN_DISTINCT = 0.5  # distinct values per row: with fewer, lists contain labels, not answers
SYSTEM_NAMES = ("system", "system_prompt", "system_message")
CONTEXT_NAMES = ("context", "input", "passage", "knowledge", "document")


def propose_writing(table: Table, base: BaseFacts) -> Proposal | None:
    """Return a proposal to train a language model on a table; see `Task.propose`."""
    names = _names_for_conversation(table)
    found = _propose(table.renamed(names) if names else table, base)
    if found is not None:
        found.renamed = names
    return found


def _names_for_conversation(table: Table) -> dict[str, str]:
    """Return new names for columns, if prompt and answer are better read as a conversation.

    This is the case if another column belongs to the prompt: the system's turn in OpenOrca, the
    earlier turns in ms-swift's data, or the context of the question in Dolly.

    Returns:
        The new names by the old ones; empty if no column needs a new name.
    """
    by_name = table.by_name
    filled = {name for name, column in by_name.items() if column.kind != "blank"}
    systems = [name for name in SYSTEM_NAMES if name in filled]
    has_more = systems or any(row.get("history") not in (None, "", [], "[]") for row in table.rows)
    if table.names_columns or table.are_lines:
        return {}
    names = {systems[0]: "system"} if len(systems) == 1 else {}
    if conversation_proposal(table.columns, table.rows) is None:
        pair = named_pair(by_name) or _text_pair(
            [c for c in table.columns if c.name not in systems]
        )
        more = _context_columns(pair, by_name) if pair is not None else []
        if pair is None or len(more) > 1 or not (has_more or more):
            return {}
        names |= dict(zip(pair.inputs, ("instruction", "output"), strict=True))
        names |= dict.fromkeys(more, "input")
    kept = by_name.keys() - names.keys()
    return {} if kept & {*names.values()} else {k: new for k, new in names.items() if k != new}


def _propose(table: Table, base: BaseFacts) -> Proposal | None:
    columns, by_name = table.columns, table.by_name
    # a conversation may have a label too, which is all that an encoder can learn
    by_names = Certainty.NAMED if base.can_write else Certainty.UNSUITED
    if table.are_lines and not table.names_columns:
        first, second = columns
        # for an encoder, the second file may contain the labels of the first
        may_be_labels = not base.can_write and second.kind in ("category", "number", "binary")
        return proposed(
            lambda: parallel_lines(first, second, table.place, base.can_write),
            Certainty.UNSUITED if may_be_labels else Certainty.ONLY,
        )
    if (pair := _chosen_pair(table)) is not None:
        return proposed(lambda: _with_check(pair_proposal(*pair), table, base), by_names)
    found = None
    if not table.names_columns:
        try:
            require_conversations(by_name, table.place)
            if base.can_write and not base.is_encoder_decoder:
                require_one_answer(by_name, table.place)
            found = media_texts(columns, table.place, base.can_write)
        except LoraError as error:
            return Proposal({}, {}, [], certainty=Certainty.NAMED, error=error)
        found = found or conversation_proposal(columns, table.rows) or named_pair(by_name)
    text_pair = _text_pair(columns) if found is None and table.text is None else None
    if text_pair is not None:
        return proposed(lambda: _with_check(text_pair, table, base), Certainty.FALLBACK)
    if found is None:
        return proposed(
            lambda: _with_check(
                plain_text(columns, by_name, table.rows, table.place, table.text), table, base
            ),
            Certainty.FALLBACK,
        )

    def complete() -> Proposal:
        require_context(found, by_name, table.place)
        return _with_check(found, table, base)

    return proposed(complete, by_names)


def _with_check(chosen: Proposal, table: Table, base: BaseFacts) -> Proposal:
    """Return the proposal with a check that the base model can learn it."""
    _adopt_separator(chosen, table)

    def check() -> None:
        check_texts(table, chosen)
        if not base.can_write:
            raise _no_label_error(table, chosen, base)
        if chosen.is_chat or "prompt_column" in chosen.keys:
            _require_supported(table, chosen)

    chosen.check = check
    return chosen


def _require_supported(table: Table, chosen: Proposal) -> None:
    """Check that the rows really contain conversations, or prompts with their answers.

    Raises:
        LoraError: If a row has unsupported contents, or no row has a conversation to train on.
    """
    place = table.place
    reject_rows(table.rows, place, unsupported)
    if not chosen.is_chat:
        return
    prompt_names, completion_names = zip(*PROMPT_NAMES, strict=True)
    conversation_format, column = chosen.keys["format"], chosen.keys.get("messages_column")
    require_whole_conversations(table, conversation_format, column, prompt_names, completion_names)


def _no_label_error(table: Table, chosen: Proposal, base: BaseFacts) -> LoraError:
    """Return the error for texts without labels and a model that cannot continue a text."""
    columns, place = table.columns, table.place
    what = chosen.why.get("", "text without a label").removesuffix(" without a label")
    hint = (
        f"name the label with `--label COLUMN` ({list_columns(columns)}), or use a language model"
    )
    for column in columns:
        if rank(column) < len(LABEL_NAMES) and column.kind == "other":
            hint = unnesting_hint(column, table.rows, place)
            return LoraError(f"`{column.name}` holds objects", place, hint)
        if rank(column) < len(LABEL_NAMES) and len(column.counts) == 1:
            value = next(iter(column.counts))
            return LoraError(f"`{column.name}` has one value only, `{value}`", place, hint)
    because = "the model is an encoder, which cannot continue a text"
    if base.is_encoder_decoder:
        because = "the model generates one text from another, and there is only one text"
        hint = hint.replace("name the label", "name a second text or a label")
    return LoraError(f"the rows have {what}, but no label, and {because}", place, hint)


def _chosen_pair(table: Table) -> tuple[Column, Column] | None:
    """Return the columns of the prompt and the completion if the user names two text columns."""
    if table.text is None or table.label not in table.by_name:
        return None
    prompt, completion = table.by_name[table.text], table.by_name[table.label]
    return (prompt, completion) if completion.kind == "text" else None


def media_texts(columns: Sequence[Column], place: str, can_write: bool) -> Proposal | None:
    """Return a proposal for the texts that belong to recordings or images, if the rows have files.

    Raises:
        LoraError: If there are files, but no column of texts that the model could learn.
    """
    files = next((column for column in columns if column.kind == "file"), None)
    if files is None or any(column.kind in ("text", *CONVERSATIONS) for column in columns):
        return None
    texts = [c for c in columns if c.kind == "category" and TEXT_NAMES.fullmatch(c.name.strip())]
    if can_write and len(texts) == 1:
        why = f"what belongs to the files in `{files.name}`, which a language model does not read"
        keys = {"type": "causal_lm", "text_column": texts[0].name}
        return Proposal(keys, {"": "text without a label", "text_column": why}, [texts[0].name])
    example = printable(next(iter(files.counts)), 60)
    raise LoraError(
        f"the rows are about files of sound or pictures (`{files.name}`: {example}), which the "
        "model does not read",
        place,
        "to learn from the other columns alone, name them: `--text COLUMN --label COLUMN` "
        f"({list_columns(columns)})",
    )


def conversation_proposal(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]]
) -> Proposal | None:
    """Return the proposal for conversations in any format, if the columns contain some."""
    for column in columns:
        if column.kind in CONVERSATIONS:
            return Proposal(
                {"type": "causal_lm", "messages_column": column.name, "format": column.kind},
                {
                    "": f"conversations in `{column.name}`",
                    "messages_column": f"lists of {TURN_FORMATS[column.kind]}",
                },
                [column.name],
            )
    kinds = {column.name: column for column in columns}
    if "instruction" in kinds and _has_instances(kinds.get("instances"), rows):
        return Proposal(
            {"type": "causal_lm", "format": "self_instruct"},
            {
                "": "the columns instruction and instances",
                "format": "each instance is an input and its output",
            },
            ["instruction", "instances"],
        )
    if not {"instruction", "output"} <= set(kinds) or kinds["output"].kind in ("other", "blank"):
        return None
    filled = sum(not is_blank(row.get("input")) for row in rows)
    return Proposal(
        {"type": "causal_lm", "format": "alpaca"},
        {
            "": "the columns instruction and output",
            "format": f"instruction, input (filled in {counted(filled, 'row')}) and output",
        },
        [name for name in ("instruction", "input", "output") if name in kinds],
    )


def _has_instances(column: Column | None, rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether a column contains lists of inputs with their outputs."""
    if column is None or column.kind != "other":
        return False
    values = [value for row in rows if isinstance(value := row.get(column.name), list) and value]
    good = sum(isinstance(value[0], dict) and "output" in value[0] for value in values)
    return good > 0.9 * len(rows)


def named_pair(by_name: dict[str, Column]) -> Proposal | None:
    """Return the proposal for a prompt and its completion if the names of two columns fit."""
    lower = {name.lower(): column for name, column in by_name.items()}
    for prompt_name, completion_name in PROMPT_NAMES:
        prompt, completion = lower.get(prompt_name), lower.get(completion_name)
        is_prompt = prompt_name == "prompt"  # a name that no other task uses
        if prompt is None or completion is None or prompt.kind in ("other", "list", "blank"):
            continue
        has_one_answer = (
            completion.kind not in ("other", "list", "blank") or completion.separator is not None
        )
        if completion.kind == "text" or (is_prompt and has_one_answer):
            return pair_proposal(prompt, completion)
        if completion.rows_per_value < 2 and completion.kind in ("category", "number", "id"):
            return pair_proposal(prompt, completion)
    return None


def require_context(chosen: Proposal, by_name: dict[str, Column], place: str) -> None:
    """Check that no third column contains the context of the prompt, which would be left out.

    Raises:
        LoraError: If there is such a column, as in Dolly and SQuAD.
    """
    if "prompt_column" not in chosen.keys:
        return
    for name in _context_columns(chosen, by_name):
        prompt, completion = chosen.keys["prompt_column"], chosen.keys["completion_column"]
        new = f"instruction: {field(prompt)}, input: {field(name)}, output: {field(completion)}"
        raise LoraError(
            f"`{name}` belongs to the prompt in {counted(by_name[name].count, 'row')}, and a "
            "recipe has one column for it",
            place,
            f"join them: {jq_command(f'{{{new}}}', place, 'joined.jsonl')}; or train without it: "
            f"`--text {shlex.quote(prompt)} --label {shlex.quote(completion)}`",
        )


def _context_columns(chosen: Proposal, by_name: dict[str, Column]) -> list[str]:
    """Return the text columns that belong to a prompt, by their names."""
    return [
        name
        for name, column in by_name.items()
        if name.lower() in CONTEXT_NAMES and name not in chosen.inputs and column.kind == "text"
    ]


def require_one_answer(by_name: dict[str, Column], place: str) -> None:
    """Check that each prompt has a single answer, since a language model learns only one.

    Raises:
        LoraError: If the answers are lists, as in NQ-open.
    """
    lower = {name.lower(): column for name, column in by_name.items()}
    for prompt_name, completion_name in PROMPT_NAMES:
        prompt, completion = lower.get(prompt_name), lower.get(completion_name)
        if (
            prompt is None
            or completion is None
            or (prompt.kind, completion.kind) != ("text", "list")
        ):
            continue
        if (
            completion.separator is None
            and len(completion.counts) > MIN_DISTINCT * completion.count
        ):
            what = f"`{completion.name}` holds lists of answers, and a language model learns one"
            first = jq_command(f"{field(completion.name)} |= .[0]", place, "first.jsonl")
            raise LoraError(what, place, f"keep the first of each: {first}")


def require_conversations(by_name: dict[str, Column], place: str) -> None:
    """Check that rows are whole conversations.

    Raises:
        LoraError: If they are single messages, as in oasst1.
    """
    if {"message_id", "parent_id", "role", "text"} <= set(by_name):
        raise LoraError(
            "each row is one message of a conversation, which `parent_id` puts together",
            place,
            "write each conversation as a row, with a list `messages` of role and content",
        )


def pair_proposal(prompt: Column, completion: Column) -> Proposal:
    """Return the proposal for a prompt column and its completion column."""
    return Proposal(
        {
            "type": "causal_lm",
            "prompt_column": prompt.name,
            "completion_column": completion.name,
            "separator": "\n",
        },
        {
            "": f"`{prompt.name}` and its answer `{completion.name}`",
            "prompt_column": f"{prompt.characters:.0f} characters on average; read, not trained",
            "completion_column": f"{completion.characters:.0f} characters on average",
            "separator": "a new line between them",
        },
        [prompt.name, completion.name],
    )


def _adopt_separator(chosen: Proposal, table: Table) -> None:
    """Set an empty separator if prompts end, or completions begin, with whitespace of their own."""
    if "prompt_column" not in chosen.keys:
        return
    prompt, completion = chosen.keys["prompt_column"], chosen.keys["completion_column"]
    pairs = [(row.get(prompt), row.get(completion)) for row in table.rows]
    texts = [(a, b) for a, b in pairs if isinstance(a, str) and isinstance(b, str) and b]
    spaced = sum(a != a.rstrip() or b != b.lstrip() for a, b in texts)
    if texts and spaced >= MOST_ROWS * len(texts):
        chosen.keys["separator"] = ""
        chosen.why["separator"] = "the texts have a space or a line end of their own between them"


def parallel_lines(first: Column, second: Column, place: str, can_write: bool) -> Proposal:
    """Return the proposal for two text files with corresponding lines.

    Raises:
        LoraError: If the model cannot generate text.
    """
    if not can_write:
        what = "an encoder writes no text, so it cannot learn one file from the other"
        raise LoraError(what, place, "use a language model")
    chosen = pair_proposal(first, second)
    chosen.why[""] = f"a line of `{second.name}` answers the same line of `{first.name}`"
    return chosen


def _text_pair(columns: Sequence[Column]) -> Proposal | None:
    """Return the proposal for two text columns if their names show which one is the answer."""
    pair = source_and_target(columns)
    return pair_proposal(*pair) if pair is not None else None


def _require_one_text(chosen: Column, columns: Sequence[Column], place: str) -> None:
    """Check that the chosen column is the only possible one, since other texts would be left out.

    Raises:
        LoraError: If another text is longer, or not much shorter than a column without a usual
            name.
    """
    is_named = TEXT_NAMES.fullmatch(chosen.name.strip()) is not None
    for other in columns:
        if other.kind != "text" or other is chosen:
            continue
        is_longer = other.characters > chosen.characters and chosen.name.lower() != "text"
        if is_longer or (not is_named and other.characters > MUCH_SHORTER * chosen.characters):
            raise LoraError(
                f"which column is the text? It could be `{chosen.name}` or `{other.name}`",
                place,
                "name it with `--text COLUMN`, or a prompt and its completion: `--text A --label "
                f"B` ({list_columns(columns)})",
            )


def plain_text(
    columns: Sequence[Column],
    by_name: dict[str, Column],
    rows: Sequence[dict[str, Any]],
    place: str,
    text: str | None,
) -> Proposal:
    """Return the proposal for a single text column."""
    column = by_name[text] if text is not None else text_of(columns, place, None, rows=rows)
    if text is None:
        _require_one_text(column, columns, place)
    why = "chosen by you" if text is not None else text_reason(column, columns)
    return Proposal(
        {"type": "causal_lm", "text_column": column.name},
        {"": "text without a label", "text_column": why},
        [column.name],
    )
