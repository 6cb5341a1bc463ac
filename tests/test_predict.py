from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.data.file_formats import read_rows
from lora_cli.data.write_rows import OutputFormat, writing
from lora_cli.errors import LoraError
from lora_cli.evaluation import predict as prediction
from lora_cli.evaluation.evaluate_split import evaluate
from lora_cli.evaluation.predict import answer, answer_file
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import FormatSpec, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.sequence_classification import SequenceClassification

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


def run(
    opened: Opened, source: Path, target: Path, overwrite: bool = False
) -> tuple[int, list[Any]]:
    task, model, accelerator = opened
    return answer_file(model, task, source, target, accelerator, overwrite)


@pytest.mark.parametrize("chunk", [1, 2, 1000])
@pytest.mark.parametrize("target", ["out.csv", "out.tsv", "out.jsonl"])
@pytest.mark.parametrize("source", ["in.csv", "in.tsv", "in.jsonl"])
def test_rows_order_and_columns_are_preserved(
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
        assert found == pytest.approx(probabilities, abs=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([source, target])


def test_without_any_answer_nothing_is_written(opened: Opened, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": "", "id": i} for i in range(5)])
    with pytest.raises(LoraError, match="none of 5 rows can be answered") as found:
        run(opened, source, tmp_path / "out.jsonl")
    assert "in.jsonl:1" in str(found.value)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_leftovers_are_deleted_and_existing_files_are_not_replaced(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, other = tmp_path / f".out.csv.{dead.pid}.tmp", tmp_path / f".out.csv.{os.getppid()}.tmp"
    for file in (left, other):
        file.write_text("a part")
    source, target = write(tmp_path / "in.csv", ROWS), tmp_path / "out.csv"

    def while_it_runs(*given: Any) -> Any:
        target.write_text("of another process")
        return answer(*given)

    monkeypatch.setattr(prediction, "answer", while_it_runs)
    with pytest.raises(LoraError, match="was written by another process meanwhile"):
        run(opened, source, target)
    assert target.read_text() == "of another process"
    assert run(opened, source, target, overwrite=True)[0] == 5
    assert {file.name for file in tmp_path.iterdir()} == {"in.csv", "out.csv", other.name}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.slow_after(1)
def test_only_the_best_of_many_labels_are_written(suffix: str, tmp_path: Path) -> None:
    """Otherwise 3,000 labels give 3,000 columns, and rows of 70 kB."""
    names = [f"label {i}" for i in range(3000)]
    given = {"task": {"labels": names}, "data": {"path": "rows.csv"}}
    opened = open_task(tiny.save_encoder(tmp_path / "base"), tmp_path, **given)
    source, target = write(tmp_path / "in.csv", ROWS), tmp_path / f"out{suffix}"
    run(opened, source, target)
    task, model, _ = opened
    assert isinstance(task, SequenceClassification)
    with torch.no_grad():
        task.first_position = None  # padded, as in plain transformers
        batch = task.input_tensors(task._encode_texts(ROWS))
        wanted = torch.softmax(model(**batch).logits, -1)
    rows = pq.read_table(target).to_pylist() if suffix == ".parquet" else read(target)
    assert target.stat().st_size < 5 * 1000
    for row, scores in zip(rows, wanted, strict=True):
        assert row["prediction"] == names[int(scores.argmax())]
        assert float(row["p"]) == pytest.approx(float(scores.max()), abs=1e-5)
        best = row["best"] if suffix == ".jsonl" else json.loads(row["best"])
        top = scores.topk(10)
        assert list(best) == [names[i] for i in top.indices.tolist()]
        assert list(best.values()) == pytest.approx(top.values.tolist(), abs=1e-5)


def test_predictions_contain_the_best_of_many_labels_and_the_row_s_own(tmp_path: Path) -> None:
    names = [f"label {i}" for i in range(3000)]
    rows = [{"text": row["text"], "label": names[-1 - i]} for i, row in enumerate(ROWS)]
    write(tmp_path / "rows.jsonl", rows)
    given = {"task": {"labels": names}, "data": {"path": "rows.jsonl"}}
    task, model, accelerator = open_task(tiny.save_encoder(tmp_path / "base"), tmp_path, **given)
    file = tmp_path / "predictions.jsonl"
    evaluate(model, task, load_data(task)["train"], accelerator, file)
    assert file.stat().st_size < 5 * 1000
    for i, line in enumerate(read(file)):
        assert len(line["scores"]) in (10, 11)
        assert {line["prediction"], names[-1 - i]} <= set(line["scores"])
        assert max(line["scores"], key=line["scores"].get) == line["prediction"]


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
        assert row["p_bad"] == pytest.approx(line["scores"]["bad"], abs=1e-5)
    assert len({row["p_bad"] for row in found}) == 5


def test_bad_rows_get_no_answer_and_are_reported(opened: Opened, tmp_path: Path) -> None:
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


def test_new_columns_do_not_reuse_existing_names(opened: Opened, tmp_path: Path) -> None:
    rows = [
        {"text": "a", "prediction": "old", "p_bad": 1},
        {"text": "b", "prediction_2": "older"},  # a column that only exists in a later row
    ]
    for name in ("out.jsonl", "out.csv"):
        run(opened, write(tmp_path / "in.jsonl", rows), tmp_path / name)
        first, second = read(tmp_path / name)
        assert (first["prediction"], second["prediction_2"]) == ("old", "older")
        assert {first["prediction_3"], second["prediction_3"]} <= {"bad", "good"}
        assert str(first["p_bad"]) == "1"
        assert 0 <= float(first["p_bad_2"]) <= 1


def test_columns_of_later_rows_are_written_to_a_table(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "CHUNK", 1)
    rows = [{"text": "a"}, {"text": "b", "tags": ["x", "é"]}]
    run(opened, write(tmp_path / "in.jsonl", rows), tmp_path / "out.csv")
    first, second = read(tmp_path / "out.csv")
    assert (first["tags"], second["tags"]) == ("", '["x", "é"]')


def test_a_file_with_an_unknown_suffix_is_read_in_the_recipe_s_format(tmp_path: Path) -> None:
    data = {"path": "rows.jsonl", "format": {"type": "json"}}
    write(tmp_path / "rows.jsonl", [{"text": "a", "label": 0}])
    opened = open_task(tiny.save_encoder(tmp_path / "base"), tmp_path, data=data)
    source = write(tmp_path / "in.jsonl", ROWS).rename(tmp_path / "in.data")
    assert run(opened, source, tmp_path / "out.jsonl") == (5, [])
    assert run(opened, write(tmp_path / "in.csv", ROWS), tmp_path / "more.jsonl") == (5, [])


def test_a_language_model_answers_files_too(tmp_path: Path) -> None:
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
        ("in.csv", "hard.csv", "would overwrite the input"),
        ("in.csv", "old.csv", "exists already, and is not overwritten"),
        ("in.csv", "folder.csv", "is a folder"),
        ("in.csv", "out.xlsx", "cannot write out.xlsx"),
        ("in.csv", "out.parquet.gz", "cannot write out.parquet.gz"),
        ("in.csv", "out", "cannot write out"),
        ("in.csv", "none/out.csv", "there is no folder"),
        ("good.jsonl", "out.parquet", "no fixed types"),
        ("none.csv", "out.csv", "there is no file"),
        ("other.csv", "out.csv", "has no column `text`"),
        ("empty.csv", "out.csv", "the file is empty"),
        ("in.jsonl", "out.csv", "no row can be read"),
    ],
)
def test_an_error_leaves_no_files_behind(
    opened: Opened, tmp_path: Path, source: str, target: str, message: str
) -> None:
    write(tmp_path / "in.csv", ROWS)
    (tmp_path / "in.jsonl").write_text("{broken\n")
    write(tmp_path / "good.jsonl", ROWS)
    (tmp_path / "old.csv").write_text("old")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "hard.csv").hardlink_to(tmp_path / "in.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "in.csv")
    (tmp_path / "other.csv").write_text("id,note\n1,a\n")
    (tmp_path / "empty.csv").write_text("\n")
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(LoraError, match=message):
        run(opened, tmp_path / source, tmp_path / target)
    assert {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before


def test_a_failure_during_writing_keeps_the_old_output(
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
        run(opened, source, target, overwrite=True)
    assert target.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.csv", "out.csv"]
    monkeypatch.setattr(prediction, "answer", answer)
    assert run(opened, source, target, overwrite=True) == (5, [])
    assert len(read(target)) == 5


# ------------------------------------------------------------- how the output is written, and read


def raw_rows(encoding: str = "utf-8", delimiter: str = ",", end: str = "\n") -> bytes:
    rows = [("id", "text", "note"), ("1", "très réussi", "é"), ("2", "slow\r\nand dull", "NA")]
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows(rows)
    return out.getvalue().encode(encoding)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [";", "|", ",", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_a_table_is_written_in_its_own_format(
    opened: Opened, tmp_path: Path, encoding: str, delimiter: str, end: str
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(raw_rows(encoding, delimiter, end))
    assert run(opened, source, target) == (2, [])
    raw = target.read_bytes()
    assert raw[:2] == source.read_bytes()[:2]  # the byte order mark, or none
    text = raw.decode(encoding)
    assert text.startswith(delimiter.join(["id", "text", "note", *ADDED]) + end)
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    assert [row[:3] for row in rows[1:]] == [
        ["1", "très réussi", "é"], ["2", "slow\r\nand dull", "NA"],
    ]  # fmt: skip
    assert text.count(end) >= 3
    assert ("\r" in text.replace("slow\r\nand", "")) == (end == "\r\n")


def test_a_compressed_output(opened: Opened, tmp_path: Path) -> None:
    source = tmp_path / "in.csv.gz"
    source.write_bytes(gzip.compress(raw_rows()))
    for name in ("out.csv.gz", "out.jsonl.gz"):
        assert run(opened, source, tmp_path / name) == (2, [])
        text = gzip.decompress((tmp_path / name).read_bytes()).decode()
        assert "très réussi" in text
        assert "prediction" in text


def test_parquet_keeps_its_types(opened: Opened, tmp_path: Path) -> None:
    columns = {
        "n": pa.array([1, 2, None], pa.int8()),
        "text": pa.array(["a", None, "the plot 🙂"], pa.large_string()),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "seen": pa.array([1, 2, 3], pa.timestamp("ms")),
        "nested": [[{"a": 1}], [], [{"a": 2}]],
        "raw": [b"\x00\xff", b"", None],
    }
    before = pa.table(columns)
    pq.write_table(before, tmp_path / "in.parquet")
    written, problems = run(opened, tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert (written, [p.at for p in problems]) == (3, ["in.parquet[1]"])
    after = pq.read_table(tmp_path / "out.parquet")
    assert after.select(before.column_names).cast(before.schema).equals(before)
    assert after.schema.field("n").type == pa.int8()
    assert after.column_names == [*before.column_names, *ADDED]
    assert after["prediction"].to_pylist()[1] is None
    assert all(0 <= value <= 1 for value in after["p_bad"].to_pylist()[::2])
    assert run(opened, write(tmp_path / "in.csv", ROWS), tmp_path / "text.parquet") == (5, [])
    assert pq.read_table(tmp_path / "text.parquet")["id"].to_pylist() == [r["id"] for r in ROWS]


@pytest.mark.slow
def test_parquet_preserves_values_that_python_cannot_represent(
    opened: Opened, tmp_path: Path
) -> None:
    text = pa.array(["great fun"] * 2500)
    offsets = np.arange(2501, dtype=np.int32) * 2
    broken = pa.Array.from_buffers(
        pa.string(), 2500, [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"\xff " * 2500)]
    )
    day = pa.array([10**8] * 2500, pa.int32()).cast(pa.date32())
    moment = pa.array(range(2500), pa.timestamp("ns"))
    before = pa.table({"text": text, "broken": broken, "day": day, "moment": moment})
    pq.write_table(before, tmp_path / "in.parquet", row_group_size=700)
    assert run(opened, tmp_path / "in.parquet", tmp_path / "out.parquet") == (2500, [])
    after = pq.read_table(tmp_path / "out.parquet")
    assert after.drop_columns(ADDED).equals(before)


@pytest.mark.parametrize("name", ["in.tsv", "in.tsv.gz", "in.txt"])
def test_a_table_without_quoting_is_written_without_quoting(
    opened: Opened, tmp_path: Path, name: str
) -> None:
    lines = ["id\ttext", '1\t"Open quote', "2\trow in the middle", '3\tlast row"', '4\t5" "x" pipe']
    raw = "\r\n".join([*lines, ""]).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert run(opened, tmp_path / name, tmp_path / "out.tsv") == (4, [])
    written = (tmp_path / "out.tsv").read_bytes().decode().split("\r\n")
    assert written.pop() == ""
    assert [line.rsplit("\t", 3)[0] for line in written] == lines


def test_a_table_with_backslashes_is_written_with_them(opened: Opened, tmp_path: Path) -> None:
    text = 'id,text\n1,"say \\"hi\\", \\\\ you"\n2,plain\n'
    (tmp_path / "in.csv").write_text(text)
    assert run(opened, tmp_path / "in.csv", tmp_path / "out.csv") == (2, [])
    spec = FormatSpec(quoting="backslash")
    for name in ("in.csv", "out.csv"):
        rows = [row.columns for row in read_rows(tmp_path / name, spec)]
        assert [row and row["text"] for row in rows] == ['say "hi", \\ you', "plain"]


def test_an_answer_with_a_tab_in_a_table_without_quoting(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [["a\tb\r\nc", 0.5, 0.5], ["bad", 1.0, 0.0]]
    monkeypatch.setattr(prediction, "answer", lambda *_: answers)
    (tmp_path / "in.tsv").write_text('text\tn\n"x\t1\ny\t2\n')
    written, problems = run(opened, tmp_path / "in.tsv", tmp_path / "out.tsv")
    assert written == 2
    assert [(p.at, "tab or a line end" in p.what) for p in problems] == [("in.tsv:2", True)]
    lines = (tmp_path / "out.tsv").read_text().splitlines()
    assert lines[1:] == ['"x\t1\ta b c\t0.5\t0.5', "y\t2\tbad\t1.0\t0.0"]


def test_a_table_without_a_header_is_written_without_one(tmp_path: Path) -> None:
    form = {"header": False, "columns": ["text", "label"]}
    (tmp_path / "rows.csv").write_text("a;0\nb;1\n".replace(";", ","))
    data = {"path": "rows.csv", "format": form}
    opened = open_task(tiny.save_encoder(tmp_path / "base"), tmp_path, data=data)
    (tmp_path / "in.csv").write_text("a fine film,0\nslow and dull,1\nlong,0\n")
    assert run(opened, tmp_path / "in.csv", tmp_path / "out.csv") == (3, [])
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines] == [
        ["a fine film", "0"], ["slow and dull", "1"], ["long", "0"],
    ]  # fmt: skip


@pytest.mark.parametrize("trained_on", ["first_word", "fasttext", "folder", None])
def test_the_labels_of_lines_are_not_read_as_text(tmp_path: Path, trained_on: str | None) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,bad\nb,good\n")
    data = {"path": "rows.csv", "format": {"label_from": trained_on} if trained_on else {}}
    opened = open_task(
        tiny.save_encoder(tmp_path / "base"), tmp_path, data=data, task={"labels": ["bad", "good"]}
    )
    cases = {
        "marked.txt": ("__label__bad a long film\n__label__good a fine one\n", "a long film"),
        "plain.txt": ("a long film\nbad news for all\n", "a long film"),
        "table.csv": ("text,label\na long film,bad\na fine one,good\n", "a long film"),
        "words.txt": (
            "bad a long film\ngood a fine one\n",
            "a long film" if trained_on == "first_word" else "bad a long film",
        ),
    }
    for name, (content, first) in cases.items():
        (tmp_path / name).write_text(content)
        assert run(opened, tmp_path / name, tmp_path / f"{name}.jsonl") == (2, [])
        assert read(tmp_path / f"{name}.jsonl")[0]["text"] == first


def test_a_header_alone_has_no_rows_to_answer(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id;text\n")
    assert run(opened, tmp_path / "in.csv", tmp_path / "out.csv") == (0, [])
    assert (tmp_path / "out.csv").read_text() == "id;text;prediction;p_bad;p_good\n"


@pytest.mark.parametrize("name", ["in.txt", "in.csv", "in.txt.gz"])
def test_a_file_with_one_text_per_line_needs_no_header(
    opened: Opened, tmp_path: Path, name: str
) -> None:
    raw = b"great fun, all of it\nslow and dull\na long bore of a film\n"
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert run(opened, tmp_path / name, tmp_path / "out.jsonl") == (3, [])
    found = [row["text"] for row in read(tmp_path / "out.jsonl")]
    assert found == raw.decode().splitlines()


def test_a_file_is_read_in_its_own_format_not_the_recipe_s(tmp_path: Path) -> None:
    form = {"encoding": "cp1252", "delimiter": ";", "header": False, "columns": ["text", "label"]}
    data = {"path": "rows.csv", "format": form}
    (tmp_path / "rows.csv").write_text("a;0\nb;1\n")
    opened = open_task(tiny.save_encoder(tmp_path / "base"), tmp_path, data=data)
    cases = {
        "same.csv": ("très bon, oui;0\nfade;1\nun peu long;0\n".encode("cp1252"), ";"),
        "other.csv": (raw_rows(), ","),
        "lines.csv": ("très bon; oui\nfade\n".encode(), "\t"),
        "lines.txt": ("très bon, oui\nfade\nun peu long\n".encode("cp1252"), "\t"),
    }
    for name, (raw, _) in cases.items():
        (tmp_path / name).write_bytes(raw)
        written, problems = run(opened, tmp_path / name, tmp_path / f"out-{name}.jsonl")
        assert (written, problems) == (raw.count(b"\n") - 2 * (name == "other.csv"), [])
        assert read(tmp_path / f"out-{name}.jsonl")[0]["text"].startswith("très")
    (tmp_path / "named.csv").write_text("sentence;label\n" + "a fine film;0\nslow;1\n" * 9)
    with pytest.raises(
        LoraError, match=r"the first line of named\.csv names its columns"
    ) as caught:
        run(opened, tmp_path / "named.csv", tmp_path / "out.csv")
    assert "rename the column to be read to `text`" in (caught.value.problems[0].hint or "")


@pytest.mark.parametrize("delimiter", [";", ",", "\t", "|"])
def test_broken_rows_do_not_hide_a_table(opened: Opened, tmp_path: Path, delimiter: str) -> None:
    raw = "id;text;note\r\n1;a film;x\r\n2;too;many;fields\r\n3;few\r\n4;b;c;d\r\n"
    (tmp_path / "in.csv").write_bytes(raw.replace(";", delimiter).encode())
    written, problems = run(opened, tmp_path / "in.csv", tmp_path / "out.csv")
    assert (written, len(problems)) == (4, 3)
    text = (tmp_path / "out.csv").read_bytes().decode()
    assert text.startswith(delimiter.join(["id", "text", "note", *ADDED]) + "\r\n1")
    (tmp_path / "other.csv").write_bytes(raw.replace("text", "body").encode())
    with pytest.raises(LoraError, match="no column `text`"):
        run(opened, tmp_path / "other.csv", tmp_path / "out2.csv")


def test_a_single_column_with_the_expected_name_has_a_header(
    opened: Opened, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text('text\nslow, dull\na warm; "good" film\n')
    assert run(opened, tmp_path / "in.csv", tmp_path / "out.jsonl") == (2, [])
    found = [row["text"] for row in read(tmp_path / "out.jsonl")]
    assert found == ["slow, dull", 'a warm; "good" film']


@pytest.mark.parametrize(("name", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_columns_added_to_a_single_column_use_the_usual_delimiter(
    opened: Opened, tmp_path: Path, name: str, delimiter: str
) -> None:
    texts = ["slow, dull", "a warm film", "long; and\tdull", 'a "good" one, too']
    with (tmp_path / f"in.{name}").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["text"], *([text] for text in texts)])
    assert run(opened, tmp_path / f"in.{name}", tmp_path / f"out.{name}") == (4, [])
    with (tmp_path / f"out.{name}").open(newline="") as file:
        header, *rows = csv.reader(file, delimiter=delimiter)
    assert header == ["text", *ADDED]
    assert [row[0] for row in rows] == texts


def test_characters_missing_in_the_encoding_are_reported(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "answer", lambda *_: [["良い é", 1, 0], ["ok", 1, 0]])
    (tmp_path / "in.csv").write_bytes(raw_rows("cp1252"))
    _, (problem,) = run(opened, tmp_path / "in.csv", tmp_path / "out.csv")
    assert problem.what == "the answer holds letters that cp1252 lacks: `い 良`"
    text = (tmp_path / "out.csv").read_bytes().decode("cp1252")
    assert "\\u826f\\u3044 é" in text


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
@pytest.mark.slow
def test_the_memory_for_a_file_is_bounded_by_a_chunk(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # the long text is in a column that is only copied, as tokenizing it would take a minute
    note, count = "and so on " * 2400, 1000
    row = {"text": "great fun", "note": note}
    line = json.dumps(row) + "\n" if name == "in.jsonl" else f"great fun,{note}\n"
    with (tmp_path / name).open("w") as file:
        file.write("text,note\n" if name == "in.csv" else "")
        file.writelines(line for _ in range(count))
    size = (tmp_path / name).stat().st_size
    assert size > 24e6
    monkeypatch.setattr(prediction, "CHUNK", 10)
    monkeypatch.setattr(prediction, "answer", lambda _, __, rows, ___: [["bad", 1, 0]] * len(rows))
    tracemalloc.start()
    try:
        assert run(opened, tmp_path / name, tmp_path / "out.jsonl") == (count, [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 8  # 10 of 1,000 rows, and the part that is read to detect the format
    with (tmp_path / "out.jsonl").open() as file:
        assert sum(json.loads(row)["note"].strip() == note.strip() for row in file) == count


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_temporary_file(tmp_path: Path, number: signal.Signals) -> None:
    target = tmp_path / "answers.jsonl"
    before = signal.getsignal(number)

    def interrupted() -> None:
        with writing(target, OutputFormat(["text"])) as write:
            write([{"text": "a film"}])
            assert list(tmp_path.iterdir())
            assert signal.getsignal(number) is not signal.SIG_DFL
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as ended:
        interrupted()
    assert ended.value.code == 128 + number
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with writing(tmp_path / "answers.jsonl", OutputFormat(["text"])) as write:
            signal.raise_signal(signal.SIGHUP)
            write([{"text": "a film"}])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "answers.jsonl").is_file()
