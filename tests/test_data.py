"""Reading files, finding the files of a split, drawing held-out rows, and caching rows."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data import file_formats as reading
from lora_cli.data import file_rows
from lora_cli.data.bad_rows import without_errors
from lora_cli.data.file_formats import columns_of, kind_of, read_rows, require_columns, text_error
from lora_cli.data.load_rows import Rows, load_rows, stream_label_names, stream_rows
from lora_cli.data.text_lines import RawRow
from lora_cli.errors import LoraError
from lora_cli.recipe import FormatSpec, Recipe


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def read(path: Path, content: str | bytes, **form: Any) -> list[RawRow]:
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return list(read_rows(path, FormatSpec(**form)))


def good(rows: Sequence[RawRow]) -> list[list[Any]]:
    return [list(row.columns.values()) for row in rows if row.columns is not None]


def errors(rows: Sequence[RawRow]) -> dict[str, str]:
    return {row.place: row.error for row in rows if row.error}


plain = st.text(st.characters(exclude_categories=["Cs"])) | st.text('",a\n\r ')


@pytest.fixture
def csv(tmp_path: Path) -> Callable[..., list[RawRow]]:
    return lambda content, **form: read(tmp_path / "x.csv", content, **form)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., list[RawRow]]:
    return lambda content, **form: read(tmp_path / "x.jsonl", content, **form)


# ------------------------------------------------------------------------------------------- csv


def test_every_value_of_a_csv_file_stays_text(csv: Any) -> None:
    rows = csv("text,label\nNA,null\nnan,007\n,None\n 1.0 ,1e5\n\ttab,true\n")
    assert good(rows) == [
        ["NA", "null"], ["nan", "007"], ["", "None"], [" 1.0 ", "1e5"], ["\ttab", "true"],
    ]  # fmt: skip
    assert [row.place for row in rows] == [f"x.csv:{n}" for n in (2, 3, 4, 5, 6)]
    assert rows[0].columns == {"text": "NA", "label": "null"}


def test_quotes_may_hold_commas_quotes_and_line_ends(csv: Any) -> None:
    rows = csv('a,b\r\n"x, ""y""","1\r\n2\n\n3"\r\nplain 5" pipe,z\r\n')
    assert good(rows) == [['x, "y"', "1\r\n2\n\n3"], ['plain 5" pipe', "z"]]
    assert [row.place for row in rows] == ["x.csv:2", "x.csv:6"]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_lines_may_have_any_line_end_and_blank_ones_are_skipped(ends: str, csv: Any) -> None:
    rows = csv(ends.join(["", "a,b", "", "1,2", "  ", "3,4", ""]))
    assert good(rows) == [["1", "2"], ["3", "4"]]
    assert [row.place for row in rows] == ["x.csv:4", "x.csv:6"]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("utf-8", "naïve 日本"), ("utf-8-sig", "naïve 日本"), ("utf-16", "naïve 日本"),
     ("utf-16-le", "ł😀"), ("utf-32", "naïve"), ("latin-1", "naïve"), ("cp1252", "“naïve”"),
     ("cp932", "日本語表示ソ"), ("shift_jis", "日本"), ("gb18030", "中文")],
)  # fmt: skip
def test_encodings(encoding: str, text: str, csv: Any) -> None:
    content = f'text,b\n{text},"1\n2"\nx,{text}\n'.encode(encoding)
    rows = csv(content, encoding="utf-8" if encoding == "utf-8-sig" else encoding)
    assert [row.columns for row in rows] == [{"text": text, "b": "1\n2"}, {"text": "x", "b": text}]
    assert rows[1].place == "x.csv:4"


def test_bytes_of_another_encoding_are_an_error_of_their_row(csv: Any) -> None:
    rows = csv('a,b\n1,2\nna\xefve,2\n"x\n\xff",3\n4,5\n'.encode("latin-1"))
    assert good(rows) == [["1", "2"], ["4", "5"]]
    assert errors(rows) == {
        "x.csv:3": "byte 0xef is not utf-8 text",
        "x.csv:4": "byte 0xff is not utf-8 text",
    }


def test_utf_16_is_recognised(csv: Any) -> None:
    with pytest.raises(LoraError, match=r"UTF-16[\s\S]*--set data.format.encoding=utf-16"):
        csv("a,b\n".encode("utf-16"))


def test_a_file_that_ends_inside_a_character(csv: Any) -> None:
    with pytest.raises(LoraError, match=r"x\.csv"):
        csv("a,b\n1,2\n".encode("utf-16")[:-1], encoding="utf-16")


@pytest.mark.parametrize(
    ("content", "form", "expected"),
    [
        ("a;b\n1,5;2\n", {"delimiter": ";"}, {"a": "1,5", "b": "2"}),
        ("a\tb\n1\t2\n", {"delimiter": "\t"}, {"a": "1", "b": "2"}),
        ("1,2\n", {"header": False}, {"0": "1", "1": "2"}),
        ("1,2\n", {"header": False, "columns": ["x", "y"]}, {"x": "1", "y": "2"}),
        ("a,a\n1,2\n", {"columns": ["x", "y"]}, {"x": "1", "y": "2"}),
        (" a , b\n1,2\n", {}, {"a": "1", "b": "2"}),
        (",a\n0,x\n", {}, {"": "0", "a": "x"}),
        ("a\nx\n", {}, {"a": "x"}),
        ('a\n""\n', {}, {"a": ""}),
    ],
)
def test_csv_formats(content: str, form: Any, expected: dict[str, str], csv: Any) -> None:
    (row,) = csv(content, **form)
    assert row.columns == expected


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        ("a,b,a\n1,2,3\n", {}, r"two columns are called `a`[\s\S]*x.csv:1"),
        (
            "a,b\n1,2\n",
            {"columns": ["x"]},
            r"1 name in `data.format.columns` for 2 columns[\s\S]*a, b",
        ),
        ('a,"b\n1,2\n', {"quoting": "csv"}, r"the header: a quotation mark[\s\S]*x.csv:1"),
        ("\xff,b\n1,2\n".encode("latin-1"), {}, r"the header: byte 0xff"),
    ],
)
def test_a_bad_header(content: Any, form: Any, message: str, csv: Any) -> None:
    with pytest.raises(LoraError, match=message):
        csv(content, **form)


@pytest.mark.parametrize("content", ["", "a,b\n", "\n\n", "\ufeff"])
def test_a_csv_file_without_rows(content: str, csv: Any) -> None:
    assert csv(content) == []


def test_too_many_and_too_few_fields_are_reported_with_their_line(csv: Any) -> None:
    rows = csv('a,b\n"1\n\n2",x\n1,2,3\n4\n5,6\n')
    assert good(rows) == [["1\n\n2", "x"], ["5", "6"]]
    assert errors(rows) == {
        "x.csv:5": "3 fields where there are 2 columns",
        "x.csv:6": "1 field where there are 2 columns",
    }


def test_an_unclosed_quote_loses_one_row_and_not_the_rest_of_the_file(csv: Any) -> None:
    body = "".join(f"{i},text {i}\n" for i in range(1000))
    rows = csv('n,text\n1,"never closed\n' + body, quoting="csv")
    assert len(good(rows)) == 1000
    assert list(errors(rows)) == ["x.csv:2"]
    assert "a quotation mark is not closed" in rows[0].error
    assert rows[-1].place == "x.csv:1002"


@pytest.mark.parametrize(
    "broken", ['"open', '"a" b', '"say "hi" now"', '"x""', 'a,b,"c'], ids=lambda text: text
)
def test_a_broken_row_loses_only_itself(broken: str, csv: Any) -> None:
    rows = csv(f'a,b\n1,2\n{broken},x\n"multi\nline",3\n"q, ""r""",4\n5,6\n')
    assert list(errors(rows)) == ["x.csv:3"]
    assert good(rows) == [["1", "2"], ["multi\nline", "3"], ['q, "r"', "4"], ["5", "6"]]
    assert [row.place for row in rows if not row.error] == [
        "x.csv:2", "x.csv:4", "x.csv:6", "x.csv:7",
    ]  # fmt: skip


def test_the_inside_of_a_broken_row_is_not_read_as_rows(csv: Any) -> None:
    rows = csv('a,b\n"one "two" three\nfour",x\n5,6\n')
    assert good(rows) == [["5", "6"]]
    assert list(errors(rows)) == ["x.csv:2", "x.csv:3"]


@given(pairs=st.lists(st.tuples(plain, plain), max_size=8), at=st.integers(0, 8))
def test_files_of_the_csv_module_are_read_and_a_broken_line_loses_no_other(
    pairs: list[tuple[str, str]], at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import csv
    import io

    # a row with only blanks is indistinguishable from a blank line
    pairs = [(a, b) for a, b in pairs if (a + b).strip(" \r\n")]
    parts = []
    for pair in pairs:
        buffer = io.StringIO()
        csv.writer(buffer, quoting=csv.QUOTE_ALL).writerow(pair)
        parts.append(buffer.getvalue())
    parts.insert(min(at, len(pairs)), '1,"x"y\n')
    text = "a,b\n" + "".join(parts)
    rows = read(tmp_path_factory.getbasetemp() / "x.csv", text.encode(), quoting="csv")
    assert good(rows) == [list(pair) for pair in pairs]
    assert len(errors(rows)) == 1


def test_nul_and_a_megabyte_are_text(csv: Any) -> None:
    long = "x" * 2**20
    rows = csv(f"a,b\n1\0,{long}\n")
    assert good(rows) == [["1\0", long]]


def test_tsv_and_gz(tmp_path: Path) -> None:
    assert good(read(tmp_path / "x.tsv", "a\tb\n1,2\t3\n\t\n")) == [["1,2", "3"], ["", ""]]
    assert good(read(tmp_path / "x.TSV.gz", "a\tb\n1\t2\n")) == [["1", "2"]]
    assert good(read(tmp_path / "x.csv.gz", "a\n1\n", encoding="utf-8")) == [["1"]]
    assert good(read(tmp_path / "x.jsonl.gz", '{"a": 1}\n')) == [[1]]


@pytest.mark.parametrize("damage", ["cut", "other", "bits"])
def test_a_damaged_gz_is_an_error_of_the_file(damage: str, tmp_path: Path) -> None:
    import random

    text = "".join(f"{random.Random(i).random()}\n" for i in range(2000))
    raw = bytearray(gzip.compress(f"a\n{text}".encode()))
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    elif damage == "other":
        raw = bytearray(b"plain text")
    else:
        raw[len(raw) // 2 : len(raw) // 2 + 20] = b"\0" * 20
    file = tmp_path / "x.csv.gz"
    file.write_bytes(raw)
    what = "is cut off" if damage == "cut" else "is not a gzip file, or it is damaged"
    with pytest.raises(LoraError, match=rf"{what}\n  at .*x\.csv\.gz\nhint: copy"):
        list(read_rows(file, FormatSpec()))


# ----------------------------------------------------------------------- json, parquet, text


def test_json_lines(jsonl: Any) -> None:
    rows = jsonl('\ufeff{"a": "1", "b": [1, {"c": null}]}\r\n\n{"a": "\\u00e9\u2028"}\n')
    assert [row.columns for row in rows] == [
        {"a": "1", "b": [1, {"c": None}]}, {"a": "é\u2028"},
    ]  # fmt: skip
    assert [row.place for row in rows] == ["x.jsonl:1", "x.jsonl:3"]


def test_bad_json_lines_lose_only_themselves(jsonl: Any) -> None:
    # fmt: off
    lines = [b'{"a": 1}', b"{", b"[1, 2]", b'"text"', b"3", b"null", b"true", b'{"a": "\xff"}',
             b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b'{"a": 2}']
    # fmt: on
    rows = jsonl(b"\n".join(lines))
    assert good(rows) == [[1], [2]]
    result = errors(rows)
    assert list(result) == [f"x.jsonl:{n}" for n in range(2, 12)]
    for line, word in {2: "not valid JSON", 3: "not a list", 4: "not a text", 5: "not a number",
                       6: "not null", 7: "not true or false", 8: "0xff", 9: "half of a character",
                       10: "JSON", 11: "not valid JSON"}.items():  # fmt: skip
        assert word in result[f"x.jsonl:{line}"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig", "latin-1"])
def test_a_json_list(encoding: str, tmp_path: Path) -> None:
    content = '\n [\n{"a": "é"},\n3, {"a": 2}]\n'.encode(encoding)
    form = "utf-8" if encoding == "utf-8-sig" else encoding
    rows = read(tmp_path / "x.json", content, encoding=form)
    assert good(rows) == [["é"], [2]]
    assert errors(rows) == {"x.json[1]": "a row is a JSON object, not a number"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n{"a" 2}]', r"not valid JSON[\s\S]*x\.json:2"),
        (b'[{"a": "\xff"}]', r"0xff is not utf-8 text"),
        (b'{\n"version": 1, "data": [{"a": 1}]\n}\n', r"one JSON object[\s\S]*jq -c '\.data\[\]'"),
        (
            b'{\n"val": [["a", "b"]], "train": [["a", "b"]]\n}\n',
            r"jq -c '\.train\[\] \| {text: \.\[0\], label: \.\[1\]}'",
        ),
    ],
)
def test_a_json_file_without_rows(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=message):
        read(tmp_path / "x.json", content)


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2], "list": [["x"], []]}), file)
    rows = list(read_rows(file, FormatSpec()))
    assert good(rows) == [["a", 1, ["x"]], [None, 2, []]]
    assert [row.place for row in rows] == ["x.parquet[0]", "x.parquet[1]"]
    whole = file.read_bytes()
    damaged = {whole[:-20]: "cut off or damaged", b"": "not a parquet file", b"PAR1": "cut off",
               whole.replace(b"\x15", b"\x16"): "damaged"}  # fmt: skip
    for raw, what in damaged.items():
        file.write_bytes(raw)
        with pytest.raises(LoraError, match=rf"{what}[\s\S]*x\.parquet\nhint: "):
            list(read_rows(file, FormatSpec()))


def test_parquet_with_duplicate_column_names(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["t", "t"]), file)
    with pytest.raises(LoraError, match=r'two columns are called `t`[\s\S]*\["t", "t_2"\]'):
        list(read_rows(file, FormatSpec()))
    spec = FormatSpec(columns=["t", "t_2"])
    assert [row.columns for row in read_rows(file, spec)] == [{"t": "a", "t_2": "b"}]
    assert columns_of(file, spec) == ["t", "t_2"]


def test_parquet_values_that_python_cannot_represent(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    columns = {
        "text": ["x", "y"],
        "broken": broken,
        "list": pa.ListArray.from_arrays(pa.array([0, 1, 2]), broken),
        "kind": broken.dictionary_encode(),
        "day": pa.array([0, 10**8], pa.int32()).cast(pa.date32()),
        "moment": pa.array([0, 2**52], pa.timestamp("s")),
        "zone": pa.array([0, 1], pa.timestamp("s", "Mars/Phobos")),
    }
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), file)
    first, second = (row.columns for row in read_rows(file, FormatSpec()))
    assert first is not None
    assert second is not None
    assert (first["text"], first["broken"], first["kind"]) == ("x", "a", "a")
    assert (second["text"], second["broken"], second["kind"]) == ("y", "\udcff", "\udcff")
    assert second["list"] is None
    assert isinstance(second["day"], str)
    rows = load_rows(recipe_of({"path": str(file)}))["train"]
    assert [row["broken"] for row in rows] == ["a", "\udcff"]
    assert text_error(rows[1], ["text"]) == ""
    assert text_error(rows[1], ["broken"]) == "column `broken`: byte 0xff is not UTF-8 text"


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("line", [("x.txt:2", "one"), ("x.txt:3", "two  "), ("x.txt:5", " three")]),
        ("paragraph", [("x.txt:2", "one\ntwo  "), ("x.txt:5", " three")]),
        ("document", [("x.txt:2", "one\ntwo  \n \n three\n")]),
    ],
)
def test_text(by: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    rows = read(tmp_path / "x.txt", "\ufeff\none\ntwo  \n \n three\n", sample_by=by)
    assert [(row.place, row.columns["text"]) for row in rows if row.columns] == expected


@pytest.mark.parametrize(("by", "left"), [("line", 3), ("paragraph", 1), ("document", 0)])
def test_a_bad_byte_loses_its_unit_of_text(by: str, left: int, tmp_path: Path) -> None:
    rows = read(tmp_path / "x.txt", b"one\n\xff\ntwo\n\nthree\n", sample_by=by)
    assert len(good(rows)) == left
    assert len(errors(rows)) == 1


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.json", "x.txt"])
def test_an_empty_file_has_no_rows(name: str, tmp_path: Path) -> None:
    assert read(tmp_path / name, "") == []


def test_the_format_of_a_file(tmp_path: Path) -> None:
    assert kind_of(Path("a.JSONL.gz"), FormatSpec()) == "json"
    assert kind_of(Path("a.dat"), FormatSpec(type="csv")) == "csv"
    with pytest.raises(LoraError, match=r"`a\.dat` is not a known kind[\s\S]*csv` \(or json"):
        kind_of(Path("a.dat"), FormatSpec())
    with pytest.raises(LoraError, match="cannot be read"):
        list(read_rows(tmp_path / "no.csv", FormatSpec()))


@given(raw=st.binary(max_size=300), kind=st.sampled_from(["csv", "json", "text"]))
def test_any_bytes_give_rows_or_errors(
    raw: bytes, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes"
    try:
        rows = read(file, b"a\n" + raw if kind == "csv" else raw, type=kind)
    except LoraError:
        return
    assert all((row.columns is None) == bool(row.error) for row in rows)
    json.dumps([row.columns for row in rows], ensure_ascii=False).encode()


def test_a_missing_column_is_reported_with_the_nearest_name() -> None:
    with pytest.raises(LoraError) as caught:
        require_columns({"at x": "txt", "at y": "label"}, ["text", "n"], "rows.csv")
    assert [(p.what, p.at) for p in caught.value.problems] == [
        ("rows.csv has no column `txt`", "at x"),
        ("rows.csv has no column `label`", "at y"),
    ]
    assert "did you mean `text`?" in caught.value.problems[0].hint
    with pytest.raises(LoraError, match=r"--set 'data\.format\.delimiter=\";\"'`"):
        require_columns({"at x": "text"}, ["text;label"], "rows.csv")


# --------------------------------------------------------------------------------------- splits


def recipe_of(data: dict[str, Any], task: dict[str, Any] | None = None, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "base"},
            "task": {"type": "sequence_classification", **(task or {})},
            "data": data,
            "train": train,
        }
    )


def texts(rows: Rows) -> list[str]:
    return [row["text"] for row in rows]


@pytest.fixture
def rows_csv(tmp_path: Path) -> str:
    lines = "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(200))
    (tmp_path / "rows.csv").write_text("text,label\n" + lines)
    return str(tmp_path / "rows.csv")


def test_rows_have_places_and_are_in_order(rows_csv: str) -> None:
    rows = load_rows(recipe_of({"path": rows_csv}))["train"]
    assert len(rows) == 200
    assert rows[3] == {"text": "text 3", "label": "b"}
    assert rows.place(3) == "rows.csv:5"
    assert texts(rows) == [f"text {i}" for i in range(200)]
    assert [len(batch) for batch in rows.batches(90)] == [90, 90, 20]
    assert rows.columns == ["text", "label"]
    assert rows.source == rows_csv


@pytest.mark.parametrize(
    ("part", "expected"),
    [("[:80%]", range(160)), ("[80%:]", range(160, 200)), ("[-100:]", range(100, 200)),
     ("[:500]", range(200)), ("[10:20]", range(10, 20)), ("[:]", range(200)),
     ("[-5%:-1%]", range(190, 198)), ("[:-190]", range(10)), ("[1:]", range(1, 200))],
)  # fmt: skip
def test_slices(part: str, expected: range, rows_csv: str) -> None:
    for data in ({"path": rows_csv, "train": f"train{part}"}, {"train": f"{rows_csv}{part}"}):
        rows = load_rows(recipe_of(data))["train"]
        assert texts(rows) == [f"text {i}" for i in expected]
        assert rows.place(0) == f"rows.csv:{expected[0] + 2}"


@pytest.mark.parametrize(
    "part", ["[]", "[10]", "[:%]", "[-:]", "[a:b]", "[1:2:3]", "[:150%]", "[:1.5%]", "[: 5]"]
)
def test_an_invalid_slice_shows_valid_ones(part: str, rows_csv: str) -> None:
    with pytest.raises(LoraError, match=r"is not a slice\n  at data\.train\nhint: a slice is"):
        load_rows(recipe_of({"path": rows_csv, "train": f"train{part}"}))


def test_an_empty_split_is_an_error(rows_csv: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="the train split has no rows"):
        load_rows(recipe_of({"path": rows_csv, "train": "train[5:5]"}))
    (tmp_path / "empty.csv").write_text("text,label\n")
    for held_out in (None, {"fraction": 0.5}):
        with pytest.raises(LoraError, match="the train split has no rows"):
            load_rows(recipe_of({"path": str(tmp_path / "empty.csv"), "validation": held_out}))
    (tmp_path / "bad.csv").write_text("text,label\n1\n2\n")
    with pytest.raises(LoraError, match=r"2 rows skipped[\s\S]*the first is bad\.csv:2"):
        load_rows(recipe_of({"path": str(tmp_path / "bad.csv"), "on_bad_row": "skip"}))


def test_one_row_is_enough_to_train_but_not_to_split(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\nx,a\n")
    assert len(load_rows(recipe_of({"path": str(tmp_path / "one.csv")}))["train"]) == 1
    with pytest.raises(LoraError, match="leaves one side empty"):
        load_rows(recipe_of({"path": str(tmp_path / "one.csv"), "validation": {"fraction": 0.5}}))


def test_the_first_ten_bad_rows_and_their_number(tmp_path: Path) -> None:
    lines = "".join(f"{i},a\n{i}\n" for i in range(15))
    (tmp_path / "bad.csv").write_text("text,label\n" + lines)
    data = {"path": str(tmp_path / "bad.csv")}
    with pytest.raises(LoraError) as caught:
        load_rows(recipe_of(data))
    problems = caught.value.problems
    assert [p.at for p in problems] == [f"bad.csv:{n}" for n in range(3, 23, 2)]
    assert "on_bad_row=skip" in problems[-1].hint
    assert "5 more rows" in problems[-1].hint
    rows = load_rows(recipe_of({**data, "on_bad_row": "skip"}))["train"]
    assert len(rows) == 15
    assert rows.place(1) == "bad.csv:4"
    assert len(rows.skipped) == 15
    assert rows.skipped[0] == "bad.csv:3: 1 field where there are 2 columns"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "with [brackets]" / "data"
    for name in ("train-1.csv", "train-2.csv", "dev.csv", "sub/test/part.csv", ".hidden/train.csv",
                 "README.txt", "notes.pdf", "retrain.csv", "extra.csv"):  # fmt: skip
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text,label\n{name},a\n")
    return folder


def test_a_folder_has_the_splits_of_its_file_names(folder: Path) -> None:
    names = {"validation": "validation", "test": "test"}
    splits = load_rows(recipe_of({"path": str(folder), **names}))
    assert {name: texts(rows) for name, rows in splits.items()} == {
        "train": ["train-1.csv", "train-2.csv"],
        "validation": ["dev.csv"],
        "test": ["sub/test/part.csv"],
    }
    assert splits["train"].source.endswith("(2 files)")
    extra = load_rows(recipe_of({"path": str(folder), "train": "extra"}))["train"]
    assert texts(extra) == ["extra.csv"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train-*.csv", ["train-1.csv", "train-2.csv"]),
        ("*-2.csv", ["train-2.csv"]),
        ("**/part.csv", ["sub/test/part.csv"]),
        ("train-[12].csv", ["train-1.csv", "train-2.csv"]),
    ],
)
def test_patterns(pattern: str, expected: list[str], folder: Path) -> None:
    for data in ({"path": f"{folder}/{pattern}"}, {"train": f"{folder}/{pattern}"}):
        assert texts(load_rows(recipe_of(data))["train"]) == expected


def test_a_folder_without_split_names_is_all_train(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv"):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text(f"text,label\n{name},a\n")
    splits = load_rows(recipe_of({"path": str(tmp_path / "d"), "validation": {"fraction": 0.5}}))
    assert sorted(texts(splits["train"]) + texts(splits["validation"])) == ["a.csv", "b.csv"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "{}/nothing.csv"}, r"there is no file [\s\S]*at data\.path[\s\S]*train-1\.csv"),
        ({"path": "{}/trian-1.csv"}, r"did you mean `train-1\.csv`"),
        ({"path": "{}/no/such/*.csv"}, r"there is no file"),
        ({"train": "{}/no.csv"}, r"there is no file [\s\S]*at data\.train"),
        ({"path": "{}", "validation": "nope"},
         r"no split `nope`\n  at data\.validation[\s\S]*fraction[\s\S]*dev\.csv"),
        ({"path": "{}/dev.csv", "test": "test"}, r"no split `test`\n  at data\.test"),
        ({"path": "{}", "validation": {"from": "tset", "fraction": 0.5}},
         r"no split `tset` to draw"),
        ({"path": "{}", "test": {"from": "validation", "fraction": 0.5}},
         r"no split `validation` to draw"),
    ],
)  # fmt: skip
def test_missing_files_and_splits(data: dict[str, Any], message: str, folder: Path) -> None:
    data = {k: v.format(folder) if isinstance(v, str) else v for k, v in data.items()}
    with pytest.raises(LoraError, match=message):
        load_rows(recipe_of(data))


def test_one_split_from_a_file_and_another_drawn(folder: Path, rows_csv: str) -> None:
    splits = load_rows(
        recipe_of(
            {
                "path": str(folder),
                "train": rows_csv,
                "validation": f"{folder}/dev.csv",
                "test": {"from": "train", "fraction": 0.25},
            }
        )
    )
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [150, 1, 50]


def test_only_the_requested_splits_are_read(folder: Path, rows_csv: str) -> None:
    data = {"train": "/nowhere/x.csv", "validation": rows_csv, "test": rows_csv}
    assert list(load_rows(recipe_of(data), ["test"])) == ["test"]
    drawn = {"train": rows_csv, "validation": "/nowhere/x.csv", "test": {"fraction": 0.1}}
    assert len(load_rows(recipe_of(drawn), ["test"])["test"]) == 20


@pytest.mark.parametrize(
    ("held_out", "task", "at", "column"),
    [
        ({}, {"text_column": "txt"}, "task.text_column", "txt"),
        ({}, {"text_pair_column": "other"}, "task.text_pair_column", "other"),
        ({"group_by": "user"}, {}, "data.validation.group_by", "user"),
        ({"stratify": True}, {"label_column": "lable"}, "task.label_column", "lable"),
    ],
)
def test_a_draw_needs_its_columns(
    held_out: dict[str, Any], task: dict[str, Any], at: str, column: str, rows_csv: str
) -> None:
    data = {"path": rows_csv, "validation": {"fraction": 0.1, **held_out}}
    with pytest.raises(LoraError) as caught:
        load_rows(recipe_of(data, task))
    (problem,) = caught.value.problems
    assert (problem.at, f"no column `{column}`" in problem.what) == (at, True)


def test_rows_that_lack_a_column_can_be_split(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    rows = [{"text": f"t{i}", **({"label": "a", "g": "x"} if i % 3 else {})} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options in ({"stratify": True}, {"group_by": "text"}):
        held_out = {"fraction": 0.2, **options}
        splits = load_rows(recipe_of({"path": str(file), "validation": held_out}))
        assert len(splits["train"]) + len(splits["validation"]) == 60


def turns(text: str, system: str) -> list[dict[str, str]]:
    said = {"system": system, "user": text, "assistant": "yes"}
    return [{"role": role, "content": content} for role, content in said.items()]


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (
            {"type": "token_classification"},  # the lists differ, but their texts do not
            lambda i: {
                "tokens": [["Ärzte", f"{i % 40}"], ["ärzte", f"{i % 40}", "."]][i // 40],
                "tags": ["O"] * (2 + i // 40),
            },
        ),
        (
            {
                "type": "causal_lm",
                "messages_column": "messages",
            },  # without the system turn
            lambda i: {"messages": turns(f"word {i % 40}", "Be brief." * (i // 40))},
        ),
    ],
)
def test_held_out_rows_of_lists_are_compared_as_the_data_gate_does(
    task: dict[str, Any], row: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row(i)) + "\n" for i in range(80)))
    held_out = {"fraction": 0.25}
    splits = load_rows(recipe_of({"path": str(file), "validation": held_out}, task))
    # rows 0 and 40 have the same text, and so on; a number stands for such a pair
    numbers = {name: [str(r) for r in rows] for name, rows in splits.items()}
    result = {
        name: {re.search(r"\d+", r)[0] for r in rows}  # type: ignore[index]
        for name, rows in numbers.items()
    }
    assert not result["train"] & result["validation"]
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 60, "validation": 20}


def draws(rows_csv: str, **options: Any) -> dict[str, set[str]]:
    data = {
        "path": rows_csv,
        "validation": {"fraction": 0.2},
        "test": {"fraction": 0.1},
        **{k: v for k, v in options.items() if k == "split_seed"},
    }
    seed = {k: v for k, v in options.items() if k == "seed"}
    return {name: set(texts(rows)) for name, rows in load_rows(recipe_of(data, **seed)).items()}


def test_two_draws_from_train_never_overlap_and_depend_on_split_seed_alone(rows_csv: str) -> None:
    first = draws(rows_csv)
    assert [len(first[name]) for name in ("train", "validation", "test")] == [144, 36, 20]
    assert len(set.union(*first.values())) == 200
    assert draws(rows_csv, seed=7) == first
    other = draws(rows_csv, split_seed=1)
    assert all(other[name] != first[name] for name in first)


@pytest.fixture
def marked_csv(tmp_path: Path) -> str:
    marks = ["train", "train", " dev", "test", "other"]
    lines = "".join(f"text {i},{'ab'[i % 2]},{marks[i % 5]}\n" for i in range(50))
    (tmp_path / "marked.csv").write_text("text,label,split\n" + lines)
    return str(tmp_path / "marked.csv")


def test_a_split_column(marked_csv: str, tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("text,label,split\na,b,train\n")
    data = {
        "path": marked_csv, "split_column": "split", "train": "train[:10]", "validation": "dev",
        "test": str(tmp_path / "more.csv"),
    }  # fmt: skip
    rows = load_rows(recipe_of(data))
    assert texts(rows["train"]) == [f"text {i}" for i in range(25) if i % 5 < 2]
    assert texts(rows["validation"]) == [f"text {i}" for i in range(2, 50, 5)]
    assert rows["validation"].place(0) == "marked.csv:4"
    assert texts(rows["test"]) == ["a"]  # a separate file is read completely
    drawn = load_rows(recipe_of({**data, "train": "train", "validation": {"fraction": 0.1}}))
    assert (len(drawn["train"]), len(drawn["validation"])) == (18, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": "devv"}, r"`split` marks no row as `devv`[\s\S]*did you mean `dev`"),
        ({"split_column": "splot"}, r"no column `splot`[\s\S]*did you mean `split`"),
    ],
)
def test_an_invalid_split_column(change: dict[str, Any], message: str, marked_csv: str) -> None:
    data = {"path": marked_csv, "split_column": "split", "validation": "dev", **change}
    with pytest.raises(LoraError, match=message):
        load_rows(recipe_of(data))


def test_an_unreadable_row_belongs_to_no_split(marked_csv: str) -> None:
    with Path(marked_csv).open("a") as file:
        file.write("too,many,fields,here\n")
    data = {"path": marked_csv, "split_column": "split", "test": "test", "on_bad_row": "skip"}
    rows = load_rows(recipe_of(data))
    assert [len(split.skipped) for split in rows.values()] == [1, 0]


@pytest.mark.parametrize(
    "splits",
    [
        {"validation": {"fraction": 0.2}, "test": {"fraction": 0.2}},
        {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
        {"split_column": "split", "validation": "dev", "test": "test"},
    ],
)
def test_an_unreadable_row_is_counted_once(splits: dict[str, Any], marked_csv: str) -> None:
    with Path(marked_csv).open("a") as file:
        file.write("too,many,fields,here\n")
    rows = load_rows(recipe_of({"path": marked_csv, "on_bad_row": "skip", **splits}))
    assert {name: len(split.skipped) for name, split in rows.items()} == {
        "train": 1, "validation": 0, "test": 0,
    }  # fmt: skip


def test_a_split_column_of_a_stream(marked_csv: str) -> None:
    data = {"path": marked_csv, "split_column": "split", "streaming": True}
    result = [(row.columns or {})["text"] for row in stream_rows(recipe_of(data, max_steps=1))]
    assert result[:3] == ["text 0", "text 1", "text 5"]
    assert len(result) == len(set(result)) == 20
    with pytest.raises(LoraError, match="marks no row as `none`"):
        next(stream_rows(recipe_of({**data, "train": "none"}, max_steps=1)))


# ---------------------------------------------------------------------------------------- cache


def test_files_are_read_once_until_they_or_the_format_change(
    rows_csv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(path: Path, spec: FormatSpec) -> Any:
        calls.append(path.name)
        return reading.read_rows(path, spec)

    monkeypatch.setattr(file_rows, "read_rows", counted)
    first = load_rows(recipe_of({"path": rows_csv}))["train"]
    again = load_rows(recipe_of({"path": rows_csv, "validation": {"fraction": 0.1}}))
    assert calls == ["rows.csv"]
    assert again["train"].sha256 == first.sha256
    columns = {"columns": ["text", "other"]}
    renamed = load_rows(recipe_of({"path": rows_csv, "format": columns}))["train"]
    assert renamed[0] == {"text": "text 0", "other": "a"}
    assert len(calls) == 2
    Path(rows_csv).write_text("text,label\nchanged,b\n")
    changed = load_rows(recipe_of({"path": rows_csv}))["train"]
    assert list(changed) == [{"text": "changed", "label": "b"}]
    assert changed.sha256 != first.sha256
    assert len(calls) == 3
    copy = Path(rows_csv).with_name("copy.csv")
    copy.write_bytes(Path(rows_csv).read_bytes())
    assert load_rows(recipe_of({"path": str(copy)}))["train"].place(0) == "copy.csv:2"


def test_an_unreadable_file_is_not_cached_as_empty(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("a,a\n1,2\n")
    for _ in range(2):
        with pytest.raises(LoraError, match="two columns are called `a`"):
            load_rows(recipe_of({"path": str(file)}))


# ------------------------------------------------------------------------------ Hub and streams


@pytest.fixture
def hub(tmp_path: Path) -> str:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    folder = tmp_path / "hub"
    for split, count in {"train": 20, "test": 4}.items():
        labels = [-1 if split == "test" else i % 2 for i in range(count)]
        rows = {"text": [f"{split} {i}" for i in range(count)], "label": labels}
        made = datasets.Dataset.from_dict(rows, features=features)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        made.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_a_hub_data_set_keeps_its_label_names(hub: str) -> None:
    data = {"name": hub, "train": "train[:50%]", "validation": "train[-5:]", "test": "test"}
    splits = load_rows(recipe_of(data))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [10, 5, 4]
    assert splits["train"].label_names == {"label": ["neg", "pos"]}
    assert splits["validation"][0] == {"text": "train 15", "label": 1}
    assert splits["validation"].place(0) == f"{hub}/train[15]"
    assert [row["label"] for row in splits["test"]] == [-1] * 4
    assert splits["train"].content_sha256() != splits["test"].content_sha256()
    drawn = load_rows(recipe_of({"name": hub, "test": {"fraction": 0.2, "stratify": True}}))
    assert sorted(row["label"] for row in drawn["test"]) == [0, 0, 1, 1]


def test_missing_data_sets_and_splits_of_the_hub(hub: str) -> None:
    with pytest.raises(LoraError, match=r"cannot load `no/such-data-set`[\s\S]*data\.path"):
        load_rows(recipe_of({"name": "no/such-data-set"}))
    with pytest.raises(LoraError, match=r"cannot load [\s\S]*nope"):
        load_rows(recipe_of({"name": hub, "train": "nope"}))


@pytest.mark.parametrize("source", ["hub", "files"])
def test_a_stream_yields_each_row_once(source: str, hub: str, rows_csv: str) -> None:
    data = {"name": hub} if source == "hub" else {"path": rows_csv}
    count = 20 if source == "hub" else 200
    recipe = recipe_of({**data, "streaming": True, "validation": None}, max_steps=3)
    assert load_rows(recipe) == {}
    seen = [row["text"] for _, row in without_errors(stream_rows(recipe), faultless, recipe, print)]
    assert len(seen) == len(set(seen)) == count


def faultless(row: dict[str, Any]) -> str:
    return ""


def test_a_bad_row_of_a_stream_raises_an_error_or_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\na,1\nb\nc,1\n")
    data = {"path": str(tmp_path / "x.csv"), "streaming": True}
    recipe = recipe_of(data, max_steps=1)
    with pytest.raises(LoraError, match=r"1 field where[\s\S]*x\.csv:3"):
        list(without_errors(stream_rows(recipe), faultless, recipe, print))
    skipping = recipe_of({**data, "on_bad_row": "skip"}, max_steps=1)
    skipped: list[tuple[str, str]] = []

    def a_is_bad(row: dict[str, Any]) -> str:
        return "no" if row["text"] == "a" else ""

    rows = stream_rows(skipping)
    kept = without_errors(rows, a_is_bad, skipping, lambda *why: skipped.append(why))
    assert list(kept) == [("x.csv:4", {"text": "c", "label": "1"})]
    assert skipped[0] == ("x.csv:2", "no")
    assert skipped[1][0] == "x.csv:3"


def test_a_hub_stream_has_label_names(hub: str, rows_csv: str) -> None:
    names = [
        stream_label_names(recipe_of({**data, "streaming": True}, max_steps=1))
        for data in ({"name": hub}, {"path": rows_csv})
    ]
    assert names == [{"label": ["neg", "pos"]}, {}]
