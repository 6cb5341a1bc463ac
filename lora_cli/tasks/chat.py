"""Conversations: three ways to store them, and which tokens of them are trained.

A conversation is rendered once by the model's chat template. A turn's share of the text is what the
template adds for it: the difference between the rendering up to the turn and the rendering before
it. That needs no generation markers in the template; a template whose renderings are not prefixes
of each other (one that rewrites earlier turns) cannot be masked so, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.errors import LoraError

Message = dict[str, Any]
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "tool": "tool", "function": "tool", "function_call": "assistant", "observation": "tool",
}  # fmt: skip


def read_messages(row: dict[str, Any], form: str, column: str | None) -> list[Message] | str:
    """Return the conversation of a row as OpenAI messages, or what is wrong with it.

    Args:
        row: A row of the data.
        form: `openai`, `sharegpt` or `alpaca`.
        column: The column of the messages; not used by `alpaca`.
    """
    if form == "alpaca":
        instruction, output = row.get("instruction"), row.get("output")
        if not instruction or not output:
            return "`instruction` or `output` is blank"
        more = row.get("input")
        question = f"{instruction}\n\n{more}" if more else str(instruction)
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return [
            *system,
            {"role": "user", "content": question},
            {"role": "assistant", "content": str(output)},
        ]
    value = row.get(column or "")
    if isinstance(value, str):  # csv files hold the list as JSON
        try:
            value = json.loads(value)
        except ValueError:
            return f"column `{column}` is text, not a list of messages"
    if not isinstance(value, list) or not value:
        return f"column `{column}` is not a list of messages"
    messages = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            return f"turn {number} is not an object"
        message = _openai(turn) if form == "openai" else _sharegpt(turn)
        if isinstance(message, str):
            return f"turn {number}: {message}"
        messages.append(message)
    if not any(message["role"] == "assistant" for message in messages):
        return "no turn is the assistant's"
    return messages


def _openai(turn: dict[str, Any]) -> Message | str:
    role = turn.get("role")
    if not isinstance(role, str):
        hint = "; it looks like `format: sharegpt`" if "from" in turn else ""
        return f"it has no `role`{hint}"
    if turn.get("content") is None and not turn.get("tool_calls"):
        return "it has no `content`"
    return {key: value for key, value in turn.items() if value is not None}


def _sharegpt(turn: dict[str, Any]) -> Message | str:
    speaker, text = turn.get("from"), turn.get("value")
    if speaker not in SHAREGPT_ROLES:
        return f"`{speaker}` is not a known speaker; they are {', '.join(SHAREGPT_ROLES)}"
    if not isinstance(text, str):
        return "it has no `value`"
    return {"role": SHAREGPT_ROLES[speaker], "content": text}


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], train_on: str
) -> tuple[str, list[tuple[int, int]]]:
    """Return the conversation as text, and the spans of characters that are trained.

    Args:
        tokenizer: It holds the chat template.
        messages: The conversation.
        train_on: `assistant`, `all` or `last`.

    Raises:
        LoraError: If the template's rendering of a beginning is not the beginning of its rendering
            of the whole.
    """
    whole = _apply(tokenizer, messages)
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "all":
        return whole, [(0, len(whole))]
    spans = []
    for turn in assistant if train_on == "assistant" else assistant[-1:]:
        before = _apply(tokenizer, messages[:turn], add_generation_prompt=True)
        after = _apply(tokenizer, messages[: turn + 1])
        if not (after.startswith(before) and whole.startswith(after)):
            raise LoraError(
                f"turn {turn + 1} cannot be found in the conversation: the chat template rewrites "
                "earlier turns",
                hint="give another template with `task.chat_template`, or `task.train_on: all`",
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    if not messages:  # templates read the first message; there is none before the first turn
        return ""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
