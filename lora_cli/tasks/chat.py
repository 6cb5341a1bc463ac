"""Conversations: four ways to store them, and which tokens of them are trained.

A conversation is rendered once by the model's chat template. A template with generation markers
says itself what the assistant wrote. For others, a turn's share of the text is what the template
adds for it: the difference between the rendering up to the turn and the rendering before it. Where
a template rewrites earlier turns (Qwen 3 takes their reasoning away), each of the assistant's turns
becomes an example of its own, rendered up to there: as the model sees it when it is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.data.json_rows import JSON_NAMES
from lora_cli.errors import LoraError

Message = dict[str, Any]
THINK_END = "</think>"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "tool": "tool", "function": "tool", "function_call": "assistant", "observation": "tool",
}  # fmt: skip


def read_conversations(
    row: dict[str, Any], form: str, column: str | None
) -> list[list[Message]] | str:
    """Return the conversations of a row as OpenAI messages, or what is wrong with it.

    Args:
        row: A row of the data.
        form: `openai`, `sharegpt`, `alpaca` or `self_instruct`, where a row may hold several.
        column: The column of the messages; not used by the last two forms.
    """
    if form == "self_instruct":
        return _self_instruct(row)
    messages = _alpaca(row) if form == "alpaca" else read_messages(row, form, column)
    return messages if isinstance(messages, str) else [messages]


def _self_instruct(row: dict[str, Any]) -> list[list[Message]] | str:
    """Return a conversation for each instance; without any, one that waits for its answer."""
    value = row.get("instances")
    if isinstance(value, str):  # csv files hold the list as JSON
        try:
            value = json.loads(value)
        except ValueError:
            return "column `instances` is text, not a list of inputs and outputs"
    if value is None:
        return [_alpaca({"instruction": row["instruction"]})]
    if not isinstance(value, list) or not value:
        return "column `instances` is not a list of inputs and outputs"
    for number, instance in enumerate(value, 1):
        if not isinstance(instance, dict):
            return f"instance {number} is not an object"
    keys = ("instruction", "system")
    whole = {key: row[key] for key in keys if key in row}
    return [_alpaca({**whole, **instance}) for instance in value]


def read_messages(row: dict[str, Any], form: str, column: str | None) -> list[Message] | str:
    """Return the conversation in a column as OpenAI messages, or what is wrong with it.

    Args:
        row: A row of the data.
        form: `openai` or `sharegpt`.
        column: The column of the messages.
    """
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
    return messages


def _alpaca(row: dict[str, Any]) -> list[Message]:
    more = str(row.get("input") or "").strip()
    question = f"{row['instruction']}\n\n{more}" if more else str(row["instruction"])
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    answer = row.get("output")
    blank = answer is None or not str(answer).strip()
    said = [] if blank else [{"role": "assistant", "content": str(answer)}]
    return [*system, {"role": "user", "content": question}, *said]


def _openai(turn: dict[str, Any]) -> Message | str:
    role = turn.get("role")
    if not isinstance(role, str):
        hint = "; it looks like `format: sharegpt`" if "from" in turn else ""
        return f"it has no `role`{hint}"
    content = turn.get("content")
    if content is None and not turn.get("tool_calls"):
        return "it has no `content`"
    if not isinstance(content, str | list | None):  # a list has parts, as in OpenAI's requests
        return f"its `content` is {JSON_NAMES[type(content)]}, not text"
    return {key: value for key, value in turn.items() if value is not None}


def _sharegpt(turn: dict[str, Any]) -> Message | str:
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        return f"`{speaker}` is not a known speaker; they are {', '.join(SHAREGPT_ROLES)}"
    if not isinstance(text, str):
        return "it has no `value`"
    return {"role": SHAREGPT_ROLES[speaker], "content": text}


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    train_on: str,
    opened: str = "",
) -> list[tuple[list[int], list[bool]]]:
    """Return the tokens of a conversation's examples, one as a rule, and which are trained.

    Args:
        tokenizer: It holds the chat template.
        messages: The conversation.
        train_on: `assistant`, `all` or `last`.
        opened: What `opened_block` found.

    Raises:
        LoraError: If the template refuses the conversation, or the turns cannot be told apart.
    """
    if train_on != "all" and _GENERATION.search(tokenizer.get_chat_template()):
        encoding = _apply(
            tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [bool(token) for token in encoding["assistant_masks"]]
        return [(list(encoding["input_ids"]), _last_run(mask) if train_on == "last" else mask)]
    examples = []
    for text, spans in render(tokenizer, messages, train_on, opened):
        encoding = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        trained = [
            any(start < last and first < end for first, last in spans)
            for start, end in encoding["offset_mapping"]
        ]
        examples.append((list(encoding["input_ids"]), trained))
    return examples


def _last_run(mask: list[bool]) -> list[bool]:
    """Return the mask with its last run of true entries alone."""
    last = max((i for i, on in enumerate(mask) if on), default=-1)
    first = last
    while first > 0 and mask[first - 1]:
        first -= 1
    return [first <= i <= last for i in range(len(mask))]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    train_on: str,
    opened: str = "",
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return a conversation's examples as text, each with the spans of characters to train.

    Args:
        tokenizer: It holds the chat template.
        messages: The conversation.
        train_on: `assistant`, `all` or `last`.
        opened: What `opened_block` found.

    Raises:
        LoraError: If the template writes a turn in another way than it asks for it, or leaves its
            reasoning out.
    """
    whole = _apply(tokenizer, messages)
    if train_on == "all":
        return [(whole, [(0, len(whole))])]
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    alone = []
    for turn in assistant if train_on == "assistant" else assistant[-1:]:
        after = _apply(tokenizer, messages[: turn + 1])
        before = _before(tokenizer, messages, turn, after, opened)
        if not after.startswith(before):
            raise LoraError(
                f"turn {turn + 1} cannot be told from what stands before it: the chat template "
                "writes it in another way than it asks for it",
                hint="give another template with `task.chat_template`",
            )
        _require_reasoning(messages[turn], after[len(before) :], turn + 1)
        alone.append((after, [(len(before), len(after))]))
    if all(whole.startswith(after) for after, _ in alone):
        return [(whole, [span for _, spans in alone for span in spans])]
    return alone


def _before(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    turn: int,
    after: str,
    opened: str,
) -> str:
    """Return what the template writes before the assistant's turn begins to speak."""
    if turn:
        return prompt_of(tokenizer, messages[:turn], opened)
    # Templates cannot render no messages. What they add to ask for an answer stands in front of it.
    prompt = prompt_of(tokenizer, messages[:1], opened)[len(after) :]
    start = after.find(prompt) + len(prompt) if prompt in after else 0
    return after[:start]


def _require_reasoning(message: Message, written: str, number: int) -> None:
    """Refuse a turn whose reasoning the template does not write: it would be lost unnoticed."""
    content, reasoning = message.get("content"), message.get("reasoning_content")
    if not isinstance(reasoning, str) and isinstance(content, str) and THINK_END in content:
        reasoning = content.partition(THINK_END)[0].rpartition("<think>")[2]
    if isinstance(reasoning, str) and reasoning.strip() not in written:
        raise LoraError(
            f"turn {number}: the chat template leaves out the reasoning before the answer",
            hint="take it out of the data, or give a template that writes it with "
            "`task.chat_template`",
        )


def opened_block(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template opens to ask for an answer, but does not write into an answer.

    DeepSeek's asks with `<think>` and keeps turns without it. The assistant's turn begins before
    that: so it is trained, and so it is asked.
    """
    question = {"role": "user", "content": "Hi"}
    answers = [{"role": "assistant", "content": said} for said in ("0", "1")]
    try:
        asked = prompt_of(tokenizer, [question])
        written = [str(_apply(tokenizer, [question, answer])) for answer in answers]
    except LoraError:  # it takes no such conversation, and says so of the rows
        return ""
    shared = takewhile(lambda letters: len(set(letters)) == 1, zip(asked, *written, strict=False))
    return asked[len(list(shared)) :]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the token by which the chat template ends the assistant's turn, if it is one token."""
    said = "Hello"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    try:
        text = str(_apply(tokenizer, messages))
    except LoraError:  # it takes no such conversation, and says so of the rows
        return set()
    tail = text[text.rfind(said) + len(said) :].strip()
    ids = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
    return set(ids[:1]) & set(tokenizer.added_tokens_decoder)


def prompt_of(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], opened: str = ""
) -> str:
    """Return a conversation as text that the assistant is to continue."""
    text = str(_apply(tokenizer, messages, add_generation_prompt=True))
    return text.removesuffix(opened)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), **{"tokenize": False, **options})
    except Exception as error:  # a template is a program; it fails in any way it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"the chat template refuses the conversation: {reason}"
        hint = "mend the row, or give a template that takes it with `task.chat_template: FILE`"
        raise LoraError(what, hint=hint) from error
