"""Tests of final answers: extraction, comparison, and the metrics of a language model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator

from lora_cli.errors import LoraError
from lora_cli.evaluation.compare import row_sums
from lora_cli.evaluation.evaluate_split import evaluate
from lora_cli.metrics import MetricContext, MetricSet, final_answer
from lora_cli.metrics.final_answers import is_same_answer
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.examples import Prediction
from lora_cli.training.run import train

GSM8K = "#### (-?[0-9.,]+)"


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (GSM8K, "half of 48 is 24\n#### 72", "72"),
        (GSM8K, "#### 1\nQuestion: another\n#### 2", "2"),  # the last one
        (GSM8K, "the answer is 72", None),
        (GSM8K, "####72", None),
        (r"-?\d+", "from 3 to -4", "-4"),  # without a group: the whole match
        (r"(?:yes:(\w+)|no:(\w+))", "no:b", "b"),  # the group that took part
        (r"answer:(.*)", "answer: Zoë ", "Zoe\u0308"),
        (r"(?i)ANSWER: (\w+)", "answer: B", "B"),
        (r"答え：(\d+)", "答え：７２", "７２"),
    ],
)
def test_the_last_match_is_the_final_answer(pattern: str, text: str, expected: str | None) -> None:
    answer = final_answer(pattern, text)
    assert answer == (expected and "Zo\u00eb" if expected == "Zoe\u0308" else expected)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1,234", "1234", True), ("72.", "72", True), ("72.0", "72", True), ("0.50", ".5", True),
        ("-3", "-3.00", True), ("+3", "3", True), ("７２", "72", True), ("3", "-3", False),
        ("12", "1", False), ("1e3", "1000", False), ("A", "a", False), ("x", "x", True),
        ("1.2.3", "1.2.3", True), ("1.2.3", "1.23", False), ("0.1", "0.10000000000000001", False),
        (",", "", False), ("", "", True),
    ],
)  # fmt: skip
def test_numbers_are_compared_by_value(a: str, b: str, same: bool) -> None:
    assert is_same_answer(a, b) is is_same_answer(b, a) is same


def test_exact_match_and_no_answer_with_a_pattern() -> None:
    predictions = ["so #### 1,200", "so #### 7", "no idea", "Paris ", "#### 3", "Rome"]
    references = ["#### 1200", "#### 8", "#### 9", "Paris", "x #### 3.0", ["Oslo", "#### 4"]]
    context = MetricContext(answer_pattern=GSM8K, several_references=True)
    metrics = MetricSet(["exact_match", "no_answer"], "text", context)
    metrics.add_batch("text", predictions, references)
    # of the five references with an answer, "no idea" and "Rome" have none; Paris is a whole text
    assert metrics.compute() == {"exact_match": 3 / 6, "no_answer": 2 / 5}
    rows = [Prediction(i, None, None, metric_inputs={"text": pair}) for i, pair in
            enumerate(zip(predictions, references, strict=True))]  # fmt: skip
    rows.append(Prediction(6, None, None))  # not answered
    for metric, total, count in (("exact_match", 3, 6), ("no_answer", 2, 5)):
        sums = row_sums(metric, rows, context)
        assert sums is not None
        assert sums.sum(0).tolist() == [total, count]


def test_a_slow_pattern_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.metrics.final_answers.TIMEOUT_S", 0.02)
    with pytest.raises(LoraError, match=r"takes more than 0\.02 s for one text"):
        final_answer("(a|aa)+$", "a" * 60 + "b")


def recipe_of(tmp_path: Path, rows: list[dict[str, str]], **sections: Any) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    task = {
        "type": "causal_lm", "prompt_column": "q", "completion_column": "a", "text_column": None,
        "max_length": 64, "answer_pattern": r"(\w)\W*$",
    }  # fmt: skip
    data = {"path": "rows.jsonl", "validation": "./rows.jsonl", "check": {"max_overlap": 1.0}}
    values: dict[str, Any] = {
        "task": task, "data": data, "evaluate": {"generation": {"max_new_tokens": 6}},
    }  # fmt: skip
    values |= sections
    return tiny.recipe(tiny.save_llama(tmp_path / "base"), tmp_path, **values)


def test_answers_equal_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"q": text, "a": f"so it is {'abc'[i % 3]}"} for i, text in enumerate(tiny.CORPUS)]
    generation = {"max_new_tokens": 6, "max_rows": 4}
    evaluate_section = {"generation": generation, "micro_batch_size": 4}
    recipe = load_recipe(recipe_of(tmp_path, rows, evaluate=evaluate_section))
    task = build_task(recipe)
    task.load_processor()
    assert list(task.metric_names) == ["exact_match", "no_answer", "perplexity"]
    split = load_data(task)["validation"]
    model, _ = task.load_model(torch.device("cpu"))
    file, generate = tmp_path / "predictions.jsonl", task.generate
    batch_sizes: list[int] = []
    monkeypatch.setattr(
        task, "generate", lambda *args: (batch_sizes.append(len(args[1])), generate(*args))[1]
    )
    metrics = evaluate(model, task, split, Accelerator(cpu=True), file)
    assert batch_sizes == [4]  # the four rows to answer in one batch

    n_right = n_missing = 0
    answered = [0, 2, 4, 6]  # four of eight rows, spread evenly
    for i in answered:
        ids = task.tokenizer(rows[i]["q"], return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tiny.PAD)
        text = task.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        answers = re.findall(r"(\w)\W*$", text)
        n_missing += not answers
        n_right += answers[-1:] == [rows[i]["a"][-1]]
    assert metrics["exact_match"] == n_right / 4
    assert metrics["no_answer"] == n_missing / 4
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [i for i, line in enumerate(lines) if "prediction" in line] == answered
    assert "at most 4 rows" in task.metric_definitions()["exact_match"]


def test_samples_are_shown_for_each_evaluation(tmp_path: Path) -> None:
    rows = [{"q": text, "a": "fine a"} for text in tiny.CORPUS]
    path = recipe_of(
        tmp_path, rows, train={"max_steps": 6, "optimizer": {"learning_rate": 0.05}},
        evaluate={"every_steps": 2, "samples": 2, "generation": {"max_new_tokens": 4}},
    )  # fmt: skip
    report = train(load_recipe(path))
    assert [set(sample) for sample in report["samples"]] == 2 * [
        {"place", "prompt", "reference", "before", "during", "after"}
    ]
    for sample in report["samples"]:
        steps = {during["step"]: during["text"] for during in sample["during"]}
        assert list(steps) == [2, 4, 6]
        assert sample["after"] == steps[report["best"]["step"]]
    page = (tmp_path / "out/report.html").read_text()
    assert "at each evaluation" in page
