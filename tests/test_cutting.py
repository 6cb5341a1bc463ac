from __future__ import annotations

import tiny

from lora_cli.inference.cutting import rows_without_answer
from lora_cli.inference.model import Base
from lora_cli.inference.written import Chosen

PAIR = Chosen({"type": "causal_lm", "prompt_column": "p", "completion_column": "c"}, {}, ["p", "c"])


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
    assert rows_without_answer([chat], base, Chosen(keys, {}, ["m"]), lengths[2]) == (2, 4)
