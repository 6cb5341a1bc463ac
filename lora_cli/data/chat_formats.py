"""Convert conversations in several formats to OpenAI messages.

Content that cannot be converted is never dropped silently. Message parts that are not text, tool
calls that are not JSON, and unsupported ways to exclude a turn from the loss are errors that name
the problem.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.data.json_rows import JSON_NAMES
from lora_cli.data.label_lists import read_nested

Message = dict[str, Any]
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "tool": "tool", "function": "tool", "function_call": "assistant", "observation": "tool",
}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# role names of other data sets, which a chat template would write unchanged
STANDARD_ROLES = {
    "human": "user", "customer": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "chatbot": "assistant", "ai": "assistant", "model": "assistant",
    "observation": "tool",
}  # fmt: skip
TEXT_PARTS = (None, "text", "input_text", "output_text")
UNSUPPORTED = (
    "image", "images", "image_url", "video", "videos", "audio", "audios", "file", "files",
    "refusal", "mask", "masked", "train_detail", "documents",
)  # fmt: skip
ANSWER_FIELDS = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = (
    "weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask",
    "output_with_loss",
)  # fmt: skip
QUESTION_KEYS = (
    "human",
    "user",
    "input",
    "query",
    "question",
    "prompt",
    "instruction",
)  # keys of the question in a pair
ANSWER_KEYS = ("assistant", "gpt", "bot", "output", "response", "answer")


class RowError(ValueError):
    """A row cannot be read as a conversation; the message says why."""


@dataclass(frozen=True)
class Conversation:
    """A conversation, and the tools that its assistant may call.

    Args:
        messages: The turns, with `role` and `content` as in OpenAI's format. An assistant turn
            with `weight: 0` is excluded from the loss.
        tools: The JSON schemas of the tools; None if there are none.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def read_conversations(row: dict[str, Any], form: str, column: str | None) -> list[Conversation]:
    """Return the conversations of a row.

    Args:
        row: A row of the data.
        form: `openai`, `sharegpt`, `pairs`, `alpaca` or `self_instruct`; only a row of the last
            can have several conversations.
        column: The column of the messages; not used by the last two formats.

    Raises:
        RowError: If any part of the row cannot be read.
    """
    if form == "self_instruct":
        return [Conversation(messages) for messages in _self_instruct(row)]
    if form == "alpaca":
        return [Conversation(_alpaca(row))]
    messages = read_messages(row, form, column)
    system = _system(row) if column != "system" else []
    if system and messages[0]["role"] == "system":
        raise RowError("it has a system prompt in the column `system`, and another as a turn")
    return [Conversation([*system, *messages], _tools(row))]


def conversation_error(row: dict[str, Any], form: str, column: str | None) -> str:
    """Return why a row has no conversation to train on; empty if it has one."""
    try:
        conversations = read_conversations(row, form, column)
    except RowError as error:
        return str(error)
    have_answer = [any(m["role"] == "assistant" for m in c.messages) for c in conversations]
    if not all(have_answer):
        number = have_answer.index(False) + 1
        has_instances = form == "self_instruct"
        return (
            f"instance {number} has no `output`" if has_instances else "no turn is the assistant's"
        )
    for number, message in enumerate(conversations[0].messages, 1):
        has_answer = any(str(message.get(key) or "").strip() for key in ANSWER_FIELDS)
        if message["role"] == "assistant" and not has_answer and message.get("weight") != 0:
            return f"turn {number}: the assistant says nothing"
    return ""


def read_messages(row: dict[str, Any], form: str, column: str | None) -> list[Message]:
    """Return the conversation in a column as OpenAI messages.

    Args:
        row: A row of the data.
        form: `openai`, `sharegpt` or `pairs`.
        column: The column of the messages.

    Raises:
        RowError: If any part of the conversation cannot be read.
    """
    value = row.get(column or "")
    if isinstance(value, str):  # csv files hold the list as JSON or Python write it
        value = read_nested(value.strip())
        if value is None:
            raise RowError(f"column `{column}` is text, not a list of messages")
    if not isinstance(value, list) or not value:
        raise RowError(f"column `{column}` is not a list of messages")
    if form == "pairs":
        return _pairs(value)
    messages = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} is not an object")
        try:
            message = _openai(turn) if form == "openai" else _sharegpt(turn)
            messages.append(message | _loss_weight(turn))
        except RowError as error:
            raise RowError(f"turn {number}: {error}") from None
    return messages


def _system(row: dict[str, Any]) -> list[Message]:
    """Return the turn in a `system` column: a text, or parts as with Bedrock and Anthropic."""
    value = _value(row, "system")
    if value in (None, []):
        return []
    try:
        text = _content(value)
    except RowError as error:
        raise RowError(f"column `system`: {str(error).removeprefix('its ')}") from None
    return [{"role": "system", "content": text}] if text.strip() else []


# ------------------------------------------------------------------------------- instructions


def _self_instruct(row: dict[str, Any]) -> list[list[Message]]:
    """Return one conversation per instance; without instances, one that lacks its answer."""
    value = row.get("instances")
    if isinstance(value, str):  # csv files hold the list as JSON or Python write it
        value = read_nested(value.strip())
        if value is None:
            raise RowError("column `instances` is text, not a list of inputs and outputs")
    if value is None:
        return [_alpaca({"instruction": row["instruction"]})]
    if not isinstance(value, list) or not value:
        raise RowError("column `instances` is not a list of inputs and outputs")
    for number, instance in enumerate(value, 1):
        if not isinstance(instance, dict):
            raise RowError(f"instance {number} is not an object")
    keys = ("instruction", "system")
    shared = {key: row[key] for key in keys if key in row}
    return [_alpaca({**shared, **instance}) for instance in value]


def _alpaca(row: dict[str, Any]) -> list[Message]:
    instruction, context, answer = (
        _text_field(row, name) for name in ("instruction", "input", "output")
    )
    context = context.strip()
    question = (
        context
        if not instruction.strip() and context
        else f"{instruction}\n\n{context}"
        if context
        else instruction
    )
    reply = [{"role": "assistant", "content": answer}] if answer.strip() else []
    return [*_system(row), *_history(row), {"role": "user", "content": question}, *reply]


def _text_field(row: dict[str, Any], name: str) -> str:
    """Return a field of an instruction as text; an empty list or object is empty text."""
    value = _value(row, name)
    if value in (None, [], {}):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = JSON_NAMES.get(type(value), f"a {type(value).__name__}")
        raise RowError(f"column `{name}` holds {kind}, not text")
    return str(value)


def _value(row: dict[str, Any], name: str) -> Any:
    """Return a value of a row; None for NaN, which pandas writes for missing values."""
    value = row.get(name)
    return value if value == value else None


def _history(row: dict[str, Any]) -> list[Message]:
    """Return the earlier turns of an instruction, given as question-answer pairs."""
    history = _value(row, "history") or []
    if isinstance(history, str):
        history = read_nested(history.strip()) if history.strip() else []
    pairs: list[Any] = history if isinstance(history, list) else [None]
    if not all(map(is_pair, pairs)):
        raise RowError("column `history` is not a list of pairs, a question and its answer each")
    try:
        return [message for pair in pairs for message in _pair(pair, is_first=False, is_last=False)]
    except RowError as error:
        raise RowError(f"column `history`: {error}") from None


# -------------------------------------------------------------------------------------- pairs


def is_pair(value: Any) -> bool:
    """Return whether a value is a question with its answer: an object, or a list of two texts."""
    if isinstance(value, list):
        return len(value) == 2 and all(isinstance(text, str) for text in value)
    return isinstance(value, dict) and all(
        len(_keys_of(value, k)) == 1 for k in (QUESTION_KEYS, ANSWER_KEYS)
    )


def _keys_of(pair: dict[str, Any], known: Sequence[str]) -> list[str]:
    return [key for key in pair if key.lower() in known]


def _pairs(pairs: list[Any]) -> list[Message]:
    """Return the turns of pairs; the last pair may lack its answer."""
    messages: list[Message] = []
    for number, pair in enumerate(pairs, 1):
        if not is_pair(pair):
            what = "a question and its answer, as `human` and `assistant`, or `input` and `output`"
            raise RowError(f"pair {number} is not {what}")
        try:
            messages += _pair(pair, is_first=number == 1, is_last=number == len(pairs))
        except RowError as error:
            raise RowError(f"pair {number}: {error}") from None
    return messages


def _pair(pair: Any, is_first: bool, is_last: bool) -> list[Message]:
    if isinstance(pair, list):
        pair = {"human": pair[0], "assistant": pair[1]}
    (question_key,), (answer_key,) = _keys_of(pair, QUESTION_KEYS), _keys_of(pair, ANSWER_KEYS)
    turns = [(role, pair[key]) for role, key in (("user", question_key), ("assistant", answer_key))]
    if pair.get("system"):
        if not is_first:
            raise RowError("it has a `system`, which only the first may have")
        turns.insert(0, ("system", pair["system"]))
    if is_last and (turns[-1][1] is None or turns[-1][1] == ""):
        turns.pop()
    for role, text in turns:
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"the {role} says nothing")
    messages = [{"role": role, "content": text} for role, text in turns]
    marks = _loss_weight(pair)
    return [m | marks if m["role"] == "assistant" else m for m in messages]


# -------------------------------------------------------------------------------------- turns


def _openai(turn: dict[str, Any]) -> Message:
    role = turn.get("role")
    if not isinstance(role, str):
        hint = "; it looks like `format: sharegpt`" if "from" in turn else ""
        raise RowError(f"it has no `role`{hint}")
    _require_role(role)
    message = {key: value for key, value in turn.items() if value is not None}
    calls = _tool_calls(turn)
    for key in ("tool_calls", "function_call", "content"):
        message.pop(key, None)
    if turn.get("content") is not None:
        message["content"] = _content(turn["content"])
    elif not calls:
        raise RowError("it has no `content`")
    if calls:
        message["tool_calls"] = calls
    return message


def _require_role(role: str) -> None:
    """Reject a role that a chat template would write unchanged, and that is never trained."""
    plain = role.strip().lower()
    standard = plain if plain in ROLES else STANDARD_ROLES.get(plain)
    if standard is not None and role != standard:
        raise RowError(f"its role is `{role}`; write `{standard}`")
    if not re.fullmatch(r"[A-Za-z][\w-]*", role):
        raise RowError(f"its role is `{role}`, not a name such as `user`")


def _content(value: Any) -> str:
    """Return the content of a message as text, joining the parts of a list."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"its `content` is {JSON_NAMES[type(value)]}, not text")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise RowError(f"a part of its `content` is {JSON_NAMES[type(part)]}, not text")
        kind, text = part.get("type"), part.get("text")
        if kind == "text" and text is None:
            text = part.get("value")  # written by LLaMA-Factory 1
        if kind not in TEXT_PARTS:
            raise RowError(f"its `content` has a part `{kind}`, and only parts of text are read")
        if not isinstance(text, str):
            keys = ", ".join(f"`{key}`" for key in part)
            raise RowError(f"its `content` has a part with {keys}, but without a text in `text`")
        if other := _first_filled(part, UNSUPPORTED):
            raise RowError(f"its `content` has a part with `{other}`, and only text is read")
        texts.append(text)
    if not texts:
        raise RowError("its `content` is an empty list")
    return "".join(texts)


def _first_filled(value: dict[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if value.get(key) not in (None, "", [], {})), None)


def _tool_calls(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tool calls of a turn, with arguments as objects, as chat templates expect."""
    calls = turn.get("tool_calls") or []
    if (old := turn.get("function_call")) is not None:  # OpenAI's format before tools
        if calls:
            raise RowError("it has both `tool_calls` and `function_call`")
        calls = [{"type": "function", "function": old}]
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except (ValueError, RecursionError):
            raise RowError("its `tool_calls` are text that is no JSON") from None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError("its `tool_calls` are not a list of objects")
    return [_tool_call(call) for call in calls]


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    call = {key: value for key, value in call.items() if value is not None}
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("one of its tool calls has no `name`")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            what = f"the arguments of its call of `{function['name']}` are text that is no JSON"
            raise RowError(what) from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"the arguments of its call of `{function['name']}` are no object")
    converted = {**function, "arguments": arguments}
    return {**call, "function": converted} if "function" in call else converted


def _sharegpt(turn: dict[str, Any]) -> Message:
    speaker, text = turn.get("from", turn.get("role")), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise RowError(f"`{speaker}` is not a known speaker; they are {known}")
    if not isinstance(text, str | list) or (isinstance(text, list) and not text):
        raise RowError("it has no `value`")
    if speaker == "function_call":
        try:
            value = json.loads(text) if isinstance(text, str) else text
        except (ValueError, RecursionError):
            value = None
        calls: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(call, dict) for call in calls):
            raise RowError("its `value` is no JSON of a call: a name and its arguments")
        calls = [{"type": "function", "function": _tool_call(call)} for call in calls]
        return {"role": "assistant", "tool_calls": calls}
    return {"role": SHAREGPT_ROLES[speaker], "content": _content(text)}


def _loss_weight(turn: dict[str, Any]) -> Message:
    """Return the loss weight of a turn, if it states one; reject fields that are not supported."""
    if other := _first_filled(turn, UNSUPPORTED):
        raise RowError(f"it has `{other}`, which no task reads")
    marks = {key: turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None}
    for key, value in marks.items():
        if value not in (0, 1):  # also true and false
            raise RowError(f"its `{key}` is {value!r}, not 0 or 1")
    return {"weight": 0} if any(not value for value in marks.values()) else {}


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the JSON schemas of the tools in a row; None if it has none."""
    filled = (key for key in ("tools", "functions") if _value(row, key) not in (None, "", []))
    name = next(filled, None)
    if name is None:
        return None
    tools = row[name]
    if isinstance(tools, str):
        tools = read_nested(tools.strip())
        if tools is None:
            raise RowError(f"column `{name}` is text that is no JSON")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"column `{name}` is not a list of the schemas of tools")
    if not all(isinstance(name_of(tool), str) for tool in tools):
        raise RowError(f"column `{name}` has a tool without a name")
    if name == "functions":  # OpenAI's format before tools
        tools = [{"type": "function", "function": tool} for tool in tools]
    return tools or None


def name_of(tool: dict[str, Any]) -> Any:
    """Return the name in a tool schema or a tool call."""
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None
