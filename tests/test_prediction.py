from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import nn

from lora_cli import prediction
from lora_cli.errors import LoraError
from lora_cli.evaluation import evaluate
from lora_cli.prediction import answer, answer_file
from lora_cli.recipe import load_recipe
from lora_cli.tasks import Task, build_task
from lora_cli.tasks.encoding import load_data

ROWS = [
    {"id": "007", "text": 'great, "fun"\nand more', "note": "NA"},
    {"id": "2", "text": "slow, dull", "note": ""},
    {"id": "x", "text": "the plot 🙂", "note": " a "},
    {"id": "4", "text": "a\ttab", "note": "é"},
    {"id": "5", "text": "what a bore " * 5, "note": "last"},
]
ADDED = ["prediction", "p_bad", "p_good"]
Opened = tuple[Task, nn.Module, Accelerator]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("opened")
    return open_task(tiny.save_encoder(folder / "base"), folder)


def open_task(base: Path, folder: Path, **sections: Any) -> Opened:
    task = build_task(load_recipe(tiny.recipe(base, folder, **sections)))
    task.load_processor()
    model, _ = task.load_model(torch.device("cpu"))
    return task, tiny.enliven(model, 4), Accelerator(cpu=True)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file]
        delimiter = "\t" if path.suffix == ".tsv" else ","
        return list(csv.DictReader(file, delimiter=delimiter))


def run(opened: Opened, source: Path, target: Path) -> tuple[int, list[Any]]:
    task, model, accelerator = opened
    return answer_file(model, task, source, target, accelerator)


@pytest.mark.parametrize("chunk", [1, 2, 1000])
@pytest.mark.parametrize("target", ["out.csv", "out.tsv", "out.jsonl"])
@pytest.mark.parametrize("source", ["in.csv", "in.tsv", "in.jsonl"])
def test_rows_order_and_columns_are_kept(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    source: str, target: str, chunk: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(prediction, "CHUNK", chunk)
    output = tmp_path / target
    written = run(opened, write(tmp_path / source, ROWS), output)
    assert written == (5, [])
    rows = read(output)
    assert [{k: row[k] for k in ROWS[0]} for row in rows] == ROWS
    assert list(rows[0]) == [*ROWS[0], *ADDED]
    task, model, accelerator = opened
    for row, (said, *probabilities) in zip(
        rows, answer(model, task, ROWS, accelerator), strict=True
    ):
        assert row["prediction"] == said
        found = [float(row[name]) for name in ADDED[1:]]
        assert found == pytest.approx(probabilities, abs=2e-6)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([source, target])


def test_the_answers_are_those_of_evaluate(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": i % 2} for i, row in enumerate(ROWS)]
    source = write(tmp_path / "rows.jsonl", rows)
    data = {"path": "rows.jsonl", "validation": "rows.jsonl"}
    opened = open_task(tiny.save_encoder(tmp_path / "base"), tmp_path, data=data)
    task, model, accelerator = opened
    file = tmp_path / "predictions.jsonl"
    evaluate(model, task, load_data(task)["validation"], accelerator, file)
    run(opened, source, tmp_path / "out.jsonl")
    wanted, found = read(file), read(tmp_path / "out.jsonl")
    assert [row["prediction"] for row in found] == [line["prediction"] for line in wanted]
    for row, line in zip(found, wanted, strict=True):
        assert row["p_bad"] == pytest.approx(line["scores"]["bad"], abs=2e-6)
    assert len({row["p_bad"] for row in found}) == 5


def test_bad_rows_stay_without_answer_and_are_reported(opened: Opened, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"text": " "}\n{broken\n{"id": 3}\n{"text": "b"}\n')
    written, problems = run(opened, source, tmp_path / "out.jsonl")
    assert written == 5
    assert [p.at for p in problems] == ["in.jsonl:2", "in.jsonl:3", "in.jsonl:4"]
    assert [p.what.split(":")[0] for p in problems] == [
        "column `text` is blank", "not valid JSON", "column `text` is blank",
    ]  # fmt: skip
    rows = read(tmp_path / "out.jsonl")
    assert [row.get("text") for row in rows] == ["a", " ", None, None, "b"]
    assert [row["prediction"] is None for row in rows] == [False, True, True, True, False]
    source = tmp_path / "in.csv"
    source.write_text("text,id\na,1\nb,2,3\nc,3\n")
    _, problems = run(opened, source, tmp_path / "out.csv")
    assert [p.at for p in problems] == ["in.csv:3"]
    rows = read(tmp_path / "out.csv")
    assert [row["text"] for row in rows] == ["a", "", "c"]
    assert [bool(row["prediction"]) for row in rows] == [True, False, True]


def test_new_columns_take_no_others_name(opened: Opened, tmp_path: Path) -> None:
    rows = [
        {"text": "a", "prediction": "old", "p_bad": 1},
        {"text": "b", "prediction_2": "older"},  # a column that only a later row has
    ]
    for name in ("out.jsonl", "out.csv"):
        run(opened, write(tmp_path / "in.jsonl", rows), tmp_path / name)
        first, second = read(tmp_path / name)
        assert (first["prediction"], second["prediction_2"]) == ("old", "older")
        assert {first["prediction_3"], second["prediction_3"]} <= {"bad", "good"}
        assert str(first["p_bad"]) == "1"
        assert 0 <= float(first["p_bad_2"]) <= 1


def test_later_columns_reach_a_table(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "CHUNK", 1)
    rows = [{"text": "a"}, {"text": "b", "tags": ["x", "é"]}]
    run(opened, write(tmp_path / "in.jsonl", rows), tmp_path / "out.csv")
    first, second = read(tmp_path / "out.csv")
    assert (first["tags"], second["tags"]) == ("", '["x", "é"]')


def test_a_file_of_an_unknown_name_is_read_as_the_recipe_says(tmp_path: Path) -> None:
    data = {"path": "rows.jsonl", "format": {"type": "json"}}
    write(tmp_path / "rows.jsonl", [{"text": "a", "label": 0}])
    opened = open_task(tiny.save_encoder(tmp_path / "base"), tmp_path, data=data)
    source = write(tmp_path / "in.jsonl", ROWS).rename(tmp_path / "in.data")
    assert run(opened, source, tmp_path / "out.jsonl") == (5, [])
    assert run(opened, write(tmp_path / "in.csv", ROWS), tmp_path / "out.jsonl") == (5, [])


def test_a_model_of_texts_answers_files_too(tmp_path: Path) -> None:
    generation = {"generation": {"max_new_tokens": 3}}
    opened = open_task(tiny.save_gpt2(tmp_path / "base"), tmp_path, evaluate=generation)
    run(opened, write(tmp_path / "in.csv", ROWS), tmp_path / "out.csv")
    task, model, accelerator = opened
    said = [values[0] for values in answer(model, task, ROWS, accelerator)]
    assert [row["prediction"] for row in read(tmp_path / "out.csv")] == said
    assert any(said)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("in.csv", "in.csv", "would overwrite the input"),
        ("in.csv", "link.csv", "would overwrite the input"),
        ("in.csv", "out.xlsx", "cannot write out.xlsx"),
        ("in.csv", "out.parquet", "cannot write out.parquet"),
        ("in.csv", "out.csv.gz", "cannot write out.csv.gz"),
        ("in.csv", "out", "cannot write out"),
        ("in.csv", "none/out.csv", "No such file or directory"),
        ("none.csv", "out.csv", "there is no file"),
        ("other.csv", "out.csv", "has no column `text`"),
        ("empty.csv", "out.csv", "no row can be read"),
        ("in.what", "out.csv", "`in.what` is of no known kind"),
    ],
)
def test_what_cannot_be_done_leaves_nothing_behind(
    opened: Opened, tmp_path: Path, source: str, target: str, message: str
) -> None:
    write(tmp_path / "in.csv", ROWS)
    (tmp_path / "in.what").write_text("text\na\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "in.csv")
    (tmp_path / "other.csv").write_text("id\n1\n")
    (tmp_path / "empty.csv").write_text("text\n")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(LoraError, match=message):
        run(opened, tmp_path / source, tmp_path / target)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failure_on_the_way_leaves_the_old_output(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "CHUNK", 2)
    source, target = write(tmp_path / "in.csv", ROWS), tmp_path / "out.csv"
    target.write_text("old")
    calls = []

    def fail_later(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return answer(*arguments)

    monkeypatch.setattr(prediction, "answer", fail_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(opened, source, target)
    assert target.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.csv", "out.csv"]


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
def test_a_file_of_any_size_takes_the_memory_of_a_chunk(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, count = "great fun " * 400, 6000
    line = json.dumps({"text": text}) + "\n" if name == "in.jsonl" else f"{text}\n"
    with (tmp_path / name).open("w") as file:
        file.write("text\n" if name == "in.csv" else "")
        file.writelines(line for _ in range(count))
    size = (tmp_path / name).stat().st_size
    assert size > 24e6
    monkeypatch.setattr(prediction, "CHUNK", 100)
    monkeypatch.setattr(prediction, "answer", lambda _, __, rows, ___: [["bad", 1, 0]] * len(rows))
    tracemalloc.start()
    try:
        assert run(opened, tmp_path / name, tmp_path / "out.jsonl") == (count, [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 10  # a chunk of rows is a sixtieth of them
    with (tmp_path / "out.jsonl").open() as file:
        assert sum(json.loads(row)["text"].strip() == text.strip() for row in file) == count
