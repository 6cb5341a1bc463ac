"""Multiple-choice questions: the command in the hint writes each question with its answer."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from drafting import Init, classification, lines, needs_jq, run_hint, said, texts

from lora_cli.errors import LoraError

T, U, V, W = (texts(40, seed) for seed in range(4))
Row = dict[str, Any]
# per layout: its name, a function for row i, the question columns, and the answer of row i
SETS: dict[str, tuple[Callable[[int], Row], list[str], Callable[[Row], str]]] = {
    "COPA": (
        lambda i: {"premise": T[i], "choice1": U[i], "choice2": V[i], "label": i % 2, "idx": i},
        ["premise"], lambda row: str(row[f"choice{row['label'] + 1}"])),
    "PIQA": (
        lambda i: {"goal": T[i], "sol1": U[i], "sol2": V[i], "label": i % 2},
        ["goal"], lambda row: str(row[f"sol{row['label'] + 1}"])),
    "Winogrande": (
        lambda i: {"qID": f"q{i}", "sentence": T[i], "option1": U[i].split()[0],
                   "option2": V[i].split()[1], "answer": str(i % 2 + 1)},
        ["sentence"], lambda row: str(row[f"option{row['answer']}"])),
    "Social IQA": (
        lambda i: {"context": T[i], "question": U[i], "answerA": V[i], "answerB": W[i],
                   "answerC": f"{V[i]} too", "label": str(i % 3 + 1)},
        ["context", "question"], lambda row: str(row[f"answer{'ABC'[int(row['label']) - 1]}"])),
    "SWAG": (
        lambda i: {"video-id": f"v{i}", "startphrase": T[i], "sent1": T[i], "sent2": "they",
                   "ending0": U[i], "ending1": V[i], "ending2": W[i], "ending3": f"{U[i]} too",
                   "label": i % 4},
        ["startphrase"], lambda row: str(row[f"ending{row['label']}"])),
    "MedMCQA": (
        lambda i: {"id": f"{i:x}", "question": T[i], "opa": U[i], "opb": V[i], "opc": W[i],
                   "opd": "none of these", "cop": i % 4 + 1, "exp": f"{W[i]} {U[i]}"},
        ["question"], lambda row: str(row[f"op{'abcd'[row['cop'] - 1]}"])),
    "C-Eval": (
        lambda i: {"id": i, "question": T[i], "A": U[i], "B": V[i], "C": W[i], "D": "none",
                   "answer": "ABCD"[i % 4]},
        ["question"], lambda row: str(row[row["answer"]])),
    "names with spaces": (
        lambda i: {"The Question": T[i], "Option A": U[i], "Option B": V[i], "Correct Answer":
                   "ab"[i % 2]},
        ["The Question"], lambda row: str(row[f"Option {row['Correct Answer'].upper()}"])),
}  # fmt: skip
NESTED: dict[str, tuple[Callable[[int], Row], list[str], Callable[[Row], str]]] = {
    "MMLU": (
        lambda i: {"question": T[i], "subject": "law", "choices": [U[i], V[i], W[i]],
                   "answer": i % 3},
        ["question"], lambda row: str(row["choices"][row["answer"]])),
    "ARC": (
        lambda i: {"id": f"q{i}", "question": T[i], "choices": {"text": [U[i], V[i], W[i]],
                   "label": ["A", "B", "C"]}, "answerKey": "ABC"[i % 3]},
        ["question"],
        lambda row: str(row["choices"]["text"]["ABC".index(row["answerKey"])])),
    "OpenBookQA, flat": (
        lambda i: {"question": T[i], "choices": [{"label": "A", "text": U[i]},
                   {"label": "B", "text": V[i]}], "answerKey": "AB"[i % 2]},
        ["question"],
        lambda row: str(row["choices"]["AB".index(row["answerKey"])]["text"])),
    "MedQA": (
        lambda i: {"question": T[i], "options": {"A": U[i], "B": V[i]}, "answer_idx": "AB"[i % 2]},
        ["question"], lambda row: str(row["options"][row["answer_idx"]])),
    "HellaSwag": (
        lambda i: {"ctx": T[i], "endings": [U[i], V[i], W[i]], "label": str(i % 3)},
        ["ctx"], lambda row: str(row["endings"][int(row["label"])])),
    "AQuA": (
        lambda i: {"question": T[i], "options": [U[i], V[i], W[i]], "correct": "ABC"[i % 3]},
        ["question"], lambda row: str(row["options"]["ABC".index(row["correct"])])),
}  # fmt: skip
CASES = [(name, *one, form) for name, one in SETS.items() for form in ("jsonl", "csv", "parquet")]
CASES += [(name, *one, form) for name, one in NESTED.items() for form in ("jsonl", "parquet")]


def write(rows: list[Row], form: str, folder: Path) -> Path:
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text(lines(rows), encoding="utf-8")
    elif form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(out.getvalue(), encoding="utf-8")
    else:
        pandas.DataFrame(rows).to_parquet(path)
    return path


@needs_jq
@pytest.mark.parametrize(
    ("make", "asked", "right", "form"),
    [c[1:] for c in CASES],
    ids=[f"{c[0]} {c[4]}" for c in CASES],
)
def test_questions_are_written_with_their_correct_choice(
    make: Callable[[int], Row], asked: list[str], right: Callable[[Row], str], form: str,
    init: Init, tmp_path: Path,
) -> None:  # fmt: skip
    rows = [make(i) for i in range(40)]
    with pytest.raises(LoraError, match="no task chooses among texts") as caught:
        init("", write(rows, form, tmp_path), "llama")
    run_hint(caught.value, tmp_path)
    written = [json.loads(line) for line in (tmp_path / "flat.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in written] == [right(row) for row in rows]
    question = ["\n".join(str(row[name]) for name in asked) for row in rows]
    assert all(w["prompt"].startswith(f"{q}\n") for w, q in zip(written, question, strict=True))
    assert all(w["completion"] in w["prompt"].split("\n") for w in written)
    assert init("", tmp_path / "flat.jsonl", "llama").task.prompt_column == "prompt"


def test_two_sentences_with_a_label_are_not_choices(init: Init) -> None:
    rows = [{"sentence1": t, "sentence2": u, "label": i % 2}
            for i, (t, u) in enumerate(zip(T, U, strict=True))]  # fmt: skip
    assert said(init("pairs.jsonl", lines(rows))) == classification(
        "sentence1", "label", [0, 1], text_pair_column="sentence2"
    )


def test_choices_that_the_user_names_are_texts(init: Init) -> None:
    rows = [SETS["PIQA"][0](i) for i in range(40)]
    recipe = init("piqa.jsonl", lines(rows), text="sol1", pair="sol2", label="label")
    assert recipe.task.text_pair_column == "sol2"


PREFERENCES = {
    "SHP": lambda i: {"history": T[i], "human_ref_A": U[i], "human_ref_B": V[i], "labels": i % 2},
    "Arena": lambda i: {"prompt": T[i], "response_a": U[i], "response_b": V[i],
                        "winner": "ab"[i % 2]},
    "StackExchange": lambda i: {"question": T[i], "response_j": U[i], "response_k": V[i]},
    "summaries": lambda i: {"post": T[i], "summary1": U[i], "summary2": V[i], "preference": i % 2},
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_columns_are_rejected(name: str, init: Init) -> None:
    rows = [PREFERENCES[name](i) for i in range(40)]
    with pytest.raises(LoraError, match=r"no task chooses among texts|to be ranked"):
        init("rows.jsonl", lines(rows), "llama")


def test_one_of_several_answer_columns_can_be_named(init: Init) -> None:
    rows = [PREFERENCES["StackExchange"](i) for i in range(40)]
    recipe = init("rows.jsonl", lines(rows), "llama", text="question", label="response_j")
    assert recipe.task.completion_column == "response_j"


@pytest.mark.parametrize(
    ("asked", "answered"),
    [("text", "code"), ("prompt", "canonical_solution"), ("question", "query"), ("nl", "cmd")],
)
def test_descriptions_with_code_are_prompts_and_completions(
    asked: str, answered: str, init: Init
) -> None:
    rows = [{"task_id": i, asked: t, answered: f"SELECT {i} FROM films"}
            for i, t in enumerate(T)]  # fmt: skip
    task = init("rows.jsonl", lines(rows), "llama").task
    assert (task.prompt_column, task.completion_column) == (asked, answered)


@pytest.mark.parametrize("dump", [json.dumps, str])
def test_objects_as_text_may_be_completions_but_not_labels(
    dump: Callable[[Any], str], init: Init, tmp_path: Path
) -> None:
    cells = [dump([{"id": 1, "name": "a"}, {"id": 2, "name": "b"}][: 1 + i % 2]) for i in range(40)]
    labelled = [{"overview": t, "genres": cell} for t, cell in zip(T, cells, strict=True)]
    with pytest.raises(LoraError, match="`genres` holds objects as text, no labels"):
        init("", write(labelled, "csv", tmp_path))
    written = [{"prompt": t, "completion": cell} for t, cell in zip(T, cells, strict=True)]
    task = init("calls.jsonl", lines(written), "llama").task
    assert (task.prompt_column, task.completion_column) == ("prompt", "completion")


@pytest.mark.parametrize("form", ["{} kg", "{}%", "{} °C", "({})"])
def test_numbers_with_a_unit_are_an_error(form: str, init: Init) -> None:
    rows = [{"text": t, "weight": form.format(i / 8)} for i, t in enumerate(T)]
    with pytest.raises(LoraError, match="no label") as caught:
        init("rows.jsonl", lines(rows), label="weight")
    assert "to predict numbers, write them alone" in (caught.value.problems[0].hint or "")
