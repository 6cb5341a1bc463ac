"""Conversations that several columns hold, or rows that are turns: the hint writes them whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from drafting import Init, needs_jq, run_hint

from lora_cli.data.chat_formats import read_messages
from lora_cli.errors import LoraError

pytestmark = needs_jq

ASKED = [f"what is the number after {i} in this list" for i in range(20)]
SAID = [f"it is number {i} and no other one" for i in range(1, 21)]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (lambda q, a: {"prompt": q, "completion": [assistant(a)]},
         "no turn in `completion` is the user's, whose text stands in `prompt`"),
        (lambda q, a: {"prompt": [user(q)], "completion": a},
         "no turn in `prompt` is the assistant's, whose text stands in `completion`"),
        (lambda q, a: {"messages": [user(q)], "response": a}, "whose text stands in `response`"),
        (lambda q, a: {"conversations": [{"from": "human", "value": q}], "answer": a},
         "whose text stands in `answer`"),
        (lambda q, a: {"completion": [assistant(a)], "prompt": [user(q)]}, "all hold turns"),
        (lambda q, a: [user(q), assistant(a)], "the rows are lists of turns"),
        (lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
         "the rows are lists of turns"),
        (lambda q, a: {"dialog": [q, a]}, "no column holds text"),
        (lambda q, a: {"utterances": [{"speaker": "user", "text": q},
                                      {"speaker": "assistant", "text": a}]}, "no column|stand"),
    ],
)  # fmt: skip
def test_the_hint_writes_conversations_with_both_sides(
    row: Any, what: str, init: Init, tmp_path: Path
) -> None:
    rows = [row(q, a) for q, a in zip(ASKED, SAID, strict=True)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(LoraError, match=what) as caught:
        init("", path, "llama")
    hint = run_hint(caught.value, tmp_path)
    written = tmp_path / hint.rpartition("> ")[2].strip("`")
    (column,) = json.loads(written.read_text().splitlines()[0])
    form = {"messages": "openai", "conversations": "sharegpt"}[column]
    for line, q, a in zip(written.read_text().splitlines(), ASKED, SAID, strict=True):
        values = json.loads(line)
        is_sharegpt = "from" in values[column][0]
        messages = read_messages(values, "sharegpt" if is_sharegpt else form, column)
        assert messages == [user(q), assistant(a)]
    recipe = init("", written, "llama")
    assert recipe.task.messages_column == column


def test_a_question_that_is_repeated_in_a_column_is_no_missing_turn(
    init: Init, tmp_path: Path
) -> None:
    rows = [
        {"prompt": q, "messages": [user(q), assistant(a)]} for q, a in zip(ASKED, SAID, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = init("", tmp_path / "rows.jsonl", "llama")
    assert recipe.task.messages_column == "messages"
