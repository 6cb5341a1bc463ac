"""Rows that a language model learns to write: conversations, prompts with answers, plain text."""

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
TURNS = {
    "openai": "turns with role and content", "sharegpt": "turns with from and value",
    "pairs": "questions with their answers",
}  # fmt: skip
MOSTLY = 0.9  # of the rows
SHORT = 0.2  # of the characters of a text: a shorter one beside it is its title
MANY_ANSWERS = 0.5  # different ones a row: fewer are labels
SYSTEM_NAMES = ("system", "system_prompt", "system_message")
CONTEXT_NAMES = ("context", "input", "passage", "knowledge", "document")


def propose_writing(table: Table, base: BaseFacts) -> Proposal | None:
    """Return what of a table a language model would learn to write; see `Task.propose`."""
    names = _other_names(table)
    found = _proposed(table.renamed(names) if names else table, base)
    if found is not None:
        found.renamed = names
    return found


def _other_names(table: Table) -> dict[str, str]:
    """Return the names by which more is read than a prompt and its answer, if it is there.

    The two are then a conversation: in OpenOrca the system's turn is a column of its own, in data
    of ms-swift the earlier turns are, in Dolly what the question is about.
    """
    by_name = table.by_name
    filled = {name for name, column in by_name.items() if column.kind != "blank"}
    systems = [name for name in SYSTEM_NAMES if name in filled]
    has_more = systems or any(row.get("history") not in (None, "", [], "[]") for row in table.rows)
    if table.names_columns or table.are_lines:
        return {}
    names = {systems[0]: "system"} if len(systems) == 1 else {}
    if conversation(table.columns, table.rows) is None:
        pair = prompts(by_name) or _two_texts([c for c in table.columns if c.name not in systems])
        more = _contexts(pair, by_name) if pair is not None else []
        if pair is None or len(more) > 1 or not (has_more or more):
            return {}
        names |= dict(zip(pair.inputs, ("instruction", "output"), strict=True))
        names |= dict.fromkeys(more, "input")
    kept = by_name.keys() - names.keys()
    return {} if kept & {*names.values()} else {k: new for k, new in names.items() if k != new}


def _proposed(table: Table, base: BaseFacts) -> Proposal | None:
    columns, by_name = table.columns, table.by_name
    # a conversation may have a label too, and an encoder can learn nothing else
    by_names = Certainty.NAMED if base.can_write else Certainty.UNSUITED
    if table.are_lines and not table.names_columns:
        first, second = columns
        # an encoder can learn which label each text has
        may_be_labels = not base.can_write and second.kind in ("category", "number", "binary")
        return proposed(
            lambda: translation(first, second, table.place, base.can_write),
            Certainty.UNSUITED if may_be_labels else Certainty.ONLY,
        )
    if (pair := _named_pair(table)) is not None:
        return proposed(lambda: _checked(prompt_and_completion(*pair), table, base), by_names)
    written = None
    if not table.names_columns:
        try:
            require_conversations(by_name, table.place)
            if base.can_write and not base.is_encoder_decoder:
                require_one_answer(by_name, table.place)
            written = spoken(columns, table.place, base.can_write)
        except LoraError as error:
            return Proposal({}, {}, [], certainty=Certainty.NAMED, error=error)
        written = written or conversation(columns, table.rows) or prompts(by_name)
    two = _two_texts(columns) if written is None and table.text is None else None
    if two is not None:
        return proposed(lambda: _checked(two, table, base), Certainty.FALLBACK)
    if written is None:
        return proposed(
            lambda: _checked(
                plain(columns, by_name, table.rows, table.place, table.text), table, base
            ),
            Certainty.FALLBACK,
        )

    def complete() -> Proposal:
        require_context(written, by_name, table.place)
        return _checked(written, table, base)

    return proposed(complete, by_names)


def _checked(chosen: Proposal, table: Table, base: BaseFacts) -> Proposal:
    """Return a proposal with the check that a model can learn it."""
    _keep_own_space(chosen, table)

    def check() -> None:
        check_texts(table, chosen)
        if not base.can_write:
            raise _no_label(table, chosen, base)
        if chosen.is_chat or "prompt_column" in chosen.keys:
            _require_supported(table, chosen)

    chosen.check = check
    return chosen


def _require_supported(table: Table, chosen: Proposal) -> None:
    """Reject rows that only look like conversations, or like prompts with their answers.

    Raises:
        LoraError: If a row holds what no task reads, or none holds a conversation to be trained.
    """
    place = table.place
    reject_rows(table.rows, place, unsupported)
    if not chosen.is_chat:
        return
    names, more = zip(*PROMPT_NAMES, strict=True)
    form, column = chosen.keys["format"], chosen.keys.get("messages_column")
    require_whole_conversations(table, form, column, names, more)


def _no_label(table: Table, chosen: Proposal, base: BaseFacts) -> LoraError:
    """Return the error of texts that an encoder, or an encoder-decoder, cannot learn."""
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
        because = "the model writes one text of another, and there is one text"
        hint = hint.replace("name the label", "name a second text or a label")
    return LoraError(f"the rows have {what}, but no label, and {because}", place, hint)


def _named_pair(table: Table) -> tuple[Column, Column] | None:
    """Return the prompt and the completion that the user names: two columns of text."""
    if table.text is None or table.label not in table.by_name:
        return None
    prompt, completion = table.by_name[table.text], table.by_name[table.label]
    return (prompt, completion) if completion.kind == "text" else None


def spoken(columns: Sequence[Column], place: str, can_write: bool) -> Proposal | None:
    """Return the text that belongs to files of sound or pictures, as a language model may learn it.

    Raises:
        LoraError: If there is nothing else that the model could learn.
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


def conversation(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> Proposal | None:
    """Return the task of conversations, however they are stored."""
    for column in columns:
        if column.kind in CONVERSATIONS:
            return Proposal(
                {"type": "causal_lm", "messages_column": column.name, "format": column.kind},
                {
                    "": f"conversations in `{column.name}`",
                    "messages_column": f"lists of {TURNS[column.kind]}",
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
    """Return whether a column holds lists of inputs with their outputs."""
    if column is None or column.kind != "other":
        return False
    values = [value for row in rows if isinstance(value := row.get(column.name), list) and value]
    good = sum(isinstance(value[0], dict) and "output" in value[0] for value in values)
    return good > 0.9 * len(rows)


def prompts(by_name: dict[str, Column]) -> Proposal | None:
    """Return the task of a prompt and its completion, where two names say so."""
    lower = {name.lower(): column for name, column in by_name.items()}
    for prompt_name, completion_name in PROMPT_NAMES:
        prompt, completion = lower.get(prompt_name), lower.get(completion_name)
        strong = prompt_name == "prompt"  # no other task calls its columns so
        if prompt is None or completion is None or prompt.kind in ("other", "list", "blank"):
            continue
        is_one = (
            completion.kind not in ("other", "list", "blank") or completion.separator is not None
        )
        if completion.kind == "text" or (strong and is_one):
            return prompt_and_completion(prompt, completion)
        if completion.rows_per_value < 2 and completion.kind in ("category", "number", "id"):
            return prompt_and_completion(prompt, completion)
    return None


def require_context(chosen: Proposal, by_name: dict[str, Column], place: str) -> None:
    """Reject a prompt whose context is in a third column, which the model would not see.

    Raises:
        LoraError: If there is such a column, as in Dolly and in SQuAD.
    """
    if "prompt_column" not in chosen.keys:
        return
    for name in _contexts(chosen, by_name):
        prompt, completion = chosen.keys["prompt_column"], chosen.keys["completion_column"]
        new = f"instruction: {field(prompt)}, input: {field(name)}, output: {field(completion)}"
        raise LoraError(
            f"`{name}` belongs to the prompt in {counted(by_name[name].count, 'row')}, and a "
            "recipe has one column for it",
            place,
            f"join them: {jq_command(f'{{{new}}}', place, 'joined.jsonl')}; or train without it: "
            f"`--text {shlex.quote(prompt)} --label {shlex.quote(completion)}`",
        )


def _contexts(chosen: Proposal, by_name: dict[str, Column]) -> list[str]:
    """Return the columns of texts that belong to a prompt."""
    return [
        name
        for name, column in by_name.items()
        if name.lower() in CONTEXT_NAMES and name not in chosen.inputs and column.kind == "text"
    ]


def require_one_answer(by_name: dict[str, Column], place: str) -> None:
    """Reject prompts with lists of answers, of which a language model learns one.

    Raises:
        LoraError: If they are, as in NQ-open.
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
            and len(completion.counts) > MANY_ANSWERS * completion.count
        ):
            what = f"`{completion.name}` holds lists of answers, and a language model learns one"
            first = jq_command(f"{field(completion.name)} |= .[0]", place, "first.jsonl")
            raise LoraError(what, place, f"keep the first of each: {first}")


def require_conversations(by_name: dict[str, Column], place: str) -> None:
    """Reject rows that are single messages of conversations, as in oasst1.

    Raises:
        LoraError: If they are.
    """
    if {"message_id", "parent_id", "role", "text"} <= set(by_name):
        raise LoraError(
            "each row is one message of a conversation, which `parent_id` puts together",
            place,
            "write each conversation as a row, with a list `messages` of role and content",
        )


def prompt_and_completion(asked: Column, said: Column) -> Proposal:
    """Return the task of two columns, of which the second answers the first."""
    return Proposal(
        {
            "type": "causal_lm",
            "prompt_column": asked.name,
            "completion_column": said.name,
            "separator": "\n",
        },
        {
            "": f"`{asked.name}` and its answer `{said.name}`",
            "prompt_column": f"{asked.characters:.0f} characters on average; read, not trained",
            "completion_column": f"{said.characters:.0f} characters on average",
            "separator": "a new line between them",
        },
        [asked.name, said.name],
    )


def _keep_own_space(chosen: Proposal, table: Table) -> None:
    """Put nothing between prompts and completions that have a space or a line end of their own."""
    if "prompt_column" not in chosen.keys:
        return
    asked, said = chosen.keys["prompt_column"], chosen.keys["completion_column"]
    pairs = [(row.get(asked), row.get(said)) for row in table.rows]
    texts = [(a, b) for a, b in pairs if isinstance(a, str) and isinstance(b, str) and b]
    spaced = sum(a != a.rstrip() or b != b.lstrip() for a, b in texts)
    if texts and spaced >= MOSTLY * len(texts):
        chosen.keys["separator"] = ""
        chosen.why["separator"] = "the texts have a space or a line end of their own between them"


def translation(first: Column, second: Column, place: str, can_write: bool) -> Proposal:
    """Return the task of two text files paired line by line.

    Raises:
        LoraError: If the model cannot write.
    """
    if not can_write:
        what = "an encoder writes no text, so it cannot learn one file from the other"
        raise LoraError(what, place, "use a language model")
    chosen = prompt_and_completion(first, second)
    chosen.why[""] = f"a line of `{second.name}` answers the same line of `{first.name}`"
    return chosen


def _two_texts(columns: Sequence[Column]) -> Proposal | None:
    """Return the task of two texts, of which one is by its name the answer to the other."""
    pair = source_and_target(columns)
    return prompt_and_completion(*pair) if pair is not None else None


def _require_one_text(chosen: Column, columns: Sequence[Column], place: str) -> None:
    """Reject a choice by length where another text may be the answer to it, and would be lost.

    Raises:
        LoraError: If there is such a text, which is not much shorter.
    """
    is_named = TEXT_NAMES.fullmatch(chosen.name.strip()) is not None
    for other in columns:
        if other.kind != "text" or other is chosen:
            continue
        is_longer = other.characters > chosen.characters and chosen.name.lower() != "text"
        if is_longer or (not is_named and other.characters > SHORT * chosen.characters):
            raise LoraError(
                f"which column is the text? It could be `{chosen.name}` or `{other.name}`",
                place,
                "name it with `--text COLUMN`, or a prompt and its completion: `--text A --label "
                f"B` ({list_columns(columns)})",
            )


def plain(
    columns: Sequence[Column],
    by_name: dict[str, Column],
    rows: Sequence[dict[str, Any]],
    place: str,
    text: str | None,
) -> Proposal:
    """Return the task of text alone."""
    column = by_name[text] if text is not None else text_of(columns, place, None, rows=rows)
    if text is None:
        _require_one_text(column, columns, place)
    why = "chosen by you" if text is not None else text_reason(column, columns)
    return Proposal(
        {"type": "causal_lm", "text_column": column.name},
        {"": "text without a label", "text_column": why},
        [column.name],
    )
