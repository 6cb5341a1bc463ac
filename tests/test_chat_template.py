from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast

from lora_cli.data.chat_formats import Conversation, read_conversations, read_messages
from lora_cli.errors import LoraError
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks.causal_lm import CausalLM
from lora_cli.tasks.examples import IGNORED
from lora_cli.tasks.generation import chat_template
from lora_cli.tasks.generation.chat_template import ChatTemplate

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALWAYS_OPENS = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHATML
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ ns.system + m.content }} [/INST]"
    "{% set ns.system = '' %}"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only system, user and assistant') }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen 3: the reasoning of answers but the last is taken away
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip() if parts|length > 1 else '' %}"
    "{% set thought = m.reasoning_content or thought %}"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ parts[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_THINKS = QWEN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|im_end|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
KEEPING = DEEPSEEK.replace(".split('</think>')[-1]", "")
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("bases") / "llama")


def tokenizer(template: str, eos: str | None = None) -> PreTrainedTokenizerFast:
    made = tiny.tokenizer("llama")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if eos:
        made.eos_token = eos
    made.chat_template = template
    return made


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


CHAT = turns(
    ("system", "Answer."), ("user", "1 + 1?"), ("assistant", "2 🙂"), ("user", "Sûr? 🤔"),
    ("assistant", "Ja — 二 👩‍👩‍👧"),
)  # fmt: skip


def encode_chat(
    made: PreTrainedTokenizerFast, messages: Any, train_on: str, tools: Any = None
) -> list[tuple[list[int], list[bool]]]:
    return ChatTemplate(made).encode(Conversation(messages, tools), train_on)


def trained_text(made: PreTrainedTokenizerFast, messages: Any, train_on: str) -> list[str]:
    """Return the runs of trained tokens of the one example as text."""
    (example,) = encode_chat(made, messages, train_on)
    return runs_of(made, *example)


def runs_of(made: PreTrainedTokenizerFast, ids: list[int], trained: list[bool]) -> list[str]:
    assert len(ids) == len(trained)
    runs: list[list[int]] = [[]]
    for token, on in zip(ids, trained, strict=True):
        if on:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [made.decode(run) for run in runs if run]


# ----------------------------------------------------------------------- which tokens are trained


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM])
def test_the_assistants_turns_are_trained(template: str) -> None:
    made = tokenizer(template)
    answers = ["2 🙂<|im_end|>\n", "Ja — 二 👩‍👩‍👧<|im_end|>\n"]
    assert trained_text(made, CHAT, "assistant") == answers
    assert trained_text(made, CHAT, "last") == answers[1:]
    whole = made.apply_chat_template(CHAT, tokenize=False)
    assert trained_text(made, CHAT, "all") == [whole]
    ((ids, _),) = encode_chat(made, CHAT, "assistant")
    assert ids == made.apply_chat_template(CHAT, tokenize=True)["input_ids"]


def test_a_trailing_generation_prompt_is_not_part_of_the_answer() -> None:
    made, plain = tokenizer(ALWAYS_OPENS), tokenizer(CHATML)
    assert made.apply_chat_template(CHAT, tokenize=False).endswith("<|im_start|>assistant\n")
    answers = ["2 🙂<|im_end|>", "Ja — 二 👩‍👩‍👧<|im_end|>"]
    for messages in (CHAT, CHAT[2:]):  # the second begins with the assistant
        assert trained_text(made, messages, "assistant") == answers
        (example,) = ChatTemplate(made).render(messages, "assistant")
        assert f"{example[0]}\n" == plain.apply_chat_template(messages, tokenize=False)
    (whole,) = trained_text(made, CHAT, "all")
    assert f"{whole}\n" == plain.apply_chat_template(CHAT, tokenize=False)


def test_a_default_system_prompt_is_read_but_not_trained() -> None:
    made = tokenizer(DEFAULT_SYSTEM)
    for messages in (CHAT[1:], CHAT[2:]):  # the second begins with the assistant
        ((ids, _),) = encode_chat(made, messages, "assistant")
        assert "Be kind." in made.decode(ids)
        first, _ = trained_text(made, messages, "assistant")
        assert first == "2 🙂<|im_end|>\n"


def test_a_system_prompt_inside_the_users_turn_is_not_trained() -> None:
    made = tokenizer(LLAMA2)
    assert trained_text(made, CHAT, "assistant") == [" 2 🙂 </s>", " Ja — 二 👩‍👩‍👧 </s>"]
    ((text, _),) = ChatTemplate(made).render(CHAT, "assistant")
    assert text.startswith("<s>[INST] <<SYS>>\nAnswer.\n<</SYS>>\n\n1 + 1? [/INST]")


@pytest.mark.parametrize("name", ["im", "end", "_end", "im_en", "lookup"])
def test_a_missing_call_is_an_error_even_if_its_name_is_part_of_a_token(
    name: str,
) -> None:
    template = CHATML.replace("<|im_end|>", "<end_of_im_turn>")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": {}}}]}
    with pytest.raises(LoraError, match=f"does not write its call of `{name}`"):
        encode_chat(tokenizer(template), [*turns(("user", "1 + 1?")), call], "all_turns")


def test_tools_are_read_and_their_calls_are_trained() -> None:
    messages = turns(
        ("user", "weather?"), ("assistant", "call()"), ("tool", "sunny"), ("assistant", "Sunny.")
    )
    assert trained_text(tokenizer(CHATML), messages, "assistant") == [
        "call()<|im_end|>\n", "Sunny.<|im_end|>\n",
    ]  # fmt: skip


def test_two_answers_in_a_row_are_both_trained_and_the_last_is_one() -> None:
    messages = turns(("user", "a"), ("assistant", "b"), ("assistant", "c"))
    made = tokenizer(CHATML)
    assert trained_text(made, messages, "assistant") == ["b<|im_end|>\n", "c<|im_end|>\n"]
    assert trained_text(made, messages, "last") == ["c<|im_end|>\n"]


@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[2:], CHAT[:4]])
def test_generation_markers_are_read_as_in_transformers(messages: Any) -> None:
    made = tokenizer(MARKED)
    theirs = made.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ((ids, trained),) = encode_chat(made, messages, "assistant")
    assert ids == theirs["input_ids"]
    assert [int(on) for on in trained] == theirs["assistant_masks"]
    assert sum(trained) > 5
    last = "2 🙂<|im_end|>" if messages == CHAT[:4] else "Ja — 二 👩‍👩‍👧<|im_end|>"
    assert trained_text(made, messages, "last") == [last]
    # without the markers the template says the same, but for the line end that follows a turn
    plain = tokenizer(MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    wanted = [text + "\n" for text in trained_text(made, messages, "assistant")]
    assert trained_text(plain, messages, "assistant") == wanted


REASONED = turns(
    ("user", "a"), ("assistant", "<think>\nx\n</think>\n\nb"), ("user", "c"),
    ("assistant", "<think>\ny\n</think>\n\nd"),
)  # fmt: skip
PLAIN = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "<d>"))


def test_turns_that_are_rewritten_later_are_separate_examples() -> None:
    made = tokenizer(THINKING)
    first, second = encode_chat(made, REASONED, "assistant")
    assert runs_of(made, *first) == ["<think>\nx\n</think>\n\nb<|im_end|>\n"]
    assert runs_of(made, *second) == ["<think>\ny\n</think>\n\nd<|im_end|>\n"]
    for (ids, _), count in ((first, 2), (second, 4)):
        whole = made.apply_chat_template(REASONED[:count], tokenize=False)
        assert made.decode(ids) == whole
    assert "x" not in made.decode(second[0]).replace("<|", "")  # as it is when d is asked for
    assert trained_text(made, REASONED, "last") == ["<think>\ny\n</think>\n\nd<|im_end|>\n"]
    more = [*REASONED, *turns(("user", "e"))]  # the last answer is rewritten by what follows
    assert trained_text(made, more, "last") == ["<think>\ny\n</think>\n\nd<|im_end|>\n"]
    assert len(trained_text(made, REASONED, "all")) == 1


@pytest.mark.parametrize(
    ("template", "messages", "opened", "wanted"),
    [
        # the template writes an empty block into the last turn, so the model learns to write it
        (QWEN, PLAIN, "", ["<think>\n\n</think>\n\nb<|im_end|>\n",
                           "<think>\n\n</think>\n\n<d><|im_end|>\n"]),
        (QWEN, REASONED, "", ["<think>\nx\n</think>\n\nb<|im_end|>\n",
                              "<think>\ny\n</think>\n\nd<|im_end|>\n"]),
        # it asks with an open block, which every turn has
        (QWEN_THINKS, PLAIN, "", ["\n</think>\n\nb<|im_end|>\n", "\n</think>\n\n<d><|im_end|>\n"]),
        (QWEN_THINKS, REASONED, "", ["x\n</think>\n\nb<|im_end|>\n",
                                     "y\n</think>\n\nd<|im_end|>\n"]),
        # it asks with an open block, which no turn has
        (DEEPSEEK, PLAIN, "<think>\n", ["b</s>", "<d></s>"]),
        (KEEPING, PLAIN, "<think>\n", ["b</s>", "<d></s>"]),
        (KEEPING, REASONED, "<think>\n", ["<think>\nx\n</think>\n\nb</s>",
                                          "<think>\ny\n</think>\n\nd</s>"]),
        (CHATML, PLAIN, "", ["b<|im_end|>\n", "<d><|im_end|>\n"]),
    ],
)  # fmt: skip
def test_the_trained_text_is_what_the_template_adds_for_the_turn(
    template: str, messages: Any, opened: str, wanted: list[str]
) -> None:
    made = tokenizer(template)
    assert ChatTemplate(made).prompt_only_suffix == opened
    for count, said in zip((2, 4), wanted, strict=True):
        asked = ChatTemplate(made).prompt(messages[: count - 1], None)
        written = made.apply_chat_template(messages[:count], tokenize=False)
        assert asked + said == written  # what is trained follows just what is asked
        assert trained_text(made, messages[:count], "last") == [said]
    found = encode_chat(made, messages, "assistant")
    assert [run for example in found for run in runs_of(made, *example)] == wanted
    assert len(found) == (2 if template in (QWEN, QWEN_THINKS) else 1)


def test_reasoning_that_the_template_leaves_out_is_not_lost_unnoticed() -> None:
    made = tokenizer(DEEPSEEK)
    with pytest.raises(LoraError, match="turn 2: the chat template leaves out the reasoning"):
        encode_chat(made, REASONED, "assistant")
    apart = [REASONED[0], {"role": "assistant", "content": "b", "reasoning_content": "x"}]
    with pytest.raises(LoraError, match="leaves out the reasoning"):
        encode_chat(tokenizer(CHATML), apart, "assistant")
    assert trained_text(tokenizer(QWEN), apart, "last") == ["<think>\nx\n</think>\n\nb<|im_end|>\n"]


def test_a_turn_that_differs_from_its_prompt_is_rejected() -> None:
    other = CHATML.replace("<|im_start|>assistant\n", "{{ messages|length }}: ")
    messages = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    made = tokenizer(other)
    with pytest.raises(LoraError, match="cannot be separated from"):
        encode_chat(made, messages, "assistant")


# ---------------------------------------------------------------------------- rows to examples


def task_of(
    base: Path, tmp_path: Path, rows: list[Any], template: str = CHATML, **sections: Any
) -> CausalLM:
    file = tmp_path / "train.jsonl"
    rows = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    spec = {
        "type": "causal_lm", "text_column": None, "messages_column": "messages",
        "chat_template": "chat.jinja", "max_length": 128, **sections.pop("task", {}),
    }  # fmt: skip
    data = {"path": sections.pop("path", file.name), **sections.pop("data", {})}
    recipe = load_recipe(tiny.recipe(base, tmp_path, data=data, task=spec, **sections))
    task = CausalLM(recipe, recipe.task)  # type: ignore[arg-type]
    task.load_processor()
    return task


def labels_of(task: CausalLM) -> list[str]:
    """Return the trained text of each example."""
    return [
        task.tokenizer.decode([i for i in example["labels"] if i != IGNORED])
        for example in load_data(task)["train"].examples
    ]


QUESTION = turns(("user", "Why?"), ("assistant", "Because."))


def test_the_end_is_added_only_where_the_template_lacks_it(base: Path, tmp_path: Path) -> None:
    assert labels_of(task_of(base, tmp_path, [QUESTION], NO_END)) == ["Because.\n</s>"]
    assert labels_of(task_of(base, tmp_path, [QUESTION], LLAMA2)) == [" Because. </s>"]
    more = [*QUESTION, *turns(("user", "Oh."), ("assistant", "Yes."), ("user", "Bye."))]
    # what follows the last answer is not trained, nor is an end after it
    assert labels_of(task_of(base, tmp_path, [more], LLAMA2)) == [" Because. </s> Yes. </s>"]
    assert labels_of(task_of(base, tmp_path, [more], NO_END)) == ["Because.\n</s>", "Yes.\n</s>"]
    # an end after the first answer alone does not teach to end the second
    first_only = NO_END.replace("\n{% endfor", "{{ '</s>' if loop.index == 2 }}\n{% endfor")
    labels = labels_of(task_of(base, tmp_path, [more], first_only))
    assert labels == ["Because.</s>\nYes.\n</s>"]


def test_each_answer_has_an_end_to_learn_if_the_template_writes_none(
    base: Path, tmp_path: Path
) -> None:
    more = [*QUESTION, *turns(("user", "Oh."), ("assistant", "Yes."))]
    task = task_of(base, tmp_path, [more], NO_END)
    examples = list(load_data(task)["train"].examples)
    assert len(examples) == 2
    for example, count, answer in zip(examples, (1, 3), ("Because.\n", "Yes.\n"), strict=True):
        asked = task.tokenizer.apply_chat_template(
            more[:count], add_generation_prompt=True, tokenize=False
        )
        asked, answer = (
            task.tokenizer.encode(t, add_special_tokens=False) for t in (asked, answer)
        )
        assert list(example["input_ids"]) == [*asked, *answer, tiny.EOS]
        assert list(example["labels"]) == [IGNORED] * len(asked) + [*answer, tiny.EOS]
    assert labels_of(task_of(base, tmp_path, [more], NO_END, task={"train_on": "last"})) == [
        "Yes.\n</s>"
    ]


def test_a_rejected_conversation_is_named(base: Path, tmp_path: Path) -> None:
    bad = turns(("user", "a"), ("tool", "b"), ("assistant", "c"))
    task = task_of(base, tmp_path, [QUESTION, QUESTION, bad], LLAMA2)
    for check in (load_data, lambda task: check_recipe(task.recipe)):
        with pytest.raises(LoraError, match="only system, user and assistant") as caught:
            check(task)
        assert caught.value.problems[0].at == "train.jsonl:3"
    with pytest.raises(LoraError, match="leaves out the reasoning") as caught:
        load_data(task_of(base, tmp_path, [QUESTION, REASONED], DEEPSEEK))
    assert caught.value.problems[0].at == "train.jsonl:2"


def test_a_conversation_may_be_several_examples(base: Path, tmp_path: Path) -> None:
    task = task_of(base, tmp_path, [QUESTION, REASONED], QWEN)
    assert task.notes == []
    split = load_data(task)["train"]
    assert [example["row"] for example in split.examples] == [0, 1, 1]
    assert split.rows_without_example == 0
    for example, messages in zip(list(split.examples)[1:], (REASONED[:2], REASONED), strict=True):
        asked = task.prompt({"messages": messages})
        trained = [label != IGNORED for label in example["labels"]]
        assert example["input_ids"][: len(asked)] == asked
        assert trained.index(True) == len(asked)


def test_a_prompt_suffix_that_answers_lack_is_noted(base: Path, tmp_path: Path) -> None:
    task = task_of(base, tmp_path, [PLAIN], DEEPSEEK)
    (note,) = task.notes
    assert note.startswith("the chat template asks for an answer with `<think>`")
    (example,) = load_data(task)["train"].examples
    asked = task.prompt({"messages": PLAIN[:3]})
    assert "<think>" not in task.tokenizer.decode(asked)
    assert example["input_ids"][: len(asked)] == asked
    assert example["labels"][len(asked)] != IGNORED


def test_a_rejected_conversation_may_be_skipped(base: Path, tmp_path: Path) -> None:
    bad = turns(("user", "a"), ("tool", "b"), ("assistant", "c"))
    data = {"on_bad_row": "skip"}
    split = load_data(task_of(base, tmp_path, [bad, QUESTION], LLAMA2, data=data))["train"]
    assert [example["row"] for example in split.examples] == [1]
    assert split.rows_without_example == 1


def test_messages_may_be_json_in_a_csv_file(base: Path, tmp_path: Path) -> None:
    with (tmp_path / "chats.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["messages"])
        writer.writerow([json.dumps(CHAT, ensure_ascii=False)])
    task = task_of(base, tmp_path, [], path="chats.csv")
    assert labels_of(task) == labels_of(task_of(base, tmp_path, [CHAT]))


def test_long_conversations_lose_their_end_and_are_counted(base: Path, tmp_path: Path) -> None:
    long = turns(("user", "word " * 60), ("assistant", "Because."))
    split = load_data(task_of(base, tmp_path, [long, QUESTION], task={"max_length": 64}))["train"]
    assert [example["row"] for example in split.examples] == [1]
    assert split.rows_without_example == 1


# ------------------------------------------------------------------------------ ways of storing


@pytest.mark.parametrize(
    ("form", "value", "error"),
    [
        ("openai", None, "column `messages` is not a list of messages"),
        ("openai", [], "column `messages` is not a list of messages"),
        ("openai", "Hello", "column `messages` is text, not a list of messages"),
        ("openai", '{"role": "user"}', "column `messages` is not a list of messages"),
        ("openai", ["hello"], "turn 1 is not an object"),
        ("openai", [{"content": "a"}], "turn 1: it has no `role`"),
        ("openai", [{"role": 3, "content": "a"}], "turn 1: it has no `role`"),
        (
            "openai",
            [{"from": "human", "value": "a"}],
            "turn 1: it has no `role`; it looks like `format: sharegpt`",
        ),
        ("openai", [{"role": "user"}], "turn 1: it has no `content`"),
        ("openai", [{"role": "user", "content": 3}], "turn 1: its `content` is a number, not text"),
        ("sharegpt", [{"from": ["gpt"], "value": "a"}], "turn 1: `['gpt']` is not a known speaker"),
        ("sharegpt", [{"from": "gpt"}], "turn 1: it has no `value`"),
        ("sharegpt", [{"from": "gpt", "value": 3}], "turn 1: it has no `value`"),
        ("sharegpt", [{"role": "user", "content": "a"}], "turn 1: it has no `value`"),
        ("sharegpt", [{"value": "a"}], "turn 1: `None` is not a known speaker"),
        ("sharegpt", [{"from": "human", "value": "a"}, 7], "turn 2 is not an object"),
        ("openai", turns(("user", "a")), "no turn is the assistant's"),
        ("sharegpt", [{"from": "human", "value": "a"}], "no turn is the assistant's"),
    ],
)
def test_a_bad_turn_is_an_error(
    base: Path, tmp_path: Path, form: str, value: Any, error: str
) -> None:
    good = QUESTION
    if form == "sharegpt":
        good = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"messages": good}, {"messages": value}]
    with pytest.raises(LoraError) as caught:
        load_data(task_of(base, tmp_path, rows, task={"format": form}))
    (problem,) = caught.value.problems
    assert problem.what.startswith(error)
    assert problem.at == "train.jsonl:2"


def test_sharegpt_and_openai_give_the_same_examples(base: Path, tmp_path: Path) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    for key in ("role", "from"):
        row = {"conversations": [{key: names[m["role"]], "value": m["content"]} for m in CHAT]}
        assert read_messages(row, "sharegpt", "conversations") == CHAT
    spec = {"format": "sharegpt", "messages_column": "conversations"}
    task = task_of(base, tmp_path, [row], task=spec)
    assert labels_of(task) == labels_of(task_of(base, tmp_path, [CHAT]))


def test_absent_keys_of_columnar_files_are_dropped() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    row = {"messages": [{"role": "user", "content": "a", "tool_calls": None}, call]}
    assert read_messages(row, "openai", "messages") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]},
    ]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"instruction": "", "output": "a"}, "column `instruction` is blank"),
        ({"instruction": "a", "output": None}, "column `output` is blank"),
        ({"instruction": ["a"], "output": "a"}, "column `instruction` holds a list, not text"),
    ],
)
def test_alpaca_rows(base: Path, tmp_path: Path, row: dict[str, Any], error: str) -> None:
    good = {"instruction": "Add.", "input": "1 1", "output": 2, "system": "Be kind."}
    bare = {"instruction": "Say a.", "input": " ", "output": "a"}
    spec = {"format": "alpaca", "messages_column": None}
    task = task_of(base, tmp_path, [good, bare], task=spec)
    assert labels_of(task) == ["2<|im_end|>\n</s>", "a<|im_end|>\n</s>"]
    first, second = (
        [m["content"] for m in read_conversations(r, "alpaca", None)[0].messages]
        for r in (good, bare)
    )
    assert first == ["Be kind.", "Add.\n\n1 1", "2"]
    assert second == ["Say a.", "a"]
    with pytest.raises(LoraError) as caught:
        load_data(task_of(base, tmp_path, [good, row], task=spec))
    assert [(p.what, p.at) for p in caught.value.problems] == [(error, "train.jsonl:2")]


INSTRUCTED = {"instruction": "Add.", "instances": [
    {"input": "1 1", "output": "2"}, {"input": "", "output": 7},
]}  # fmt: skip


@pytest.mark.parametrize("as_text", [False, True])
def test_each_instance_of_an_instruction_is_an_example(
    base: Path, tmp_path: Path, as_text: bool
) -> None:
    row = dict(INSTRUCTED)
    if as_text:
        row["instances"] = json.dumps(row["instances"])
    spec = {"format": "self_instruct", "messages_column": None}
    task = task_of(base, tmp_path, [row], task=spec)
    examples = load_data(task)["train"].examples
    shown = [task.tokenizer.decode(ids).partition("user\n")[2] for ids in examples["input_ids"]]
    assert [text.partition("<|im_end|>")[0] for text in shown] == ["Add.\n\n1 1", "Add."]
    assert labels_of(task) == ["2<|im_end|>\n</s>", "7<|im_end|>\n</s>"]
    assert list(examples["row"]) == [0, 0]
    asked = prompt(task, row)  # the first instance is what is asked
    assert asked.endswith("Add.\n\n1 1<|im_end|>\n<|im_start|>assistant\n")
    assert task.answer_error({"instruction": "Add."}) == ""  # what has no answer can be asked
    assert "Why?" in prompt(task, task.parse_input("Why?"))


@pytest.mark.parametrize(
    ("instances", "error"),
    [
        (None, "instance 1 has no `output`"),
        ([], "column `instances` is not a list of inputs and outputs"),
        ("a", "column `instances` is text, not a list of inputs and outputs"),
        (["a"], "instance 1 is not an object"),
        ([{"input": "a", "output": "b"}, {"input": "c", "output": " "}],
         "instance 2 has no `output`"),
    ],
)  # fmt: skip
def test_instances_that_cannot_be_trained(
    base: Path, tmp_path: Path, instances: Any, error: str
) -> None:
    spec = {"format": "self_instruct", "messages_column": None}
    row = {"instruction": "Add.", "instances": instances}
    with pytest.raises(LoraError) as caught:
        load_data(task_of(base, tmp_path, [INSTRUCTED, row], task=spec))
    assert [(p.what, p.at) for p in caught.value.problems] == [(error, "train.jsonl:2")]


# ------------------------------------------------------------------------------------- answers


def prompt(task: CausalLM, row: dict[str, Any]) -> str:
    return task.tokenizer.decode(task.prompt(row))


def test_a_prompt_ends_where_the_assistant_begins(base: Path, tmp_path: Path) -> None:
    task = task_of(base, tmp_path, [CHAT])
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
    wanted = whole.removesuffix("Ja — 二 👩‍👩‍👧<|im_end|>\n")
    assert prompt(task, {"messages": CHAT}) == wanted
    assert prompt(task, {"messages": CHAT[:4]}) == wanted  # the last answer need not be there
    assert prompt(task, {"messages": json.dumps(CHAT)}) == wanted
    asked = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(task, task.parse_input("Why?")) == asked
    assert prompt(task, task.parse_input('["Why?"]')).startswith('<|im_start|>user\n["Why?"]')
    # the trained tokens follow just what is asked
    task = task_of(base, tmp_path, [QUESTION])
    (example,) = load_data(task)["train"].examples
    start = task.prompt({"messages": QUESTION})
    assert example["input_ids"][: len(start)] == start
    assert [label == IGNORED for label in example["labels"]].index(False) == len(start)


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA2, "</s>"), (NO_END, None)]
)
def test_the_token_that_ends_a_turn_ends_an_answer(template: str, end: str | None) -> None:
    made = tokenizer(template)
    assert ChatTemplate(made).end_of_turn == ({made.convert_tokens_to_ids(end)} if end else set())
    made.chat_template = "{{ raise_exception('no') }}"
    assert ChatTemplate(made).end_of_turn == set()


LOOPS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [LOOPS, LOOPS + "{% generation %}{% endgeneration %}"])
def test_a_template_that_does_not_finish_is_an_error(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "TIMEOUT_S", 0.05)
    made = ChatTemplate(tokenizer(template))
    conversation = Conversation([{"role": "user", "content": "Hi"}])
    for _ in range(2):  # and it is not tried again for every row
        with pytest.raises(LoraError, match="did not finish: it computed for more than"):
            made.encode(conversation, "all")
        monkeypatch.setattr(chat_template, "TIMEOUT_S", 1e9)


@pytest.mark.parametrize("special", [True, False])
def test_an_answer_and_its_reference_end_with_the_turn(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, special: bool
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    ends = tiny.tokenizer("llama")
    ends.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=special)
    ends.save_pretrained(folder)
    model = tiny.llama()
    model.resize_token_embeddings(len(ends))
    model.save_pretrained(folder)
    evaluate = {"metrics": ["exact_match"]}
    task = task_of(folder, tmp_path, [QUESTION], evaluate=evaluate)
    end = task.tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked: list[int] = []

    def generate(input_ids: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:
        asked[:] = generation_config.eos_token_id
        answer_ids = task.tokenizer("Because.<|im_end|>\nNo.", add_special_tokens=False)[
            "input_ids"
        ]
        return torch.cat([input_ids, torch.tensor([answer_ids])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert task.answer(model, [{"messages": QUESTION}]) == [["Because."]]
    assert asked == [tiny.EOS, end]
    task.check_metrics({"text"})
    batch = task.collate(load_data(task)["train"].examples.__getitems__([0]))
    (found,) = task.predict(model, batch)
    assert (found.prediction, found.reference) == ("Because.", "Because.")


@pytest.mark.parametrize("form", ["sharegpt", "alpaca"])
def test_a_text_becomes_a_row_of_the_form(base: Path, tmp_path: Path, form: str) -> None:
    rows = {
        "sharegpt": {"chat": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "alpaca": {"instruction": "a", "output": "b"},
    }
    column = {"sharegpt": "chat", "alpaca": None}[form]
    task = task_of(
        base, tmp_path, [rows[form]], task={"format": form, "messages_column": column}
    )  # fmt: skip
    asked = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(task, task.parse_input("Why?")) == asked
    assert prompt(task, rows[form]) == asked.replace("Why?", "a")


def test_a_conversation_without_a_turn_to_answer_is_an_error(base: Path, tmp_path: Path) -> None:
    task = task_of(base, tmp_path, [QUESTION], LLAMA2)
    assert task.answer_error({"messages": turns(("user", "a"))}) == ""
    assert "only system" in task.answer_error({"messages": turns(("tool", "a"))})
    nothing = {"messages": turns(("assistant", "a"))}
    assert task.answer_error(nothing) == "there is no turn to answer"
    assert "not a list" in task.answer_error({"messages": "a"})


def test_text_metrics_are_rejected_if_all_tokens_are_trained(base: Path, tmp_path: Path) -> None:
    evaluate = {"metrics": ["exact_match"]}
    task = task_of(base, tmp_path, [QUESTION], task={"train_on": "all"}, evaluate=evaluate)
    with pytest.raises(LoraError, match="reads the assistant's answer"):
        load_data(task)
    task = task_of(base, tmp_path, [QUESTION], evaluate=evaluate)
    assert task.metric_problems() == []


def test_a_chat_needs_a_template(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="has no chat template"):
        task_of(base, tmp_path, [QUESTION], task={"chat_template": None})
    with pytest.raises(LoraError, match="there is no file"):
        task_of(base, tmp_path, [QUESTION], task={"chat_template": "none.jinja"})
