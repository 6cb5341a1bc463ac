"""Letters that the tokenizer does not know are said before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from transformers import PreTrainedTokenizerFast

from lora_cli.evaluation.evaluate_adapter import evaluate_adapter, with_test_file
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.preprocessing.data_gate import examine
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.texts.unknown_tokens import count_unknown
from lora_cli.training import train

ROWS = [
    ("商品を返品したいです", "返品"),
    ("靴のサイズを交換したい", "交換"),
    ("a warm and funny film", "返品"),
    ("the plot is dull", "交換"),
] * 3  # fmt: skip


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an encoder whose tokenizer knows the words of `tiny.CORPUS` and nothing else."""
    folder = tmp_path_factory.mktemp("base") / "english"
    tiny.save_encoder(folder, kind="bert")
    tiny.wordpiece().save_pretrained(folder)
    return folder


def recipe(base: Path, folder: Path, rows: list[tuple[str, str]], **sections: Any) -> Path:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = {"labels": ["返品", "交換"], **sections}
    return tiny.recipe(base, folder, data={"train": "train.jsonl"}, task=task)


def test_a_share_of_unknown_tokens_is_said_with_the_letters(english: Path, tmp_path: Path) -> None:
    task = build_task(load_recipe(recipe(english, tmp_path, ROWS)))
    task.load_processor()
    findings = examine(task, load_data(task))
    ids = [i for text, _ in ROWS for i in task.tokenizer(text)["input_ids"][1:-1]]
    share = ids.count(task.tokenizer.unk_token_id) / len(ids)
    assert 0.3 < share < 0.9
    assert findings.splits["train"].unknown_share == pytest.approx(share)
    (line,) = [line for line in findings.warnings() if "tokenizer does not know" in line]
    assert line.startswith(f"{100 * share:.1f} % of the tokens of train are `[UNK]`")
    assert "(train.jsonl:1: `商`, `品`" in line
    assert "unknown tokens" in findings.table()


def test_validate_says_it_too(
    english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_recipe(load_recipe(recipe(english, tmp_path, ROWS)))
    assert "of the tokens of train are `[UNK]`" in capsys.readouterr().err
    check_recipe(load_recipe(tmp_path / "recipe.yaml"), all_rows_follow=True)
    assert "[UNK]" not in capsys.readouterr().err


def test_a_rare_letter_and_a_tokenizer_of_bytes_are_no_reason(
    english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [(text, "返品" if i % 2 else "交換") for i, text in enumerate(tiny.CORPUS * 3)]
    check_recipe(load_recipe(recipe(english, tmp_path, [*known, ("a funny \u2603", "返品")])))
    by_bytes = tiny.save_encoder(tmp_path / "bytes")
    check_recipe(load_recipe(recipe(by_bytes, tmp_path, ROWS)))
    assert "warning" not in capsys.readouterr().err


def test_the_token_that_also_ends_a_text_is_not_unknown() -> None:
    tokenizer = tiny.tokenizer("gpt2")  # whose one special token is everything
    ids = np.array([tokenizer.eos_token_id] * 5)
    assert count_unknown(tokenizer, ids, np.array([5])).share == 0.0


def test_special_tokens_do_not_thin_out_the_share() -> None:
    tokenizer: PreTrainedTokenizerFast = tiny.wordpiece()
    ids = np.array(tokenizer("返 film")["input_ids"] + tokenizer("film 返")["input_ids"])
    found = count_unknown(tokenizer, ids, np.array([4, 8]))
    assert (found.share, found.first) == (0.5, 0)


def test_eval_says_it_of_a_file_in_another_language(
    english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [(text, "返品" if i % 2 else "交換") for i, text in enumerate(tiny.CORPUS)]
    path = recipe(english, tmp_path, known)
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in ROWS),
        encoding="utf-8",
    )
    train(load_recipe(path, ["train.max_steps=1"]))
    capsys.readouterr()
    loaded = load_recipe(tmp_path / "out" / "recipe.yaml")
    loaded = with_test_file(loaded, tmp_path / "other.jsonl")
    evaluate_adapter(tmp_path / "out", loaded, "test")
    assert "of the tokens of test are `[UNK]`" in capsys.readouterr().err
