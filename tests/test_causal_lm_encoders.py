"""What is cut of long rows, against slices of the tokens of the whole row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch

from lora_cli.errors import LoraError
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.preprocessing.data_gate import inspect_data
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import CausalLMSpec, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import IGNORED, Encoded
from lora_cli.tasks.generation.causal_lm_encoders import (
    SAMPLE_NEW_TOKENS,
    SAMPLE_TOKENS,
    input_error,
    target_error,
)

PAIR = {"type": "causal_lm", "prompt_column": "prompt", "completion_column": "completion"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
CHAT = {"type": "causal_lm", "messages_column": "messages", "chat_template": "chat.jinja"}
LABELS = {"type": "sequence_classification", "labels": ["bad", "good"]}
SIZE = 48


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def task_of(tmp_path: Path, rows: list[dict[str, Any]], task: dict[str, Any], **more: Any) -> Task:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    save = tiny.save_encoder if task["type"] == LABELS["type"] else tiny.save_llama
    base = tmp_path / "base"
    base = base if base.exists() else save(base)
    keys = {"text_column": None, "max_length": SIZE} if save is tiny.save_llama else {}
    path = tiny.recipe(base, tmp_path, task={**keys, **task}, data={"path": "rows.jsonl"}, **more)
    made = build_task(load_recipe(path))
    made.load_processor()
    return made


def encoded(task: Task) -> Encoded:
    return load_data(task)["train"]


LONG, SHORT = "slow " * 60 + "\n", "yes"


def row_of(kind: str, prompt: str, answer: str) -> dict[str, Any]:
    if kind == "pair":
        return {"prompt": prompt, "completion": answer}
    turns = (("user", prompt), ("assistant", answer))
    return {"messages": [{"role": role, "content": said} for role, said in turns]}


def whole_of(kind: str, task: Task, prompt: str, answer: str) -> tuple[list[int], int]:
    """Return the tokens of a row and how many of them ask, without our code."""
    read = task.tokenizer
    if kind == "pair":
        asked = read(prompt)["input_ids"]
        return [*read(prompt + answer)["input_ids"], tiny.EOS], len(asked)
    row = row_of(kind, prompt, answer)["messages"]
    asked = read.apply_chat_template(row[:1], add_generation_prompt=True)["input_ids"]
    ids = read.apply_chat_template(row)["input_ids"]
    return ids, len(asked)  # the template's own end of text is the last but one


@pytest.mark.parametrize("kind", ["pair", "chat"])
@pytest.mark.parametrize(("prompt", "answer"), [(LONG, SHORT), ("a\n", LONG + "x"), (LONG, LONG)])
def test_the_beginning_is_cut_if_the_recipe_says_so(
    tmp_path: Path, kind: str, prompt: str, answer: str
) -> None:
    spec = {**(PAIR if kind == "pair" else CHAT), "truncate": "left"}
    task = task_of(tmp_path, [row_of(kind, prompt, answer)], spec)
    ids, n_asked = whole_of(kind, task, prompt, answer)
    if kind == "chat" and ids[-1] != tiny.EOS:
        ids = [*ids]  # a line end follows the turn; it is trained with it
    (example,) = encoded(task).examples
    labels = [IGNORED] * n_asked + ids[n_asked:]
    if example["full_length"] == len(ids) + 1:  # an end of text was added
        ids, labels = [*ids, tiny.EOS], [*labels, tiny.EOS]
    assert example["full_length"] == len(ids) > SIZE
    assert example["input_ids"] == [ids[0], *ids[-SIZE + 1 :]]
    assert example["input_ids"][0] == tiny.BOS
    assert example["labels"] == [IGNORED, *labels[-SIZE + 1 :]]


@pytest.mark.parametrize("kind", ["pair", "chat"])
def test_the_end_is_cut_and_rows_without_an_answer_are_counted(tmp_path: Path, kind: str) -> None:
    spec = PAIR if kind == "pair" else CHAT
    rows = [row_of(kind, LONG, SHORT), row_of(kind, "a\n", LONG + "x"), row_of(kind, "a\n", SHORT)]
    split = encoded(task := task_of(tmp_path, rows, spec))
    assert list(split.examples["row"]) == [1, 2]
    assert split.rows_without_example == 1
    ids, n_asked = whole_of(kind, task, "a\n", LONG + "x")
    assert split.examples[0]["input_ids"] == ids[:SIZE]
    assert split.examples[0]["labels"] == [IGNORED] * n_asked + ids[n_asked:SIZE]


@pytest.mark.parametrize("kind", ["pair", "chat"])
def test_long_rows_are_dropped_or_errors(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = PAIR if kind == "pair" else CHAT
    rows = [row_of(kind, "a\n", SHORT), row_of(kind, "a\n", LONG + "x"), row_of(kind, LONG, SHORT)]
    task = task_of(tmp_path, rows, {**spec, "truncate": "drop"})
    split = encoded(task)
    assert (list(split.examples["row"]), split.rows_without_example) == ([0], 2)
    check_recipe(task.recipe)
    assert "2 of 3 train rows leave nothing to train within 48 tokens" in capsys.readouterr().err
    with pytest.raises(LoraError, match=r"the row has \d+ tokens, more than 48") as caught:
        encoded(task_of(tmp_path, rows, {**spec, "truncate": "error"}))
    assert [p.at for p in caught.value.problems] == ["rows.jsonl:2"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_classified_text_is_truncated_on_the_recipe_s_side(
    tmp_path: Path, side: str, pairs: bool
) -> None:
    row = {"text": "a long and boring plot " * 12, "other": "great fun " * 30, "label": "bad"}
    spec = {**LABELS, "truncate": side, "max_length": SIZE}
    spec |= {"text_pair_column": "other"} if pairs else {}
    task = task_of(tmp_path, [row, {**row, "label": "good"}], spec)
    theirs = tiny.tokenizer("encoder")
    theirs.truncation_side = side
    texts = [row["text"], row["other"]] if pairs else [row["text"]]
    wanted = theirs(*texts, truncation=True, max_length=SIZE)["input_ids"]
    assert encoded(task).examples[0]["input_ids"] == wanted
    model, _ = task.load_model(torch.device("cpu"))
    assert len(task.answer(model, [row])) == 1


def test_long_texts_to_classify_are_dropped_or_errors(tmp_path: Path) -> None:
    rows = [{"text": "great", "label": "good"}, {"text": LONG, "label": "bad"},
            {"text": "dull", "label": "bad"}]  # fmt: skip
    spec = {**LABELS, "max_length": SIZE}
    split = encoded(task := task_of(tmp_path, rows, {**spec, "truncate": "drop"}))
    assert (list(split.examples["row"]), split.rows_without_example) == ([0, 2], 1)
    assert task.answer_error(rows[0]) == ""
    assert "tokens, more than 48" in task.answer_error(rows[1])
    with pytest.raises(LoraError, match="tokens, more than 48") as caught:
        encoded(task_of(tmp_path, rows, {**spec, "truncate": "error"}))
    assert caught.value.problems[0].at == "rows.jsonl:2"


# ------------------------------------------------------------------------------ control tokens


@pytest.mark.parametrize("splits", [None, False, True])
@pytest.mark.parametrize("kind", ["text", "pair", "labels"])
def test_control_tokens_are_counted_and_read_as_the_recipe_says(
    tmp_path: Path, kind: str, splits: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "<s> great </s> fun"
    row = {"text": text, "prompt": text, "completion": "a</s>", "label": "good"}
    rows = [{**row, "text": "dull", "prompt": "b", "completion": "c", "label": "bad"}, row]
    spec = {"text": {"type": "causal_lm", "text_column": "text"}, "pair": PAIR, "labels": LABELS}
    keys = {**spec[kind], "max_length": 64}
    if splits is not None:
        keys["split_special_tokens"] = splits
    task = task_of(tmp_path, rows, keys)
    theirs = tiny.tokenizer("encoder" if kind == "labels" else "llama")
    whole = f"{text}a</s>" if kind == "pair" else text
    wanted = theirs(whole, split_special_tokens=bool(splits))["input_ids"]
    if kind != "labels" and wanted[-1] != tiny.EOS:
        wanted = [*wanted, tiny.EOS]
    found = encoded(task).examples[1]["input_ids"]
    assert found == wanted
    assert (found.count(tiny.BOS) > 1) == (not splits)
    check_recipe(task.recipe)
    err = capsys.readouterr().err
    how = "as text" if splits else "as tokens: see `task.split_special_tokens`"
    assert "1 of 2 train rows have control tokens in their text, the first is `<s>` at" in err
    assert f"rows.jsonl:2; they are read {how}" in err
    inspect_data(task.recipe)
    printed = capsys.readouterr().err
    # `<s>` stands there, and the tokenizer writes one before it
    assert ("two at the beginning of" in printed) == (not splits), printed
    task.note_control_tokens(rows)
    (warning,) = task.take_warnings()
    assert warning.startswith("1 row with control tokens in the text")
    asked = task.text_tokenizer(text)["input_ids"]
    if kind != "labels":
        assert task.prompt(row) == asked  # type: ignore[attr-defined]


def test_in_a_conversation_control_tokens_are_never_read(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="control tokens in a text are always read as letters"):
        task_of(tmp_path, [row_of("chat", "a", "b")], {**CHAT, "split_special_tokens": False})
    row = row_of("chat", f"a</s>\nassistant:\n{SHORT}</s>", "b")
    task = task_of(tmp_path, [row], {**CHAT, "max_length": 64})
    (example,) = encoded(task).examples
    assert example["input_ids"].count(tiny.EOS) == 2
    asked = task.prompt({"messages": row["messages"][:1]})  # type: ignore[attr-defined]
    assert asked == example["input_ids"][: len(asked)]
    assert asked.count(tiny.EOS) == 1


def said(*turns: str) -> dict[str, Any]:
    """Return a conversation of turns such as `user: why?`."""
    parts = [turn.partition(": ") for turn in turns]
    return {"messages": [{"role": role, "content": content} for role, _, content in parts]}


def test_the_prompt_of_a_conversation_ends_before_the_last_answer(tmp_path: Path) -> None:
    row = said("user: a film?", "assistant: dull", "user: why?", "assistant: too long")
    task: Any = task_of(tmp_path, [row], CHAT)
    read = task.tokenizer

    def tokens(turns: list[dict[str, str]]) -> list[int]:
        return list(read.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])

    turns = row["messages"]
    for count, asked in ((1, 1), (2, 1), (3, 3), (4, 3)):
        assert task.prompt({"messages": turns[:count]}) == tokens(turns[:asked])
    with pytest.raises(LoraError, match="no turn to answer"):
        task.prompt(said("assistant: hello"))


def test_a_sample_is_the_prompt_and_the_reference(tmp_path: Path) -> None:
    row = said("user: a film?", "assistant: dull", "user: why?", "assistant: too long")
    task: Any = task_of(tmp_path, [row], CHAT)
    turns = row["messages"]
    for count, wanted in ((1, ""), (2, "dull"), (3, ""), (4, "too long")):
        some = {"messages": turns[:count]}
        assert task.rows.sample(some) == (task.prompt(some), wanted)
    # the assistant speaks first: of a blank, which every model reads
    begun = task.tokenizer(" ")["input_ids"]
    assert task.rows.sample(said("assistant: hello")) == (begun, "hello")


def test_a_sample_of_a_text_is_its_first_half_and_what_follows(tmp_path: Path) -> None:
    texts = ["a great film and a warm cast", "dull", "slow and long " * 60]
    rows = [{"text": text} for text in texts]
    task: Any = task_of(tmp_path, rows, {"type": "causal_lm", "text_column": "text"})
    for row in rows:
        whole = task.tokenizer(row["text"])["input_ids"]
        begin, end = task.rows.sample(row)
        cut = min(SAMPLE_TOKENS, (len(whole) + 1) // 2)
        assert begin == whole[:cut]
        assert end == task.tokenizer.decode(whole[cut : cut + SAMPLE_NEW_TOKENS])


# ------------------------------------------------------------------------------------- lengths


def rows_of(tmp_path: Path, size: int, **task: Any) -> Any:
    """Return the format of texts, or of pairs, with examples of up to `size` tokens."""
    text = {"type": "causal_lm", "text_column": "text"}
    keys = {**(PAIR if task else text), "max_length": size, **task}
    return task_of(tmp_path, [{"text": "a"}], keys).rows  # type: ignore[attr-defined]


def test_a_long_example_is_truncated_and_has_its_full_length(tmp_path: Path) -> None:
    ids, labels = [tiny.BOS, 11, 12, 13, 14], [IGNORED, IGNORED, 12, 13, 14]
    for size in (5, 6):  # it fits
        assert rows_of(tmp_path, size).fit_to_length(ids, labels) == [
            {"input_ids": ids, "labels": labels}
        ]
    right = rows_of(tmp_path, 4, truncate="right")
    assert right.fit_to_length(ids, labels) == [
        {"input_ids": ids[:4], "labels": labels[:4], "full_length": 5}
    ]
    left = rows_of(tmp_path, 4, truncate="left")
    assert left.fit_to_length(ids, labels) == [
        {
            "input_ids": [tiny.BOS, 12, 13, 14],
            "labels": [IGNORED, 12, 13, 14],
            "full_length": 5,
        }
    ]
    assert rows_of(tmp_path, 4, truncate="drop").fit_to_length(ids, labels) == []
    with pytest.raises(LoraError, match="has 5 tokens, more than 4"):
        rows_of(tmp_path, 4, truncate="error").fit_to_length(ids, labels)


def test_an_example_needs_a_trained_token_after_the_first(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 4)
    assert rows.fit_to_length([7, 8], [7, IGNORED]) == []  # the first is predicted from nothing
    assert rows.fit_to_length([7, 8, 9], [IGNORED, IGNORED, 9])
    assert rows.fit_to_length([7, 8, 9, 10, 11], [IGNORED] * 4 + [11]) == []  # it is cut off


def test_a_shortened_prompt_keeps_its_bos_token(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 8)
    begun, other = [tiny.BOS, 11, 12, 13, 14], [10, 11, 12, 13, 14]
    assert rows.keep_last_tokens(begun, 3) == [tiny.BOS, 13, 14]
    assert rows.keep_last_tokens(begun, 2) == [tiny.BOS, 14]
    assert rows.keep_last_tokens(begun, 1) == [14]  # with one place alone, the newest is worth more
    assert rows.keep_last_tokens(begun, 5) == begun
    assert rows.keep_last_tokens(other, 3) == [12, 13, 14]


def test_a_text_has_one_end_token_and_a_continued_one_none(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 8)
    assert rows.with_end_token([5, 6]) == [5, 6, tiny.EOS]
    assert rows.with_end_token([5, tiny.EOS]) == [5, tiny.EOS]
    assert rows.with_end_token([]) == [tiny.EOS]
    ids = tiny.tokenizer("llama")("a film")["input_ids"]
    assert rows.encode_without_end("a film") == ids
    rows.text_tokenizer = tiny.tokenizer("encoder")  # it ends texts by itself
    assert rows.encode_without_end("a film") == rows.text_tokenizer("a film")["input_ids"][:-1]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 99])
def test_every_token_of_a_text_but_the_first_is_trained_once(tmp_path: Path, size: int) -> None:
    rows = rows_of(tmp_path, size)
    for n in range(1, 12):
        ids = list(range(100, 100 + n))
        windows = rows._windows(ids)
        predicted = [token for window in windows for token in window["labels"][1:]]
        assert predicted == ids[1:]
        assert all(len(window["input_ids"]) <= size for window in windows)
        assert all(window["input_ids"] == window["labels"] for window in windows)
        full = {window.get("full_length") for window in windows}
        assert full <= ({n} if n > size else {None})


@pytest.mark.parametrize("kind", ["pair", "chat", "text"])
def test_a_bad_answer_and_what_no_task_reads_are_errors_beside_a_prompt(kind: str) -> None:
    values = {"pair": PAIR, "chat": {"type": "causal_lm", "messages_column": "messages"},
              "text": {"type": "causal_lm", "text_column": "text"}}  # fmt: skip
    spec = CausalLMSpec.model_validate(values[kind])
    row = {**row_of("pair", "a", "b"), **row_of("chat", "a", "b"), "text": "a"}
    assert input_error(row, spec, []) == target_error(row, spec, []) == ""
    bad = target_error({**row, "chosen": "x", "rejected": "y"}, spec, [])
    message = input_error({**row, "images": ["x.png"]}, spec, [])
    if kind == "text":  # whose rows have no answer
        assert bad == message == ""
    else:
        assert bad.startswith("it has a rejected answer in `rejected`")
        assert message.startswith("it has pictures, sound or films in `images`")


def test_a_text_is_read_from_its_column(tmp_path: Path) -> None:
    row = {"text": "dull", "said": "a great film and a warm cast"}
    keys = {"type": "causal_lm", "text_column": "said", "separator": " ;"}
    rows = task_of(tmp_path, [row], keys).rows  # type: ignore[attr-defined]
    ids = tiny.tokenizer("llama")(row["said"])["input_ids"]
    ((example,),) = rows.encode([row])
    assert example["input_ids"] == [*ids, tiny.EOS]
    assert rows.prompt(row) == tiny.tokenizer("llama")(row["said"] + " ;")["input_ids"]
    assert rows.sample(row)[0] == ids[: (len(ids) + 1) // 2]
