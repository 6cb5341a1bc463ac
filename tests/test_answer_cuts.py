from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny

from lora_cli.data.chat_formats import read_conversations
from lora_cli.recipe_draft.answer_cuts import rows_without_answer
from lora_cli.recipe_draft.base_model_info import Base
from lora_cli.recipe_draft.chat_lengths import TurnCounter
from lora_cli.recipe_draft.text_lengths import length_of
from lora_cli.tasks.proposal import Proposal

PAIR = Proposal(
    {"type": "causal_lm", "prompt_column": "p", "completion_column": "c"}, {}, ["p", "c"]
)


def test_rows_whose_prompt_alone_is_too_long_are_counted() -> None:
    base = Base("base", tiny.tokenizer("llama"))
    rows = [{"p": "slow " * count, "c": "yes"} for count in (1, 2, 30, 40)]
    lengths = [len(base.tokenizer(row["p"])["input_ids"]) for row in rows]
    assert rows_without_answer([rows], base, PAIR, lengths[2]) == (2, 4)
    assert rows_without_answer([rows[:2], rows[2:]], base, PAIR, lengths[3]) == (1, 4)
    assert rows_without_answer([rows], base, PAIR, lengths[3] + 1) is None
    assert rows_without_answer([rows], Base("base"), PAIR, 1) is None
    turns = [
        [{"role": "user", "content": row["p"]}, {"role": "assistant", "content": "yes"}]
        for row in rows
    ]
    keys = {"type": "causal_lm", "messages_column": "m", "format": "openai"}
    chat = [{"m": turn} for turn in turns] + [{"m": []}]  # the last is skipped, and said so
    chatting = TurnCounter(base.tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    asked = [len(base.tokenizer(row["p"], add_special_tokens=False)["input_ids"]) for row in rows]
    chosen = Proposal(keys, {}, ["m"])
    assert rows_without_answer([chat], base, chosen, asked[2], chatting) == (2, 4)


TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        (
            {"messages_column": "m", "format": "openai"},
            [
                {"m": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]},
                {
                    "m": [
                        {"role": "user", "content": [{"type": "text", "text": "warm film"}]},
                        {"role": "assistant", "content": "no"},
                    ],
                    "tools": TOOLS,
                    "system": "be kind",
                },
            ],
        ),
        (
            {"format": "alpaca"},
            [
                {"instruction": "a", "output": "b"},
                {"instruction": "c", "output": "d", "history": [["e", "f g h"]], "system": "s"},
            ],
        ),
    ],
)
def test_conversations_are_counted_as_the_template_writes_them(
    keys: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    tokenizer = tiny.tokenizer("llama")
    template = (
        "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    base = Base("base", tokenizer)
    chosen = Proposal({"type": "causal_lm", **keys}, {}, ["m"])
    turns = TurnCounter(tokenizer, template)
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    longest = read_conversations(rows[1], keys["format"], keys.get("messages_column"))[0]
    right = tokenizer.apply_chat_template(
        longest.messages, tools=longest.tools, tokenize=True, return_dict=False
    )
    length, why = length_of([rows], base, chosen, turns)
    assert f"no row has more than {len(right)}, by the model's tokens" in why
    assert len(right) <= length < len(right) + 32
    first = [message["role"] for message in longest.messages].index("assistant")
    asked = tokenizer.apply_chat_template(
        longest.messages[:first], tools=longest.tools, tokenize=True, return_dict=False,
        add_generation_prompt=True,
    )  # fmt: skip
    assert rows_without_answer([rows], base, chosen, len(asked), turns) == (1, 2)
    assert rows_without_answer([rows], base, chosen, len(asked) + 1, turns) is None
