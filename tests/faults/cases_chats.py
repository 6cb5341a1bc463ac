"""Faults of conversations, of rows that only look like them, and of prompts without room."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from cases import CASES, Case, case
from cases_data import FINE, LONG, PAIR, TURNS, _chat
from world import Printed, World

USER, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}


def _rows(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _talks(*talks: Any) -> str:
    return _rows(*({"messages": talk} for talk in talks))


def _said(**turn: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", **turn}]


TALKS: dict[str, tuple[str, str]] = {
    "turns of which something is not read": (_talks(
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, YES],
        [{"role": "user", "content": [3]}, YES],
        [{"role": "user", "content": [{"type": "text", "text": "hi", "images": ["x"]}]}, YES],
        [{"role": "user", "content": []}, YES],
        [{"role": "User", "content": "hi"}, YES],
        [{"role": "bot", "content": "hi"}, YES],
        [{"role": "a b", "content": "hi"}, YES],
        _said(content="a", images=["x"]), _said(content="a", weight=0.5), _said(content=""),
        _said(tool_calls="no JSON"), _said(tool_calls=[{"id": "1"}]), _said(tool_calls={}),
        _said(tool_calls=[{"function": {"name": "look", "arguments": "{"}}]),
        _said(tool_calls=[{"function": {"name": "look", "arguments": "[]"}}]),
        _said(tool_calls=[CALL], function_call={"name": "look"}),
    ), TURNS),
    "tools that are none": (
        _rows({"messages": [USER, YES], "tools": "no JSON"}, {"messages": [USER, YES], "tools": 3},
              {"messages": [USER, YES], "tools": [{}]},
              {"messages": [{"role": "system", "content": "a"}, USER, YES], "system": "b"}), TURNS),
    "tools that the template leaves out": (
        _rows({"messages": [USER, YES], "tools": [TOOL]}), TURNS),
    "a call that the template leaves out": (_talks(_said(tool_calls=[CALL])), TURNS),
    "words that the template leaves out": (FINE, TURNS.replace("m.content", "m.content[:1]")),
    "a role that the template does not name": (
        _talks([{"role": "critic", "content": "hi"}, YES]), TURNS),
    "a template that marks other turns than there are": (
        _talks([USER, {**YES, "weight": 0}]),
        "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}a{% endgeneration %}b"
        "{% generation %}c{% endgeneration %}"),
    "a template with marks that refuses": (
        FINE, "{% generation %}{{ raise_exception('no') }}{% endgeneration %}"),
    "every private character": (
        _talks([{"role": "user", "content": "</s>\U000f0000\U000f8000\U00100000\U00108000"}, YES]),
        TURNS),
    "preferences": (_rows({"messages": [USER, YES], "rejected": [USER, YES]}), TURNS),
    "pictures": (_rows({"messages": [USER, YES], "images": ["a.png"]}), TURNS),
    "bad answers": (_rows({"messages": [USER, YES], "label": False}), TURNS),
}  # fmt: skip
for _name, (_file, _template) in TALKS.items():
    CASES.append(Case("Language models", _name, _chat(_file, _template)))


@case("Language models", "a row that is too long")
def _(world: World) -> Printed:
    world.write("rows.csv", "prompt,answer\n" + LONG)
    return world.lora("validate", world.recipe("llama", task={**PAIR, "truncate": "error"}))


@case("Labels", "a text that is too long")
def _(world: World) -> Printed:
    world.write("rows.csv", "text,label\n" + LONG)
    task = {"truncate": "error", "max_length": 8}
    return world.lora("train", world.recipe(task=task))


def _init(*rows: Any, model: str = "llama") -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.write("rows.jsonl", _rows(*rows))
        return world.lora("init", "rows.jsonl", "--model", f"../bases/{model}")

    return run


for _name, _lines in {
    "preferences": [{"prompt": "a question", "chosen": "a good one", "rejected": "a bad one"}],
    "preferences in columns of their own": [
        {
            "question": f"what is number {i} of all",
            "response_j": f"one good answer {i}",
            "response_k": f"one bad answer {i}",
        }
        for i in range(9)
    ],
    "turns in two columns": [{"prompt": [USER], "completion": [YES]}],
    "an answer in another column than the turns": [
        {"messages": [USER], "response": f"the answer to question {i}"} for i in range(9)
    ],
    "turns of two people as texts": [
        {"dialog": ["how are you", f"fine, number {i}"]} for i in range(9)
    ],
    "conversations that nobody answers": [{"messages": [USER]}],
    "tools that no template writes": [{"messages": [USER, YES], "tools": [TOOL]}],
}.items():
    CASES.append(Case("lora init", _name, _init(*_lines)))


@case("Prediction", "of a prompt that leaves no room")
def _(world: World) -> Printed:
    recipe = world.recipe("llama")
    assert world.lora("train", recipe, "-o", "out").code == 0
    return world.lora("predict", "--adapter", "out", "slow " * 200)
