"""Texts of any length are tokenised in bounded memory, and to the tokens of the whole text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_cli.preprocessing.data_gate import inspect_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.texts import tokenize_long_texts

LETTERS = [
    "the film",
    " ",
    "</s>",
    "中文",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "한국",
    "\n",
    "don't ",
    "0",
    "x" * 50,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("base") / "encoder")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


def mixed(size: int) -> str:
    draw = random.Random(0)
    return "".join(draw.choice(LETTERS) for _ in range(size))[:size]


TEXTS = {
    "mixed": mixed(200_000),
    "one letter": "x" * 200_000,
    "two letters": "ab" * 100_000,
    "Chinese": "这是一部好电影。" * 25_000,
    "line ends": "\n" * 200_000,
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.slow_after(1)
def test_a_text_in_pieces_has_the_tokens_of_the_whole_text(
    tokenizer: PreTrainedTokenizerBase, name: str, special: bool
) -> None:
    text = TEXTS[name]
    whole: Any = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    found = tokenize_long_texts._in_pieces(tokenizer, text, special, offsets=True)
    assert found is not None
    assert found.ids == whole["input_ids"]
    where = np.stack([found.starts, found.ends], 1)
    np.testing.assert_array_equal(where, np.array(whole["offset_mapping"]))


@pytest.mark.slow
def test_pieces_that_cannot_be_joined_are_read_whole(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_long_texts, "_joint", lambda *_: None)
    text = TEXTS["mixed"]
    assert (
        tokenize_long_texts.token_ids(tokenizer, text)
        == tokenizer(text, verbose=False)["input_ids"]
    )


@pytest.mark.parametrize("last", [False, True])
def test_the_end_of_a_text_decides_the_tokens_that_are_kept(
    tokenizer: PreTrainedTokenizerBase, last: bool
) -> None:
    text = " " * 30_000 + mixed(60_000) + " " * 30_000
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    part = tokenize_long_texts.end_of_text(tokenizer, text, 2000, last)
    ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    assert len(part) < len(text)
    assert ids[-2000:] == whole[-2000:] if last else ids[:2000] == whole[:2000]


@pytest.mark.parametrize("truncate", ["right", "left"])
@pytest.mark.parametrize("sizes", [(150, 2200), (2000, 2200), (2200, 2000), (2200, 9)])
def test_a_long_pair_is_cut_as_the_tokenizer_cuts_it(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    sizes: tuple[int, int],
    truncate: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the tokenizer is slow with longer pairs
    monkeypatch.setattr(tokenize_long_texts, "OVERLAP", 256)
    spec = {"labels": ["bad", "good"], "text_pair_column": "other", "truncate": truncate}
    task = build_task(load_recipe(tiny.recipe(folder, tmp_path, task={**spec, "max_length": 127})))
    task.load_processor()
    one, other = mixed(sizes[0]), mixed(sizes[1])[::-1]
    ((example,),) = task.encode([{"text": one, "other": other, "label": "bad"}])
    tokenizer.truncation_side = truncate
    wanted = tokenizer(one, other, truncation=True, max_length=127)["input_ids"]
    assert example["input_ids"] == wanted
    assert example["full_length"] == len(tokenizer(one, other, verbose=False)["input_ids"])


@pytest.mark.parametrize("kind", ["classification", "text", "pair", "chat"])
@pytest.mark.slow
def test_the_tokenizer_never_reads_much_at_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = mixed(400_000).replace("</s>", "")
    row: dict[str, Any] = {"text": long, "label": "good"}
    task: dict[str, Any] = {}
    if kind == "pair":
        task = {"text_column": None, "prompt_column": "text", "completion_column": "label"}
        row = {"text": "say it", "label": long}
    if kind == "chat":
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
        task = {"text_column": None, "messages_column": "messages", "chat_template": "chat.jinja"}
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": long}]
        row = {"messages": turns}
    few = json.loads(json.dumps(row).replace(json.dumps(long)[1:-1], "a bad film"))
    if kind == "classification":
        few["label"] = "bad"
        task = {"labels": ["bad", "good"]}
    base = tiny.save_encoder if kind == "classification" else tiny.save_llama
    folder = base(tmp_path / "base")
    lines = [json.dumps(one) for one in (few, row, few)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = load_recipe(tiny.recipe(folder, tmp_path, task=task, data={"path": "rows.jsonl"}))
    sizes: list[int] = []
    read = PreTrainedTokenizerFast._encode_plus

    def recording(self: Any, text: Any, text_pair: Any = None, **options: Any) -> Any:
        given = [text] if isinstance(text, str) else text
        sizes.append(sum(len(one) if isinstance(one, str) else sum(map(len, one)) for one in given))
        return read(self, text, text_pair, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", recording)
    _, data = inspect_data(recipe)
    assert data["train"].full_lengths.max() > 100_000
    assert 100_000 < max(sizes) < 300_000
