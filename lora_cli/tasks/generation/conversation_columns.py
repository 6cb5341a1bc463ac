"""Reject conversations that several columns hold together: what one lacks would not be learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_cli.data.chat_formats import RowError, conversation_error, read_messages
from lora_cli.data.column_kinds import CONVERSATIONS
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.errors import LoraError
from lora_cli.tasks.proposal import Table

ROLE_AND_TEXT = {  # how a format writes a turn of the user, and of the assistant
    "openai": ('{{role: "user", content: {}}}', '{{role: "assistant", content: {}}}'),
    "sharegpt": ('{{from: "human", value: {}}}', '{{from: "gpt", value: {}}}'),
}
WANTED = "put the turns of a row into one column, in their order: "


def require_whole_conversations(
    table: Table, form: str, column: str | None, prompts: Sequence[str], answers: Sequence[str]
) -> None:
    """Reject conversations of which another column holds the question or the answer.

    Args:
        table: The rows.
        form: How they are stored, as in `task.format`.
        column: The column of the turns; None if columns of text hold them.
        prompts: Names of columns that hold questions, in lower case.
        answers: Names of columns that hold answers, in lower case.

    Raises:
        LoraError: If there is such a column, or no row has a conversation to train.
    """
    place = table.place
    talks = [c.name for c in table.columns if c.kind in CONVERSATIONS]
    if len(talks) > 1:
        talks.sort(key=lambda name: _speakers(table, form, name)[:1] == ["assistant"])
        joined = " + ".join(map(field, talks))
        what = f"the columns `{'` and `'.join(talks)}` all hold turns of conversations"
        raise LoraError(what, place, _joining(joined, place))
    if column is not None and form in ROLE_AND_TEXT:
        speakers = set(_speakers(table, form, column))
        asks, says = ROLE_AND_TEXT[form]
        for role, names, turns in (
            ("user", prompts, f"[{asks}] + {field(column)}"),
            ("assistant", answers, f"{field(column)} + [{says}]"),
        ):
            others = [
                c.name
                for c in table.columns
                if c.name.lower() in names and c.kind in ("text", "category", "number", "id")
            ]
            if role not in speakers and len(others) == 1:
                what = f"no turn in `{column}` is the {role}'s, whose text stands in `{others[0]}`"
                raise LoraError(what, place, _joining(turns.format(field(others[0])), place))
    errors = [conversation_error(row, form, column) for row in table.rows]
    if all(errors):
        hint = "each row has a list of turns, of which one at least is the assistant's"
        raise LoraError(f"no row can be trained: {errors[0]}", f"{place}, row 1", hint)


def _joining(turns: str, place: str) -> str:
    return WANTED + jq_command(f"{{messages: ({turns})}}", place, "joined.jsonl")


def _speakers(table: Table, form: str, column: str) -> list[str]:
    """Return the roles of all turns in a column that can be read, in their order."""
    roles: list[Any] = []
    for row in table.rows:
        try:
            roles += [message["role"] for message in read_messages(row, form, column)]
        except RowError:
            continue
    return roles
