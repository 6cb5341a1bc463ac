"""Rows that a language model learns to write: conversations, prompts with answers, plain text."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_cli.errors import LoraError, counted
from lora_cli.recipe_draft.column_kinds import Column, is_blank
from lora_cli.recipe_draft.text_columns import TEXT_NAMES, listed, text_of, text_reason

PROMPT_NAMES = [
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "chosen"), ("question", "answer"),
    ("question", "response"), ("query", "response"), ("query", "answer"), ("input", "output"),
    ("instruction", "response"), ("instruction", "completion"), ("source", "target"),
    ("article", "summary"), ("document", "summary"), ("text", "summary"),
    ("article", "highlights"), ("dialogue", "summary"), ("frage", "antwort"),
]  # fmt: skip
CONVERSATION_COLUMNS = {  # that are read besides the turns, by the format of the conversation
    "openai": {"system", "tools", "functions"},
    "sharegpt": {"system", "tools", "functions"},
    "alpaca": {"system", "history"},
    "self_instruct": {"system"},
}
CONTEXT_NAMES = ("context", "input", "passage", "knowledge", "document")


@dataclass
class Chosen:
    """The task, and of each key what says so.

    Args:
        keys: The keys of the recipe's `task`, but for the length.
        why: Of some of these keys, what says so.
        inputs: The columns that the model reads and writes; their length counts.
        labels: How often each label stands, if there are labels.
        left_out: Of the other columns, why they are not read.
        row_error: Says what is wrong with a row, where more than a missing value can be.
    """

    keys: dict[str, Any]
    why: dict[str, str]
    inputs: list[str]
    labels: Counter[str] | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    row_error: Callable[[dict[str, Any]], str] | None = None

    @property
    def is_chat(self) -> bool:
        """Whether a row is a conversation, written with the model's chat template."""
        return "format" in self.keys

    @property
    def also_read(self) -> set[str]:
        """The columns that conversations are read from besides their turns, where there are any."""
        return CONVERSATION_COLUMNS.get(self.keys.get("format", ""), set())

    @property
    def used(self) -> set[str]:
        """The columns that the task reads."""
        label = self.keys.get("label_columns") or [
            self.keys.get(key) for key in ("label_column", "tags_column", "spans_column")
        ]
        return {*self.inputs, *filter(None, label)}


def spoken(columns: Sequence[Column], place: str, can_write: bool) -> Chosen | None:
    """Return the text that belongs to files of sound or pictures, as a language model may learn it.

    Raises:
        LoraError: If there is nothing else that the model could learn.
    """
    files = next((column for column in columns if column.kind == "file"), None)
    if files is None or any(column.kind in ("text", "openai", "sharegpt") for column in columns):
        return None
    texts = [c for c in columns if c.kind == "category" and TEXT_NAMES.fullmatch(c.name.strip())]
    if can_write and len(texts) == 1:
        why = f"what belongs to the files in `{files.name}`, which no task reads yet"
        keys = {"type": "causal_lm", "text_column": texts[0].name}
        return Chosen(keys, {"": "text without a label", "text_column": why}, [texts[0].name])
    example = next(iter(files.counts))
    raise LoraError(
        f"the rows are about files of sound or pictures (`{files.name}`: {example}), which no "
        "task reads yet",
        place,
        "to learn from the other columns alone, name them: `--text COLUMN --label COLUMN` "
        f"({listed(columns)})",
    )


def conversation(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> Chosen | None:
    """Return the task of conversations, however they are stored."""
    for column in columns:
        if column.kind in ("openai", "sharegpt"):
            says = "role and content" if column.kind == "openai" else "from and value"
            return Chosen(
                {"type": "causal_lm", "messages_column": column.name, "format": column.kind},
                {
                    "": f"conversations in `{column.name}`",
                    "messages_column": f"lists of turns with {says}",
                },
                [column.name],
            )
    kinds = {column.name: column for column in columns}
    if "instruction" in kinds and _has_instances(kinds.get("instances"), rows):
        return Chosen(
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
    return Chosen(
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


def prompts(by_name: dict[str, Column]) -> Chosen | None:
    """Return the task of a prompt and its completion, where two names say so."""
    lower = {name.lower(): column for name, column in by_name.items()}
    for prompt, completion in PROMPT_NAMES:
        asked, said = lower.get(prompt), lower.get(completion)
        strong = prompt == "prompt"  # no other task calls its columns so
        if asked is None or said is None or asked.kind in ("other", "list", "blank"):
            continue
        if said.kind == "text" or (strong and said.kind not in ("other", "list", "blank")):
            return prompt_and_completion(asked, said)
        if said.rows_per_value < 2 and said.kind in ("category", "number", "id"):
            return prompt_and_completion(asked, said)
    return None


def require_context(chosen: Chosen, by_name: dict[str, Column], place: str) -> None:
    """Reject a prompt whose context is in a third column, which the model would not see.

    Raises:
        LoraError: If there is such a column, as in Dolly and in SQuAD.
    """
    if "prompt_column" not in chosen.keys:
        return
    for name, column in by_name.items():
        if name.lower() in CONTEXT_NAMES and name not in chosen.inputs and column.kind == "text":
            asked, said = chosen.keys["prompt_column"], chosen.keys["completion_column"]
            new = f"instruction: .{asked}, input: .{name}, output: .{said}"
            source = shlex.quote(place)
            raise LoraError(
                f"`{name}` belongs to the prompt in {counted(column.count, 'row')}, and a recipe "
                "has one column for it",
                place,
                f"join them: `jq -c '{{{new}}}' {source} > joined.jsonl`; or train without it: "
                f"`--text {shlex.quote(asked)} --label {shlex.quote(said)}`",
            )


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


def prompt_and_completion(asked: Column, said: Column) -> Chosen:
    """Return the task of two columns, of which the second answers the first."""
    return Chosen(
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


def translation(first: Column, second: Column, place: str, can_write: bool) -> Chosen:
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


def plain(
    columns: Sequence[Column],
    by_name: dict[str, Column],
    rows: Sequence[dict[str, Any]],
    place: str,
    text: str | None,
) -> Chosen:
    """Return the task of text alone."""
    column = by_name[text] if text is not None else text_of(columns, place, None, rows=rows)
    why = "chosen by you" if text is not None else text_reason(column, columns)
    return Chosen(
        {"type": "causal_lm", "text_column": column.name},
        {"": "text without a label", "text_column": why},
        [column.name],
    )
