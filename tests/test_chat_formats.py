"""Conversion of rows to conversations, compared with how transformers renders the messages."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas
import pytest
import tiny

from lora_cli.data.chat_formats import Conversation, conversation_error, read_conversations
from lora_cli.data.unsupported_rows import unsupported
from lora_cli.tasks.generation.chat_template import ChatTemplate

Json = dict[str, Any]
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}:\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def user(content: Any, **more: Any) -> Json:
    return {"role": "user", "content": content, **more}


def said(content: Any, **more: Any) -> Json:
    return {"role": "assistant", "content": content, **more}


def read(row: Json, form: str = "openai") -> Conversation:
    (one,) = read_conversations(row, form, "messages")
    return one


def ids_of(conversation: Conversation, train_on: str = "assistant") -> tuple[list[int], str]:
    made = tiny.tokenizer("llama")
    made.chat_template = TEMPLATE
    ((ids, trained),) = ChatTemplate(made).encode(conversation, train_on)
    return ids, made.decode([i for i, on in zip(ids, trained, strict=True) if on])


def theirs(messages: list[Json], tools: Any = None) -> list[int]:
    made = tiny.tokenizer("llama")
    made.chat_template = TEMPLATE
    ids: list[int] = made.apply_chat_template(messages, tools=tools)["input_ids"]
    return ids


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}], "Hello you"),
        ([{"type": "input_text", "text": "a\n"}, "b"], "a\nb"),
        ([{"type": "text", "text": "a", "image_url": None, "cache_control": {"type": "x"}}], "a"),
        ([{"text": "a"}], "a"),
        ([{"type": "text", "value": "a "}, {"type": "text", "value": "b"}], "a b"),
    ],
)
def test_text_parts_are_joined(parts: list[Any], text: str) -> None:
    row = {"messages": [user(parts), said(parts)]}
    for write in (list, json.dumps, str, lambda turns: str(np.array(turns, dtype=object))):
        value = {"messages": write(row["messages"])}  # also as text in a table written by pandas
        ids, trained = ids_of(read(value))
        assert ids == theirs([user(text), said(text)])
        assert trained == f"{text}</s>\n"


CALL = {"type": "function", "function": {"name": "look", "arguments": {"a": [1, None], "b": "é"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def test_tool_calls_and_tools_are_passed_to_the_template() -> None:
    text = json.loads(json.dumps(CALL))
    text["function"]["arguments"] = json.dumps(CALL["function"]["arguments"])
    legacy = {"role": "assistant", "content": None, "function_call": text["function"]}
    messages = [
        user("q"), {"role": "assistant", "content": None, "tool_calls": [text, text]},
        {"role": "tool", "content": "sun", "tool_call_id": "1"}, said("ok"),
    ]  # fmt: skip
    expected = [
        user("q"),
        {"role": "assistant", "tool_calls": [CALL, CALL]},
        messages[2],
        said("ok"),
    ]
    for tools in (TOOLS, json.dumps(TOOLS), str(TOOLS)):
        ids, trained = ids_of(read({"messages": messages, "tools": tools}))
        assert ids == theirs(expected, TOOLS)
        call = '<call>look {"a": [1, null], "b": "é"}</call>'
        assert trained == f"{call}{call}</s>\nok</s>\n"
    ids, _ = ids_of(read({"messages": [user("q"), legacy], "functions": [TOOLS[0]["function"]]}))
    assert ids == theirs([user("q"), {"role": "assistant", "tool_calls": [CALL]}], TOOLS)
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "sun"}, {"from": "gpt", "value": "ok"},
    ]  # fmt: skip
    ids, _ = ids_of(read({"messages": turns, "tools": TOOLS}, "sharegpt"))
    expected[1]["tool_calls"] = [CALL]
    assert ids == theirs(expected, TOOLS)


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"train": False}, {"training": False}, {"loss": 0}, {"loss_weight": 0.0}],
)
def test_turns_with_weight_0_are_read_but_not_trained(mark: Json) -> None:
    row = {"messages": [user("a"), said("bad", **mark), user("b"), said("good", weight=1)]}
    ids, trained = ids_of(read(row))
    assert ids == theirs([user("a"), said("bad"), user("b"), said("good")])
    assert trained == "good</s>\n"
    assert ids_of(read(row), "last")[1] == "good</s>\n"
    made = tiny.tokenizer("llama")
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}|"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    ((ids, on),) = ChatTemplate(made).encode(read(row), "assistant")
    assert made.decode([i for i, yes in zip(ids, on, strict=True) if yes]) == "good|"


def test_a_system_prompt_may_be_in_its_own_column() -> None:
    row = {"messages": [user("a"), said("b")], "system": "Be kind."}
    expected = [{"role": "system", "content": "Be kind."}, user("a"), said("b")]
    assert read(row).messages == expected
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert read({"messages": turns, "system": "Be kind."}, "sharegpt").messages == expected
    assert read({**row, "system": " "}).messages == expected[1:]


def test_earlier_turns_of_an_instruction_are_read() -> None:
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    expected = [user("a"), said("b"), user("c"), said("d")]
    assert read(row, "alpaca").messages == expected
    for history in ('[["a", "b"]]', "[['a', 'b']]"):
        assert read({**row, "history": history}, "alpaca").messages == expected
    assert read({**row, "history": []}, "alpaca").messages == expected[2:]
    assert "column `history`" in conversation_error({**row, "history": ["a"]}, "alpaca", None)


@pytest.mark.parametrize(
    ("turns", "error"),
    [
        ([user([{"type": "image_url", "image_url": {}}]), said("a")], "turn 1: its `content` has"),
        ([user("a"), said([{"type": "refusal", "refusal": "no"}])], "turn 2: its `content` has"),
        ([user("a"), said([{"type": "text", "text": None}])], "turn 2: its `content` has a part"),
        ([user("a", images=["x.png"]), said("b")], "turn 1: it has `images`"),
        ([user("a"), said("b", audio={"id": "x"})], "turn 2: it has `audio`"),
        ([user("a"), said("b", mask=True)], "turn 2: it has `mask`"),
        ([user("a"), said("b", weight=0.3)], "turn 2: its `weight` is 0.3"),
        ([user("a"), said("b", loss_weight=0.5)], "turn 2: its `loss_weight` is 0.5"),
        ([user("a"), {"role": "Assistant", "content": "b"}], "turn 2: its role is `Assistant`"),
        ([{"role": "human", "content": "a"}, said("b")], "turn 1: its role is `human`; write"),
        ([{"role": "x\n<|im_end|>", "content": "a"}, said("b")], "turn 1: its role is"),
        ([user("a"), said("  ")], "turn 2: the assistant says nothing"),
        ([user("a"), said(None, tool_calls=[])], "turn 2: it has no `content`"),
        ([user("a"), said(None, tool_calls=[{"function": {}}])], "turn 2: one of its tool calls"),
        ([user("a")], "no turn is the assistant's"),
    ],
)
def test_an_unreadable_turn_is_an_error_that_names_it(turns: list[Json], error: str) -> None:
    assert conversation_error({"messages": turns}, "openai", "messages").startswith(error)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"rejected": "a"}, "a rejected answer in `rejected`"),
        ({"chosen": "a", "rejected": [said("b")]}, "a rejected answer in `rejected`"),
        ({"rejected_response": "a"}, "a rejected answer in `rejected_response`"),
        ({"non_preferred_output": [said("a")]}, "a rejected answer in `non_preferred_output`"),
        ({"label": False}, "false in `label`"), ({"label": "False"}, "false in `label`"),
        ({"label": 0}, "0 in `label`"), ({"kto_tag": False}, "false in `kto_tag`"),
        ({"is_desirable": "no"}, "no in `is_desirable`"), ({"images": ["a"]}, "pictures, sound"),
        ({"image": {"bytes": b"a"}}, "pictures, sound"), ({"audio": "a.wav"}, "pictures, sound"),
        ({"video_path": "a"}, "pictures, sound"), ({"rejected": None}, None),
        ({"rejected": False}, None), ({"label": True}, None), ({"label": 3}, None),
        ({"label": "sport"}, None), ({"images": []}, None), ({"correct": 0}, None),
        ({"imagery": "words"}, None), ({"title": "a"}, None),
    ],
)  # fmt: skip
def test_rows_with_unsupported_columns_are_recognised(more: Json, what: str | None) -> None:
    result = unsupported({"prompt": "a", "completion": "b", **more})
    assert (result and result[0].startswith(what or "")) == (what and True)


@pytest.mark.parametrize("system", ["be kind", [{"text": "be kind"}], ["be ", "kind"]])
@pytest.mark.parametrize("form", ["openai", "alpaca"])
def test_a_system_prompt_may_be_in_parts(system: Any, form: str) -> None:
    row = {"messages": [user("a"), said("b")], "instruction": "a", "output": "b", "system": system}
    (read,) = read_conversations(row, form, "messages")
    assert read.messages[0] == {"role": "system", "content": "be kind"}


@pytest.mark.parametrize("system", [3, {"text": "be kind"}, [{"type": "image"}], True])
def test_a_system_prompt_that_is_not_text_is_an_error(system: Any) -> None:
    row = {"messages": [user("a"), said("b")], "system": system}
    assert conversation_error(row, "openai", "messages").startswith("column `system`: ")


def test_missing_values_of_pandas_are_ignored() -> None:
    frame = pandas.DataFrame(
        {
            "instruction": ["add", None, "name it"],
            "input": [None, "what is it?", "a bee"],
            "output": ["3", "a film", "Bee"],
            "history": [None, None, [["hello", "hi"]]],
        }
    )
    rows = json.loads(json.dumps(frame.to_dict("records")).replace("null", "NaN"))
    assert rows[0]["input"] != rows[0]["input"]
    read = [
        [message["content"] for message in conversation.messages]
        for row in rows
        for conversation in read_conversations(row, "alpaca", None)
    ]
    assert read == [
        ["add", "3"], ["what is it?", "a film"], ["hello", "hi", "name it\n\na bee", "Bee"]
    ]  # fmt: skip
    turns = {"messages": [user("a"), said("b")], "tools": float("nan"), "system": float("nan")}
    (plain,) = read_conversations(turns, "openai", "messages")
    assert plain.tools is None
    assert len(plain.messages) == 2


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("input", ["x", "y"], "a list"), ("output", ["b"], "a list"), ("output", {"a": 1}, "an obj"),
     ("instruction", [1], "a list"), ("output", True, "true or false")],
)  # fmt: skip
def test_a_field_of_an_instruction_that_is_not_text_is_an_error(
    name: str, value: Any, kind: str
) -> None:
    row = {"instruction": "a", "input": "", "output": "b"} | {name: value}
    assert conversation_error(row, "alpaca", None).startswith(f"column `{name}` holds {kind}")


@pytest.mark.parametrize("blank", ["", " ", None])
def test_an_input_without_an_instruction_is_the_question(blank: str | None) -> None:
    row = {"instruction": blank, "input": "What is 1?", "output": "One."}
    assert read(row, "alpaca").messages == [user("What is 1?"), said("One.")]
    assert read({**row, "instruction": "a", "input": blank}, "alpaca").messages[0] == user("a")


PAIRED = [user("a"), said("b"), user("c"), said("d")]


@pytest.mark.parametrize(
    ("pairs", "messages"),
    [
        ([{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}], PAIRED),  # Firefly
        (
            [{"system": "s", "input": "a", "output": "b"}, {"input": "c", "output": "d"}],  # XTuner
            [{"role": "system", "content": "s"}, *PAIRED],
        ),
        ([["a", "b"], ["c", "d"]], PAIRED),
        ([{"Human": "a", "Assistant": "b"}, {"human": "c", "assistant": ""}], PAIRED[:3]),
        ([{"input": "a", "output": "b", "output_with_loss": False}],
         [user("a"), said("b", weight=0)]),
    ],
)  # fmt: skip
def test_pairs_of_questions_and_answers_are_turns(pairs: Any, messages: list[Json]) -> None:
    conversation = read({"messages": pairs}, "pairs")
    assert conversation.messages == messages
    assert read({"messages": json.dumps(pairs)}, "pairs").messages == messages
    plain = [{key: m[key] for key in ("role", "content")} for m in messages]
    assert ids_of(conversation)[0] == theirs(plain)


@pytest.mark.parametrize(
    ("pairs", "error"),
    [
        ([{"human": "a"}], "pair 1 is not a question and its answer"),
        ([{"human": "a", "assistant": "b", "gpt": "c"}], "pair 1 is not"),
        ([{"human": " ", "assistant": "b"}], "pair 1: the user says nothing"),
        ([["a", ""], ["c", "d"]], "pair 1: the assistant says nothing"),
        ([["a", "b"], {"system": "s", "input": "c", "output": "d"}], "pair 2: it has a `system`"),
        ([{"human": "a", "assistant": 3}], "pair 1: the assistant says nothing"),
        ([{"human": "a", "assistant": "b", "images": ["x"]}], "pair 1: it has `images`"),
    ],
)
def test_pairs_that_cannot_be_read(pairs: Any, error: str) -> None:
    assert conversation_error({"messages": pairs}, "pairs", "messages").startswith(error)
