"""Other JSON layouts: the command in the hint gives the same rows as pandas."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from drafting import Init, classification, needs_jq, run_hint, said, texts

from lora_cli.data.file_formats import read_rows
from lora_cli.errors import LoraError
from lora_cli.recipe import FormatSpec

TEXTS = texts(40)
FRAME = pandas.DataFrame({"text": TEXTS, "label": [["good", "bad"][i % 2] for i in range(40)]})
ROWS: list[dict[str, Any]] = FRAME.to_dict("records")
WHOLE = json.dumps({"train": ROWS[:30], "test": ROWS[30:]})


def oriented(orient: Any, indent: int | None) -> str:
    return str(FRAME.to_json(orient=orient, indent=indent))


def keyed(indent: int | None) -> str:
    return json.dumps({f"row_{i}": row for i, row in enumerate(ROWS)}, indent=indent)


LAYOUTS: dict[str, Callable[[int | None], str]] = {
    "pandas: columns": lambda indent: oriented("columns", indent),
    "pandas: index": lambda indent: oriented("index", indent),
    "pandas: split": lambda indent: oriented("split", indent),
    "pandas: table": lambda indent: oriented("table", indent),
    "pandas: values": lambda indent: oriented("values", indent),
    "rows with names": keyed,
    "lists": lambda indent: json.dumps(FRAME.to_dict("list"), indent=indent),
    "texts as keys": lambda indent: json.dumps(dict(FRAME.values.tolist()), indent=indent),
    "texts of a label": lambda indent: json.dumps(
        FRAME.groupby("label")["text"].apply(list).to_dict(), indent=indent
    ),
    "objects over lines": lambda _: "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "lists with keys": lambda indent: json.dumps(
        {f"row_{i}": [*row.values()] for i, row in enumerate(ROWS)}, indent=indent
    ),
    "lists in lines": lambda _: "\n".join(json.dumps(list(row.values())) for row in ROWS),
}  # fmt: skip


@needs_jq
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_writes_the_rows(
    layout: str, indent: int | None, init: Init, tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text(LAYOUTS[layout](indent))
    with pytest.raises(LoraError) as caught:
        init("", tmp_path / "rows.json")
    run_hint(caught.value, tmp_path)
    read = pandas.read_json(tmp_path / "rows.jsonl", lines=True)[["text", "label"]]
    order = ["label", "text"]
    assert read.sort_values(order).values.tolist() == FRAME.sort_values(order).values.tolist()
    assert said(init("", tmp_path / "rows.jsonl")) == classification(
        "text", "label", ["bad", "good"]
    )


@needs_jq
def test_a_list_of_rows_for_each_split(init: Init, tmp_path: Path) -> None:
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(WHOLE.encode()))
    with pytest.raises(LoraError, match="a list of rows for each split") as caught:
        init("", tmp_path / "rows.json.gz")
    assert run_hint(caught.value, tmp_path).endswith("; so too `test`")
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS[:30]


@needs_jq
@pytest.mark.parametrize("is_list", [True, False])
def test_a_list_of_texts(is_list: bool, init: Init, tmp_path: Path) -> None:
    lines = "".join(json.dumps(text) + "\n" for text in TEXTS)
    (tmp_path / "rows.json").write_text(json.dumps(TEXTS) if is_list else lines)
    with pytest.raises(LoraError, match="the rows are texts, and not objects") as caught:
        init("", tmp_path / "rows.json", "llama")
    run_hint(caught.value, tmp_path)
    assert pandas.read_json(tmp_path / "rows.jsonl", lines=True)["text"].tolist() == TEXTS


@pytest.mark.parametrize(
    "row",
    [
        {"tokens": ["a", "film"], "tags": ["O", "B-X"]},
        {"text": "a warm film", "label": "good"},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "b"}, {"name": "c"}]},
        {"context": {"title": "a", "text": "b"}, "answers": {"text": ["c"], "start": [1]}},
        {"text": ["a warm film"], "label": ["good"]},
    ],
)
def test_a_single_row_is_a_row(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(row))
    assert [result.columns for result in read_rows(path, FormatSpec())] == [row]


@pytest.mark.parametrize("content", ['[{"text": "a"}, ["a", "b"]]', '{"text": "a"}\n["a", "b"]'])
def test_a_list_among_objects_loses_only_itself(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    result = list(read_rows(path, FormatSpec()))
    assert [one.error for one in result] == ["", "a row is a JSON object, not a list"]


def test_many_multiline_objects_are_recognised_quickly(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(ROWS[i % 40], indent=1) for i in range(60_000)))
    start = time.process_time()
    with pytest.raises(LoraError, match="each object goes over several lines"):
        list(read_rows(path, FormatSpec()))
    assert time.process_time() - start < 8  # a minute if each object copied the rest
