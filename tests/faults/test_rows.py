"""Bad rows, files and labels: what is skipped is counted, nothing costs more than itself.

The messages themselves are in tests/golden/messages.md; here is what follows from a fault.
"""

from __future__ import annotations

import encodings.aliases
import gzip
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from cases_data import LONG
from fuzzing import ROOT, bounded
from hypothesis import given, settings
from hypothesis import strategies as st
from world import GOOD, TABLE, World

from lora_cli.data.file_formats import read_rows
from lora_cli.errors import LoraError
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import FormatSpec, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.classification.labels import Labels

TWO = {"labels": ["bad", "good"]}
SKIP = ("--set", "data.on_bad_row=skip")
Make = Callable[..., World]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "bases"
    tiny.save_encoder(folder / "encoder")
    tiny.save_llama(folder / "llama")
    return folder


@pytest.fixture
def world(tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "bases").symlink_to(bases)
    return World(tmp_path / "work", tmp_path / "bases")


def report_of(world: World) -> Any:
    return json.loads((world.folder / "out" / "report.json").read_text())


# ------------------------------------------------------------------------- rows that are skipped

BAD_CSV = 'one\n"a" b,good\nwell, yes,good\n,good\n\u200b,bad\nfine,\nfine,ugly\nna\udcefve,bad\n'
BAD_JSON = [
    "{", "[1]", "3", '"text"', "null", '{"text": "a", "label": "good",}', '{"label": "good"}',
    '{"text": null, "label": "bad"}', '{"text": NaN, "label": "bad"}', '{"text": [], "label": "x"}',
    '{"text": "a", "label": null}', '{"text": "a", "label": []}', '{"text": "a", "text": "b"}',
    '{"text": "\\ud800", "label": "bad"}', "[" * 100_000,
]  # fmt: skip


def test_rows_that_cannot_be_used_are_skipped_and_counted_in_the_report(world: World) -> None:
    bad = BAD_CSV.replace("fine,ugly\n", "")
    world.write("rows.csv", (TABLE + bad).encode("utf-8", "surrogateescape"))
    printed = world.lora("train", world.recipe(task=TWO), *SKIP)
    assert (printed.code, "Traceback" in printed.err) == (0, False)
    facts = report_of(world)["data"]["train"]
    count = len(bad.splitlines())
    assert (facts["rows"], facts["skipped_rows"]) == (8, count)
    assert re.search(rf"^skipped rows +{count}$", printed.err, re.MULTILINE)


def test_bad_lines_of_json_are_skipped_and_counted(world: World) -> None:
    good = "".join(json.dumps({"text": t, "label": "good"}) + "\n" for t in tiny.CORPUS)
    world.write("rows.jsonl", good + "\n".join(BAD_JSON) + "\n")
    recipe = world.recipe(data={"path": "rows.jsonl"}, task=TWO)
    printed = world.lora("train", recipe, *SKIP)
    assert printed.code == 0
    facts = report_of(world)["data"]["train"]
    assert (facts["rows"], facts["skipped_rows"]) == (8, len(BAD_JSON))


def test_an_unknown_label_is_never_skipped(world: World) -> None:
    world.write("rows.csv", TABLE + "fine,ugly\n")
    printed = world.lora("train", world.recipe(task=TWO), *SKIP)
    assert printed.code == 2
    assert "`ugly` is not a label (1 row of train)\n  at rows.csv:10" in printed.err


def test_each_bad_row_is_named_with_its_line_and_a_reason(world: World) -> None:
    world.write("rows.csv", (TABLE + BAD_CSV).encode("utf-8", "surrogateescape"))
    printed = world.lora("validate", world.recipe(task=TWO))
    assert printed.code == 2
    # what cannot be read comes first, by itself
    assert [line for line in printed.err.splitlines() if line.startswith("  at ")] == [
        f"  at rows.csv:{line}" for line in (10, 11, 12, 17)
    ]


# ------------------------------------------------------------------ files that are good after all

HEBREW = "\u05e9\u05dc\u05d5\u05dd"
FAMILY = "\U0001f469\u200d\U0001f467"
ODD = f"{FAMILY} film,good\n{HEBREW},bad\nzero\u200bwidth,good\na\0b,bad\n\u202eto the left,good\n"


ODD_FILES: list[tuple[str, Any, dict[str, Any]]] = [
    ("bom.csv", b"\xef\xbb\xbf" + TABLE.encode(), {}),
    ("crlf.csv", TABLE.replace("\n", "\r\n"), {}),
    ("cr.csv", TABLE.replace("\n", "\r"), {}),
    ("blank.csv", TABLE.replace("\n", "\n\n"), {}),
    ("no_end.csv", TABLE.rstrip("\n"), {}),
    ("utf16.csv", TABLE.encode("utf-16"), {"encoding": "utf-16"}),
    ("cp932.csv", (TABLE + "日本語表示ソ,good\n").encode("cp932"), {"encoding": "cp932"}),
    ("odd.csv", TABLE + ODD, {}),
    ("packed.csv.gz", gzip.compress(TABLE.encode(), mtime=0), {}),
    ("semicolons.csv", TABLE.replace(",", ";"), {"delimiter": ";"}),
    ("no_header.csv", GOOD, {"header": False, "columns": ["text", "label"]}),
]


@pytest.mark.parametrize(
    ("name", "content", "form"), ODD_FILES, ids=[name for name, *_ in ODD_FILES]
)
def test_odd_files_are_read(name: str, content: Any, form: Any, world: World) -> None:
    world.write(name, content)
    recipe = world.recipe(data={"path": name, "format": form}, task=TWO)
    printed = world.lora("validate", recipe, "--data")
    assert printed.code == 0, printed.err


def test_bytes_and_dates_of_parquet_are_text_where_they_are_text(tmp_path: Path) -> None:
    import datetime

    file = tmp_path / "x.parquet"
    days = [datetime.date(2020, 1, 1), None]
    pq.write_table(pa.table({"text": [b"na\xc3\xafve", b"\xff"], "day": days}), file)
    assert [row.columns for row in read_rows(file, FormatSpec())] == [
        {"text": b"na\xc3\xafve", "day": days[0]}, {"text": b"\xff", "day": None},
    ]  # fmt: skip


def test_bytes_of_parquet_that_are_no_text_are_a_bad_row(world: World) -> None:
    texts = ["naïve film".encode(), b"\xff\xfe\xfd"]
    pq.write_table(
        pa.table({"text": texts, "label": ["good", "bad"]}), world.folder / "rows.parquet"
    )
    printed = world.lora("validate", world.recipe(data={"path": "rows.parquet"}, task=TWO))
    assert printed.code == 2
    assert "error: column `text` is blank\n  at rows.parquet[1]" in printed.err
    assert "rows.parquet[0]" not in printed.err


# --------------------------------------------------------------------------- bounds, and any bytes


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
@pytest.mark.slow
def test_a_line_of_50_megabytes_is_read_in_bounded_memory(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{kind}"
    word = "word " * (10 * 2**20)
    with file.open("w") as out:
        if kind == "jsonl":
            out.write('{"text": "' + word + '", "label": "good"}\n{"text": "x", "label": "bad"}\n')
        else:
            out.write("text,label\n" if kind == "csv" else "")
            out.write(word + (",good\nx,bad\n" if kind == "csv" else "\nx\n"))
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from lora_cli.data.file_formats import read_rows\n"
        "from lora_cli.recipe import FormatSpec\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = read_rows(Path(sys.argv[1]), FormatSpec())\n"
        "lengths = [len(row.columns['text']) for row in rows]\n"
        "print(lengths, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(file)], env=environment, capture_output=True, text=True,
        check=True, timeout=100,
    )  # fmt: skip
    lengths, kilobytes = result.stdout.rsplit(" ", 1)
    assert lengths == f"[{len(word)}, 1]"
    assert int(kilobytes) / 1024 < 400  # eight times the line


@pytest.mark.slow
def test_an_error_about_a_line_of_5_megabytes_is_short(world: World) -> None:
    world.write("rows.csv", TABLE + "good,x" + "y" * (5 * 2**20) + "\n")
    printed = world.lora("validate", world.recipe(task=TWO))
    assert printed.code == 2
    assert "at rows.csv:10" in printed.err
    assert len(printed.err) < 5000


ENCODINGS = sorted({*encodings.aliases.aliases.values(), "unicode_escape", "utf-7", "idna"})


@given(
    raw=st.binary(max_size=60),
    encoding=st.sampled_from(ENCODINGS),
    name=st.sampled_from(["x.csv", "x.tsv", "x.jsonl", "x.txt", "x.json.gz", "x.parquet"]),
)
@settings(max_examples=150)
def test_any_bytes_in_any_encoding_are_rows_or_a_error(
    raw: bytes, encoding: str, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / name
    try:
        form = FormatSpec(encoding=encoding)
    except ValueError:
        return  # a codec that is not of text
    file.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with bounded():
        try:
            rows, reason = list(read_rows(file, form)), None
        except LoraError as error:
            rows, reason = [], error.problems[0]
    assert reason is None or (reason.at and reason.hint)
    assert all(row.place and (row.columns is None) == bool(row.error) for row in rows)


def test_a_pipe_that_no_one_writes_to_is_not_waited_for(world: World) -> None:
    os.mkfifo(world.folder / "rows.csv")
    for command in ("validate", "params"):
        assert world.lora(command, world.recipe()).code == 2
    printed = world.lora("init", "rows.csv", "--model", "../bases/encoder", "-o", "new.yaml")
    assert printed.code == 2
    assert "this is a pipe or a device" in printed.err


# ---------------------------------------------------------------------------------------- labels


def lines(*labels: Any) -> str:
    rows = ({"text": f"film {i} of {label}", "label": label} for i, label in enumerate(labels))
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ([1, 1.0, "1", " 1 ", 0], ["0", "1"]),
        (["Good ", " good", "good", "Good"], ["Good", "good"]),
        ([True, "true", False], ["false", "true"]),
        ([2, 10, 1], ["1", "2", "10"]),
        (["b", "B", "ä", "a"], ["B", "a", "b", "ä"]),
    ],
)
def test_one_label_written_in_several_ways(labels: Any, wanted: list[str], world: World) -> None:
    world.write("rows.jsonl", lines(*labels))
    with world.inside():
        task = build_task(world.load(world.recipe(data={"path": "rows.jsonl"})))
        task.load_processor()
        load_data(task)
    assert task.completed_recipe.task.labels == wanted


@pytest.mark.parametrize(
    ("labels", "task", "warning"),
    [
        (["Good", "good", "bad"], {}, "the labels `Good` and `good` look alike (1 row and 1 row)"),
        (["go\u200bod", "good"], {}, "the labels `good` and `go\\u200bod` look alike"),
        ([True, 1, 0], {}, "the labels `1` and `true` look alike"),
        (["01", "1", "x"], {}, "the labels `01` and `1` look alike"),
        ([-1, 0, 1], {}, "-1 is taken for a label (1 row)"),
        (["bad", "good"], {"labels": ["bad", "good", "so so"]}, "no row of the label `so so`"),
        (["bad", "good"], TWO, None),
    ],
)
def test_doubtful_labels_are_warned_of(
    labels: Any, task: Any, warning: str | None, world: World
) -> None:
    world.write("rows.jsonl", lines(*labels))
    printed = world.lora("validate", world.recipe(data={"path": "rows.jsonl"}, task=task), "--data")
    assert printed.code == 0
    if warning is None:
        assert "warning" not in printed.err
    else:
        assert warning in printed.err


def test_labels_never_reach_the_model_unchecked(world: World) -> None:
    """The base's weights are missing: whatever is found is found before they are needed."""
    base = world.folder / "base"
    base.mkdir()
    for file in (world.bases / "encoder").iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    world.write("rows.jsonl", lines(0, 1, 2, -1, "never", None))
    for task in (TWO, {"problem": "regression"}, {"problem": "multi_label"}):
        sections = {"data": {"path": "rows.jsonl"}, "task": task, "model": {"name": "./base"}}
        printed = world.lora("train", world.recipe(**sections))
        assert printed.code == 2
        assert "rows.jsonl:" in printed.err
        assert "base" not in printed.message
    world.write("rows.jsonl", lines(0, 1))
    assert "has no model.safetensors" in world.lora("train", "recipe.yaml", "--set",
        "task.problem=single_label", "--set", "task.labels=[bad, good]").err  # fmt: skip


# ------------------------------------------------------------------- rows with nothing to train


def test_prompts_that_are_too_long_are_left_out_and_counted(world: World) -> None:
    world.write("rows.csv", "prompt,answer\n" + LONG + "say,yes\nsay more,no\n")
    task = {"prompt_column": "prompt", "completion_column": "answer", "text_column": ...}
    printed = world.lora("train", world.recipe("llama", task=task))
    assert printed.code == 0
    assert "6 of 8 (75.0 %) train rows leave nothing to train within 32 tokens" in printed.err
    facts = report_of(world)["data"]["train"]
    assert (facts["rows"], facts["examples"], facts["rows_without_example"]) == (8, 2, 6)


def test_nothing_left_to_train_ends_with_2_before_any_weights(world: World) -> None:
    world.write("rows.csv", "prompt,answer\n" + LONG)
    task = {"prompt_column": "prompt", "completion_column": "answer", "text_column": ...}
    for command in ("validate", "train"):
        printed = world.lora(command, world.recipe("llama", task=task))
        assert printed.code == 2
        assert "no row leaves anything to train within 32 tokens" in printed.err


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="needs limits of memory")
@pytest.mark.slow
def test_a_zip_bomb_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv.gz"
    with gzip.open(file, "wb") as out:
        out.write(b"text,label\n")
        out.write(b"a word," * 2**20)
        for _ in range(2**10):
            out.write(b" " * 2**16 + b"\n")
    with bounded():
        (row,) = read_rows(file, FormatSpec())
    assert row.error == "1,048,577 fields where there are 2 columns"


# ------------------------------------------------------------ what `lora init` writes is accepted


def _priced(pattern: str, first: str, between: str = ",") -> str:
    """Return a table of texts with a number each, quoted where the delimiter is in it."""
    values = [first, *(pattern.replace("%", str(120 + i)) for i in range(31))]
    cells = [f'"{value}"' if between in value else value for value in values]
    texts = [text.replace(",", "") for text in tiny.CORPUS * 4]
    rows = [f"{text} {i}{between}{cell}"
            for i, (text, cell) in enumerate(zip(texts, cells, strict=True))]  # fmt: skip
    return "\n".join([f"text{between}score", *rows, ""])


@pytest.mark.parametrize(
    ("content", "form", "first"),
    [
        (_priced("2,%", "812"), {"thousands": ","}, 812.0),
        (_priced("2,%", "12,301"), {"thousands": ","}, 12301.0),
        (_priced("2,%", "812", "\t"), {"thousands": ","}, 812.0),
        (_priced("2,%", "2,301", ";"), {"decimal": ","}, 2.301),
        (_priced("2.%", "812", ";"), {"thousands": ".", "decimal": ","}, 812.0),
        (_priced("%,5", "0,5", ";"), {"decimal": ","}, 0.5),
        (_priced("\uff11%\uff0e\uff15", "\uff14\uff0e\uff15"), {}, 4.5),
        (_priced("\u00a52,%", "\u00a5920"), {"thousands": ","}, 920.0),
        (_priced("%\u5186", "4059.5\u5186"), {}, 4059.5),
        (_priced("1\u00a0%,5", "7,0", ";"), {"decimal": ","}, 7.0),
        (_priced("%.25", "-3"), {}, -3.0),
    ],
)
@pytest.mark.slow_after(4)
def test_a_draft_reads_numbers_as_its_own_check_does(
    content: str, form: dict[str, str], first: float, world: World
) -> None:
    world.write("rows.tsv" if "\t" in content else "rows.csv", content)
    source = "rows.tsv" if "\t" in content else "rows.csv"
    drafted = world.lora("init", source, "--model", "../bases/encoder", "--label", "score")
    assert drafted.code == 0, drafted.err
    with world.inside():
        recipe = load_recipe("recipe.yaml")
    set_form = {key: getattr(recipe.data.format, key) for key in ("decimal", "thousands")}
    assert {k: v for k, v in set_form.items() if v not in (None, ".") or k in form} == form
    assert recipe.task.type == "sequence_classification"
    assert recipe.task.problem == "regression"
    rows = read_rows(world.folder / source, recipe.data.format)
    labels = Labels(recipe, recipe.task)
    assert labels.number(next(rows).columns or {}) == first
    checked = world.lora("validate", "recipe.yaml")
    assert checked.code == 0, checked.err


def test_several_labels_between_ideographic_commas(world: World) -> None:
    topics = ["請求、配送", "請求", "配送、返品", "返品"]
    rows = [f"{text} {i},{topics[i % 4]}" for i, text in enumerate(tiny.CORPUS * 4)
            if "," not in text]  # fmt: skip
    world.write("rows.csv", "\n".join(["text,label", *rows, ""]))
    drafted = world.lora("init", "rows.csv", "--model", "../bases/encoder")
    assert drafted.code == 0, drafted.err
    recipe = world.load("recipe.yaml")
    assert recipe.task.type == "sequence_classification"
    assert (recipe.task.problem, recipe.task.label_separator) == ("multi_label", "、")
    assert recipe.task.labels == ["請求", "返品", "配送"]
    assert world.lora("validate", "recipe.yaml").code == 0


def test_two_currencies_in_a_column_are_told_apart(world: World) -> None:
    world.write("rows.csv", _priced("$%", "7") + "a film,\u20ac5\n")
    printed = world.lora("validate", world.recipe(task={
        "label_column": "score", "problem": "regression"}))  # fmt: skip
    assert printed.code == 2
    assert (
        "column `score` holds `\u20ac5`, where rows before it have `$`\n  at rows.csv:"
        in printed.err
    )
