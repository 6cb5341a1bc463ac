"""The formats of conversations in a row; all are converted to OpenAI's messages.

Anything with a meaning that cannot be converted is an error that names it, and is never dropped:
parts of a message that are not text, tool calls that are not JSON, marks of turns that are not to
be trained.
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
# names of roles in other data sets, which a chat template would write unchanged
MEANT_ROLES = {
    "human": "user", "customer": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "chatbot": "assistant", "ai": "assistant", "model": "assistant",
    "observation": "tool",
}  # fmt: skip
TEXT_PARTS = (None, "text", "input_text", "output_text")
NOT_READ = (
    "image", "images", "image_url", "video", "videos", "audio", "audios", "file", "files",
    "refusal", "mask", "masked", "train_detail", "documents",
)  # fmt: skip
SAID = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")
TRAINED_MARKS = (
    "weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask",
    "output_with_loss",
)  # fmt: skip
ASKED = ("human", "user", "input", "query", "question", "prompt", "instruction")  # of a pair
ANSWERED = ("assistant", "gpt", "bot", "output", "response", "answer")


class RowError(ValueError):
    """A row cannot be read as a conversation; the message says why."""


@dataclass(frozen=True)
class Conversation:
    """A conversation, and the tools that its assistant may call.

    Args:
        messages: The turns, with `role` and `content` as in OpenAI's format. An assistant's turn
            with `weight: 0` is not trained.
        tools: The JSON schemas of the tools; None if there are none.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def read_conversations(row: dict[str, Any], form: str, column: str | None) -> list[Conversation]:
    """Return the conversations of a row.

    Args:
        row: A row of the data.
        form: `openai`, `sharegpt`, `pairs`, `alpaca` or `self_instruct`, where a row may hold
            several.
        column: The column of the messages; not used by the last two forms.

    Raises:
        RowError: If something of it cannot be read.
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
    """Return why a row holds no conversation that can be trained, or nothing."""
    try:
        conversations = read_conversations(row, form, column)
    except RowError as error:
        return str(error)
    answered = [any(m["role"] == "assistant" for m in c.messages) for c in conversations]
    if not all(answered):
        number = answered.index(False) + 1
        several = form == "self_instruct"
        return f"instance {number} has no `output`" if several else "no turn is the assistant's"
    for number, message in enumerate(conversations[0].messages, 1):
        said = any(str(message.get(key) or "").strip() for key in SAID)
        if message["role"] == "assistant" and not said and message.get("weight") != 0:
            return f"turn {number}: the assistant says nothing"
    return ""


def read_messages(row: dict[str, Any], form: str, column: str | None) -> list[Message]:
    """Return the conversation in a column as OpenAI messages.

    Args:
        row: A row of the data.
        form: `openai`, `sharegpt` or `pairs`.
        column: The column of the messages.

    Raises:
        RowError: If something of it cannot be read.
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
            messages.append(message | _marked(turn))
        except RowError as error:
            raise RowError(f"turn {number}: {error}") from None
    return messages


def _system(row: dict[str, Any]) -> list[Message]:
    """Return the turn of a column `system`: a text or, as Bedrock and Anthropic have it, parts."""
    value = _given(row, "system")
    if value in (None, []):
        return []
    try:
        text = _content(value)
    except RowError as error:
        raise RowError(f"column `system`: {str(error).removeprefix('its ')}") from None
    return [{"role": "system", "content": text}] if text.strip() else []


# ------------------------------------------------------------------------------- instructions


def _self_instruct(row: dict[str, Any]) -> list[list[Message]]:
    """Return a conversation for each instance; without any, one that waits for its answer."""
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
    whole = {key: row[key] for key in keys if key in row}
    return [_alpaca({**whole, **instance}) for instance in value]


def _alpaca(row: dict[str, Any]) -> list[Message]:
    asked, more, answer = (_field(row, name) for name in ("instruction", "input", "output"))
    more = more.strip()
    question = more if not asked.strip() and more else f"{asked}\n\n{more}" if more else asked
    said = [{"role": "assistant", "content": answer}] if answer.strip() else []
    return [*_system(row), *_history(row), {"role": "user", "content": question}, *said]


def _field(row: dict[str, Any], name: str) -> str:
    """Return a part of an instruction as text; a list that holds nothing is none."""
    value = _given(row, name)
    if value in (None, [], {}):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = JSON_NAMES.get(type(value), f"a {type(value).__name__}")
        raise RowError(f"column `{name}` holds {kind}, not text")
    return str(value)


def _given(row: dict[str, Any], name: str) -> Any:
    """Return a value of a row; NaN, which pandas writes where nothing stands, is none."""
    value = row.get(name)
    return value if value == value else None


def _history(row: dict[str, Any]) -> list[Message]:
    """Return the earlier turns of an instruction: pairs of a question and its answer."""
    history = _given(row, "history") or []
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
    return isinstance(value, dict) and all(len(_keys_of(value, k)) == 1 for k in (ASKED, ANSWERED))


def _keys_of(pair: dict[str, Any], known: Sequence[str]) -> list[str]:
    return [key for key in pair if key.lower() in known]


def _pairs(pairs: list[Any]) -> list[Message]:
    """Return the turns of pairs; the last pair may wait for its answer."""
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
    (asked,), (answered,) = _keys_of(pair, ASKED), _keys_of(pair, ANSWERED)
    said = [(role, pair[key]) for role, key in (("user", asked), ("assistant", answered))]
    if pair.get("system"):
        if not is_first:
            raise RowError("it has a `system`, which only the first may have")
        said.insert(0, ("system", pair["system"]))
    if is_last and (said[-1][1] is None or said[-1][1] == ""):
        said.pop()
    for role, text in said:
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"the {role} says nothing")
    messages = [{"role": role, "content": text} for role, text in said]
    marks = _marked(pair)
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
    """Reject a role that a template would write as it stands, and nobody would train."""
    plain = role.strip().lower()
    meant = plain if plain in ROLES else MEANT_ROLES.get(plain)
    if meant is not None and role != meant:
        raise RowError(f"its role is `{role}`; write `{meant}`")
    if not re.fullmatch(r"[A-Za-z][\w-]*", role):
        raise RowError(f"its role is `{role}`, not a name such as `user`")


def _content(value: Any) -> str:
    """Return a content as text; the parts of a list are joined."""
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
            text = part.get("value")  # as LLaMA-Factory 1 writes it
        if kind not in TEXT_PARTS:
            raise RowError(f"its `content` has a part `{kind}`, and only parts of text are read")
        if not isinstance(text, str):
            keys = ", ".join(f"`{key}`" for key in part)
            raise RowError(f"its `content` has a part with {keys}, but without a text in `text`")
        if other := _first_filled(part, NOT_READ):
            raise RowError(f"its `content` has a part with `{other}`, and only text is read")
        texts.append(text)
    if not texts:
        raise RowError("its `content` is an empty list")
    return "".join(texts)


def _first_filled(value: dict[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if value.get(key) not in (None, "", [], {})), None)


def _tool_calls(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the calls of a turn, with arguments that are objects: as templates write them."""
    calls = turn.get("tool_calls") or []
    if (old := turn.get("function_call")) is not None:  # as OpenAI had it before there were tools
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
    inside = call.get("function", call)
    if not isinstance(inside, dict) or not isinstance(inside.get("name"), str):
        raise RowError("one of its tool calls has no `name`")
    arguments = inside.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            what = f"the arguments of its call of `{inside['name']}` are text that is no JSON"
            raise RowError(what) from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"the arguments of its call of `{inside['name']}` are no object")
    new = {**inside, "arguments": arguments}
    return {**call, "function": new} if "function" in call else new


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


def _marked(turn: dict[str, Any]) -> Message:
    """Return the weight of a turn that says whether it is trained; reject what is not read."""
    if other := _first_filled(turn, NOT_READ):
        raise RowError(f"it has `{other}`, which no task reads")
    marks = {key: turn[key] for key in TRAINED_MARKS if turn.get(key) is not None}
    for key, value in marks.items():
        if value not in (0, 1):  # true and false too
            raise RowError(f"its `{key}` is {value!r}, not 0 or 1")
    return {"weight": 0} if any(not value for value in marks.values()) else {}


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the schemas of the tools of a row."""
    names = (key for key in ("tools", "functions") if _given(row, key) not in (None, "", []))
    name = next(names, None)
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
    if name == "functions":  # as OpenAI had it before there were tools
        tools = [{"type": "function", "function": tool} for tool in tools]
    return tools or None


def name_of(tool: dict[str, Any]) -> Any:
    """Return the name of a tool, or of what a call calls."""
    inside = tool.get("function", tool)
    return inside.get("name") if isinstance(inside, dict) else None
